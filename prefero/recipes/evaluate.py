"""`prefero evaluate`: a model on held-out prompts, and a policy or reward model on human preference pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from prefero.cache import cache_root
from prefero.config import Config, ConfigError, load_config
from prefero.data import Comparison, collate_examples, encode_example, encode_prompt, pad_id, read_rows, to_preferences
from prefero.data.tokenize import Example
from prefero.functional import masked
from prefero.models.base import LM, Actor
from prefero.models.loading import resolve
from prefero.recipes.evaluation import Examination, best_of_curve, kl_from_reference
from prefero.recipes.ilql import build_rewards, make_guided_examination
from prefero.recipes.limits import Limits
from prefero.recipes.ppo import make_examination
from prefero.recipes.rewards import Judging, load_model_reward
from prefero.recipes.run import find_config, free_folder
from prefero.recipes.session import open_session
from prefero.recipes.sources import Sources, open_sources
from prefero.recipes.use import load_for_use
from prefero.rewards.model import ModelReward
from prefero.rollout.collect import collect
from prefero.rollout.engine import Engine
from prefero.rollout.make import make_engine
from prefero.strategies import NaiveStrategy, Strategy
from prefero.tracking.base import sample_rows
from prefero.tracking.report import write_report
from prefero.tracking.run_folder import RunFolder
from prefero.types import Completion, Metrics, Prompt, Rollout, ScoredRollout

Measure = Callable[[], tuple[Metrics, list[ScoredRollout], dict[str, Metrics]]]
"""What is left to do once nothing can be wrong any more: the numbers, the answers they came from, and what choosing the
best of several would give."""


def evaluate(args: Namespace) -> None:
    """Runs the evaluation that the arguments ask for and writes it as a run folder."""
    if args.best_of < 0 or (args.best_of and args.hhh):
        raise ConfigError(f"--best-of is {args.best_of}; give the number of samples to choose from, and not with --hhh")
    run = Path(args.model).expanduser()
    config = _config(args, run)
    reward_model = _part_of(run, "reward", args.reward_model)
    strategy = NaiveStrategy(config.strategy.device or None, config.strategy.precision)
    actor, tokenizer = load_for_use(args.model, config.strategy.device)
    # Whatever may be wrong is found before a folder is made, or --overwrite clears one.
    sources = open_sources(config.data, config.seed)
    if args.hhh:
        measure = _preferences(config, actor, tokenizer, reward_model, strategy)
    else:
        measure = _answers(args, config, sources, actor, tokenizer, reward_model, strategy)
    folder = Path(args.out) if args.out else free_folder("evaluate")
    with open_session(
        config, folder, strategy, overwrite=args.overwrite, stage="eval", sources=sources, stoppable=False
    ) as session:
        session.tracker.start("eval", 1)
        with strategy.autocast():
            metrics, rollouts, best_of = measure()
        session.tracker.log_samples(sample_rows(rollouts), 0)
        session.tracker.log(metrics, 0)
        session.finish({"model": args.model, **metrics, **best_of})
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    for name, numbers in best_of.items():
        print(f"{name}: " + ", ".join(f"{key.removeprefix('eval/')} {value:.4f}" for key, value in numbers.items()))
    print(f"report: {write_report(folder)}")


def _config(args: Namespace, run: Path) -> Config:
    if args.config:
        return load_config(find_config(args.config))
    if (run / "config.yaml").is_file():
        return load_config(run / "config.yaml")
    if args.hhh:
        return Config()
    raise ConfigError(f"{args.model} is no run folder, so its data is unknown; give --config FILE")


def _part_of(run: Path, stage: str, given: str) -> Path | None:
    """What was named on the command line, else what that stage of the run exported, if there is one."""
    if given:
        return Path(resolve(given))
    trained = run / "checkpoints" / stage / "model"
    return trained if (trained / "config.json").is_file() else None


def _answers(
    args: Namespace,
    config: Config,
    sources: Sources,
    actor: Actor,
    tokenizer: Any,
    reward_model: Path | None,
    strategy: Strategy,
) -> Measure:
    """Answers to the held-out prompts: reward, gold, diversity, and the KL where there is a reference."""
    if args.reward_model:  # named to be asked, also where the run's own rewards are others
        config = replace(config, ppo=replace(config.ppo, rewards={}))
    examination = _examination(args, config, sources, tokenizer, reward_model, strategy)
    named = _part_of(Path(args.model).expanduser(), "sft", args.reference)
    reference = None if named is None else load_for_use(str(named), config.strategy.device)[0]

    def measure() -> tuple[Metrics, list[ScoredRollout], dict[str, Metrics]]:
        engine = make_engine(actor, tokenizer, config.engine)
        result = examination(engine)
        metrics = dict(result.metrics)
        if reference is not None:
            metrics["eval/kl"] = fmean(kl_from_reference(result.rollouts, reference, config.ppo.temperature))
        return metrics, result.rollouts, _best_of(examination, engine, args.best_of)

    return measure


def _examination(
    args: Namespace, config: Config, sources: Sources, tokenizer: Any, reward_model: Path | None, strategy: Strategy
) -> Examination:
    """The run's own: of a run of ILQL its questions, with `ilql.rewards` or the gold scorer."""
    run = Path(args.model).expanduser()
    offline = (run / "summary.json").is_file() and RunFolder.open(run).summary().get("command") == "ilql"
    if not offline or args.config or args.reward_model:
        return make_examination(config, sources, tokenizer, reward_model, strategy)
    found = make_guided_examination(config, sources, tokenizer, build_rewards(config, strategy), strategy)
    if found is None:
        raise ConfigError(
            f"{args.model} learned from rewards that came with its rows, so nobody can score a new answer; name a "
            "reward model with --reward-model, or a config with rewards with --config"
        )
    return found


def _best_of(examination: Examination, engine: Engine, num_samples: int) -> dict[str, Metrics]:
    """Reward against KL of choosing among up to so many samples; nothing for fewer than two."""
    if num_samples < 2:
        return {}
    exam = examination
    rollouts = collect(exam.prompts, engine, exam.reward, exam.sampling, num_samples, exam.group)
    return best_of_curve(rollouts, exam.yardsticks, num_samples)


def _preferences(
    config: Config, actor: Actor, tokenizer: Any, reward_model: Path | None, strategy: Strategy
) -> Measure:
    """The HHH pairs, by the policy and, where there is one, by the reward model."""
    how = Judging(strategy, reward_model, config.reward.max_length)
    scorer = None if reward_model is None else load_model_reward(str(reward_model), how)
    pairs, limits = hhh_pairs(), Limits.of(actor.model.config)
    for pair in pairs:
        for example in _examples(tokenizer, pair):
            limits.check(pair.id, example.token_ids, "take a model with a longer context")
    return lambda: (human_preferences(actor, tokenizer, scorer, pairs), [], {})


def hhh_pairs() -> list[Comparison]:
    """The 221 pairs of BIG-bench's HHH alignment task; for evaluation only. ValueError when they were not fetched."""
    file = cache_root() / "data" / "bigbench" / "hhh.jsonl"
    if not file.is_file():
        raise ValueError("the HHH pairs are not there; run `prefero fetch bigbench` first (358 MB)")
    return list(to_preferences(read_rows(str(file))))


def human_preferences(actor: Actor, tokenizer: Any, scorer: ModelReward | None, pairs: Sequence[Comparison]) -> Metrics:
    """How often the policy finds the answer people preferred likelier, and the reward model scores it higher.

    By the pairs' category. The policy is judged by the sum and by the mean of its tokens' log-probabilities, because
    the sum alone prefers short answers.
    """
    model = LM(actor.model)
    right: dict[str, list[bool]] = {}
    for pair in pairs:
        verdicts = policy_verdicts(model, tokenizer, pair)
        if scorer is not None:
            verdicts["reward_model"] = _prefers(scorer, pair)
        for judge, verdict in verdicts.items():
            for group in (str(pair.columns["category"]), "all"):
                right.setdefault(f"hhh/{judge}_{group}", []).append(verdict)
    return {name: fmean(verdicts) for name, verdicts in sorted(right.items())}


@torch.no_grad()
def policy_verdicts(model: LM, tokenizer: Any, pair: Comparison) -> dict[str, bool]:
    """Whether the policy gives the chosen answer the higher log-probability, summed and per token."""
    batch, device = collate_examples(_examples(tokenizer, pair), pad_id(tokenizer)), next(model.parameters()).device
    mask = batch.loss_mask.bool().to(device)
    logprobs = model(batch.token_ids.to(device), batch.attention_mask.to(device), loss_mask=mask)
    sums, means = masked.sum(logprobs, mask, dim=1), masked.mean(logprobs, mask, dim=1)
    return {"logprob_sum": bool(sums[0] > sums[1]), "logprob_mean": bool(means[0] > means[1])}


def _examples(tokenizer: Any, pair: Comparison) -> list[Example]:
    """The chosen and the rejected answer behind the prompt."""
    assert isinstance(pair.prompt, str)
    prompt = encode_prompt(tokenizer, pair.prompt, pair.id)
    return [encode_example(tokenizer, prompt, answer, end=False) for answer in (pair.chosen, pair.rejected)]


def _prefers(scorer: ModelReward, pair: Comparison) -> bool:
    assert isinstance(pair.prompt, str)
    prompt = Prompt(pair.id, (), pair.prompt)
    answers: Sequence[str] = (pair.chosen, pair.rejected)
    chosen, rejected = scorer([Rollout(prompt, Completion((), (), answer, "stop")) for answer in answers])
    return chosen.value > rejected.value
