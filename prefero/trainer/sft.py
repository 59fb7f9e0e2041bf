"""Supervised fine-tuning of an actor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from prefero.algorithms.sft import SFT
from prefero.models.base import Actor
from prefero.models.loss import IGNORED
from prefero.rollout.buffer import zero_pad_sequences
from prefero.strategies.base import Strategy
from prefero.strategies.group import Group, Share
from prefero.tracking.base import Tracker
from prefero.trainer.offline import OfflineTrainer, Schedule, require_lora, row_loader
from prefero.trainer.split import MicroBatchLimit, share_tokens, split_tokens
from prefero.trainer.update import Learner
from prefero.types import Metrics, TokenBatch


class SFTTrainer(OfflineTrainer[TokenBatch]):
    """Teaches an actor to imitate.

    train_dataloader: batches, each one optimiser step, that are `TokenBatch` or dicts with input_ids, attention_mask
    and labels (-100 where nothing is to be learned); or a torch Dataset of such dicts for single rows, which is then
    shuffled into batches of batch_size. sampler: told the epoch before each one (`set_epoch`). micro_batch_size,
    micro_batch_tokens: rows and tokens forwarded at once (None: all), without influence on the result: the loss of a
    step is the sum over its tokens divided by their number. dropout: off unless asked for.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataloader: Iterable[Any],
        eval_dataloader: Iterable[Any] | None = None,
        sampler: Any = None,
        batch_size: int = 1,
        max_epochs: int = 2,
        *,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_norm: float | None = None,
        dropout: bool = False,
        scheduler: Schedule = "cosine",
        tracker: Tracker | None = None,
        eval_interval: int | None = None,
    ) -> None:
        self.sampler = sampler
        eval_sets = {} if eval_dataloader is None else {"eval": _loader(eval_dataloader, batch_size, None)}
        # As the older trainers did it themselves; what is placed stays placed.
        model, optim = strategy.prepare((model, optim))
        super().__init__(
            strategy, SFT(model), Learner("actor", "sft/loss", model, optim),
            _loader(train_dataloader, batch_size, strategy.group), max_epochs,
            limit=MicroBatchLimit(micro_batch_size, micro_batch_tokens),
            max_norm=max_norm, dropout=dropout, scheduler=scheduler, tracker=tracker, eval_sets=eval_sets,
            eval_interval=eval_interval,
        )  # fmt: skip

    def fit(self, logger: Any = None, use_lora: int = 0, log_interval: int = 10) -> Metrics:
        """Trains; returns the last metrics.

        logger: gets a line through its `info` every log_interval steps (any `logging.Logger`). use_lora: a rank
        above 0 makes sure that the model was built with LoRA. The tracker is written every step.
        """
        require_lora(self.model, use_lora)
        self._logger, self._log_interval = logger, log_interval
        return self.run()

    _logger: Any = None
    _log_interval = 10

    def training_step(self, batch: Any) -> Metrics:
        """One optimiser step on one batch, and one of the schedule."""
        metrics = super().training_step(batch)
        if self._logger is not None and self.strategy.is_rank_0 and self.num_steps % self._log_interval == 0:
            self._logger.info("step %d: loss %.4f, lr %.3g", self.num_steps, metrics["sft/loss"], metrics["lr"])
        return metrics

    def evaluate(self, batches: Iterable[Any]) -> Metrics:
        """Loss in nats a token, and the perplexity it means."""
        metrics = super().evaluate(batches)
        return {**metrics, "sft/perplexity": math.exp(min(metrics["sft/loss"], 700.0))}

    def _start_epoch(self, epoch: int) -> None:
        if self.sampler is not None and hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _cut(self, batch: TokenBatch, limit: MicroBatchLimit) -> Sequence[TokenBatch]:
        return split_tokens(batch, limit, self.strategy.group)

    def _typed(self, batch: Any) -> TokenBatch:
        return batch if isinstance(batch, TokenBatch) else token_batch(batch)

    def _share(self, batch: TokenBatch, share: Share) -> TokenBatch:
        return share_tokens(batch, share)


def token_batch(batch: Mapping[str, Tensor]) -> TokenBatch:
    """A TokenBatch from input_ids [B, T], and where there are any attention_mask and labels.

    Raises ValueError for a batch without input_ids.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        kind = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"an SFT batch needs input_ids (and labels), got {kind}: use TokenBatch or a dict of tensors")
    token_ids = batch["input_ids"]
    attention_mask = batch.get("attention_mask", torch.ones_like(token_ids))
    labels = batch.get("labels", token_ids)
    return TokenBatch(token_ids, attention_mask.long(), (labels != IGNORED) & attention_mask.bool())


def _loader(data: Iterable[Any], batch_size: int, alike: Group | None) -> Iterable[Any]:
    """Batches as they are, or of a dataset's rows: in order, or shuffled the same way in all processes of a group."""
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        return row_loader(data, batch_size, _collate, alike)
    return data


def _collate(rows: Sequence[Mapping[str, Tensor]]) -> TokenBatch:
    """Rows of dicts to a batch padded on the right."""
    batches = [token_batch({name: torch.as_tensor(row[name])[None] for name in row}) for row in rows]
    return TokenBatch(
        token_ids=zero_pad_sequences([batch.token_ids[0] for batch in batches], "right"),
        attention_mask=zero_pad_sequences([batch.attention_mask[0] for batch in batches], "right"),
        loss_mask=zero_pad_sequences([batch.loss_mask[0] for batch in batches], "right"),
    )
