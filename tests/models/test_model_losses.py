"""The seed's loss modules and helpers, against numbers worked by hand."""

import math

import pytest
import torch

import prefero.models as models
from prefero.models.loss import (
    GPTLMLoss,
    LogExpLoss,
    LogSigLoss,
    PairWiseLoss,
    PolicyLoss,
    PPOPtxActorLoss,
    ValueLoss,
)
from prefero.models.utils import (
    compute_approx_kl,
    compute_reward,
    log_probs_from_logits,
    masked_mean,
    masked_normalize,
    normalize,
)

OLD = torch.zeros(2, 2)
NEW = torch.tensor([[math.log(1.5), math.log(0.5)], [math.log(1.1), 0.0]])
MASK = torch.tensor([[1, 1], [1, 0]])


def test_the_seeds_names_are_exported() -> None:
    expected = {"Actor", "Critic", "RewardModel", "LM", "PolicyLoss", "ValueLoss", "PPOPtxActorLoss", "PairWiseLoss",
                "LogSigLoss", "LogExpLoss"}  # fmt: skip
    assert expected == set(models.__all__)


def test_policy_loss_is_the_mean_over_rows_of_their_token_means() -> None:
    # Row 1, A = 2: min(1.5, 1.2)*2 = 2.4 and min(0.5, 0.8)*2 = 1.0. Row 2, A = -1: max(1.1, 1.1) = 1.1 lost.
    expected = ((-2.4 - 1.0) / 2 + 1.1) / 2
    assert PolicyLoss(0.2)(NEW, OLD, torch.tensor([2.0, -1.0]), MASK).item() == pytest.approx(expected)
    wide = torch.tensor([[2.0, 2.0], [-1.0, 99.0]])
    assert PolicyLoss(0.2)(NEW, OLD, wide, MASK).item() == pytest.approx(expected)


def test_value_loss_clips_around_the_old_value() -> None:
    values, old, target = torch.tensor([1.0, 0.2]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0])
    # max((1-2)^2, (0.4-2)^2) = 2.56 and 0.04, halved, averaged.
    assert ValueLoss(0.4)(values, old, target).item() == pytest.approx((2.56 + 0.04) / 4)
    assert ValueLoss(0.4)(values, old, target, torch.tensor([1, 0])).item() == pytest.approx(1.28)


def test_language_model_loss_shifts_and_skips() -> None:
    logits = torch.log(torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.9, 0.05, 0.05]]]))
    assert GPTLMLoss()(logits, torch.tensor([[0, 2, 1]])).item() == pytest.approx(-(math.log(0.5) + math.log(0.6)) / 2)
    labels = torch.tensor([[0, -100, 1]])
    assert GPTLMLoss()(logits, labels).item() == pytest.approx(-math.log(0.6))
    assert labels.tolist() == [[0, -100, 1]]


def test_ptx_adds_the_language_model_loss() -> None:
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    advantages = torch.tensor([1.0, 2.0])
    expected = PolicyLoss(0.2)(NEW, OLD, advantages, MASK) + 0.3 * GPTLMLoss()(logits, ids)
    assert PPOPtxActorLoss(0.2, 0.3)(NEW, OLD, advantages, logits, ids, MASK).item() == pytest.approx(expected.item())


def test_pair_losses_are_one_function() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0))) / 2
    for loss in (PairWiseLoss(), LogSigLoss(), LogExpLoss()):
        assert loss(chosen, rejected).item() == pytest.approx(expected)


def test_log_probs_of_aligned_labels() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    expected = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(log_probs_from_logits(logits, labels), expected)


def test_kl_is_that_of_the_policy_not_the_inverted_one() -> None:
    p, q = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.2, 0.8]).log()
    kl = (p.exp() * (p - q)).sum()
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True)
    estimate = compute_approx_kl(p[tokens][None], q[tokens][None])
    assert estimate.item() == pytest.approx(kl.item(), rel=0.02)
    poisoned = torch.cat([p[tokens][:4], torch.tensor([math.nan])])[None]
    base = torch.cat([q[tokens][:4], torch.tensor([0.0])])[None]
    assert compute_approx_kl(poisoned, base, torch.tensor([[1, 1, 1, 1, 0]])).isfinite().all()


def test_reward_is_penalised_unless_switched_off() -> None:
    logp, base = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    reward = compute_reward(torch.tensor([3.0]), 0.1, logp, base)
    assert reward.item() == pytest.approx(3.0 - 0.1 * sum(k3) / 2)
    assert compute_reward(3.0, 0.0, logp, base) == 3.0


def test_masked_helpers() -> None:
    x, mask = torch.tensor([[1.0, 3.0, math.nan], [5.0, 7.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(masked_mean(x, mask), torch.tensor([2.0, 7.0]))
    torch.testing.assert_close(masked_normalize(x, mask)[0], torch.tensor([-1.0, 1.0, 0.0]))
    y = torch.randn(50, 3) * 4 + 2
    torch.testing.assert_close(normalize(y).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize(y).square().mean(0), torch.ones(3), atol=1e-5, rtol=0)
