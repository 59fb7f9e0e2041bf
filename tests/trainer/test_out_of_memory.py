"""Memory that does not suffice halves what one forward pass is given, and nothing else changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ppo_world import actor, algorithm, assert_same, clone, critic, rows, scores, trainer
from torch import nn

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.optimizer import HybridAdam
from prefero.strategies.group import Group
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer.split import Passes, Portion
from prefero.trainer.update import Learner, update
from prefero.types import Loss

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


def too_small_for(module: nn.Module, limit: int, error: RuntimeError) -> list[int]:
    """Lets the module fail on more rows than `limit`; returns the rows it was given."""
    given: list[int] = []

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(len(inputs[0]))
        if len(inputs[0]) > limit and torch.is_grad_enabled():
            raise error

    module.register_forward_pre_hook(check)
    return given


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_step_is_that_of_enough_memory(error: RuntimeError, role: str) -> None:
    ppo = PPO(actor(0), critic(1), actor(5), PPOSettings(kl_coef=0.3, value_clip=0.1))
    batch = ppo.experience(*rows(), scores())
    enough, little = clone(ppo), clone(ppo)
    metrics = trainer(enough).training_step(batch)
    given = too_small_for(getattr(little, role), 1, error)
    subject = trainer(little)
    with pytest.warns(UserWarning, match="memory does not suffice: 1 rows a forward pass from here on"):
        small_metrics = subject.training_step(batch)
    for one, other in ((enough.actor, little.actor), (enough.critic, little.critic)):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert small_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    # What was learned about the machine is remembered.
    given.clear()
    subject.training_step(batch)
    assert set(given) == {1}


def test_one_row_that_is_too_large_is_named() -> None:
    ppo = algorithm()
    batch = ppo.experience(*rows(), scores())
    too_small_for(ppo.actor, 0, ERRORS[0])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not enough memory to train the actor on one row"):
        trainer(ppo).training_step(batch)


@pytest.mark.parametrize("world_size", [1, 2])
def test_other_errors_and_those_of_several_processes_are_not_hidden(world_size: int) -> None:
    model = nn.Linear(2, 1)
    strategy = NaiveStrategy("cpu")
    learner = Learner("actor", "loss", model, HybridAdam(model.parameters()))
    error = RuntimeError("shapes do not fit") if world_size == 1 else ERRORS[0]
    if world_size > 1:
        strategy.group = Group(0, 2)
        strategy.sum = lambda tensor: tensor  # type: ignore[method-assign]

    def losses(batch: torch.Tensor, total: float) -> Iterator[Loss]:
        raise error
        yield

    passes = Passes(lambda portion: [torch.ones(4, 2)], Portion())
    with pytest.raises(type(error), match=str(error)[:10]):
        update(strategy, [learner], passes, lambda batch: torch.tensor(4.0), losses)
