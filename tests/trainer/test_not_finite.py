"""Losses and gradients that are not finite: skipped before anything is touched, counted, and the end after too many."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from prefero.optimizer import HybridAdam
from prefero.strategies import NaiveStrategy
from prefero.strategies.scaling import LossScale
from prefero.trainer.split import MicroBatches
from prefero.trainer.update import Learner, update
from prefero.types import Loss, Metrics


class Rig:
    """A linear model that learns from micro-batches of numbers; a number may spoil its loss or its gradient."""

    def __init__(self, strategy: NaiveStrategy, max_skipped: int = 3) -> None:
        torch.manual_seed(0)
        self.strategy = strategy
        strategy.max_skipped = max_skipped
        self.model = nn.Linear(2, 1)
        optimizer = HybridAdam(self.model.parameters(), lr=0.1)
        self.learner = Learner("actor", "actor_loss", *strategy.prepare((self.model, optimizer)))

    def losses(self, batch: Tensor, total: float) -> Iterator[Loss]:
        yield Loss("actor", self.model(batch).square().sum() / total, {})

    def step(self, *micro_batches: Tensor) -> Metrics:
        return update(
            self.strategy, [self.learner], MicroBatches(lambda limit: micro_batches),
            lambda batch: torch.tensor(float(len(batch))), self.losses,
        )  # fmt: skip

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()


GOOD = torch.ones(3, 2)
NAN, INF, LARGE = GOOD * math.nan, GOOD * math.inf, GOOD * 1e25  # squared, the last one is too large for float32


@pytest.mark.parametrize("bad", [NAN, INF, LARGE], ids=["nan", "inf", "overflow"])
def test_the_step_is_skipped_and_counted_and_training_goes_on(bad: Tensor) -> None:
    rig, clean = Rig(NaiveStrategy("cpu")), Rig(NaiveStrategy("cpu"))
    for each in (rig, clean):
        each.step(GOOD, GOOD)
    before = rig.weights()
    metrics = rig.step(GOOD, bad)  # one micro-batch is enough to spoil the step
    assert torch.equal(rig.weights(), before)
    assert metrics["actor/skipped_max"] == 1.0 and not math.isfinite(metrics["actor/gradient_norm_max"])
    assert rig.strategy.skipped_steps == 1
    metrics = rig.step(GOOD)
    clean.step(GOOD)
    assert metrics["actor/skipped_max"] == 0.0
    assert torch.equal(rig.weights(), clean.weights()), "the optimizer's own state was not touched either"


def test_a_constant_that_is_not_finite_is_a_bad_loss_too() -> None:
    """Its gradient alone would look healthy."""

    class Shifted(Rig):
        def losses(self, batch: Tensor, total: float) -> Iterator[Loss]:
            yield Loss("actor", next(super().losses(batch, total)).value + math.inf, {})

    rig = Shifted(NaiveStrategy("cpu"))
    before = rig.weights()
    assert rig.step(GOOD)["actor/skipped_max"] == 1.0
    assert torch.equal(rig.weights(), before)


def test_too_many_in_a_row_end_the_run_and_tell_where_it_began() -> None:
    rig = Rig(NaiveStrategy("cpu"))
    for batch in (GOOD, NAN, NAN, GOOD, NAN, NAN):
        rig.step(batch)
    before = rig.weights()
    with pytest.raises(ValueError, match=r"actor was not finite in 3 optimizer steps in a row, from its step 5 on"):
        rig.step(NAN)
    assert torch.equal(rig.weights(), before)
    assert rig.strategy.skipped_steps == 5


def test_a_loss_scale_may_shrink_first() -> None:
    scale = LossScale(initial_scale=2.0**4, hysteresis=1)
    rig = Rig(NaiveStrategy("cpu", precision="fp16", loss_scale=scale))
    for _ in range(3 + 2):  # the scale of 16 is 1 after four halvings; the step that leaves it there counts already
        rig.step(NAN)
    with pytest.raises(ValueError, match="from its step 4 on"):
        rig.step(NAN)
