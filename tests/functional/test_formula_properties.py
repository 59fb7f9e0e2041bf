"""What must hold of the formulas for any numbers: worked cases, invariances, poison behind masks."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefero.functional import advantages, kl, logprobs, masked, policy, reward, supervised, value

POISON = [math.nan, math.inf, -math.inf, 1e30, -1e30]
quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def coin(seed: int, *shape: int, p: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)) < p


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- masked


def test_masked_sums_and_means_by_hand() -> None:
    x, mask = tensor([1.0, 2.0, 99.0], [3.0, 99.0, 99.0], [99.0, 99.0, 99.0]), tensor([1, 1, 0], [1, 0, 0], [0, 0, 0])
    assert masked.sum(x, mask) == 6
    assert masked.mean(x, mask) == 2
    assert masked.mean(x, mask, dim=1).tolist() == [1.5, 3.0, 0.0]
    assert masked.sum(x, mask, dim=1).tolist() == [3.0, 3.0, 0.0]
    assert masked.aggregate(x, mask) == 2
    assert masked.aggregate(x, mask, norm=12) == 0.5
    # The empty row is no sequence: it neither adds to the sum nor to the count.
    assert masked.aggregate(x, mask, "sequence_mean") == 2.25
    assert masked.aggregate(x, mask, "sequence_mean", norm=3) == 1.5
    assert masked.aggregate(x, mask, "sequence_sum_norm", norm=12) == 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float64])
def test_a_mask_may_have_any_type(dtype: torch.dtype) -> None:
    x, mask = normal(0, 3, 4), coin(1, 3, 4)
    assert masked.mean(x, mask.to(dtype)).item() == pytest.approx(x[mask].mean().item(), rel=1e-12)


def test_nothing_to_count_gives_zero_and_no_gradient() -> None:
    x = normal(0, 2, 3).requires_grad_()
    none = torch.zeros(2, 3)
    zero = torch.tensor(0.0)
    for result in (
        masked.mean(x, none),
        masked.whiten(x, none).sum(),
        masked.whiten(x, none, shift_mean=False, unbiased=True).sum(),
        masked.aggregate(x, none),
        masked.aggregate(x, none, "sequence_mean"),
        masked.aggregate(x, none, norm=zero),
        masked.aggregate(x, none, "sequence_sum_norm", norm=5),
        supervised.cross_entropy(x, none, zero),
        advantages.gae(x, x, none, 1.0, 0.95)[1].sum(),
    ):
        assert result == 0
        assert not torch.autograd.grad(result, x)[0].any()
    assert not kl.penalised_rewards(torch.ones(2), x, x + 1, none, 0.5).any()


@quick
@given(seeds, st.booleans(), st.booleans())
def test_whitening_gives_mean_zero_and_variance_one(seed: int, shift_mean: bool, unbiased: bool) -> None:
    x, mask = 3 * normal(seed, 4, 6) + 5, coin(seed + 1, 4, 6)
    mask[0, :2] = True
    kept = masked.whiten(x, mask, shift_mean, unbiased)[mask]
    assert kept.var(correction=int(unbiased)).item() == pytest.approx(1.0, abs=1e-6)
    assert kept.mean().item() == pytest.approx(0.0 if shift_mean else x[mask].mean().item(), abs=1e-9)
    assert torch.equal(kept.argsort(), x[mask].argsort())


@quick
@given(seeds, st.floats(-50, 50), st.floats(0.5, 20))
def test_whitening_does_not_see_shift_or_scale(seed: int, shift: float, scale: float) -> None:
    x, mask = normal(seed, 3, 5), coin(seed + 1, 3, 5)
    mask[0, :3] = True
    torch.testing.assert_close(masked.whiten(scale * x + shift, mask), masked.whiten(x, mask), rtol=1e-6, atol=1e-7)


def test_whitening_one_token_or_equal_tokens() -> None:
    one = tensor([1, 0, 0])
    for unbiased in (False, True):
        assert masked.whiten(tensor([7.0, 1.0, 2.0]), one, unbiased=unbiased).tolist() == [[0.0, 0.0, 0.0]]
        assert masked.whiten(tensor([7.0, 1.0, 2.0]), one, False, unbiased).tolist() == [[7.0, 0.0, 0.0]]
    assert masked.whiten(tensor([2.0, 2.0, 2.0]), tensor([1, 1, 1])).tolist() == [[0.0, 0.0, 0.0]]


@quick
@given(seeds, st.sampled_from(["token_mean", "sequence_mean", "sequence_sum_norm"]), st.integers(1, 5))
def test_micro_batches_with_the_global_count_add_up(seed: int, how: str, size: int) -> None:
    x, mask = normal(seed, 6, 4), coin(seed + 1, 6, 4, p=0.5)
    mask[0, 0] = True
    tokens, sequences = mask.sum(), mask.any(1).sum()
    norm = {"token_mean": tokens, "sequence_mean": sequences, "sequence_sum_norm": torch.tensor(6.0)}[how]
    whole = x.clone().requires_grad_()
    parts = x.clone().requires_grad_()
    loss = masked.aggregate(whole, mask, how, norm if how == "sequence_sum_norm" else None)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(6).split(size):
        piece = masked.aggregate(parts[rows], mask[rows], how, norm)
        piece.backward()
        total += piece.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-12)


def test_cross_entropy_divides_by_the_tokens_of_the_whole_update() -> None:
    lp, mask = tensor([-1.0, -2.0, -99.0]), tensor([1, 1, 0])
    assert supervised.cross_entropy(lp, mask, 2) == 1.5
    assert supervised.cross_entropy(lp, mask, 12) == 0.25
    assert supervised.cross_entropy(lp, mask, torch.tensor(12)) == 0.25


# ---------------------------------------------------------------- poison behind masks


def ppo_loss(x: dict[str, Tensor], mask: Tensor, dual: float | None) -> Tensor:
    return masked.aggregate(policy.ppo_clip(x["logprobs"], x["old"], x["advantages"], 0.2, 0.3, dual), mask)


Loss = Callable[[dict[str, Tensor], Tensor], Tensor]
MASKED: dict[str, Loss] = {
    "sum": lambda x, m: masked.sum(x["logprobs"], m),
    "mean": lambda x, m: masked.mean(x["logprobs"], m, dim=1).square().sum(),
    "whiten": lambda x, m: (masked.whiten(x["logprobs"], m) * m).pow(3).sum(),
    "whiten_rewards": lambda x, m: masked.whiten(x["logprobs"], m, False, True).pow(3).sum(),
    "token_mean": lambda x, m: masked.aggregate(x["logprobs"], m),
    "sequence_mean": lambda x, m: masked.aggregate(x["logprobs"], m, "sequence_mean"),
    "sequence_sum": lambda x, m: masked.aggregate(x["logprobs"], m, "sequence_sum_norm", 7),
    "cross_entropy": lambda x, m: supervised.cross_entropy(x["logprobs"], m, 11),
    "ppo": lambda x, m: ppo_loss(x, m, None),
    "ppo_dual": lambda x, m: ppo_loss(x, m, 3.0),
    "value": lambda x, m: masked.aggregate(value.clipped(x["logprobs"], x["old"], x["advantages"], 0.2), m),
    "gae": lambda x, m: advantages.gae(x["old"], x["logprobs"], m, 0.9, 0.8)[0].square().sum(),
    "returns": lambda x, m: advantages.gae(x["logprobs"], x["old"], m, 0.9, 0.8)[1].square().sum(),
    **{
        kind: lambda x, m, kind=kind: masked.aggregate(kl.estimate(x["logprobs"], x["old"], kind), m)
        for kind in ("k1", "k2", "k3")
    },
    **{
        f"rewards_{kind}": lambda x, m, kind=kind: (
            x["logprobs"][m].sum() * kl.penalised_rewards(x["score"], x["logprobs"], x["old"], m, 0.1, kind).sum()
        )
        for kind in ("k1", "k2", "k3")
    },
    "stats": lambda x, m: (
        x["logprobs"][m].sum() * torch.stack(policy.ppo_clip_stats(x["logprobs"], x["old"], m, 0.2, 0.2)).sum()
    ),
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", MASKED)
def test_poison_behind_the_mask_is_neither_seen_nor_differentiated(name: str, poison: float) -> None:
    mask = coin(3, 4, 6)
    mask[1] = False
    clean = {key: normal(i, 4, 6) for i, key in enumerate(("logprobs", "old", "advantages"))}
    clean["score"] = normal(9, 4)
    clean["logprobs"].requires_grad_()
    expected = MASKED[name](clean, mask)
    (slope,) = torch.autograd.grad(expected, clean["logprobs"])
    for target in [["logprobs"], ["old"], ["advantages"], ["logprobs", "old"], ["logprobs", "old", "advantages"]]:
        dirty = {key: copy.copy(x.detach()).clone() for key, x in clean.items()}
        for key in target:
            dirty[key][~mask] = poison
        dirty["score"][1] = poison
        dirty["logprobs"].requires_grad_()
        loss = MASKED[name](dirty, mask)
        (gradient,) = torch.autograd.grad(loss, dirty["logprobs"])
        assert torch.equal(loss, expected), target
        assert torch.equal(gradient, slope), target


@pytest.mark.parametrize("name", [n for n in MASKED if n not in ("stats",)])
def test_a_nan_inside_the_mask_is_not_hidden(name: str) -> None:
    mask = torch.ones(4, 6, dtype=torch.bool)
    x = {key: normal(i, 4, 6) for i, key in enumerate(("logprobs", "old", "advantages"))}
    x["score"] = normal(9, 4)
    x["logprobs"][2, 3] = math.nan
    assert MASKED[name](x, mask).isnan()


@pytest.mark.parametrize("poison", POISON)
def test_poisoned_logits_of_masked_tokens(poison: float) -> None:
    ids, mask = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    results = []
    for dirty in (False, True):
        logits = normal(0, 2, 4, 5)
        if dirty:
            # Position t predicts token t+1: row 0 needs positions 0 and 1, row 1 positions 1 and 2.
            logits[0, 2:] = poison
            logits[1, [0, 3]] = poison
        logits.requires_grad_()
        loss = masked.mean(logprobs.token_logprobs(logits, ids), mask)
        entropies = masked.sum(logprobs.entropy(logits), mask.roll(-1, 1))
        results.append((loss + entropies, torch.autograd.grad(loss + entropies, logits)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---------------------------------------------------------------- log-probabilities


@quick
@given(seeds, st.sampled_from([0.5, 0.7, 1.0, 1.3]), st.floats(-30, 30))
def test_token_logprobs_equal_log_softmax_and_ignore_a_shift(seed: int, temperature: float, shift: float) -> None:
    logits, ids = 3 * normal(seed, 3, 5, 7), torch.randint(0, 7, (3, 5), generator=generator(seed))
    ours, naive = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weights = normal(seed + 1, 3, 5)
    result = logprobs.token_logprobs(ours, ids, temperature)
    table = torch.log_softmax(naive / temperature, -1)
    expected = table[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(result[:, 1:], expected, rtol=1e-12, atol=1e-12)
    (result * weights).sum().backward()
    (expected * weights[:, 1:]).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logprobs.token_logprobs(logits + shift, ids, temperature), result.detach())


def test_token_logprobs_of_many_rows_and_of_one_token() -> None:
    logits, ids = normal(0, 30, 20, 5), torch.randint(0, 5, (30, 20), generator=generator(1))
    expected = torch.log_softmax(logits, -1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(logprobs.token_logprobs(logits, ids)[:, 1:], expected, rtol=1e-12, atol=1e-12)
    assert logprobs.token_logprobs(logits[:, :1], ids[:, :1]).tolist() == [[0.0]] * 30
    assert logprobs.token_logprobs(logits[:0], ids[:0]).shape == (0, 20)


def test_a_token_after_the_last_one_changes_nothing() -> None:
    logits, ids = normal(0, 2, 6, 9), torch.randint(0, 9, (2, 6), generator=generator(1))
    other = ids.clone()
    other[:, 4:] = (ids[:, 4:] + 1) % 9
    assert torch.equal(logprobs.token_logprobs(logits, ids)[:, :4], logprobs.token_logprobs(logits, other)[:, :4])


def test_entropy_of_even_certain_and_forbidden_choices() -> None:
    assert logprobs.entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2, rel=1e-6)
    certain = torch.tensor([[0.0, -1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    assert logprobs.entropy(certain).item() == 0.0
    forbidden = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    entropy = logprobs.entropy(forbidden)
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-12)
    (slope,) = torch.autograd.grad(entropy, forbidden)
    assert slope.abs().max() < 1e-12
    # Twice the temperature is half the logits.
    logits = normal(0, 3, 7)
    torch.testing.assert_close(logprobs.entropy(logits, 2.0), logprobs.entropy(logits / 2))


def test_gradients_against_finite_differences() -> None:
    logits = normal(0, 2, 3, 5).requires_grad_()
    ids = torch.tensor([[1, 4, 0], [2, 2, 3]])
    assert torch.autograd.gradcheck(lambda x: logprobs.token_logprobs(x, ids, 0.7), logits)
    assert torch.autograd.gradcheck(lambda x: logprobs.entropy(x, 0.7), logits)
    x, other = normal(1, 3, 4).requires_grad_(), normal(2, 3, 4).requires_grad_()
    mask = coin(3, 3, 4)
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda a, b, kind=kind: kl.estimate(a, b, kind), (x, other))
    assert torch.autograd.gradcheck(lambda a: masked.whiten(a, mask), x)
    assert torch.autograd.gradcheck(lambda a, b: advantages.gae(a, b, mask, 0.9, 0.8), (x, other))
    old, weight = other.detach(), normal(4, 3, 4)
    assert torch.autograd.gradcheck(lambda a: policy.ppo_clip(a, old, weight, 0.2, 0.3, 3.0), x)
    assert torch.autograd.gradcheck(lambda a: value.clipped(a, old, weight, 0.2), x)
    chosen, rejected = normal(5, 6).requires_grad_(), normal(6, 6).requires_grad_()
    margin = normal(7, 6).abs()
    assert torch.autograd.gradcheck(lambda a, b: reward.bradley_terry(a, b, margin, 0.1), (chosen, rejected))
    assert torch.autograd.gradcheck(reward.log_exp, (chosen, rejected))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_and_exponentiated_in_float32(half: torch.dtype) -> None:
    x, mask = normal(0, 4, 6).to(half), coin(1, 4, 6)
    for result in (
        masked.mean(x, mask),
        masked.whiten(x, mask),
        kl.estimate(x, x, "k3"),
        policy.ppo_clip(x, x, x, 0.2, 0.2),
        value.clipped(x, x, x, 0.2),
        reward.bradley_terry(x, x),
        logprobs.entropy(x),
        logprobs.token_logprobs(x[None], torch.zeros(1, 4, dtype=torch.long)),
        advantages.gae(x, x, mask, 1.0, 1.0)[0],
    ):
        assert result.dtype == torch.float32
    # 4096 halves of 1 and one of 0.25 do not add up in half precision.
    ones = torch.cat([torch.ones(1, 4096), torch.tensor([[0.25]])], dim=1).to(half)
    assert masked.sum(ones, torch.ones_like(ones)) == 4096.25


# ---------------------------------------------------------------- KL


@quick
@given(seeds)
def test_expectation_of_the_estimators_under_the_policy(seed: int) -> None:
    """Exact sums over a small vocabulary: k1 and k3 average to KL(policy || reference), in that direction."""
    lp, ref = (torch.log_softmax(normal(seed + i, 6), 0) for i in range(2))
    p = lp.exp()
    forward, reverse = (p * (lp - ref)).sum(), (ref.exp() * (ref - lp)).sum()
    mean = {kind: (p * kl.estimate(lp, ref, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], forward)
    torch.testing.assert_close(mean["k3"], forward)
    torch.testing.assert_close(mean["k2"], (p * (lp - ref) ** 2).sum() / 2)
    assert abs(forward - reverse) < 1e-12 or not torch.isclose(mean["k3"], reverse, rtol=1e-9)
    assert (kl.estimate(lp, ref, "k3") >= 0).all() and (kl.estimate(lp, ref, "k2") >= 0).all()


@quick
@given(seeds)
def test_gradient_of_the_estimators_in_a_loss(seed: int) -> None:
    """On policy k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy), k1 none."""
    theta = normal(seed, 6).requires_grad_()
    ref = torch.log_softmax(normal(seed + 1, 6), 0)
    lp = torch.log_softmax(theta, 0)

    def slope(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    p = lp.exp().detach()
    of_policy, of_reference = slope((lp.exp() * (lp - ref)).sum()), slope((ref.exp() * (ref - lp)).sum())
    torch.testing.assert_close(slope((p * kl.estimate(lp, ref, "k2")).sum()), of_policy)
    torch.testing.assert_close(slope((p * kl.estimate(lp, ref, "k3")).sum()), of_reference)
    assert slope((p * kl.estimate(lp, ref, "k1")).sum()).abs().max() < 1e-12
    ratio = (lp - lp.detach()).exp()
    torch.testing.assert_close(slope((p * ratio * kl.estimate(lp, ref, "k3")).sum()), of_policy)


def test_k3_is_exact_near_zero_and_finite_far_away() -> None:
    tiny = torch.tensor([1e-4])
    # exp(x) - 1 - x in float32 would be off by 100 % here.
    assert kl.estimate(tiny, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=0.3)
    far = kl.estimate(torch.tensor([-400.0]), torch.tensor([0.0]), "k3")
    assert torch.isfinite(far).all()


def test_penalised_rewards_by_hand() -> None:
    lp, ref = tensor([-1.0, -2.0, -3.0]), tensor([-1.5, -1.0, -3.0])
    score = tensor([10.0])[0]
    assert kl.penalised_rewards(score, lp, ref, tensor([1, 1, 1]), 0.1)[0].tolist() == pytest.approx([-0.05, 0.1, 10.0])
    assert kl.penalised_rewards(score, lp, ref, tensor([1, 1, 0]), 0.1)[0].tolist() == pytest.approx([-0.05, 10.1, 0.0])
    assert kl.penalised_rewards(score, lp, ref, tensor([1, 0, 1]), 0.1)[0].tolist() == pytest.approx([-0.05, 0.0, 10.0])
    assert kl.penalised_rewards(score, lp, ref, tensor([0, 1, 0]), 0.0)[0].tolist() == [0.0, 10.0, 0.0]
    assert kl.penalised_rewards(score, lp, ref, tensor([0, 0, 0]), 0.1)[0].tolist() == [0.0, 0.0, 0.0]
    # One action: the score and the penalty share the token.
    one = kl.penalised_rewards(score, lp[:, :1], ref[:, :1], tensor([1]), 0.1, "k2")
    assert one.tolist() == [[pytest.approx(10 - 0.1 * 0.125)]]


@quick
@given(seeds)
def test_token_penalties_add_up_to_the_sequence_penalty(seed: int) -> None:
    lp, ref, mask = -normal(seed, 3, 5).abs(), -normal(seed + 1, 3, 5).abs(), coin(seed + 2, 3, 5)
    mask[:, 0] = True
    score = normal(seed + 3, 3)
    rewards = kl.penalised_rewards(score, lp.requires_grad_(), ref, mask, 0.3)
    torch.testing.assert_close(rewards.sum(1), score - 0.3 * masked.sum(lp.detach() - ref, mask, dim=1))
    assert not rewards.requires_grad


def test_adaptive_coefficient_moves_the_right_way() -> None:
    coefficient = kl.AdaptiveCoefficient(0.1, target=2.0, horizon=1000)
    assert coefficient.update(2.0, 100) == 0.1
    assert coefficient.update(100.0, 100) == pytest.approx(0.1 * 1.02)
    assert coefficient.update(0.0, 100) == pytest.approx(0.1 * 1.02 * 0.98)
    with pytest.raises(ValueError, match="horizon above 2000"):  # one update may not end the penalty for good
        coefficient.update(0.0, 10**4)


# ---------------------------------------------------------------- advantages


def test_gae_does_not_bootstrap_from_padding() -> None:
    mask, values, rewards = tensor([1, 1, 0]), tensor([0.0, 0.0, 100.0]), tensor([0.0, 1.0, 0.0])
    ours, returns = advantages.gae(rewards, values, mask, 1.0, 0.95)
    assert ours[0].tolist() == pytest.approx([0.95, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([0.95, 1.0, 0.0])


def test_gae_by_hand_and_on_one_token() -> None:
    rewards, values = tensor([1.0, 0.0, 2.0]), tensor([0.5, 1.0, -1.0])
    ours, returns = advantages.gae(rewards, values, torch.ones(1, 3), 0.5, 0.5)
    # deltas: 1 + .5·1 - .5 = 1; 0 + .5·(-1) - 1 = -1.5; 2 - (-1) = 3
    assert ours[0].tolist() == [1 + 0.25 * (-1.5 + 0.25 * 3), -1.5 + 0.25 * 3, 3.0]
    assert returns[0].tolist() == (ours + values)[0].tolist()
    single, target = advantages.gae(tensor([2.0]), tensor([0.5]), tensor([1]), 0.9, 0.95)
    assert single.tolist() == [[1.5]] and target.tolist() == [[2.0]]
    assert advantages.gae(tensor([]), tensor([]), tensor([]), 0.9, 0.9)[0].shape == (1, 0)


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_with_holes_is_gae_of_the_tokens_pushed_together(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = normal(seed, 1, 8), normal(seed + 1, 1, 8), coin(seed + 2, 1, 8)
    ours, returns = advantages.gae(rewards, values, mask, gamma, lam)
    dense = advantages.gae(rewards[mask][None], values[mask][None], torch.ones(1, int(mask.sum())), gamma, lam)
    torch.testing.assert_close(ours[mask], dense[0][0])
    torch.testing.assert_close(returns[mask], dense[1][0])
    assert not ours[~mask].any() and not returns[~mask].any()


@quick
@given(seeds, st.floats(0, 1))
def test_the_two_ends_of_lambda(seed: int, gamma: float) -> None:
    rewards, values = normal(seed, 2, 5), normal(seed + 1, 2, 5)
    every = torch.ones(2, 5)
    _, monte_carlo = advantages.gae(rewards, values, every, gamma, 1.0)
    expected = torch.stack([sum(gamma**k * rewards[:, t + k] for k in range(5 - t)) for t in range(5)], 1)  # type: ignore[arg-type]
    torch.testing.assert_close(monte_carlo, expected)
    one_step, _ = advantages.gae(rewards, values, every, gamma, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros(2, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(one_step, rewards + gamma * after - values)


@quick
@given(seeds)
def test_rows_do_not_see_each_other_nor_extra_padding(seed: int) -> None:
    rewards, values, mask = normal(seed, 4, 5), normal(seed + 1, 4, 5), coin(seed + 2, 4, 5)
    order = torch.randperm(4, generator=generator(seed))
    whole = advantages.gae(rewards, values, mask, 0.9, 0.8)[0]
    assert torch.equal(advantages.gae(rewards[order], values[order], mask[order], 0.9, 0.8)[0], whole[order])
    padded = [torch.nn.functional.pad(x, (2, 3), value=fill) for x, fill in ((rewards, 9.0), (values, 9.0), (mask, 0))]
    assert torch.equal(advantages.gae(*padded, 0.9, 0.8)[0][:, 2:7], whole)
    lp, ref, score = -normal(seed + 3, 4, 5).abs(), -normal(seed + 4, 4, 5).abs(), normal(seed + 5, 4)
    shaped = kl.penalised_rewards(score, lp, ref, mask, 0.1)
    wide = [torch.nn.functional.pad(x, (2, 3), value=fill) for x, fill in ((lp, -9.0), (ref, -7.0), (mask, 0))]
    assert torch.equal(kl.penalised_rewards(score, *wide, 0.1)[:, 2:7], shaped)


# ---------------------------------------------------------------- policy, value


def per_token_ppo(ratio: float, advantage: float, dual: float | None = None) -> tuple[float, float]:
    lp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = policy.ppo_clip(lp, torch.zeros(1, dtype=torch.float64), tensor([advantage])[0], 0.2, 0.3, dual)
    (slope,) = torch.autograd.grad(loss, lp)
    return loss.item(), slope.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "slope"),
    [
        (1.0, 2.0, None, -2.0, -2.0),
        (1.1, 2.0, None, -2.2, -2.2),
        (1.5, 2.0, None, -2.6, 0.0),
        (0.5, 2.0, None, -1.0, -1.0),
        (0.5, -2.0, None, 1.6, 0.0),
        (1.5, -2.0, None, 3.0, 3.0),
        (5.0, -2.0, None, 10.0, 10.0),
        (5.0, -2.0, 3.0, 6.0, 0.0),
        (5.0, 2.0, 3.0, -2.6, 0.0),
        (2.0, -2.0, 3.0, 4.0, 4.0),
    ],
)
def test_ppo_clip_by_hand(ratio: float, advantage: float, dual: float | None, loss: float, slope: float) -> None:
    assert per_token_ppo(ratio, advantage, dual) == (pytest.approx(loss), pytest.approx(slope))


def test_ppo_clip_stays_finite_for_absurd_ratios() -> None:
    lp = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = policy.ppo_clip(lp, torch.zeros(2), -torch.ones(2), 0.2, 0.2)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), lp)[0]).all()


def test_only_the_new_policy_and_the_new_values_learn() -> None:
    x, old, target = (normal(i, 3, 4).requires_grad_() for i in range(3))
    for loss in (policy.ppo_clip(x, old, target, 0.2, 0.2), value.clipped(x, old, target, 0.2)):
        got = torch.autograd.grad(loss.sum(), (x, old, target), allow_unused=True)
        assert got[0] is not None and got[1] is None and got[2] is None


def test_ppo_clip_stats_by_hand() -> None:
    old = torch.zeros(1, 5, dtype=torch.float64)
    lp = torch.tensor([[1.0, 1.25, 0.75, 1.15, 9.0]], dtype=torch.float64).log()
    fraction, moved = policy.ppo_clip_stats(lp, old, tensor([1, 1, 1, 1, 0]), 0.2, 0.2)
    assert fraction == 0.5
    assert moved.item() == pytest.approx(sum(0.5 * math.log(r) ** 2 for r in (1.25, 0.75, 1.15)) / 4)
    fraction, _ = policy.ppo_clip_stats(lp, old, tensor([1, 1, 1, 1, 0]), 0.3, 0.2, norm=8)
    assert fraction == 1 / 8


@pytest.mark.parametrize(
    ("new", "old", "target", "loss", "slope"),
    [
        (1.0, 1.0, 2.0, 0.5, -1.0),
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),
        (2.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),
        (4.0, 1.0, 2.0, 2.0, 2.0),
        (0.0, 1.0, 2.0, 2.0, -2.0),
    ],
)
def test_clipped_value_loss_by_hand(new: float, old: float, target: float, loss: float, slope: float) -> None:
    v = torch.tensor([new], dtype=torch.float64, requires_grad=True)
    ours = value.clipped(v, tensor([old])[0], tensor([target])[0], 0.2)
    assert ours.item() == pytest.approx(loss)
    assert torch.autograd.grad(ours, v)[0].item() == pytest.approx(slope)


# ---------------------------------------------------------------- reward model


def test_reward_losses_by_hand() -> None:
    chosen, rejected = tensor([1.0, 3.0])[0], tensor([1.0, 1.0])[0]
    expected = (math.log(2) + math.log1p(math.exp(-2))) / 2
    assert reward.bradley_terry(chosen, rejected).item() == pytest.approx(expected)
    assert reward.log_exp(chosen, rejected).item() == pytest.approx(expected)
    with_margin = reward.bradley_terry(chosen, rejected, tensor([0.0, 2.0])[0]).item()
    assert with_margin == pytest.approx(math.log(2))
    centered = reward.bradley_terry(chosen, rejected, centering=0.5).item()
    assert centered == pytest.approx(expected + 0.5 * (4 + 16) / 2)
    assert reward.accuracy(chosen, rejected) == 0.75
    assert reward.accuracy(rejected, chosen) == 0.25
    assert reward.accuracy(chosen, torch.full_like(chosen, math.nan)).isnan()


def test_reward_losses_do_not_overflow() -> None:
    far = torch.tensor([1e4], requires_grad=True)
    for loss in (reward.bradley_terry(-far, far), reward.log_exp(-far, far)):
        assert loss.item() == pytest.approx(2e4)
        assert torch.autograd.grad(loss, far)[0].item() == pytest.approx(2.0)


@quick
@given(seeds, st.floats(-100, 100))
def test_comparisons_do_not_see_a_shift(seed: int, shift: float) -> None:
    chosen, rejected = normal(seed, 5), normal(seed + 1, 5)
    for formula in (reward.bradley_terry, reward.log_exp, reward.accuracy):
        torch.testing.assert_close(formula(chosen + shift, rejected + shift), formula(chosen, rejected))
    centered = reward.bradley_terry(chosen, rejected, centering=1.0)
    if abs(shift) > 10:
        assert reward.bradley_terry(chosen + shift, rejected + shift, centering=1.0) > centered


# ---------------------------------------------------------------- refusals

X = torch.zeros(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.long)
REFUSALS: list[tuple[str, Callable[[], object]]] = [
    ("kind='k4'.*'k1', 'k2', 'k3'", lambda: kl.estimate(X, X, "k4")),
    ("how='mean'.*'token_mean'", lambda: masked.aggregate(X, X, "mean")),
    ("norm=None.*sequence_sum_norm", lambda: masked.aggregate(X, X, "sequence_sum_norm")),
    ("norm=0 ", lambda: masked.aggregate(X, X, norm=0)),
    ("norm=nan", lambda: masked.aggregate(X, X, norm=math.nan)),
    (r"\[B, T\], not \[3\]", lambda: masked.aggregate(X[0], X[0], "sequence_mean")),
    (r"mask has shape \[2, 2\] but x has \[2, 3\]", lambda: masked.mean(X, X[:, :2])),
    (r"mask has shape \[3\]", lambda: masked.whiten(X, X[0])),
    (r"ref_logprobs has shape \[2\]", lambda: kl.estimate(X, X[:, 0])),
    (r"score has shape \[2, 2\].*\[B\]", lambda: kl.penalised_rewards(X[:, :2], X, X, X, 0.1)),
    (r"action_mask has shape \[2, 2\]", lambda: kl.penalised_rewards(X[:, 0], X, X, X[:, :2], 0.1)),
    ("coefficient=-0.1", lambda: kl.penalised_rewards(X[:, 0], X, X, X, -0.1)),
    ("coefficient=nan", lambda: kl.penalised_rewards(X[:, 0], X, X, X, math.nan)),
    ("target=0", lambda: kl.AdaptiveCoefficient(0.1, 0, 100)),
    ("horizon=-1", lambda: kl.AdaptiveCoefficient(0.1, 6, -1)),
    ("initial=-1", lambda: kl.AdaptiveCoefficient(-1, 6, 100)),
    ("kl=nan", lambda: kl.AdaptiveCoefficient(0.1, 6, 100).update(math.nan, 1)),
    ("kl=inf", lambda: kl.AdaptiveCoefficient(0.1, 6, 100).update(math.inf, 1)),
    ("num_samples=-1", lambda: kl.AdaptiveCoefficient(0.1, 6, 100).update(1.0, -1)),
    ("gamma=1.1", lambda: advantages.gae(X, X, X, 1.1, 0.95)),
    ("lam=-0.1", lambda: advantages.gae(X, X, X, 1.0, -0.1)),
    (r"values has shape \[2\]", lambda: advantages.gae(X, X[:, 0], X, 1.0, 1.0)),
    (r"rewards has shape \[2\]; give \[B, T\]", lambda: advantages.gae(*[X[:, 0]] * 3, 1.0, 1.0)),
    ("clip_low=-0.2", lambda: policy.ppo_clip(X, X, X, -0.2, 0.2)),
    ("clip_high=nan", lambda: policy.ppo_clip(X, X, X, 0.2, math.nan)),
    ("dual_clip=1.0", lambda: policy.ppo_clip(X, X, X, 0.2, 0.2, 1.0)),
    (r"advantages has shape \[2, 1\]", lambda: policy.ppo_clip(X, X, X[:, :1], 0.2, 0.2)),
    ("clip=-1", lambda: value.clipped(X, X, X, -1)),
    (r"returns has shape \[2\]", lambda: value.clipped(X, X, X[:, 0], 0.2)),
    (r"rejected has shape \[2, 2\]", lambda: reward.bradley_terry(X, X[:, :2])),
    (r"margin has shape \[2\]", lambda: reward.bradley_terry(X, X, X[:, 0])),
    ("centering=-1", lambda: reward.bradley_terry(X, X, centering=-1)),
    ("chosen is empty", lambda: reward.bradley_terry(X[:0], X[:0])),
    ("chosen is empty", lambda: reward.accuracy(X[:0], X[:0])),
    ("temperature=0.0", lambda: logprobs.entropy(X, 0.0)),
    (r"logits has shape \[2, 0\]", lambda: logprobs.entropy(X[:, :0])),
    ("temperature=-1", lambda: logprobs.token_logprobs(X[..., None], IDS, -1)),
    ("temperature=inf", lambda: logprobs.token_logprobs(X[..., None], IDS, math.inf)),
    (r"logits has shape \[2, 3\]", lambda: logprobs.token_logprobs(X, IDS)),
    ("token_ids holds -100.*0..4", lambda: logprobs.token_logprobs(torch.zeros(2, 3, 5), IDS - 100)),
    ("token_ids holds 5.*0..4.*mask", lambda: logprobs.token_logprobs(torch.zeros(2, 3, 5), IDS + 5)),
    ("token_ids has dtype torch.float32", lambda: logprobs.token_logprobs(torch.zeros(2, 3, 5), IDS.float())),
    ("total=0 ", lambda: supervised.cross_entropy(X, X, 0)),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS, ids=[message for message, _ in REFUSALS])
def test_wrong_arguments_are_refused_by_name_value_and_cure(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert any(cure in str(error.value) for cure in ("use ", "give ", "put ")), "the message names no cure"
