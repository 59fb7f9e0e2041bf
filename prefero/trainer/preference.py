"""Training of a policy on preferences themselves: DPO and its kin on pairs of completions, KTO on single ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from prefero.algorithms.completions import PairAlgorithm
from prefero.algorithms.cpo import CPO
from prefero.algorithms.dpo import DPO
from prefero.algorithms.kto import KTO, per_kind
from prefero.algorithms.orpo import ORPO
from prefero.algorithms.simpo import SimPO
from prefero.data.collate import collate_labelled, collate_pairs
from prefero.data.tokenize import EncodedLabel, EncodedPair
from prefero.models.base import Actor
from prefero.models.trunk import evaluating, out_of_memory
from prefero.strategies.base import Strategy
from prefero.strategies.group import Group, Share
from prefero.tracking.base import Tracker
from prefero.trainer.offline import OfflineTrainer, Schedule, require_lora, row_loader
from prefero.trainer.split import (
    MicroBatches,
    MicroBatchLimit,
    share_labelled,
    share_pairs,
    split_labelled,
    split_pairs,
)
from prefero.trainer.update import Learner
from prefero.types import LabelledBatch, Metrics, PairBatch


class Options(TypedDict, total=False):
    """What every one of these trainers may be told by keyword.

    micro_batch_size, micro_batch_tokens: rows and tokens forwarded at once (None: all), without influence on the
    result. max_norm: gradient clipping (None: the strategy's own). dropout: off unless asked for. scheduler: the
    learning rate follows a cosine to 0 unless another schedule is given. tracker: gets the numbers of every step.
    eval_interval: steps between looks at the evaluation data, beside those after each epoch.
    """

    micro_batch_size: int | None
    micro_batch_tokens: int | None
    max_norm: float | None
    dropout: bool
    scheduler: Schedule
    tracker: Tracker | None
    eval_interval: int | None


def _how(options: Options) -> dict[str, Any]:
    """The options as the offline trainer takes them."""
    return {
        "limit": MicroBatchLimit(options.get("micro_batch_size"), options.get("micro_batch_tokens")),
        "max_norm": options.get("max_norm"),
        "dropout": options.get("dropout", False),
        "scheduler": options.get("scheduler", "cosine"),
        "tracker": options.get("tracker"),
        "eval_interval": options.get("eval_interval"),
    }


class PairTrainer(OfflineTrainer[PairBatch]):
    """What the trainers on pairs share.

    train_dataset, eval_dataset: batches that are `PairBatch`, each one optimiser step; or rows as
    `prefero.data.encode_pair` gives them, which are shuffled into batches of batch_size.
    """

    def __init__(
        self,
        algorithm: PairAlgorithm,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any,
        batch_size: int,
        max_epochs: int,
        options: Options,
    ) -> None:
        model, optim = strategy.prepare((algorithm.actor, optim))
        eval_sets = {} if eval_dataset is None else {"eval": _batches(eval_dataset, batch_size, None)}
        super().__init__(
            strategy, algorithm, Learner("actor", f"{algorithm.name}/loss", model, optim),
            _batches(train_dataset, batch_size, strategy.group), max_epochs, eval_sets=eval_sets, **_how(options),
        )  # fmt: skip

    def fit(self, use_lora: int = 0) -> Metrics:
        """Trains; returns the last metrics: NAME/loss, NAME/accuracy, NAME/eval_accuracy and so on.

        use_lora: a rank above 0 makes sure that the model was built with LoRA.
        """
        require_lora(self.model, use_lora)
        return self.run()

    def _cut(self, batch: PairBatch, limit: MicroBatchLimit) -> Sequence[PairBatch]:
        return split_pairs(batch, limit, self.strategy.group)

    def _typed(self, batch: Any) -> PairBatch:
        if not isinstance(batch, PairBatch):
            raise ValueError(f"pairs must come as PairBatch objects or as EncodedPair rows; got {type(batch).__name__}")
        if not len(batch):
            raise ValueError("a batch of pairs is empty: leave it out")
        if not bool(batch.loss_mask[:, 1:].bool().any(dim=1).all()):
            raise ValueError("a completion has no token: leave pairs with empty completions out, or mark the EOS")
        alike = torch.ones(len(batch), dtype=torch.bool, device=batch.chosen.device)
        for side in (batch.attention_mask, batch.token_ids.masked_fill(~batch.attention_mask.bool(), 0)):
            alike &= (side[batch.chosen] == side[batch.rejected]).all(dim=1)
        if bool(alike.any()):
            row = int(alike.nonzero()[0])
            raise ValueError(f"pair {row} of a batch has the same text as chosen and as rejected: leave it out")
        return batch

    def _share(self, batch: PairBatch, share: Share) -> PairBatch:
        return share_pairs(batch, share)


class DPOTrainer(PairTrainer):
    """Direct preference optimisation of an actor on pairs.

    reference: asked in every step for what batches do not bring (`ReferencedPairBatch`); without one, an actor with
    LoRA is its own. beta, kind, label_smoothing: see `functional.preference.dpo`. The data: see `PairTrainer`; further
    keywords: `Options`.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any = None,
        batch_size: int = 1,
        max_epochs: int = 1,
        *,
        reference: Actor | None = None,
        beta: float = 0.1,
        kind: str = "sigmoid",
        label_smoothing: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        algorithm = DPO(model, _placed(reference, strategy), beta, kind, label_smoothing)
        super().__init__(algorithm, strategy, optim, train_dataset, eval_dataset, batch_size, max_epochs, options)


class ORPOTrainer(PairTrainer):
    """Odds-ratio preference optimisation of an actor on pairs; beta is the paper's lambda.

    nll: what is imitated, the chosen "completion" or the whole "text". The data: see `PairTrainer`; further keywords:
    `Options`.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any = None,
        batch_size: int = 1,
        max_epochs: int = 1,
        *,
        beta: float = 0.1,
        nll: Literal["completion", "text"] = "completion",
        **options: Unpack[Options],
    ) -> None:
        algorithm = ORPO(model, beta, nll)
        super().__init__(algorithm, strategy, optim, train_dataset, eval_dataset, batch_size, max_epochs, options)


class SimPOTrainer(PairTrainer):
    """Simple preference optimisation of an actor on pairs, with the margin gamma.

    The data: see `PairTrainer`; further keywords: `Options`.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any = None,
        batch_size: int = 1,
        max_epochs: int = 1,
        *,
        beta: float = 2.0,
        gamma: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        algorithm = SimPO(model, beta, gamma)
        super().__init__(algorithm, strategy, optim, train_dataset, eval_dataset, batch_size, max_epochs, options)


class CPOTrainer(PairTrainer):
    """Contrastive preference optimisation of an actor on pairs; nll_coef weighs the imitation of the chosen ones.

    The data: see `PairTrainer`; further keywords: `Options`.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any = None,
        batch_size: int = 1,
        max_epochs: int = 1,
        *,
        beta: float = 0.1,
        nll_coef: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        algorithm = CPO(model, beta, nll_coef)
        super().__init__(algorithm, strategy, optim, train_dataset, eval_dataset, batch_size, max_epochs, options)


class KTOTrainer(OfflineTrainer[LabelledBatch]):
    """Kahneman-Tversky optimisation of an actor on single completions with a verdict.

    train_dataset, eval_dataset: batches that are `LabelledBatch`, each one optimiser step; or rows as
    `prefero.data.with_unrelated` gives them, which are shuffled into batches of batch_size. reference: as for
    `DPOTrainer`. Further keywords: `Options`.
    """

    def __init__(
        self,
        model: Actor,
        strategy: Strategy,
        optim: Optimizer,
        train_dataset: Any,
        eval_dataset: Any = None,
        batch_size: int = 1,
        max_epochs: int = 1,
        *,
        reference: Actor | None = None,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        reference = _placed(reference, strategy)
        self.kto = KTO(model, reference, beta, desirable_weight, undesirable_weight)
        model, optim = strategy.prepare((model, optim))
        eval_sets = {} if eval_dataset is None else {"eval": _batches(eval_dataset, batch_size, None)}
        super().__init__(
            strategy, self.kto, Learner("actor", "kto/loss", model, optim),
            _batches(train_dataset, batch_size, strategy.group), max_epochs, eval_sets=eval_sets, **_how(options),
        )  # fmt: skip

    def fit(self, use_lora: int = 0) -> Metrics:
        """Trains; returns the last metrics: kto/loss, kto/z0, kto/eval_accuracy and so on.

        use_lora: a rank above 0 makes sure that the model was built with LoRA.
        """
        require_lora(self.model, use_lora)
        return self.run()

    def training_step(self, batch: Any) -> Metrics:
        """One optimiser step on one batch, and one of the schedule."""
        self._look_ahead([batch])
        return per_kind(super().training_step(batch))

    def evaluate(self, batches: Iterable[Any]) -> Metrics:
        """Metrics over all of `batches`, which are gone through twice: z0 is that of all of them."""
        self._look_ahead(batches)
        return per_kind(super().evaluate(batches))

    def _look_ahead(self, batches: Iterable[Any]) -> None:
        """Takes the reference point of all the batches; where memory does not suffice, in smaller parts."""
        owns = [self._own(self._typed(batch)) for batch in batches]
        if not owns:
            raise ValueError("the evaluation data is empty: there is nothing to evaluate on")
        micro_batches = MicroBatches(lambda limit: [part for own in owns for part in self._cut(own, limit)], self.limit)
        with evaluating(self.model), self.strategy.autocast():
            while True:
                try:
                    self.kto.look_ahead(micro_batches.parts, self.strategy.group)
                    break
                except RuntimeError as error:
                    if not self.strategy.can_repeat or not out_of_memory(error) or not micro_batches.halve():
                        raise
        self.limit = micro_batches.limit

    def _cut(self, batch: LabelledBatch, limit: MicroBatchLimit) -> Sequence[LabelledBatch]:
        return split_labelled(batch, limit, self.strategy.group)

    def _typed(self, batch: Any) -> LabelledBatch:
        if not isinstance(batch, LabelledBatch):
            told = (
                f"labelled texts must come as LabelledBatch objects or as EncodedLabel rows; got {type(batch).__name__}"
            )
            raise ValueError(told)
        if not len(batch):
            raise ValueError("a batch of labelled texts is empty: leave it out")
        for mask in (batch.loss_mask, batch.unrelated_loss_mask):
            if not bool(mask[:, 1:].bool().any(dim=1).all()):
                raise ValueError("a completion has no token: leave rows with empty completions out, or mark the EOS")
        return batch

    def _share(self, batch: LabelledBatch, share: Share) -> LabelledBatch:
        return share_labelled(batch, share)


def _placed(reference: Actor | None, strategy: Strategy) -> Actor | None:
    if reference is None:
        return None
    placed: nn.Module = strategy.prepare(reference)
    assert isinstance(placed, Actor)
    return placed.requires_grad_(False)


_COLLATE: dict[type, Callable[[Any], Any]] = {EncodedPair: collate_pairs, EncodedLabel: collate_labelled}


def _batches(data: Any, batch_size: int, alike: Group | None) -> Iterable[Any]:
    """Batches as they are, or of rows: in order, or shuffled the same way in all processes of the group `alike`."""
    if isinstance(data, DataLoader) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data  # type: ignore[no-any-return]
    if not len(data):
        raise ValueError("the dataset of preferences is empty: there is nothing to learn from")
    collate = _COLLATE.get(type(data[0]))
    return data if collate is None else row_loader(data, batch_size, collate, alike)
