"""Descending our own formulas with exact expectations ends where the algebra says it must.

The cases and their optima are those of tests/vectors/toy_optimum.json. A: a bandit of six arms with a KL penalty,
once per estimator and place; B: an autoregressive policy over three tokens of three, penalised token by token.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefero.functional import advantages, kl, logprobs, masked, policy

TOY = json.loads((Path(__file__).parents[1] / "vectors" / "toy_optimum.json").read_text())
BETA = 0.5


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def descend(
    loss: Callable[[Tensor], Tensor], visits: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float
) -> Tensor:
    """Natural gradient descent: a table of softmaxes needs each slope divided by how often its choice is made.

    It ends where plain descent would, thousands of steps earlier.
    """
    theta = start.clone()
    for _ in range(steps):
        theta.requires_grad_()
        (slope,) = torch.autograd.grad(loss(theta), theta)
        theta = theta.detach() - rate * slope / visits(theta.detach())
    return theta


# ---------------------------------------------------------------- A

ARMS = TOY["A_inputs"]
REWARD = torch.tensor(ARMS["r"], dtype=torch.float64)
REFERENCE = torch.tensor(ARMS["ref"], dtype=torch.float64).log()
BOLTZMANN = torch.tensor(ARMS["boltzmann"], dtype=torch.float64)
FORWARD = torch.tensor(ARMS["forward_kl_optimum"], dtype=torch.float64)
ONE_TOKEN = torch.ones(6, 1)


def bandit_loss(theta: Tensor, kind: str, place: str) -> Tensor:
    """Six completions of one token, each weighted by its probability: an expectation, not a sample."""
    lp = torch.log_softmax(theta, 0)[:, None]
    weight = lp.detach().exp()
    reference = REFERENCE[:, None]
    penalty = BETA if place == "reward" else 0.0
    rewards = kl.penalised_rewards(REWARD, lp, reference, ONE_TOKEN, penalty, "k1" if place != "reward" else kind)
    baseline = (weight * rewards).sum().expand(6, 1)
    gains, _ = advantages.gae(rewards, baseline, ONE_TOKEN, 1.0, 0.95)
    loss = policy.ppo_clip(lp, lp.detach(), gains, 0.2, 0.2)
    if place.startswith("loss"):
        estimate = kl.estimate(lp, reference, kind)
        loss = loss + BETA * (estimate * (lp - lp.detach()).exp() if place == "loss, ratio" else estimate)
    return masked.aggregate(weight * loss, ONE_TOKEN, "sequence_sum_norm", norm=1)


def bandit(kind: str, place: str) -> Tensor:
    def visits(theta: Tensor) -> Tensor:
        return torch.softmax(theta, 0)

    return visits(descend(lambda theta: bandit_loss(theta, kind, place), visits, REFERENCE, 300, 0.2))


@pytest.mark.parametrize(
    ("kind", "place", "optimum"),
    [
        ("k1", "reward", BOLTZMANN),
        ("k2", "loss", BOLTZMANN),
        ("k3", "loss, ratio", BOLTZMANN),
        ("k1", "loss, ratio", BOLTZMANN),
        ("k3", "loss", FORWARD),
    ],
)
def test_each_estimator_and_place_reaches_its_own_optimum(kind: str, place: str, optimum: Tensor) -> None:
    reached = bandit(kind, place)
    other = FORWARD if optimum is BOLTZMANN else BOLTZMANN
    assert total_variation(reached, optimum) < 1e-8
    assert total_variation(reached, other) == pytest.approx(ARMS["tv_boltz_vs_fwd"], abs=1e-8)


def test_k1_in_the_loss_is_no_penalty_at_all() -> None:
    reached = bandit("k1", "loss")
    assert int(reached.argmax()) == ARMS["greedy"]
    assert reached.max() > 0.99


# ---------------------------------------------------------------- B

VOCAB, LENGTH = 3, 3
SEQUENCES = list(itertools.product(range(VOCAB), repeat=LENGTH))
PREFIXES = {
    prefix: i for i, prefix in enumerate(p for t in range(LENGTH) for p in itertools.product(range(3), repeat=t))
}
STATES = torch.tensor([[PREFIXES[s[:t]] for t in range(LENGTH)] for s in SEQUENCES])
TOKENS = torch.tensor([(0, *s) for s in SEQUENCES])  # a first token that nothing predicts
SCORES = torch.tensor(np.random.RandomState(1).randn(len(SEQUENCES)))
START = torch.tensor(np.random.RandomState(2).randn(len(PREFIXES), VOCAB))
ACTIONS = torch.ones(len(SEQUENCES), LENGTH)


def completion_logprobs(theta: Tensor) -> Tensor:
    logits = torch.cat([theta[STATES], torch.zeros(len(SEQUENCES), 1, VOCAB, dtype=torch.float64)], dim=1)
    return logprobs.token_logprobs(logits, TOKENS)[:, 1:]


def test_token_level_penalty_reaches_the_optimum_over_sequences() -> None:
    reference = completion_logprobs(START)
    no_values = torch.zeros_like(reference)

    def loss(theta: Tensor) -> Tensor:
        lp = completion_logprobs(theta)
        rewards = kl.penalised_rewards(SCORES, lp, reference, ACTIONS, BETA, "k1")
        gains, returns = advantages.gae(rewards, no_values, ACTIONS, 1.0, 1.0)
        assert torch.equal(gains, returns)
        tokens = policy.ppo_clip(lp, lp.detach(), gains, 0.2, 0.2)
        weight = lp.detach().sum(1, keepdim=True).exp()
        return masked.aggregate(weight * tokens, ACTIONS, "sequence_sum_norm", norm=1)

    def objective(theta: Tensor) -> float:
        lp = completion_logprobs(theta)
        value = masked.sum(lp - reference, ACTIONS, dim=1)
        return float((lp.sum(1).exp() * (SCORES - BETA * value)).sum())

    def visits(theta: Tensor) -> Tensor:
        probability = completion_logprobs(theta).sum(1).exp()
        flat = (STATES * VOCAB + TOKENS[:, 1:]).flatten()
        counts = torch.zeros(theta.numel(), dtype=torch.float64)
        return counts.index_add(0, flat, probability.repeat_interleave(LENGTH)).view_as(theta)

    reached = descend(loss, visits, START, 300, 0.2)
    star = torch.softmax(reference.sum(1) + SCORES / BETA, 0)
    assert objective(START) == pytest.approx(TOY["B"]["J_ref"], abs=1e-9)
    assert objective(reached) == pytest.approx(TOY["B"]["J_star"], abs=1e-8)
    probabilities = completion_logprobs(reached).sum(1).exp()
    assert total_variation(probabilities, star) < 1e-6
    divergence = (probabilities * masked.sum(completion_logprobs(reached) - reference, ACTIONS, dim=1)).sum()
    assert divergence.item() == pytest.approx(TOY["B"]["kl_star"], abs=1e-6)
