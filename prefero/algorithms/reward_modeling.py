"""Reward modelling: scores whose differences predict which of two texts people prefer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from prefero.algorithms.base import Algorithm
from prefero.functional import reward
from prefero.types import Loss, PreferenceBatch

PairLoss = Callable[[Tensor, Tensor], Tensor]
_METRICS = ("reward/accuracy", "reward/distance", "reward/chosen", "reward/rejected")


class Scorer(Protocol):
    """What is trained: token ids and attention mask to one score a row."""

    def __call__(self, sequences: Tensor, attention_mask: Tensor) -> Tensor: ...


class RewardModeling(Algorithm[PreferenceBatch]):
    """A loss over pairs of scores, each text forwarded once.

    loss: "log_sig" (Bradley-Terry, with the batch's margins), "log_exp", or a function of (chosen, rejected) scores
    that returns their mean loss. centering: weight of (chosen + rejected)², which holds the scores around 0
    ("log_sig" only). Raises ValueError for an unknown loss.
    """

    def __init__(self, model: Scorer, loss: str | PairLoss = "log_sig", centering: float = 0.0) -> None:
        if isinstance(loss, str) and loss not in ("log_sig", "log_exp"):
            raise ValueError(
                f"loss_fn={loss!r} is unknown: use 'log_sig', 'log_exp' or a function of two score tensors"
            )
        if centering and loss != "log_sig":
            raise ValueError(f"centering={centering} only exists for loss_fn='log_sig'")
        self.model = model
        self.loss = loss
        self.centering = centering

    def count(self, batch: PreferenceBatch) -> Tensor:
        """Pairs that count."""
        return batch.counted.sum().float()

    def losses(self, batch: PreferenceBatch, total: float) -> Iterator[Loss]:
        """One loss: the pairs' losses, summed, divided by `total`."""
        scores = self.model(batch.token_ids, batch.attention_mask)
        counted = batch.counted
        chosen, rejected = scores[batch.chosen[counted]], scores[batch.rejected[counted]]
        if not len(chosen):
            zero = scores.sum() * 0.0  # nothing to learn, but a graph that backward can follow in step with the others
            yield Loss("model", zero, {name: zero.detach() for name in _METRICS})
            return
        share = len(chosen) / total
        with torch.no_grad():
            metrics = {
                "reward/accuracy": reward.accuracy(chosen, rejected) * share,
                "reward/distance": (chosen - rejected).mean() * share,
                "reward/chosen": chosen.mean() * share,
                "reward/rejected": rejected.mean() * share,
            }
        yield Loss("model", self._mean_loss(chosen, rejected, batch.margin[counted]) * share, metrics)

    def _mean_loss(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        if self.loss == "log_sig":
            return reward.bradley_terry(chosen, rejected, margin.to(chosen), self.centering)
        if self.loss == "log_exp":
            return reward.log_exp(chosen, rejected)
        assert not isinstance(self.loss, str)
        return self.loss(chosen, rejected)
