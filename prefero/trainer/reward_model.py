"""Training of a reward model on comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from prefero.algorithms.reward_modeling import PairLoss, RewardModeling
from prefero.rollout.buffer import zero_pad_sequences
from prefero.strategies.base import Strategy
from prefero.strategies.group import Group, Share
from prefero.tracking.base import Tracker
from prefero.trainer.offline import OfflineTrainer, Schedule, require_lora, row_loader
from prefero.trainer.split import MicroBatchLimit, share_preferences, split_preferences
from prefero.trainer.update import Learner
from prefero.types import Metrics, PreferenceBatch

_WANTED = (
    "comparisons must come as PreferenceBatch objects, or as a dataset of rows (chosen ids, chosen mask, rejected ids, "
    "rejected mask); got {}"
)


class RewardModelTrainer(OfflineTrainer[PreferenceBatch]):
    """Teaches a reward model which of two texts is preferred.

    train_dataset, eval_dataset, valid_dataset: batches that are `PreferenceBatch`, each one optimiser step; or rows
    (chosen ids, chosen mask, rejected ids, rejected mask) as `prefero.dataset.RewardDataset` gives them, which are
    shuffled into batches of batch_size. loss_fn: "log_sig", "log_exp" or a function of chosen and rejected scores.
    valid_dataset: looked at every eval_interval steps and after each epoch, as eval_dataset is. The learning rate
    follows a cosine to 0 unless another schedule is given. micro_batch_size, micro_batch_tokens: comparisons and
    tokens forwarded at once (None: all), without influence on the result. dropout: off unless asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any,
        batch_size: int = 1,
        max_epochs: int = 2,
        *,
        loss_fn: str | PairLoss = "log_sig",
        centering: float = 0.0,
        valid_dataset: Any = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_norm: float | None = None,
        dropout: bool = False,
        scheduler: Schedule = "cosine",
        tracker: Tracker | None = None,
        eval_interval: int | None = None,
    ) -> None:
        eval_sets = {
            name: _loader(data, batch_size, None)
            for name, data in (("eval", eval_dataset), ("valid", valid_dataset)) if data is not None
        }  # fmt: skip
        # As the older trainers did it themselves; what is placed stays placed.
        model, optim = strategy.prepare((model, optim))
        super().__init__(
            strategy, RewardModeling(model, loss_fn, centering), Learner("model", "reward/loss", model, optim),
            _loader(train_dataset, batch_size, strategy.group), max_epochs,
            limit=MicroBatchLimit(micro_batch_size, micro_batch_tokens),
            max_norm=max_norm, dropout=dropout, scheduler=scheduler, tracker=tracker, eval_sets=eval_sets,
            eval_interval=eval_interval,
        )  # fmt: skip

    def fit(self, use_lora: int = 0) -> Metrics:
        """Trains; returns the last metrics: reward/loss, reward/eval_accuracy, reward/eval_distance and so on.

        use_lora: a rank above 0 makes sure that the model was built with LoRA.
        """
        require_lora(self.model, use_lora)
        return self.run()

    def _cut(self, batch: PreferenceBatch, limit: MicroBatchLimit) -> Sequence[PreferenceBatch]:
        return split_preferences(batch, limit, self.strategy.group)

    def _typed(self, batch: Any) -> PreferenceBatch:
        if not isinstance(batch, PreferenceBatch):
            raise ValueError(_WANTED.format(type(batch).__name__))
        if not len(batch):
            raise ValueError("a batch of comparisons is empty: leave it out")
        return batch

    def _share(self, batch: PreferenceBatch, share: Share) -> PreferenceBatch:
        return share_preferences(batch, share)


def collate_pairs(rows: Sequence[Sequence[Tensor]]) -> PreferenceBatch:
    """Rows of (chosen ids, chosen mask, rejected ids, rejected mask), [T] or [1, T] each, to one batch."""
    token_ids = [torch.as_tensor(row[place]).reshape(-1) for place in (0, 2) for row in rows]
    masks = [torch.as_tensor(row[place]).reshape(-1).long() for place in (1, 3) for row in rows]
    attention_mask = zero_pad_sequences(masks, "right")
    width = int(attention_mask.any(dim=0).nonzero()[-1]) + 1
    num_pairs = len(rows)
    return PreferenceBatch(
        token_ids=zero_pad_sequences(token_ids, "right")[:, :width],
        attention_mask=attention_mask[:, :width],
        chosen=torch.arange(num_pairs),
        rejected=torch.arange(num_pairs, 2 * num_pairs),
        margin=torch.zeros(num_pairs),
        counted=torch.ones(num_pairs, dtype=torch.bool),
    )


def _loader(data: Any, batch_size: int, alike: Group | None) -> Iterable[Any]:
    """Batches as they are, or of a dataset's rows: in order, or shuffled the same way in all processes of a group."""
    if isinstance(data, DataLoader) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data  # type: ignore[no-any-return]
    if not len(data):
        raise ValueError("the dataset of comparisons is empty: there is nothing to learn from")
    if isinstance(data[0], PreferenceBatch):
        return data  # type: ignore[no-any-return]
    if not isinstance(data[0], (tuple, list)) or len(data[0]) != 4:
        raise ValueError(_WANTED.format(type(data[0]).__name__))
    return row_loader(data, batch_size, collate_pairs, alike)
