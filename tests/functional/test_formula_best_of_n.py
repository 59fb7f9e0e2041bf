"""Best-of-n: its law with ties, its KL, and the estimate over subsets, against enumeration and the known numbers."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from prefero.functional import best_of_n

TOY = json.loads((Path(__file__).parents[1] / "vectors" / "toy_optimum.json").read_text())
ARMS = torch.tensor(TOY["A_inputs"]["ref"], dtype=torch.float64)
REWARDS = torch.tensor(TOY["A_inputs"]["r"], dtype=torch.float64)
TIED = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0, 1.0], dtype=torch.float64)


def enumerated(probabilities: torch.Tensor, scores: torch.Tensor, n: int) -> torch.Tensor:
    """The law by going through all draws: the first of the highest is chosen."""
    chosen = torch.zeros_like(probabilities)
    for draw in itertools.product(range(len(scores)), repeat=n):
        chosen[max(draw, key=lambda arm: float(scores[arm]))] += math.prod(float(probabilities[arm]) for arm in draw)
    return chosen


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_law_and_its_kl_are_the_known_ones(n: int) -> None:
    known = TOY[f"D_bon{n}"]
    torch.testing.assert_close(
        best_of_n.law(ARMS, REWARDS, n), torch.tensor(known["law"], dtype=torch.float64), rtol=1e-9, atol=1e-15
    )
    assert best_of_n.kl(ARMS, REWARDS, n) == pytest.approx(known["kl_exact"], abs=1e-12)
    assert best_of_n.kl_bound(n) == pytest.approx(known["kl_bound"], abs=1e-12)
    assert float(best_of_n.law(ARMS, REWARDS, n) @ REWARDS) == pytest.approx(known["mean_reward"], abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ties_are_won_by_whoever_came_first(n: int) -> None:
    law = best_of_n.law(ARMS, TIED, n)
    expected = enumerated(ARMS, TIED, n)
    torch.testing.assert_close(law, expected, rtol=1e-12, atol=1e-15)
    kl = float((expected * (expected / ARMS).log()).sum())
    assert best_of_n.kl(ARMS, TIED, n) == pytest.approx(kl, abs=1e-12)
    assert best_of_n.kl(ARMS, TIED, n) <= best_of_n.kl_bound(n) + 1e-12


def test_draws_follow_the_law() -> None:
    n, draws = 4, 100_000
    arms = torch.multinomial(ARMS, draws * n, replacement=True, generator=torch.Generator().manual_seed(1)).view(-1, n)
    chosen = arms.gather(1, TIED[arms].argmax(dim=1, keepdim=True)).flatten()
    expected = best_of_n.law(ARMS, TIED, n) * draws
    statistic = float(((torch.bincount(chosen, minlength=6) - expected).square() / expected).sum())
    assert statistic < 20.5  # chi-squared with 5 degrees of freedom, p = 0.001


def test_where_all_scores_agree_choosing_changes_nothing() -> None:
    alike = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(best_of_n.law(ARMS, alike, 8), ARMS)
    assert best_of_n.kl(ARMS, alike, 8) == pytest.approx(0.0, abs=1e-12)


def test_the_kl_of_samples_knows_ties_and_tends_to_the_bound() -> None:
    right_or_wrong = torch.tensor([1.0] * 25 + [0.0] * 75)
    law = torch.tensor([0.75**4, 1 - 0.75**4], dtype=torch.float64)
    kl = float((law * (law / torch.tensor([0.75, 0.25], dtype=torch.float64)).log()).sum())
    assert best_of_n.sampled_kl(right_or_wrong, 4) == pytest.approx(kl, abs=1e-12)
    different = torch.arange(4096.0)
    assert best_of_n.sampled_kl(different, 4) == pytest.approx(best_of_n.kl_bound(4), abs=1e-3)
    assert best_of_n.sampled_kl(different, 1) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    torch.manual_seed(3)
    scores = torch.stack([torch.randn(6, dtype=torch.float64), TIED])
    values = torch.randn(2, 6, dtype=torch.float64)
    for row in range(2):
        own, other = [], []
        for subset in itertools.combinations(range(6), n):
            best = max(float(scores[row, i]) for i in subset)
            own.append(best)
            other.append([float(values[row, i]) for i in range(6) if scores[row, i] == best])
        assert float(best_of_n.expected(scores, n)[row]) == pytest.approx(sum(own) / len(own), abs=1e-12)
        means = [sum(worths) / len(worths) for worths in other]
        estimate = float(best_of_n.expected(scores, n, values)[row])
        assert estimate == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_the_estimate_is_unbiased_for_every_n_from_one_set() -> None:
    draws = torch.multinomial(ARMS, 8 * 40_000, replacement=True, generator=torch.Generator().manual_seed(2)).view(
        -1, 8
    )
    for n in (1, 2, 4, 8):
        true = float(best_of_n.law(ARMS, REWARDS, n) @ REWARDS)
        assert float(best_of_n.expected(REWARDS[draws], n).mean()) == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n.kl_bound(0), "n is 0"),
        (lambda: best_of_n.kl_bound(True), "n is True"),
        (lambda: best_of_n.law(ARMS, REWARDS[:3], 2), "same shape"),
        (lambda: best_of_n.law(ARMS * 2, REWARDS, 2), "sum to 1"),
        (lambda: best_of_n.law(ARMS, REWARDS * math.nan, 2), "finite"),
        (lambda: best_of_n.law(ARMS.view(2, 3), REWARDS.view(2, 3), 2), "one dimension"),
        (lambda: best_of_n.expected(REWARDS, 7), "n=7 is more than the 6"),
        (lambda: best_of_n.expected(REWARDS / 0, 2), "inf"),
        (lambda: best_of_n.expected(REWARDS, 2, ARMS[:2]), "same shape"),
        (lambda: best_of_n.sampled_kl(torch.empty(0), 2), "empty"),
    ],
)
def test_what_means_nothing_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
