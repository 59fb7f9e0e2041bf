"""`prefero evaluate`: a model on held-out prompts, and a policy or reward model on human preference pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from prefero.cache import cache_root
from prefero.config import Config, ConfigError, load_config
from prefero.data import Comparison, collate_examples, encode_example, encode_prompt, pad_id, read_rows, to_preferences
from prefero.functional import masked
from prefero.models.base import LM, Actor
from prefero.recipes.evaluation import Evaluation, kl_from_reference
from prefero.recipes.ppo import make_examination
from prefero.recipes.rewards import load_model_reward
from prefero.recipes.run import find_config, free_folder
from prefero.recipes.session import Session, open_session
from prefero.recipes.use import load_for_use
from prefero.rewards.model import ModelReward
from prefero.rollout.hf import HFEngine
from prefero.tracking.base import sample_rows
from prefero.tracking.report import write_report
from prefero.types import Completion, Metrics, Prompt, Rollout


def evaluate(args: Namespace) -> None:
    """Runs the evaluation that the arguments ask for and writes it as a run folder."""
    run = Path(args.model).expanduser()
    config = _config(args, run)
    reward_model = _reward_model(args, run)
    actor, tokenizer = load_for_use(args.model)
    folder = Path(args.out) if args.out else free_folder("evaluate")
    with open_session(config, folder, overwrite=args.overwrite, stage="eval") as session:
        session.tracker.start("eval", 1)
        metrics: Metrics = {}
        if not args.hhh:
            result = _examine(session, actor, tokenizer, reward_model, args.reference)
            session.tracker.log_samples(sample_rows(result.rollouts), 0)
            metrics |= result.metrics
        else:
            scorer = None if reward_model is None else load_model_reward(reward_model, config.reward.max_length, 32)
            metrics |= human_preferences(actor, tokenizer, scorer)
        session.tracker.log(metrics, 0)
        session.finish({"model": args.model, **metrics})
    write_report(folder)
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    print(f"report: {folder / 'report.html'}")


def _config(args: Namespace, run: Path) -> Config:
    if args.config:
        return load_config(find_config(args.config))
    if (run / "config.yaml").is_file():
        return load_config(run / "config.yaml")
    if args.hhh:
        return Config()
    raise ConfigError(f"{args.model} is no run folder, so its data is unknown; give --config FILE")


def _reward_model(args: Namespace, run: Path) -> Path | None:
    if args.reward_model:
        folder = Path(args.reward_model)
        inside = folder / "model"
        return inside if (inside / "config.json").is_file() else folder
    trained = run / "checkpoints" / "reward" / "model"
    return trained if (trained / "config.json").is_file() else None


def _examine(session: Session, actor: Actor, tokenizer: Any, reward_model: Path | None, reference: str) -> Evaluation:
    examination = make_examination(session, tokenizer, reward_model)
    evaluation = examination(HFEngine(actor, tokenizer, batch_size=session.config.evaluate.batch_size))
    if reference:
        kl = kl_from_reference(evaluation.rollouts, load_for_use(reference)[0], session.config.ppo.temperature)
        evaluation.metrics["eval/kl"] = fmean(kl)
    return evaluation


def human_preferences(actor: Actor, tokenizer: Any, scorer: ModelReward | None) -> Metrics:
    """How often the policy finds the answer people preferred likelier, and the reward model scores it higher.

    The 221 pairs of BIG-bench's HHH alignment task, by category; for evaluation only. The policy is judged by the sum
    and by the mean of its tokens' log-probabilities, because the sum alone prefers short answers. Raises ValueError
    when the pairs were not fetched.
    """
    file = cache_root() / "data" / "bigbench" / "hhh.jsonl"
    if not file.is_file():
        raise ValueError("the HHH pairs are not there; run `prefero fetch bigbench` first (358 MB)")
    pairs = list(to_preferences(read_rows(str(file))))
    right: dict[str, list[bool]] = {}
    for pair in pairs:
        category = str(pair.columns["category"])
        verdicts = policy_verdicts(actor, tokenizer, pair)
        if scorer is not None:
            verdicts["reward_model"] = _prefers(scorer, pair)
        for judge, verdict in verdicts.items():
            for group in (category, "all"):
                right.setdefault(f"hhh/{judge}_{group}", []).append(verdict)
    return {name: fmean(verdicts) for name, verdicts in sorted(right.items())}


@torch.no_grad()
def policy_verdicts(actor: Actor, tokenizer: Any, pair: Comparison) -> dict[str, bool]:
    """Whether the policy gives the chosen answer the higher log-probability, summed and per token."""
    assert isinstance(pair.prompt, str)
    prompt = encode_prompt(tokenizer, pair.prompt, pair.id)
    examples = [encode_example(tokenizer, prompt, answer, end=False) for answer in (pair.chosen, pair.rejected)]
    batch = collate_examples(examples, pad_id(tokenizer))
    logprobs = LM(actor.model)(batch.token_ids, batch.attention_mask)
    mask = batch.loss_mask.bool()
    sums, means = masked.sum(logprobs, mask, dim=1), masked.mean(logprobs, mask, dim=1)
    return {"logprob_sum": bool(sums[0] > sums[1]), "logprob_mean": bool(means[0] > means[1])}


def _prefers(scorer: ModelReward, pair: Comparison) -> bool:
    assert isinstance(pair.prompt, str)
    prompt = Prompt(pair.id, (), pair.prompt)
    answers: Sequence[str] = (pair.chosen, pair.rejected)
    chosen, rejected = scorer([Rollout(prompt, Completion((), (), answer, "stop")) for answer in answers])
    return chosen.value > rejected.value
