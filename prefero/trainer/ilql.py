"""Offline training of a policy with value heads, from texts and their rewards (ILQL)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from prefero.algorithms.ilql import ILQL, ILQLSettings
from prefero.models.ilql import ILQLActor
from prefero.strategies.base import Strategy
from prefero.strategies.group import Share
from prefero.tracking.base import Tracker
from prefero.trainer.offline import OfflineTrainer, Schedule, require_lora
from prefero.trainer.split import MicroBatchLimit, share_tokens, split_tokens
from prefero.trainer.update import Learner
from prefero.types import Metrics, TrajectoryBatch


class ILQLTrainer(OfflineTrainer[TrajectoryBatch]):
    """Teaches an `ILQLActor` to imitate rewarded texts, and what their tokens are worth.

    train_batches, eval_batches: `TrajectoryBatch`es, each one optimiser step. settings: the numbers of the algorithm.
    The rest is as for `SFTTrainer`. Raises ValueError for a batch without rewards, with rewards that are no finite
    numbers or stand where nothing was chosen.
    """

    algorithm: ILQL

    def __init__(
        self,
        model: ILQLActor,
        strategy: Strategy,
        optim: Optimizer,
        train_batches: Iterable[TrajectoryBatch],
        eval_batches: Iterable[TrajectoryBatch] | None = None,
        max_epochs: int = 1,
        *,
        settings: ILQLSettings | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_norm: float | None = None,
        dropout: bool = False,
        scheduler: Schedule = "constant",
        tracker: Tracker | None = None,
        eval_interval: int | None = None,
    ) -> None:
        model, optim = strategy.prepare((model, optim))
        super().__init__(
            strategy, ILQL(model, settings), Learner("actor", "ilql/loss", model, optim), train_batches, max_epochs,
            limit=MicroBatchLimit(micro_batch_size, micro_batch_tokens),
            max_norm=max_norm, dropout=dropout, scheduler=scheduler, tracker=tracker,
            eval_sets={} if eval_batches is None else {"eval": eval_batches}, eval_interval=eval_interval,
        )  # fmt: skip

    def fit(self, use_lora: int = 0) -> Metrics:
        """Trains; returns the last metrics. use_lora: a rank above 0 makes sure that the model was built with LoRA."""
        require_lora(self.model, use_lora)
        return self.run()

    def training_step(self, batch: Any) -> Metrics:
        """One optimiser step on one batch, one of the schedule, and the slow copies of Q moved when it is time."""
        metrics = super().training_step(batch)
        self.strategy.settle(self.model)
        self.algorithm.stepped(self.num_steps)
        return metrics

    def _typed(self, batch: Any) -> TrajectoryBatch:
        if not isinstance(batch, TrajectoryBatch):
            raise ValueError(
                f"an ILQL batch needs rewards, got a {type(batch).__name__}: use TrajectoryBatch "
                "(prefero.data.collate_trajectories makes one)"
            )
        broken = ~batch.rewards.isfinite()
        if bool(broken.any()):
            row, column = broken.nonzero()[0].tolist()
            raise ValueError(
                f"the reward of row {row}, token {column} is {float(batch.rewards[row, column])}: use finite numbers"
            )
        lost = (batch.rewards != 0) & ~batch.loss_mask.bool()
        lost[:, 0] |= batch.rewards[:, 0] != 0
        if bool(lost.any()):
            row, column = lost.nonzero()[0].tolist()
            raise ValueError(
                f"row {row} is rewarded at token {column}, which nobody chose (its loss_mask is 0, or it is the "
                "first): put the reward on an action, e.g. the answer's last token"
            )
        return batch

    def _cut(self, batch: TrajectoryBatch, limit: MicroBatchLimit) -> Sequence[TrajectoryBatch]:
        return split_tokens(batch, limit, self.strategy.group)

    def _share(self, batch: TrajectoryBatch, share: Share) -> TrajectoryBatch:
        return share_tokens(batch, share)
