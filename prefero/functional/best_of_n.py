"""What choosing the best of n samples does: the law of the chosen one, its KL, and rewards estimated from one set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefero.functional import _checks


def kl_bound(n: int) -> float:
    """The most nats best-of-n may lie away from the policy it draws from: log n - (n - 1) / n.

    Exact for continuous rewards without ties, an upper bound otherwise (Beirami et al. 2024,
    https://arxiv.org/abs/2401.01879). Raises ValueError for n below 1.
    """
    _whole("n", n)
    return math.log(n) - (n - 1) / n


def law(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """The distribution of best-of-n over K outcomes, ties included: [K], float64.

    probabilities: [K] under the policy, summing to 1; scores: [K]. With outcomes in order of score and F_i the
    probability of a score not above the i-th, P(i) = F_i^n - F_{i-1}^n; outcomes of one score are one step of F and
    share its probability as they do under the policy, because of equals any may come first. Raises ValueError for
    other shapes, probabilities that are none, scores that are not finite, n below 1. Source: Beirami et al. 2024
    (https://arxiv.org/abs/2401.01879), section 3.
    """
    _whole("n", n)
    p = probabilities.double()
    level, mass = _levels(p, scores)
    return p / mass[level].clamp_min(torch.finfo(p.dtype).tiny) * _level_law(mass, n)[level]


def kl(probabilities: Tensor, scores: Tensor, n: int) -> float:
    """KL(best-of-n || policy) in nats, exactly, from all K outcomes: probabilities, scores [K] as in `law`.

    Only how probable each score is counts: within ties both distributions agree.
    """
    _whole("n", n)
    _, mass = _levels(probabilities.double(), scores)
    chosen = _level_law(mass, n)
    kept = chosen > 0
    return float((chosen[kept] * (chosen[kept] / mass[kept]).log()).sum())


def sampled_kl(scores: Tensor, n: int) -> float:
    """KL(best-of-n || policy) in nats for one prompt, as if its policy gave each of N samples with probability 1/N.

    scores: [N]. It knows the ties that the samples show, such as those of right and wrong; where all differ it tends to
    `kl_bound` as N grows beyond n. Raises ValueError as `kl` does.
    """
    _checks.not_empty(scores=scores)
    return kl(torch.full(scores.shape, 1.0 / len(scores), dtype=torch.float64), scores, n)


def expected(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """The mean, over all subsets of n of N samples, of what the one with the highest score is worth: [...].

    scores: [..., N], n <= N. values: [..., N], by another scorer (None: the scores themselves); among equal scores
    their mean. It estimates best-of-n without bias, for every n from the same samples. The weight of the i-th in order
    of score is C(i - 1, n - 1) / C(N, n). Float64. Raises ValueError for shapes that differ, scores that are not finite
    or n above N.
    """
    _whole("n", n)
    values = scores if values is None else values
    _checks.same_shape(scores=scores, values=values)
    count = scores.shape[-1] if scores.dim() else 0
    if n > count:
        raise ValueError(f"n={n} is more than the {count} samples there are; use a smaller n or give more samples")
    _finite(scores)
    ordered, order = scores.double().sort(dim=-1)
    worth = values.double().gather(-1, order)
    # Shares of subsets whose best is among the first i: C(i, n) / C(N, n).
    places = torch.arange(count + 1, dtype=torch.float64, device=scores.device)
    share = torch.ones_like(places)
    for k in range(n):
        share = share * ((places - k).clamp_min(0.0) / (count - k))
    weights = (share[1:] - share[:-1]).expand_as(worth)
    return (_mean_of_ties(ordered, worth) * weights).sum(dim=-1)


def _mean_of_ties(ordered: Tensor, worth: Tensor) -> Tensor:
    """Every value replaced by the mean of those whose scores equal its own; both [..., N], in order of score."""
    new = torch.ones_like(ordered, dtype=torch.long)
    new[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).long()
    level = new.cumsum(dim=-1) - 1
    zeros = torch.zeros_like(worth)
    sums = zeros.scatter_add(-1, level, worth)
    counts = zeros.scatter_add(-1, level, torch.ones_like(worth))
    return (sums / counts.clamp_min(1.0)).gather(-1, level)


def _levels(probabilities: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """To which of the different scores, in rising order, each outcome belongs, and how probable each of those is."""
    _checks.same_shape(probabilities=probabilities, scores=scores)
    _checks.not_empty(scores=scores)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {list(scores.shape)}; give one dimension, the outcomes of one prompt")
    _finite(scores)
    if not (bool((probabilities >= 0).all()) and abs(float(probabilities.sum()) - 1.0) < 1e-6):
        raise ValueError(f"probabilities sum to {float(probabilities.sum())!r}; give numbers >= 0 that sum to 1")
    different, level = torch.unique(scores, return_inverse=True)
    mass = torch.zeros(len(different), dtype=torch.float64, device=scores.device)
    return level, mass.index_add(0, level, probabilities)


def _level_law(mass: Tensor, n: int) -> Tensor:
    reached = mass.cumsum(dim=0).clamp_max(1.0)
    reached[-1] = 1.0
    return reached.pow(n).diff(prepend=reached.new_zeros(1))


def _finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"scores holds {float(scores[~torch.isfinite(scores)][0])}; give finite numbers")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"best-of-n {name} is {value!r}: give a whole number, 1 or more")
