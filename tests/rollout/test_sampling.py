"""Keyed random numbers and inverse-CDF draws: the right distribution, the same numbers wherever a row stands."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from prefero.rollout.sampling import draw, inverse_cdf, penalised, stream_key, uniforms

DRAWS = 20_000
LOGITS = torch.linspace(-2.0, 2.5, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]


def keyed(n: int, seed: int = 0, position: int = 0) -> torch.Tensor:
    return uniforms(torch.tensor([stream_key(seed, 0, str(i), 0) for i in range(n)]), position)


def chi_squared(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Standardised: about 0 plus or minus 1 when the tokens come from probs."""
    kept = probs > 0
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[~kept].sum() == 0
    expected = probs[kept] * len(tokens)
    freedom = int(kept.sum()) - 1
    return float((((counts[kept] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_draws_follow_the_softmax(temperature):
    drawn = draw(LOGITS.expand(DRAWS, -1), keyed(DRAWS), temperature=temperature)
    probs = (LOGITS.double() / temperature).softmax(-1)
    assert chi_squared(drawn.token_ids, probs) < 6
    torch.testing.assert_close(drawn.logprobs, probs.log()[drawn.token_ids], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.sampling_logprobs, drawn.logprobs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.8), (5, 0.7), (1, 1.0), (0, 1e-9), (100, 1.0)])
def test_truncated_draws_follow_the_truncated_softmax(temperature, top_k, top_p):
    probs = (LOGITS.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: top_k or None]
    share = probs[kept] / probs[kept].sum()
    kept = kept[share.cumsum(0) - share < top_p]
    expected = torch.zeros_like(probs)
    expected[kept] = probs[kept] / probs[kept].sum()

    drawn = draw(LOGITS.expand(DRAWS, -1), keyed(DRAWS, seed=1), temperature=temperature, top_k=top_k, top_p=top_p)
    assert set(drawn.token_ids.tolist()) == set(kept.tolist())
    if len(kept) > 1:
        assert chi_squared(drawn.token_ids, expected) < 6
    torch.testing.assert_close(drawn.logprobs, probs.log()[drawn.token_ids], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.sampling_logprobs, expected.log()[drawn.token_ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("min_p", [0.02, 0.2, 0.9])
def test_what_is_too_unlikely_beside_the_likeliest_is_never_drawn(min_p):
    theirs = MinPLogitsWarper(min_p)(None, LOGITS[None] / 1.3).double().softmax(-1)[0]
    drawn = draw(LOGITS.expand(DRAWS, -1), keyed(DRAWS, seed=2), temperature=1.3, min_p=min_p)
    assert set(drawn.token_ids.tolist()) == set(theirs.nonzero().flatten().tolist())
    torch.testing.assert_close(drawn.sampling_logprobs, theirs.log()[drawn.token_ids], atol=1e-6, rtol=0)


def test_drawing_by_other_logits_keeps_the_models_own_log_probabilities():
    other = LOGITS.flip(0)
    drawn = draw(LOGITS.expand(DRAWS, -1), keyed(DRAWS, seed=3), temperature=0.7, instead=other.expand(DRAWS, -1))
    probs = (other.double() / 0.7).softmax(-1)
    assert chi_squared(drawn.token_ids, probs) < 6
    own = (LOGITS.double() / 0.7).log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs, own[drawn.token_ids], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.sampling_logprobs, probs.log()[drawn.token_ids], atol=1e-6, rtol=0)
    likeliest = draw(LOGITS[None], None, instead=other[None])
    assert likeliest.token_ids.item() == other.argmax() and likeliest.sampling_logprobs.item() == 0


def test_repetitions_are_punished_as_everyone_does():
    logits, seen = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), [[1, 5, 39], [0, 2, 7], [4, 9, 11]]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), logits.clone())
    torch.testing.assert_close(penalised(logits, seen, 1.7), theirs)
    assert torch.equal(penalised(logits, [[], [], []], 1.7), logits)


def test_a_nucleus_beyond_the_prefilter_is_exact():
    """A flat row needs more than the prefilter's tokens and a peaked one does not: both in one batch."""
    logits = torch.randn(2, 1500) * torch.tensor([[0.01], [6.0]])
    rows = torch.arange(2).repeat(1500)
    drawn = draw(logits[rows], keyed(3000), top_p=0.9)
    probs = logits.double().softmax(-1)
    for row, least in ((0, 800), (1, 1)):
        share, order = probs[row].sort(descending=True)
        count = int((share.cumsum(0) - share < 0.9).sum())
        assert (count > 512) == (least > 512)
        own = drawn.token_ids[rows == row]
        assert set(own.tolist()) <= set(order[:count].tolist())
        assert least <= len(set(own.tolist()))
        expected = (probs[row][own] / share[:count].sum()).log()
        torch.testing.assert_close(drawn.sampling_logprobs[rows == row], expected, atol=1e-5, rtol=0)


def test_ties_at_the_edge_of_top_k_stay_in():
    drawn = draw(torch.tensor([[1.0, 0.0, 0.0, -1.0]]).expand(500, -1), keyed(500), top_k=2)
    assert set(drawn.token_ids.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
def test_every_token_is_reached_and_none_of_zero_weight(vocabulary):
    weights = torch.rand(vocabulary, dtype=torch.float32)
    weights[::3] = 0 if vocabulary > 2 else 1
    probs = weights.double() / weights.double().sum()
    middles = probs.cumsum(0) - probs / 2
    tokens = (weights > 0).nonzero().squeeze(-1)
    assert inverse_cdf(weights.expand(len(tokens), -1), middles[tokens]).tolist() == tokens.tolist()
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    picked = inverse_cdf(weights.expand(5, -1), ends)
    assert bool((weights[picked] > 0).all())
    assert picked[0] == tokens[0]
    assert picked[-1] == tokens[-1]


def test_small_weights_are_not_lost_beside_large_ones():
    """100,000 tokens of 1e-9 each behind one of 1: in float32 running sums they would never be drawn."""
    weights = torch.full((1, 100_001), 1e-9)
    weights[0, 0] = 1.0
    share = 1e-4 / (1 + 1e-4)
    tokens = inverse_cdf(weights.expand(2, -1), torch.tensor([1 - share / 2, 1 - share * 0.75], dtype=torch.float64))
    assert abs(int(tokens[0]) - 50_000) <= 2
    assert abs(int(tokens[1]) - 25_000) <= 2


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=40),
    st.floats(0.05, 5),
    st.integers(0, 6),
    st.floats(1e-6, 1.0),
    st.floats(2.0**-53, 1 - 2.0**-53),
)
def test_any_logits_give_a_possible_token(logits, temperature, top_k, top_p, uniform):
    row = torch.tensor([logits], dtype=torch.float32)
    drawn = draw(row, torch.tensor([uniform], dtype=torch.float64), temperature=temperature, top_k=top_k, top_p=top_p)
    token = int(drawn.token_ids)
    assert 0 <= token < len(logits)
    assert math.isfinite(float(drawn.logprobs))
    assert float(drawn.logprobs) - 1e-6 <= float(drawn.sampling_logprobs) <= 1e-6


def test_forbidden_and_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[200.0, 0.0, -torch.inf, 1.0]]).expand(2000, -1)
    allowed = torch.tensor([False, True, True, True])
    drawn = draw(logits, keyed(2000), allowed=allowed)
    assert set(drawn.token_ids.tolist()) == {1, 3}
    assert float(drawn.logprobs.max()) < -198
    chance = torch.tensor([0.0, 1.0], dtype=torch.float64).log_softmax(-1)[(drawn.token_ids == 3).long()]
    torch.testing.assert_close(drawn.sampling_logprobs, chance, atol=1e-6, rtol=0)
    assert draw(logits[:1], None, allowed=allowed).token_ids.item() == 3


def test_greedy_takes_the_likeliest_token_and_says_so():
    drawn = draw(LOGITS[None], None, temperature=0.7)
    assert drawn.token_ids.item() == int(LOGITS.argmax())
    assert drawn.sampling_logprobs.item() == 0
    torch.testing.assert_close(drawn.logprobs[0], (LOGITS.double() / 0.7).log_softmax(-1).max())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_stop_the_draw(bad):
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    with pytest.raises(ValueError, match=r"row 1 .*not finite.*learning rate"):
        draw(logits, keyed(3))


def test_no_token_left_is_refused():
    with pytest.raises(ValueError, match="min_new_tokens"):
        draw(torch.tensor([[1.0, -torch.inf]]), keyed(1), allowed=torch.tensor([False, True]))


def test_splitmix64_known_answers():
    """The first outputs of SplitMix64 from state 1234567 (the generator's published test values)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    for position, value in enumerate(published):
        expected = ((value >> 12) + 0.5) * 2.0**-52
        assert uniforms(torch.tensor([1234567]), position).item() == expected


def test_uniforms_depend_on_every_part_of_the_key_and_on_nothing_else():
    base = (1, 2, "prompt", 3)
    other = [(2, 2, "prompt", 3), (1, 3, "prompt", 3), (1, 2, "prompt ", 3), (1, 2, "prompt", 4), (2, 1, "prompt", 3)]
    keys = torch.tensor([stream_key(*key) for key in [base, *other]])
    together = uniforms(keys, 7)
    assert len(set(together.tolist())) == len(keys)
    assert uniforms(keys[:1], 7).item() == together[0].item()
    assert uniforms(keys.flip(0), 7).flip(0).tolist() == together.tolist()
    assert uniforms(keys[:1], 8).item() != together[0].item()
    positions = torch.arange(len(keys))
    assert uniforms(keys, positions).tolist() == [uniforms(keys[i : i + 1], i).item() for i in range(len(keys))]


def test_uniforms_are_uniform_and_uncorrelated():
    keys = torch.tensor([stream_key(0, step, f"p{i}", s) for step in range(5) for i in range(40) for s in range(20)])
    table = torch.stack([uniforms(keys, position) for position in range(20)])
    assert bool(((table > 0) & (table < 1)).all())
    counts = torch.histc(table.flatten(), 50, 0, 1)
    expected = table.numel() / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 49 + 6 * math.sqrt(98)
    centred = (table - 0.5) * math.sqrt(12)
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1], centred[:, 20:] * centred[:, :-20]):
        assert abs(float(shifted.mean())) < 5 / math.sqrt(shifted.numel())
