"""Stage 2: a reward model from comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from prefero.config import Config
from prefero.data import (
    Comparison,
    Demonstration,
    EncodedComparison,
    Loader,
    collate_comparisons,
    encode_sft,
    keep_end,
    pad_id,
)
from prefero.models.auto import AutoRM
from prefero.models.base import RewardModel
from prefero.models.loading import load_tokenizer
from prefero.models.trunk import device_of, evaluating
from prefero.recipes.limits import Limits
from prefero.recipes.rewards import write_statistics
from prefero.recipes.session import Session, Steps, adamw, num_parameters, schedule, set_up_machine
from prefero.recipes.sources import Sources, Split, spread
from prefero.recipes.start import lasting, start_of
from prefero.strategies.cpu import release_memory
from prefero.trainer import RewardModelTrainer
from prefero.trainer.split import NO_LIMIT, MicroBatchLimit
from prefero.types import Metrics, PreferenceBatch


def train_reward(session: Session, policy: str) -> Metrics:
    """Trains a reward model and exports it; policy: what the backbone `policy` means. Returns its last metrics."""
    config, settings, keeper = session.config, session.config.reward, session.keeper()
    of_policy = settings.model == "policy"
    backbone = policy if of_policy else settings.model
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer((of_policy and config.model.tokenizer) or backbone, trust_remote_code=trust)
    frozen = config.model.frozen if settings.lora_rank else "fp32"
    base, adapter = start_of(backbone, frozen, settings.lora_rank, "reward.lora_rank")
    with session.strategy.model_init_context():
        model = AutoRM(
            pretrained=base,
            checkpoint=config.model.gradient_checkpointing,
            lora_rank=settings.lora_rank,
            trust_remote_code=trust,
            dropout=settings.dropout,
            frozen=frozen,
        )
    model.model.name_or_path = lasting(base)  # what the adapter's file says it stands on
    if frozen != "fp32":
        release_memory()  # of layers that were float32 for a moment
    if adapter is not None:
        model.load_adapter(adapter)
    set_up_machine(num_parameters(model), config.strategy.threads)
    limits = Limits.of(model.model.config)
    loader, heldout = (comparisons(session, tokenizer, split, limits) for split in ("train", "heldout"))
    steps = settings.steps or settings.epochs * len(loader)
    session.tracker.start("reward", steps)
    optimizer = adamw(config, model, settings.learning_rate, settings.weight_decay)
    trainer = RewardModelTrainer(
        model,
        session.strategy,
        optimizer,
        Steps(loader, steps),
        heldout,
        max_epochs=1,
        loss_fn=settings.loss,
        centering=settings.centering,
        micro_batch_size=settings.micro_batch_size or None,
        micro_batch_tokens=settings.micro_batch_tokens or None,
        dropout=settings.dropout,
        scheduler=schedule(optimizer, settings.schedule, steps, settings.warmup_fraction),
        tracker=session.tracker,
        eval_interval=settings.eval_every or None,
    )
    keeper.watch(trainer)
    trainer.after_step = lambda: keeper.after(trainer.num_steps, trainer.num_steps)
    metrics = trainer.fit()
    keeper.checkpoints.wait()
    session.export(model, session.run.model, tokenizer)
    statistics = score_statistics(model, heldout, trainer.limit)
    if session.strategy.is_rank_0:
        write_statistics(session.run.model, *statistics)
    session.strategy.group.wait()
    session.finish({"stage": "reward", "rm_accuracy": metrics["reward/eval_accuracy"], **metrics})
    return metrics


@torch.no_grad()
def score_statistics(
    model: RewardModel, batches: Iterable[PreferenceBatch], limit: MicroBatchLimit = NO_LIMIT
) -> tuple[float, float]:
    """Mean and standard deviation of the scores of all texts compared; limit: what is forwarded at once.

    Comparisons leave a reward's zero and unit open. With these two, a KL coefficient means the same for any reward
    model (Ziegler et al., arXiv:1909.08593, normalise for the same reason).
    """
    device = device_of(model)
    with evaluating(model):
        scores = torch.cat(
            [
                model(batch.token_ids[rows].to(device), batch.attention_mask[rows].to(device))
                for batch in batches
                for rows in limit.slices(batch.attention_mask.sum(dim=1))
            ]
        )
    return float(scores.mean()), float(scores.std())


class Comparisons(NamedTuple):
    """The encoded comparisons of a split with what they are about, and how many of their texts were cut."""

    items: list[tuple[str, EncodedComparison]]
    num_texts: int
    num_cut: int


def read_comparisons(config: Config, sources: Sources, tokenizer: Any, split: Split, limits: Limits) -> Comparisons:
    """The split's comparisons as this stage learns them. Raises ValueError naming the row that cannot be read."""
    rows = sources.preferences(split)
    if limit := config.reward.max_rows if split == "train" else config.evaluate.max_pairs:
        rows = spread(rows, limit)
    group_by, max_length = sources.group_by, limits.shorten(config.reward.max_length)
    known: dict[tuple[str, str], tuple[int, ...]] = {}
    cut: set[tuple[str, str]] = set()

    def read(row: Comparison, answer: str) -> tuple[int, ...]:
        # One text often stands in many comparisons, and tokenising is the slow part.
        key = (repr(row.prompt), answer)
        if key not in known:
            whole = encode_sft(tokenizer, Demonstration(row.id, row.prompt, answer), chat=config.data.chat)
            known[key] = keep_end(tokenizer, whole.token_ids, max_length)
            limits.check(row.id, known[key], "lower reward.max_length")
            if len(known[key]) < len(whole.token_ids):
                cut.add(key)
        return known[key]

    items = [
        (
            str(row.columns.get(group_by, row.prompt)),
            EncodedComparison(row.id, read(row, row.chosen), read(row, row.rejected), row.margin),
        )
        for row in rows
    ]
    return Comparisons(items, len(known), len(cut))


def comparisons(session: Session, tokenizer: Any, split: Split, limits: Limits) -> Loader[Any, PreferenceBatch]:
    """The split's comparisons in batches; those about one prompt (or film) meet, so a shared text is read once."""
    config, settings = session.config, session.config.reward
    read = read_comparisons(config, session.sources, tokenizer, split, limits)
    if read.num_cut:
        session.say(
            f"reward ({split}): {read.num_cut} of {read.num_texts} texts are cut to their last "
            f"{limits.shorten(settings.max_length)} tokens (reward.max_length)"
        )
    filler = pad_id(tokenizer)
    return Loader(
        read.items,
        settings.batch_size,
        lambda batch: collate_comparisons([encoded for _, encoded in batch], filler),
        shuffle=split == "train",
        seed=config.seed,
        group_by=lambda item: item[0],
    )
