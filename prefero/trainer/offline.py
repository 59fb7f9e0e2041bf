"""The loop of training on given data: epochs of batches, one optimiser step a batch, evaluation in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from prefero.algorithms.base import Algorithm, learning_mode
from prefero.models.lora import has_lora
from prefero.models.trunk import device_of, evaluating
from prefero.strategies.base import Strategy
from prefero.strategies.group import Group, Share
from prefero.tracking.base import Tracker
from prefero.trainer.progress import Progress
from prefero.trainer.split import MicroBatches, MicroBatchLimit
from prefero.trainer.state import Saved, Snapshot, keep_learner, keep_strategy, restore_learner, restore_strategy
from prefero.trainer.update import Learner, cosine, update
from prefero.types import LabelledBatch, Metrics, PairBatch, PreferenceBatch, TokenBatch

BatchT = TypeVar("BatchT", bound=TokenBatch | PreferenceBatch | PairBatch | LabelledBatch)
Schedule = LRScheduler | Literal["cosine", "constant"]


@runtime_checkable
class Resumable(Protocol):
    """Batches that know where they stand."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OfflineTrainer(ABC, Generic[BatchT]):
    """Epochs over `train_batches`; subclasses say what a batch is and how it is cut into micro-batches."""

    def __init__(
        self,
        strategy: Strategy,
        algorithm: Algorithm[BatchT],
        learner: Learner,
        train_batches: Iterable[BatchT],
        max_epochs: int,
        *,
        limit: MicroBatchLimit,
        max_norm: float | None,
        dropout: bool,
        scheduler: Schedule,
        tracker: Tracker | None,
        eval_sets: dict[str, Iterable[BatchT]],
        eval_interval: int | None,
    ) -> None:
        for name, number in (("max_epochs", max_epochs), ("eval_interval", eval_interval)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        self.strategy = strategy
        self.algorithm = algorithm
        self.learner = learner
        self.train_batches = train_batches
        self.max_epochs = max_epochs
        self.limit = limit
        self.max_norm = max_norm
        self.dropout = dropout
        self.scheduler = self._schedule(scheduler)
        self.tracker = tracker
        self.eval_sets = eval_sets
        self.eval_interval = eval_interval
        self.num_steps = self.epoch = 0
        self.last_metrics: Metrics = {}
        self.last_evaluation: Metrics = {}
        self._restored = False
        self.after_step: Callable[[], None] = lambda: None
        """Called after every optimiser step, when all about it is known and logged."""

    def _schedule(self, scheduler: Schedule) -> LRScheduler | None:
        if isinstance(scheduler, LRScheduler):
            return scheduler
        if scheduler == "constant":
            return None
        if scheduler != "cosine":
            raise ValueError(f"scheduler={scheduler!r} is unknown: use 'cosine', 'constant' or a torch scheduler")
        if not isinstance(self.train_batches, Sized):
            raise ValueError("scheduler='cosine' needs the number of batches: give data with a length, or a scheduler")
        return cosine(self.learner.optimizer, len(self.train_batches) * self.max_epochs)

    @abstractmethod
    def _cut(self, batch: BatchT, limit: MicroBatchLimit) -> Sequence[BatchT]:
        """The batch cut into what is forwarded at once."""

    @abstractmethod
    def _typed(self, batch: Any) -> BatchT:
        """A batch of the loader as what it must be; raises ValueError for anything else."""

    @abstractmethod
    def _share(self, batch: BatchT, share: Share) -> BatchT:
        """One process's part of a batch."""

    def _own(self, batch: BatchT) -> BatchT:
        """This process's part of a batch, on the device of the model."""
        own = self._share(batch, self.strategy.group.share(len(batch)))
        return type(own)(*(tensor.to(self.device) for tensor in vars(own).values()))

    def _check_same(self, batch: BatchT) -> None:
        ids = batch.token_ids.double().flatten()
        fingerprint = float((ids + 1.0) @ torch.arange(1.0, len(ids) + 1.0, dtype=torch.float64, device=ids.device))
        if not self.strategy.group.same(fingerprint):
            raise ValueError(
                "the processes were given different batches: each takes its own share of one global batch, so every "
                "loader must shuffle alike (give it a generator with the same seed on every process)"
            )

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.learner.model

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return device_of(self.model)

    def training_step(self, batch: Any) -> Metrics:
        """One optimiser step on one batch, and one of the schedule."""
        learning_mode(self.model, self.dropout)
        whole = self._typed(batch)
        self._check_same(whole)
        own = self._own(whole)
        micro_batches = MicroBatches(lambda limit: self._cut(own, limit), self.limit)
        metrics = update(
            self.strategy, [self.learner], micro_batches, self.algorithm.count, self.algorithm.losses, self.max_norm
        )
        self.limit = micro_batches.limit
        metrics["lr"] = self.learner.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None:
            self.scheduler.step()
        self.num_steps += 1
        return metrics

    def run(self, log_interval: int = 1) -> Metrics:
        """All epochs; returns the last step's metrics with those of the last evaluation."""
        total = len(self.train_batches) * self.max_epochs if isinstance(self.train_batches, Sized) else None
        shown = self.strategy.is_rank_0
        with Progress(self.learner.role, total, enabled=shown and self.tracker is None) as progress:
            while self.epoch < self.max_epochs:
                self._start_epoch(self.epoch)
                before = self.num_steps
                for batch in self.train_batches:
                    self.last_metrics = self.training_step(batch)
                    if self.tracker is not None and self.num_steps % log_interval == 0:
                        self.tracker.log(self._named(self.last_metrics), self.num_steps)
                    progress.note(self.last_metrics)
                    progress.advance()
                    if self.eval_interval is not None and self.num_steps % self.eval_interval == 0:
                        self.last_evaluation = self._evaluate_all()
                    self.after_step()
                if self.num_steps == before and not self._restored:
                    raise ValueError("the training data is empty: there is nothing to learn from")
                self.last_evaluation = self._evaluate_all()
                self.epoch += 1
                self._restored = False  # only the epoch taken up may have nothing left
        return {**self._named(self.last_metrics), **self.last_evaluation}

    def keep(self, snapshot: Snapshot) -> None:
        """Puts everything that training changes into a snapshot; the batches too, where they know where they stand."""
        keep_learner(snapshot, self.learner, self.strategy)
        snapshot.values["offline"] = {
            "num_steps": self.num_steps,
            "epoch": self.epoch,
            "metrics": self.last_metrics,
            "evaluation": self.last_evaluation,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "limit": vars(self.limit).copy(),
            "batches": self.train_batches.state_dict() if isinstance(self.train_batches, Resumable) else None,
        }
        keep_strategy(snapshot, self.strategy)

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept. Raises ValueError for batches that do not know where they stand."""
        if not isinstance(self.train_batches, Resumable):
            raise ValueError(
                "these batches cannot be taken up where they were left: give them state_dict and load_state_dict"
            )
        restore_learner(saved, self.learner)
        values = saved.values["offline"]
        self.num_steps, self.epoch = values["num_steps"], values["epoch"]
        self.last_metrics, self.last_evaluation = values["metrics"], values["evaluation"]
        self.limit = MicroBatchLimit(**values["limit"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(values["scheduler"])
        self.train_batches.load_state_dict(values["batches"])
        self._restored = True
        restore_strategy(saved, self.strategy)

    def _start_epoch(self, epoch: int) -> None:
        """Before the first batch of an epoch."""

    def _evaluate_all(self) -> Metrics:
        """Every evaluation set under its own name (`section/{name}_loss`, ...)."""
        metrics = {
            f"{section}/{name}_{metric}": number
            for name, batches in self.eval_sets.items()
            for section, metric, number in _split_names(self.evaluate(batches))
        }
        if metrics and self.tracker is not None:
            self.tracker.log(metrics, self.num_steps)
        return metrics

    def _named(self, metrics: Metrics) -> Metrics:
        section = self.learner.name.partition("/")[0]
        return {name if "/" in name else f"{section}/{name}": number for name, number in metrics.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> Metrics:
        """Metrics over all of `batches`, weighted by what each batch counts; the model's mode is left as it was."""
        sums: dict[str, float] = {}
        total = 0.0
        with evaluating(self.model), self.strategy.autocast():
            for batch in batches:
                for part in self._cut(self._own(self._typed(batch)), self.limit):
                    count = float(self.algorithm.count(part))
                    total += count
                    # Forwarded even where nothing counts: other processes do the same and may wait for this one.
                    for loss in self.algorithm.losses(part, max(count, 1.0)):
                        for name, number in {self.learner.name: loss.value, **loss.metrics}.items():
                            sums[name] = sums.get(name, 0.0) + float(number) * count
        names = sorted(sums)
        reduced = self.strategy.sum(
            torch.tensor([total, *(sums[name] for name in names)], dtype=torch.float64).to(self.device)
        )
        total = float(reduced[0])
        if total == 0:
            raise ValueError("the evaluation data is empty: there is nothing to evaluate on")
        return {name: float(number) / total for name, number in zip(names, reduced[1:], strict=True)}


def row_loader(data: Any, batch_size: int, collate: Callable[[Any], Any], alike: Group | None) -> DataLoader[Any]:
    """Batches of a dataset's rows: in order, or shuffled the same way in all processes of the group `alike`."""
    # A loader always draws, in order too: from a generator of its own, or evaluating would move torch's global one.
    generator = torch.Generator()
    if alike is not None:
        generator.manual_seed(alike.agreed(int(torch.empty((), dtype=torch.int64).random_())))
    return DataLoader(data, batch_size, shuffle=alike is not None, collate_fn=collate, generator=generator)


def _split_names(metrics: Metrics) -> list[tuple[str, str, float]]:
    return [(*name.split("/", 1), number) for name, number in metrics.items()]  # type: ignore[misc]


def require_lora(model: nn.Module, use_lora: int) -> None:
    """Refuses `use_lora` for a model that was built without LoRA."""
    if use_lora > 0 and not has_lora(model):
        raise ValueError(f"use_lora={use_lora} but the model has no LoRA layers: build it with lora_rank={use_lora}")
