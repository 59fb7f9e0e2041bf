"""One optimiser step from any split into micro-batches: the same gradient, the same metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prefero.faults import fault
from prefero.models.trunk import out_of_memory
from prefero.strategies.base import Strategy
from prefero.trainer.split import BatchT, MicroBatches
from prefero.types import Loss, Metrics

_NO_ROOM = (
    "there is not enough memory to train the {} on one row: use shorter texts, gradient checkpointing "
    "(model.gradient_checkpointing), LoRA (model.lora_rank), or share the models out (strategy.kind fsdp)"
)


@dataclass
class StepCount:
    """The optimizer steps of one learner: how many there were, and how many of the latest had to be skipped."""

    asked: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Learner:
    """A model with its optimizer, and the name its loss is reported under.

    Raises ValueError for an optimizer that holds no parameter of the model: its steps would change nothing.
    """

    role: str
    name: str
    model: nn.Module
    optimizer: Optimizer
    steps: StepCount = field(default_factory=StepCount)

    def __post_init__(self) -> None:
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in self.model.parameters()):
            raise ValueError(
                f"the optimizer given for the {self.role} holds no parameter of it: build it from the {self.role}'s "
                "parameters()"
            )

    def stepped(self, norm: float, strategy: Strategy) -> None:
        """After a step with a gradient of this norm. Raises ValueError when too many in a row were skipped."""
        self.steps.asked += 1
        if math.isfinite(norm):
            self.steps.skipped_in_a_row = 0
        elif strategy.loss_scale is None or not strategy.loss_scale.may_shrink:
            self.steps.skipped_in_a_row += 1
        if self.steps.skipped_in_a_row >= strategy.max_skipped:
            first = self.steps.asked - self.steps.skipped_in_a_row + 1
            raise ValueError(
                f"a loss or gradient of the {self.role} was not finite in {self.steps.skipped_in_a_row} optimizer "
                f"steps in a row, from its step {first} on (each was skipped, the weights are as they were before it): "
                "lower the learning rate, clip gradients (max_norm; in a config strategy.max_grad_norm), look for "
                "broken rows in the data, or allow more of them (strategy.max_skipped)"
            )


def update(
    strategy: Strategy,
    learners: Sequence[Learner],
    micro_batches: MicroBatches[BatchT],
    count: Callable[[BatchT], Tensor],
    losses: Callable[[BatchT, float], Iterator[Loss]],
    max_norm: float | None = None,
    check: Callable[[Metrics], None] | None = None,
) -> Metrics:
    """Steps every learner once on the whole batch, a forward pass a part, and returns the metrics of the whole.

    Learners go one after the other: all micro-batches of the first are forwarded, backwarded and stepped before the
    second one's graphs exist; `check` sees the first one's metrics before anything is stepped. Where a loss or a
    gradient is not finite, in any process, all processes skip the step (`{role}/skipped_max` is 1). Where memory runs
    out, and the strategy allows it, the learner's step is begun again with smaller parts, which changes the masks of
    dropout and nothing else. Raises ValueError when nothing counts, when too many steps in a row were skipped, or when
    there is no memory for one row.
    """
    total = float(strategy.sum(torch.stack([count(batch) for batch in micro_batches.parts]).sum()))
    if total <= 0:
        raise ValueError(
            "there is nothing to learn from in this batch: every token is masked out (check the loss mask)"
        )
    streams = [losses(batch, total) for batch in micro_batches.parts]
    metrics: dict[str, Tensor] = {}
    for place, learner in enumerate(learners):
        skip = 0
        while (found := _backward(strategy, learner, streams, skip)) is None:
            learner.optimizer.zero_grad()
            if not micro_batches.halve():
                raise ValueError(_NO_ROOM.format(learner.role))
            tokens = micro_batches.limit.tokens
            warnings.warn(f"memory does not suffice: {tokens} tokens a forward pass from here on", stacklevel=3)
            streams, skip = [losses(batch, total) for batch in micro_batches.parts], place
        if check is not None and not metrics:
            check(_reduced(strategy, found))
        metrics |= found
        fault("step")
        norm = strategy.optimizer_step(learner.optimizer, max_norm=max_norm)
        metrics[f"{learner.role}/gradient_norm_max"] = torch.tensor(norm)
        metrics[f"{learner.role}/skipped_max"] = torch.tensor(float(not math.isfinite(norm)))
        learner.stepped(norm, strategy)
    return _reduced(strategy, metrics)


def _backward(
    strategy: Strategy, learner: Learner, streams: Sequence[Iterator[Loss]], skip: int
) -> dict[str, Tensor] | None:
    """The gradients of one learner, and its metrics; None where memory did not suffice, but less may do.

    skip: how many losses, of learners that have stepped already, come first.
    """
    metrics: dict[str, Tensor] = {}
    try:
        for stream in streams:
            with strategy.micro_batch(learner.model, last=stream is streams[-1]):
                with strategy.autocast():
                    with torch.no_grad():
                        for _ in range(skip):
                            next(stream)
                    loss = next(stream)
                assert loss.role == learner.role, f"the algorithm yields {loss.role}, the trainer steps {learner.role}"
                # A loss that is not finite makes all of the gradients so, and thereby every process skip the step.
                value = loss.value if bool(torch.isfinite(loss.value)) else loss.value * math.nan
                fault("backward")
                strategy.backward(value, learner.model, learner.optimizer)
            _add(metrics, {learner.name: loss.value.detach(), **loss.metrics})
    except RuntimeError as error:
        if not strategy.can_repeat or not out_of_memory(error):
            raise
        return None
    return metrics


def _add(metrics: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, number in more.items():
        if name not in metrics:
            metrics[name] = number
        else:
            metrics[name] = torch.maximum(metrics[name], number) if name.endswith("_max") else metrics[name] + number


def _reduced(strategy: Strategy, metrics: Mapping[str, Tensor]) -> Metrics:
    """Sums over processes, the greatest for names in `_max`."""
    greatest = [name for name in metrics if name.endswith("_max")]
    sums = [name for name in metrics if name not in greatest]
    numbers: Metrics = {}
    for names, reduce in ((sums, strategy.sum), (greatest, strategy.group.max)):
        reduced = reduce(torch.stack([metrics[name].double().cpu() for name in names]))
        numbers |= dict(zip(names, reduced.tolist(), strict=True))
    return {name: numbers[name] for name in metrics}


def cosine(optimizer: Optimizer, num_steps: int, warmup: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate from its full value (after `warmup` linear steps) down a cosine to 0 at `num_steps`."""
    span = max(num_steps - warmup, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * min((step - warmup) / span, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
