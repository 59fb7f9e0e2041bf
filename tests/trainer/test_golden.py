"""Twenty steps of a tiny PPO run, number for number.

    python tests/trainer/test_golden.py --regenerate

rewrites the file, to be done only when the numbers are meant to change.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for --regenerate, where pytest does not set the paths

from ppo_world import EOS, actor, counts_token, critic, prompts
from tiny import tiny_tokenizer

from prefero.algorithms.ppo import PPOSettings
from prefero.functional.kl import AdaptiveCoefficient
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer

GOLDEN = Path(__file__).with_name("golden_ppo.json")
WATCHED = (
    "rollout/score", "rollout/kl", "rollout/length", "policy/kl_coef", "actor_loss", "critic_loss",
    "policy/entropy", "policy/approx_kl", "actor/gradient_norm_max", "value/explained_variance",
)  # fmt: skip


def trajectory(num_steps: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    policy, values, reference = actor(0), critic(1), actor(0)
    trainer = PPOTrainer(
        NaiveStrategy("cpu"), policy, values, counts_token(5), reference,
        torch.optim.Adam(policy.parameters(), lr=3e-3), torch.optim.Adam(values.parameters(), lr=3e-3),
        train_batch_size=16, micro_batch_size=8, max_norm=1.0, num_samples=4,
        sampling=SamplingParams(5, temperature=0.9),
        engine=HFEngine(policy, tiny_tokenizer(), eos_token_ids=[EOS]),
        settings=PPOSettings(kl_coef=AdaptiveCoefficient(0.05, 0.5, 100), temperature=0.9, missing_eos_penalty=0.1),
    )  # fmt: skip
    steps = [trainer.step(prompts()) for _ in range(num_steps)]
    return [{name: metrics[name] for name in WATCHED} for metrics in steps]


def test_twenty_steps_are_what_they_were() -> None:
    golden = json.loads(GOLDEN.read_text())
    for step, (found, expected) in enumerate(zip(trajectory(20), golden, strict=True)):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), f"step {step}"


def test_the_golden_run_learned() -> None:
    golden = json.loads(GOLDEN.read_text())
    first, last = (sum(step["rollout/score"] for step in part) for part in (golden[:5], golden[-5:]))
    assert last > 1.5 * first
    assert abs(golden[0]["rollout/kl"]) < 1e-6 and golden[-1]["rollout/kl"] > 0.0


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(trajectory(20), indent=1) + "\n")
