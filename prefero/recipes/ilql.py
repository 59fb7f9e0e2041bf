"""Offline learning from rewarded texts: implicit language Q-learning, with a held-out examination of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefero.algorithms.ilql import ILQLSettings
from prefero.config import Config, ConfigError, ILQLConfig, RewardPart
from prefero.data import (
    EncodedTrajectory,
    Loader,
    Trajectory,
    collate_trajectories,
    encode_prompt,
    encode_prompts,
    encode_trajectory,
    pad_id,
    scale_of,
    standardised,
)
from prefero.data.formats import Conversation
from prefero.data.tokenize import TooLongError
from prefero.faults import fault
from prefero.models.ilql import ILQLActor, has_value_heads
from prefero.recipes.evaluation import (
    Evaluation,
    Examination,
    before_after_rows,
    kl_from_reference,
    paired_standard_error,
)
from prefero.recipes.limits import Limits
from prefero.recipes.rewards import Judging, build_part, check_part
from prefero.recipes.session import Session, Steps, adamw, load_policy, num_parameters, schedule, set_up_machine
from prefero.recipes.sources import Sources, Split, spread
from prefero.rewards.base import Reward, checked_scores
from prefero.rewards.combined import WeightedSum
from prefero.rollout.engine import Engine, SamplingParams, sampling_logprobs
from prefero.rollout.make import make_engine
from prefero.strategies import Strategy
from prefero.trainer import ILQLTrainer
from prefero.types import Completion, Prompt, Rollout, TrajectoryBatch

_SPLITS: tuple[Split, ...] = ("train", "heldout")


def run_ilql(session: Session) -> None:
    """Teaches the configured model to imitate, and what its tokens are worth; exports and examines it."""
    config, settings, keeper = session.config, session.config.ilql, session.keeper()
    strategy = session.strategy
    with strategy.model_init_context():
        actor, tokenizer = load_policy(config, config.model.path, session.sources, config.model.lora_rank, ILQLActor)
    assert isinstance(actor, ILQLActor)
    if config.model.path and has_value_heads(config.model.path):
        actor.load_heads(config.model.path)
    actor.beta = settings.beta
    set_up_machine(num_parameters(actor), config.strategy.threads)
    reward = build_rewards(config, strategy)
    limits = Limits.of(actor.model.config)
    rows = {split: read_trajectories(session, tokenizer, split, limits, reward) for split in _SPLITS}
    worth = scale_of(rows["train"]) if settings.standardise else (0.0, 1.0)
    train, heldout = (_loader(config, rows[split], split, worth, pad_id(tokenizer)) for split in _SPLITS)
    steps = settings.steps or settings.epochs * len(train)
    session.tracker.start("ilql", steps)
    optimizer = adamw(config, actor, settings.learning_rate, settings.weight_decay, settings.head_learning_rate)
    trainer = ILQLTrainer(
        actor,
        strategy,
        optimizer,
        Steps(train, steps),
        heldout,
        settings=ilql_settings(settings),
        micro_batch_size=settings.micro_batch_size or None,
        micro_batch_tokens=settings.micro_batch_tokens or None,
        scheduler=schedule(optimizer, settings.schedule, steps, settings.warmup_fraction),
        tracker=session.tracker,
    )
    examination = make_guided_examination(config, session.sources, tokenizer, reward, strategy)
    examiner = None
    if examination is not None:
        examiner = Examiner(session, examination, make_engine(actor, tokenizer, config.engine, session.say), actor)
    keeper.watch(trainer)

    def after_step() -> None:
        if examiner is not None and settings.eval_every and trainer.num_steps % settings.eval_every == 0:
            examiner.examine(settings.beta, trainer.num_steps)
        keeper.after(trainer.num_steps, trainer.num_steps)

    trainer.after_step = after_step
    metrics = trainer.fit()
    keeper.checkpoints.wait()
    session.export(actor, session.run.model, tokenizer)
    examined = bool(settings.eval_every) and steps % settings.eval_every == 0
    found = {} if examiner is None else examiner.compare(steps, log=not examined)
    scale = {"reward_mean": worth[0], "reward_std": worth[1]} if settings.standardise else {}
    session.finish({"stage": "ilql", **scale, **metrics, **found})


def ilql_settings(c: ILQLConfig) -> ILQLSettings:
    """The algorithm's numbers from the config's."""
    return ILQLSettings(
        tau=c.tau,
        gamma=c.gamma,
        awac_beta=c.awac_beta,
        cql_scale=c.cql_scale,
        awac_scale=c.awac_scale,
        sync_rate=c.sync_rate,
        sync_every=c.sync_every,
    )


@dataclass(frozen=True)
class Examiner:
    """Asks the policy the held-out questions, guided by its values or not."""

    session: Session
    examination: Examination
    engine: Engine
    actor: ILQLActor

    def examine(self, beta: float, step: int | None) -> Evaluation:
        """The numbers of its answers at this beta, logged where a step is given.

        eval/kl: nats a completion by which the guided policy differs from the imitating one.
        """
        fault("evaluate")
        strategy, usual = self.session.strategy, self.actor.beta
        self.actor.beta = beta
        try:
            with strategy.whole(self.actor), strategy.autocast():
                found = self.examination(self.engine)
                # What was drawn from, not what the guided logits alone would say: top-k may have left tokens out.
                drawn = [
                    replace(rollout, completion=replace(done, logprobs=sampling_logprobs(done)))
                    for rollout in found.rollouts
                    for done in [rollout.completion]
                ]
                kl = kl_from_reference(drawn, self.actor, self.examination.sampling.temperature)
        finally:
            self.actor.beta = usual
        found.metrics["eval/kl"] = fmean(kl)
        if step is not None:
            self.session.tracker.log(found.metrics, step)
        return found

    def compare(self, step: int, *, log: bool) -> dict[str, Any]:
        """What the values add: the imitating policy (before) beside the guided one (after), for the summary.

        log: whether the numbers of the latter were not logged yet.
        """
        before, after = self.examine(0.0, None), self.examine(self.actor.beta, step if log else None)
        self.session.tracker.log_samples(before_after_rows(before, after), step)
        return {
            "heldout_reward_before": fmean(before.headline),
            "heldout_reward_after": fmean(after.headline),
            "heldout_reward_stderr": paired_standard_error(before, after),
            "heldout_reward_is": self.examination.yardsticks.gold_name if after.gold else "reward",
            "kl": after.metrics["eval/kl"],
            "before": before.metrics,
            "after": after.metrics,
        }


def make_guided_examination(
    config: Config,
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward | None,
    strategy: Strategy,
) -> Examination | None:
    """The held-out questions with the reward and the independent scorer; None where nobody could score an answer."""
    settings, yardsticks = config.ilql, sources.yardsticks()
    if config.evaluate.gold:
        how = Judging(strategy, None, config.reward.max_length, config.evaluate.batch_size)
        gold = build_part("gold", RewardPart(use=config.evaluate.gold), how, "evaluate.gold")
        yardsticks = replace(yardsticks, gold=gold, gold_name=config.evaluate.gold)
    judge = reward or yardsticks.gold
    prompts = _questions(config, sources, tokenizer) if judge is not None else []
    if judge is None or not prompts:
        return None
    return Examination(
        prompts=spread(prompts, config.evaluate.num_prompts),
        reward=judge,
        yardsticks=yardsticks,
        sampling=SamplingParams(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=config.seed + 1_000_003,
        ),
        num_samples=config.evaluate.num_samples,
        group=strategy.group,
    )


def _questions(config: Config, sources: Sources, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    data, rows = config.data, sources.questions("heldout")
    try:
        return (
            encode_prompts(tokenizer, rows, max_length=data.max_prompt_length, truncate=data.truncate, chat=data.chat)
            if rows
            else []
        )
    except TooLongError as error:
        raise ConfigError(f"{error} (the keys data.max_prompt_length and data.truncate)") from None


def build_rewards(config: Config, strategy: Strategy) -> Reward | None:
    """The weighted sum of `ilql.rewards`; None where there are none."""
    how = Judging(strategy, None, config.reward.max_length, config.evaluate.batch_size)
    parts = {
        name: (build_part(name, part, how, f"ilql.rewards.{name}.use"), part.weight)
        for name, part in config.ilql.rewards.items()
    }
    return WeightedSum(parts) if parts else None


def read_trajectories(
    session: Session, tokenizer: PreTrainedTokenizerBase, split: Split, limits: Limits, reward: Reward | None
) -> list[EncodedTrajectory]:
    """The split's rows with rewards. Raises ValueError naming one that cannot be read, is too long or has none."""
    config = session.config
    rows = _rows(config, session.sources, split)
    if reward is not None:
        rows = scored(rows, tokenizer, reward, config.data.chat)
    encoded = _encoded(config, rows, tokenizer, limits)
    if left_out := len(rows) - len(encoded):
        session.say(f"ilql ({split}): {left_out} rows left out, longer than ilql.max_length {config.ilql.max_length}")
    return encoded


def _rows(config: Config, sources: Sources, split: Split) -> Sequence[Trajectory]:
    rows = sources.trajectories(split)
    limit = config.ilql.max_rows if split == "train" else config.evaluate.max_demonstrations
    return spread(rows, limit) if limit else rows


def _encoded(
    config: Config, rows: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[EncodedTrajectory]:
    longest, found = config.ilql.max_length, []
    for row in rows:
        try:
            encoded = encode_trajectory(tokenizer, row, longest, chat=config.data.chat)
        except TooLongError as error:
            if config.data.truncate != "drop":
                raise TooLongError(
                    f"{row.row.id}: longer than ilql.max_length {longest} tokens, and a text that is cut loses the end "
                    "that its reward is for; raise it, leave the row out, or leave out all such rows with "
                    "--data.truncate drop"
                ) from error
            continue
        limits.check(row.row.id, encoded.example.token_ids, "lower ilql.max_length")
        found.append(encoded)
    if not found:
        raise ConfigError(f"every row is longer than ilql.max_length {longest} tokens; raise it")
    return found


def scored(
    rows: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, reward: Reward, chat: bool
) -> list[Trajectory]:
    """The rows with the reward's score of what was said last, in the place of whatever reward they had."""
    rollouts = []
    for trajectory in rows:
        row = trajectory.row
        said = row.messages[-1]["content"] if isinstance(row, Conversation) else row.completion
        prompt = _prompt(trajectory, tokenizer, chat)
        rollouts.append(Rollout(prompt, Completion((), (), said, "stop")))
    scores = checked_scores(reward, rollouts)
    return [replace(row, reward=score.value) for row, score in zip(rows, scores, strict=True)]


def _prompt(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Prompt:
    """What was asked before the last answer; without a prompt, plain text stands for itself."""
    row, columns = trajectory.row, trajectory.columns
    asked = row.messages[:-1] if isinstance(row, Conversation) else row.prompt
    if not asked:
        return Prompt(row.id, (), "", columns)
    return encode_prompt(tokenizer, asked, row.id, columns=columns, chat=chat)


def _loader(
    config: Config, rows: Sequence[EncodedTrajectory], split: Split, worth: tuple[float, float], filler: int
) -> Loader[EncodedTrajectory, TrajectoryBatch]:
    return Loader(
        [standardised(row, *worth) for row in rows],
        config.ilql.batch_size,
        lambda batch: collate_trajectories(batch, filler),
        shuffle=split == "train",
        seed=config.seed,
        length=lambda row: len(row.rewards),
    )


def check_trajectories(config: Config, sources: Sources, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """That every row can be read, fits and has a reward, or one that can score it; reads no reward model's weights."""
    settings = config.ilql
    for split in _SPLITS:
        rows = _rows(config, sources, split)
        if settings.rewards:
            prompts = [_prompt(row, tokenizer, config.data.chat) for row in rows]
            for name, part in settings.rewards.items():
                check_part(name, part, prompts, trained=False, key=f"ilql.rewards.{name}.use")
            rows = [replace(row, reward=0.0) for row in rows]
        elif config.data.world != "files":
            continue  # known to be whole
        else:
            _check_rewarded(rows)
        _encoded(config, rows, tokenizer, limits)
    for prompt in _questions(config, sources, tokenizer):
        cure = "shorten or drop the row (data.max_prompt_length with data.truncate), or lower ilql.max_new_tokens"
        limits.check(prompt.id, prompt.token_ids, cure, reserve=settings.max_new_tokens)
    if config.evaluate.gold:
        check_part("gold", RewardPart(use=config.evaluate.gold), [], trained=False, key="evaluate.gold")


def _check_rewarded(rows: Sequence[Trajectory]) -> None:
    for row in rows:
        if row.reward is None:
            raise ConfigError(
                f"{row.row.id}: it has no column `reward`, and ilql.rewards names nothing that could score it; add the "
                "column, or name a reward, e.g. --ilql.rewards.mine.use my_rewards.py:score"
            )
