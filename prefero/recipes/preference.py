"""The stages that learn from preferences themselves: DPO, KTO, ORPO, SimPO, CPO, after supervised fine-tuning."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from prefero.config import Config, ConfigError, PreferenceConfig, RewardPart
from prefero.data import (
    EncodedLabel,
    EncodedPair,
    Example,
    Loader,
    PromptRow,
    collate_labelled,
    collate_pairs,
    encode_labelled,
    encode_pair,
    encode_prompts,
    encode_rows,
    pad_id,
    with_unrelated,
)
from prefero.data.collate import References
from prefero.data.spelling import frame
from prefero.data.tokenize import TooLongError
from prefero.faults import fault
from prefero.models.base import Actor
from prefero.models.lora import has_lora
from prefero.recipes.evaluation import (
    Evaluation,
    Yardsticks,
    before_after_rows,
    kl_from_reference,
    measure,
    paired_standard_error,
)
from prefero.recipes.limits import Limits
from prefero.recipes.ppo import frozen_copy
from prefero.recipes.reference_cache import cached_references
from prefero.recipes.rewards import Judging, build_part
from prefero.recipes.session import Session, Steps, adamw, load_policy, num_parameters, schedule, set_up_machine
from prefero.recipes.sft import train_sft
from prefero.recipes.sources import Sources, Split, spread
from prefero.recipes.start import adapter_of
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.make import make_engine
from prefero.trainer import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, SimPOTrainer
from prefero.trainer.split import MicroBatchLimit
from prefero.trainer.state import Saved, Snapshot
from prefero.types import Prompt, Rollout, Score

Item = EncodedPair | EncodedLabel


def run_preference(session: Session, name: str) -> None:
    """Stage 1 unless `sft.skip`, then the stage `name`, whose export is the run's model."""
    config = session.config
    if config.sft.skip:
        train_preference(session, name, config.model.path)
        return
    if session.done("sft") is None:
        with session.stage("sft") as stage:
            train_sft(stage)
    if (found := session.done(name)) is None:
        with session.stage(name) as stage:
            found = train_preference(stage, name, str(session.run.checkpoints / "sft" / "model"))
    if session.strategy.is_rank_0:
        last = session.run.checkpoints / name
        shutil.copytree(last / "model", session.run.model, dirs_exist_ok=True)
        if (adapter := adapter_of(str(last / "model"))) is not None:
            shutil.copytree(adapter, session.run.checkpoints / "adapter", dirs_exist_ok=True)
    session.finish(found)


def train_preference(session: Session, name: str, policy: str) -> dict[str, Any]:
    """Trains the policy at `policy` (a folder or a name; empty: the world's fresh model) by `name` and exports it.

    Returns what the stage found out.
    """
    config, keeper, strategy = session.config, session.keeper(), session.strategy
    settings: PreferenceConfig = getattr(config, name)
    with strategy.model_init_context():
        actor, tokenizer = load_policy(config, policy, session.sources, config.model.lora_rank)
    set_up_machine(num_parameters(actor), config.strategy.threads)
    limits = Limits.of(actor.model.config)
    rows, heldout = (_told(session, name, tokenizer, split, limits) for split in ("train", "heldout"))
    steps = settings.steps or settings.epochs * -(-len(rows) // settings.batch_size)
    session.tracker.start(name, steps)
    optimizer = adamw(config, actor, settings.learning_rate, settings.weight_decay)
    # Without its adapters an actor is what it was, unless these had learned before.
    begun = frozen_copy(actor) if actor.learned_before else None
    strategy.prepare((actor, optimizer), *([begun] if begun else []))
    references = _references(session, name, actor, [*rows, *heldout])

    def loader(items: Sequence[tuple[str, Item]], shuffle: bool) -> Loader[Any, Any]:
        return Loader(items, settings.batch_size, _collate(pad_id(tokenizer), references), shuffle, config.seed,
                      group_by=lambda item: item[0])  # fmt: skip

    trainer = _TRAINERS[name](
        actor,
        strategy,
        optimizer,
        Steps(loader(rows, shuffle=True), steps),
        loader(heldout, shuffle=False),
        **_options(name, settings, begun),
        micro_batch_size=settings.micro_batch_size or None,
        micro_batch_tokens=settings.micro_batch_tokens or None,
        scheduler=schedule(optimizer, settings.schedule, steps, settings.warmup_fraction),
        tracker=session.tracker,
        eval_interval=settings.eval_every or None,
    )
    samples = Samples(session, name, actor, tokenizer)
    keeper.watch(trainer, samples)
    if samples.before is None:
        samples.before = samples.look(0)
    trainer.after_step = lambda: keeper.after(trainer.num_steps, trainer.num_steps)
    metrics = trainer.fit()
    keeper.checkpoints.wait()
    session.export(actor, session.run.model, tokenizer)
    after = samples.look(trainer.num_steps, begun or _reference(session, actor, policy))
    summary = {"stage": name, "preference_accuracy": metrics[f"{name}/eval_accuracy"], **metrics}
    summary |= samples.summary(after, trainer.num_steps)
    session.finish(summary)
    return summary


_TRAINERS: dict[str, Callable[..., Any]] = {
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "orpo": ORPOTrainer,
    "simpo": SimPOTrainer,
    "cpo": CPOTrainer,
}
_OPTIONS = {
    "dpo": ("beta", "kind", "label_smoothing"),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "orpo": ("beta", "nll"),
    "simpo": ("beta", "gamma"),
    "cpo": ("beta", "nll_coef"),
}
"""The keys that are arguments of the trainer, by its name."""


def _options(name: str, settings: PreferenceConfig, begun: Actor | None) -> dict[str, Any]:
    options = {key: getattr(settings, key) for key in _OPTIONS[name]}
    if getattr(settings, "reference", "") == "adapters":
        options["reference"] = begun
    return options


class PreferenceRows(NamedTuple):
    """The encoded rows of a split with what they are about, and how many were left out, or cut, for being too long."""

    items: list[tuple[str, Item]]
    num_dropped: int
    num_cut: int


def read_preference_rows(
    config: Config, sources: Sources, tokenizer: Any, split: Split, limits: Limits, name: str
) -> PreferenceRows:
    """The split's rows as the stage `name` learns them. Raises ValueError naming one that cannot be read."""
    settings: PreferenceConfig = getattr(config, name)
    rows: Sequence[Any] = sources.labelled(split) if name == "kto" else sources.preferences(split)
    if limit := settings.max_rows if split == "train" else config.evaluate.max_pairs:
        rows = spread(rows, limit)
    max_length, end = settings.max_length, frame(tokenizer)[1]
    encode: Callable[..., Any] = encode_labelled if name == "kto" else encode_pair

    def encoded(row: Any) -> tuple[Any, Any]:
        try:
            return row, encode(tokenizer, row, max_length, truncate="right", chat=config.data.chat)
        except TooLongError:
            raise TooLongError(
                f"{row.id}: within {name}.max_length {max_length} nothing is left of the answers, or nothing that "
                "differs; raise it, leave the row out, or leave out all such rows with --data.truncate drop"
            ) from None

    found = encode_rows(rows, encoded, drop=config.data.truncate == "drop")
    items: Sequence[Item] = [item for _, item in found]
    if name == "kto":
        items = with_unrelated([(row.id, text, row.desirable) for row, text in found], max_length)
    for item in items:
        for text in _texts(item):
            limits.check(item.id, text.token_ids, f"lower {name}.max_length")
    own = [text for item in items for text in _texts(item)[: 1 if name == "kto" else 2]]
    keys = [str(row.columns.get(sources.group_by, row.prompt)) for row, _ in found]
    num_cut = sum(text.token_ids[-1] != end for text in own)
    return PreferenceRows(list(zip(keys, items, strict=True)), len(rows) - len(found), num_cut)


def _texts(item: Item) -> tuple[Example, Example]:
    return (item.chosen, item.rejected) if isinstance(item, EncodedPair) else (item.answer, item.unrelated)


def _told(session: Session, name: str, tokenizer: Any, split: Split, limits: Limits) -> list[tuple[str, Item]]:
    """The rows of a split; what was left out or cut of them is said."""
    read = read_preference_rows(session.config, session.sources, tokenizer, split, limits, name)
    limit = f"{name}.max_length {getattr(session.config, name).max_length} tokens"
    if read.num_dropped:
        session.say(f"{name} ({split}): {read.num_dropped} rows left out, longer than {limit}")
    if read.num_cut:
        session.say(f"{name} ({split}): {read.num_cut} completions are cut at {limit}")
    return read.items


def _references(session: Session, name: str, actor: Actor, rows: Sequence[tuple[str, Item]]) -> References | None:
    """What the reference makes of the rows, where the stage has one and is to know beforehand."""
    settings = getattr(session.config, name)
    if getattr(settings, "reference", "") != "cached":
        return None
    file = session.run.checkpoints / "reference.safetensors"
    texts = (text for _, item in rows for text in _texts(item))
    limit = MicroBatchLimit(settings.micro_batch_size or None, settings.micro_batch_tokens or None)
    return cached_references(file, actor, texts, session.strategy, limit, session.say)


def _collate(filler: int, references: References | None) -> Callable[[list[tuple[str, Item]]], Any]:
    def collate(rows: list[tuple[str, Item]]) -> Any:
        items: list[Any] = [item for _, item in rows]
        together: Any = collate_pairs if isinstance(items[0], EncodedPair) else collate_labelled
        return together(items, filler, references)

    return collate


def _reference(session: Session, actor: Actor, policy: str) -> Actor | None:
    """What the KL at the end is measured from: the policy as it came; with LoRA, itself."""
    if has_lora(actor.model):
        return actor
    if not policy:
        return None
    with session.strategy.model_init_context():
        reference, _ = load_policy(session.config, policy, session.sources, 0)
    session.strategy.prepare(reference)
    return reference.requires_grad_(False)


class Samples:
    """What the policy answers to the held-out prompts, before and after; no reward is asked, but the gold scorer is."""

    def __init__(self, session: Session, name: str, actor: Actor, tokenizer: Any) -> None:
        config = session.config
        settings: PreferenceConfig = getattr(config, name)
        self.session, self.actor, self.tokenizer = session, actor, tokenizer
        self.before: Evaluation | None = None
        self.prompts = spread(heldout_prompts(config, session.sources, tokenizer), config.evaluate.num_prompts)
        # A seed of its own, as the examinations of PPO have it: the same draws, so that runs can be compared.
        self.sampling = SamplingParams(
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=config.seed + 1_000_003
        )
        self.yardsticks = _yardsticks(session)

    def look(self, step: int, reference: Actor | None = None) -> Evaluation:
        """Samples every prompt, measures and logs; reference: what the KL is measured from."""
        fault("evaluate")
        session = self.session
        with session.strategy.whole(self.actor), session.strategy.autocast():
            engine = make_engine(self.actor, self.tokenizer, session.config.engine, session.say)
            rollouts = collect(
                self.prompts, engine, _unjudged, self.sampling, session.config.evaluate.num_samples,
                session.strategy.group,
            )  # fmt: skip
        found = measure(rollouts, self.yardsticks)
        del found.metrics["eval/reward"]  # there is none
        if reference is not None:
            with session.strategy.autocast():
                found.metrics["eval/kl"] = fmean(kl_from_reference(rollouts, reference, self.sampling.temperature))
        session.tracker.log(found.metrics, step)
        return found

    def summary(self, after: Evaluation, step: int) -> dict[str, Any]:
        """Both looks for the stage's summary; their texts go into the sample log."""
        before = self.before
        assert before is not None
        rows = before_after_rows(before, after)
        if not after.gold:
            rows = [{key: row[key] for key in ("prompt", "before", "after")} for row in rows]
        self.session.tracker.log_samples(rows, step)
        found: dict[str, Any] = {"before": before.metrics, "after": after.metrics}
        if "eval/kl" in after.metrics:
            found["kl"] = after.metrics["eval/kl"]
        if after.gold:
            found |= {
                "heldout_reward_before": fmean(before.gold),
                "heldout_reward_after": fmean(after.gold),
                "heldout_reward_stderr": paired_standard_error(before, after),
                "heldout_reward_is": self.yardsticks.gold_name,
            }
        return found

    def keep(self, snapshot: Snapshot) -> None:
        """Puts the first look into a snapshot."""
        assert self.before is not None
        snapshot.values["samples"] = self.before.to_json()

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept."""
        self.before = Evaluation.from_json(saved.values["samples"])


def heldout_prompts(config: Config, sources: Sources, tokenizer: Any) -> list[Prompt]:
    """The prompts to be answered before and after: those of the data, or where it has none, of the comparisons."""
    data = config.data
    if data.world != "files" or data.prompts:
        rows = sources.prompts("heldout")
    else:
        asked = {str(row.prompt): row for row in sources.labelled("heldout")}
        rows = [PromptRow(row.id, row.prompt, row.columns) for row in asked.values()]
    try:
        found = encode_prompts(
            tokenizer, rows, max_length=data.max_prompt_length, truncate=data.truncate, chat=data.chat
        )
    except TooLongError as error:
        raise ConfigError(f"{error} (the keys data.max_prompt_length and data.truncate)") from None
    return [replace(prompt, id=f"heldout/{prompt.id}") for prompt in found]


def _yardsticks(session: Session) -> Yardsticks:
    """The world's own, with the scorer that `evaluate.gold` names in the place of its."""
    found, named = session.sources.yardsticks(), session.config.evaluate
    if not named.gold:
        return found
    how = Judging(session.strategy, None, session.config.reward.max_length, named.batch_size)
    return replace(found, gold=build_part("gold", RewardPart(use=named.gold), how, "evaluate.gold"),
                   gold_name=named.gold)  # fmt: skip


def _unjudged(rollouts: Sequence[Rollout]) -> list[Score]:
    return [Score(0.0) for _ in rollouts]
