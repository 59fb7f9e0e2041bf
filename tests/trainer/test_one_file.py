"""The one-file example and the library learn the same from the same rollouts."""

from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ppo_world import actor, critic, rows, scores
from scripts import load_script

from prefero.algorithms.ppo import PPOSettings
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "ppo_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script(EXAMPLE)


def test_the_algorithm_does_not_use_the_library() -> None:
    assert "import prefero" not in EXAMPLE.read_text() and "from prefero" not in EXAMPLE.read_text()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_losses_and_weights_are_the_librarys(example: ModuleType, temperature: float) -> None:
    policy, values, reference = actor(0), critic(1), actor(5)
    numbers = example.Numbers(temperature=temperature, epochs=3)
    theirs, their_reference = deepcopy(policy.model), deepcopy(reference.model)
    their_critic = example.Critic(deepcopy(values.model), 32).double()
    their_critic.head.load_state_dict(values.value_head.state_dict())
    settings = PPOSettings(kl_coef=numbers.kl_coef, gamma=numbers.gamma, lam=numbers.lam, clip_low=numbers.clip,
                           value_clip=numbers.value_clip, temperature=temperature)  # fmt: skip
    trainer = PPOTrainer(
        NaiveStrategy("cpu"), policy, values, torch.nn.Linear(1, 1), reference,
        torch.optim.AdamW(policy.parameters(), lr=1e-2), torch.optim.AdamW(values.parameters(), lr=1e-2),
        train_batch_size=6, max_epochs=3, settings=settings, temperature=temperature, micro_batch_size=4,
    )  # fmt: skip
    rollouts = rows()
    made = trainer.algorithm.experience(*rollouts, scores())
    estimates = example.estimate(theirs, their_critic, their_reference, *rollouts, scores(), numbers)
    for ours, other in zip((made.action_log_probs, made.values, made.advantages), estimates, strict=False):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.info["kl"], estimates[4])

    losses: list[tuple[float, float]] = []
    step = trainer.training_step
    trainer.training_step = lambda batch: losses.append(  # type: ignore[method-assign]
        ((metrics := step(batch))["actor_loss"], metrics["critic_loss"])
    ) or metrics  # fmt: skip
    trainer.replay_buffer.append(made)
    trainer.learn()
    optimizers = (
        torch.optim.AdamW(theirs.parameters(), lr=1e-2),
        torch.optim.AdamW(their_critic.parameters(), lr=1e-2),
    )
    their_losses = example.learn(theirs, their_critic, *optimizers, rollouts, estimates, numbers)
    for ours, other in zip(losses, their_losses, strict=True):
        assert ours == pytest.approx(other, rel=1e-5, abs=1e-8)
    assert len({round(loss, 6) for loss, _ in losses}) == 3
    for ours, other in ((policy.model, theirs), (values.model, their_critic.trunk)):
        for (name, one), two in zip(ours.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)
