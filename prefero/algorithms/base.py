"""What an algorithm is: something that turns a batch into losses, and knows neither devices nor loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import Tensor, nn

from prefero.models.trunk import disable_dropout
from prefero.types import Experience, Loss

BatchT = TypeVar("BatchT")


class Algorithm(ABC, Generic[BatchT]):
    """A formula with its models: batches in, losses out.

    Every loss is a sum over units (tokens, pairs, rows) divided by `total`, the number of units in the *whole*
    optimiser step over all micro-batches and processes. So gradients of micro-batches add up to the gradient of
    their union, whatever the split.
    """

    @abstractmethod
    def count(self, batch: BatchT) -> Tensor:
        """The number of units of `batch` (a scalar): what `total` sums over micro-batches and processes."""

    @abstractmethod
    def losses(self, batch: BatchT, total: float) -> Iterator[Loss]:
        """Yields one loss per trained model; the next model's graph is built only when asked for."""


class OnlineAlgorithm(Algorithm[Experience]):
    """An algorithm that learns from its own samples."""

    @abstractmethod
    def experience(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor,
        scores: Tensor,
        old_logprobs: Tensor | None = None,
        ended: Tensor | None = None,
    ) -> Experience:
        """All that one update needs of these rollouts; computed without gradients."""


def learning_mode(model: nn.Module, dropout: bool) -> None:
    """Puts `model` in the mode it learns in: training mode with dropout, or without any dropout.

    Gradient checkpointing happens in training mode only, so a checkpointed model without dropout is put in training
    mode too, after its dropout probabilities are set to 0 for good.
    """
    if not dropout and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        disable_dropout(model)
        dropout = True
    model.train(dropout)
