"""Stage 1: supervised fine-tuning."""

from __future__ import annotations

from typing import Any, NamedTuple

from prefero.config import Config
from prefero.data import Loader, collate_examples, encode_rows, encode_sft, pad_id
from prefero.data.formats import SFTRow
from prefero.data.spelling import frame
from prefero.data.tokenize import Example, TooLongError
from prefero.recipes.limits import Limits
from prefero.recipes.session import Session, Steps, adamw, load_policy, num_parameters, schedule, set_up_machine
from prefero.recipes.sources import Sources, Split, spread
from prefero.trainer import SFTTrainer
from prefero.types import TokenBatch


def train_sft(session: Session) -> None:
    """Teaches the configured model to imitate and exports it."""
    config, settings, keeper = session.config, session.config.sft, session.keeper()
    with session.strategy.model_init_context():
        actor, tokenizer = load_policy(config, config.model.path, session.sources, config.sft_lora_rank)
    set_up_machine(num_parameters(actor), config.strategy.threads)
    limits = Limits.of(actor.model.config)
    loader = _loader(session, tokenizer, "train", limits)
    steps = settings.steps or settings.epochs * len(loader)
    session.tracker.start("sft", steps)
    optimizer = adamw(config, actor, settings.learning_rate, settings.weight_decay)
    trainer = SFTTrainer(
        actor,
        session.strategy,
        optimizer,
        Steps(loader, steps),
        _loader(session, tokenizer, "heldout", limits),
        max_epochs=1,
        micro_batch_size=settings.micro_batch_size or None,
        micro_batch_tokens=settings.micro_batch_tokens or None,
        scheduler=schedule(optimizer, settings.schedule, steps, settings.warmup_fraction),
        tracker=session.tracker,
    )
    keeper.watch(trainer)
    trainer.after_step = lambda: keeper.after(trainer.num_steps, trainer.num_steps)
    metrics = trainer.fit()
    keeper.checkpoints.wait()
    session.export(actor, session.run.model, tokenizer)
    session.finish({"stage": "sft", **metrics})


class Demonstrations(NamedTuple):
    """The encoded rows of a split, and how many were left out or cut for being too long."""

    examples: list[Example]
    num_dropped: int
    num_cut: int


def read_demonstrations(
    config: Config, sources: Sources, tokenizer: Any, split: Split, limits: Limits
) -> Demonstrations:
    """The split's rows as this stage learns them. Raises ValueError naming one that cannot be read or is too long."""
    settings = config.sft
    rows = sources.sft(split)
    if limit := settings.max_rows if split == "train" else config.evaluate.max_demonstrations:
        rows = spread(rows, limit)

    def encode(row: SFTRow) -> Example:
        try:
            example = encode_sft(tokenizer, row, settings.max_length, truncate="right", chat=config.data.chat)
        except TooLongError:
            raise TooLongError(
                f"{row.id}: the prompt alone fills sft.max_length {settings.max_length}, nothing is left to imitate; "
                "raise it, leave the row out, or leave out all such rows with --data.truncate drop"
            ) from None
        limits.check(row.id, example.token_ids, "lower sft.max_length")
        return example

    examples = encode_rows(rows, encode, drop=config.data.truncate == "drop")
    end = frame(tokenizer)[1]
    num_cut = sum(example.token_ids[-1] != end for example in examples)
    return Demonstrations(examples, len(rows) - len(examples), num_cut)


def _loader(session: Session, tokenizer: Any, split: Split, limits: Limits) -> Loader[Any, TokenBatch]:
    config, settings = session.config, session.config.sft
    read = read_demonstrations(config, session.sources, tokenizer, split, limits)
    limit = f"sft.max_length {settings.max_length} tokens"
    if read.num_dropped:
        session.say(f"sft ({split}): {read.num_dropped} rows left out, longer than {limit}")
    if read.num_cut:
        session.say(
            f"sft ({split}): {read.num_cut} of {len(read.examples)} rows are cut at {limit}; neither their rest nor "
            "their end is learned"
        )
    filler = pad_id(tokenizer)
    return Loader(
        read.examples,
        settings.batch_size,
        lambda batch: collate_examples(batch, filler),
        shuffle=split == "train",
        seed=config.seed,
        length=lambda example: len(example.token_ids),
    )
