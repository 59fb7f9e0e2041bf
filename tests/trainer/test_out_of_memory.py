"""Memory that does not suffice makes micro-batches smaller, and changes nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ppo_world import actor, algorithm, assert_same, clone, critic, rows, scores, trainer
from torch import nn

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.optimizer import HybridAdam
from prefero.strategies.base import Strategy
from prefero.strategies.ddp import DDPStrategy
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer.split import MicroBatches
from prefero.trainer.update import Learner, update
from prefero.types import Experience, Loss

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
]


def world() -> tuple[PPO, Experience]:
    ppo = PPO(actor(0), critic(1), actor(5), PPOSettings(kl_coef=0.3, value_clip=0.1))
    return ppo, ppo.experience(*rows(), scores())


def too_small_for(module: nn.Module, limit: int, error: RuntimeError) -> list[int]:
    """Lets the module fail on more rows than `limit`; returns the rows it was given."""
    given: list[int] = []

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(len(inputs[0]))
        if len(inputs[0]) > limit and torch.is_grad_enabled():
            raise error

    module.register_forward_pre_hook(check)
    return given


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_step_is_that_of_enough_memory(error: RuntimeError, role: str) -> None:
    ppo, batch = world()
    enough, little = clone(ppo), clone(ppo)
    metrics = trainer(enough).training_step(batch)
    given = too_small_for(getattr(little, role), 1, error)
    subject = trainer(little)
    with pytest.warns(UserWarning, match=r"memory does not suffice: \d+ tokens a forward pass from here on"):
        small_metrics = subject.training_step(batch)
    for one, other in ((enough.actor, little.actor), (enough.critic, little.critic)):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert small_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    # What was learned about the machine is remembered.
    given.clear()
    subject.training_step(batch)
    assert set(given) == {1}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_gradients_of_what_went_before_are_not_counted_twice(where: str, role: str) -> None:
    """The second micro-batch fails, once, when the first has left its gradients."""
    ppo, batch = world()
    enough, little = clone(ppo), clone(ppo)
    metrics = trainer(enough, micro_batch_size=2).training_step(batch)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ERRORS[0]

    def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not torch.is_grad_enabled():
            return
        if where == "forward":
            fail()
        else:
            first.register_hook(lambda gradient: fail())

    getattr(little, role).register_forward_hook(check)
    with pytest.warns(UserWarning, match="memory does not suffice"):
        small_metrics = trainer(little, micro_batch_size=2).training_step(batch)
    for one, other in ((enough.actor, little.actor), (enough.critic, little.critic)):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert small_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_one_row_that_is_too_large_is_named() -> None:
    ppo = algorithm()
    batch = ppo.experience(*rows(), scores())
    too_small_for(ppo.actor, 0, ERRORS[0])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not enough memory to train the actor on one row"):
        trainer(ppo).training_step(batch)


@pytest.mark.parametrize(
    ("strategy", "error"),
    [(lambda: NaiveStrategy("cpu"), RuntimeError("shapes do not fit")), (DDPStrategy, ERRORS[0])],
)
def test_other_errors_and_those_of_shared_models_are_not_hidden(strategy: Any, error: RuntimeError) -> None:
    model, made = nn.Linear(2, 1), strategy()
    assert isinstance(made, Strategy)
    learner = Learner("actor", "loss", model, HybridAdam(model.parameters()))

    def losses(batch: Experience, total: float) -> Iterator[Loss]:
        raise error
        yield

    _, batch = world()
    micro_batches = MicroBatches(lambda limit: [batch])
    with pytest.raises(type(error), match=str(error)[:10]):
        update(made, [learner], micro_batches, lambda batch: torch.tensor(4.0), losses)
