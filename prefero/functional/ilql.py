"""Implicit language Q-learning (ILQL, Snell et al., arXiv:2206.11871): values of tokens from texts that are given.

Three estimates are learned beside the policy π_β that imitates the texts: V, what is still to come before a token is
chosen; Q, what is still to come when a given token is; and Q̂, a slow copy of Q. Q learns from rewards and the next V, V
from the better ones of the Q̂ of the tokens that were really chosen: nothing is ever asked about a token nobody chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from prefero.functional import _checks, masked


class Losses(NamedTuple):
    """Scalars: `total` = q + v + cql_scale * cql + awac_scale * awac, the only one with a gradient, and its parts."""

    total: Tensor
    q: Tensor
    v: Tensor
    cql: Tensor
    awac: Tensor


def losses(
    logprobs: Tensor,
    qs: Sequence[Tensor],
    q_logprobs: Sequence[Tensor],
    target_qs: Sequence[Tensor],
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    tau: float = 0.7,
    gamma: float = 0.99,
    beta: float = 0.0,
    cql_scale: float = 0.1,
    awac_scale: float = 1.0,
    norm: float | Tensor | None = None,
) -> Losses:
    """The four losses of ILQL, sums over actions divided by `norm` (their number, by default; at least 1).

    All tensors are [B, A] and entry t speaks of the token at t. logprobs: log π_β(a_t). qs: Q_i(s_t, a_t) of each of
    the Q heads (two, in the paper). q_logprobs: log softmax Q_i(s_t, ·) at a_t. target_qs: Q̂_i(s_t, a_t). values:
    V(s_t), before a_t is chosen. rewards: given after a_t. mask: 1 on actions; whatever stands elsewhere changes
    nothing. The next state of an action is that of the row's next action (so what others say in between passes
    without time), and after a row's last action comes nothing more.

    - q: Σ_i (r_t + gamma * V(s_t+1) - Q_i)², with no gradient into V;
    - v: the expectile loss |tau - [u < 0]| u² of u = min_i Q̂_i - V, with no gradient into Q̂ (tau 0.5: the mean of
      what was done; towards 1: the best of it);
    - cql: Σ_i -log softmax Q_i at a_t, which holds down what nobody chose (arXiv:2006.04779);
    - awac: -exp(beta * (min_i Q̂_i - V)) * log π_β(a_t), imitation; the weight (1 with beta 0) has no gradient.

    Raises ValueError for shapes that differ, no Q heads or not as many of each, a tau not within (0, 1), a gamma not
    within [0, 1], and scales below 0.
    """
    _check(qs, q_logprobs, target_qs, {"tau": tau, "gamma": gamma, "cql_scale": cql_scale, "awac_scale": awac_scale})
    named = {f"{name}[{i}]": x for name, group in (("qs", qs), ("q_logprobs", q_logprobs), ("target_qs", target_qs))
             for i, x in enumerate(group)}  # fmt: skip
    _checks.same_shape(logprobs=logprobs, **named, values=values, rewards=rewards, mask=mask)
    fill = partial(masked.fill, mask=mask)
    logprobs, values, rewards = fill(logprobs), fill(values), fill(rewards).detach()
    target = reduce(torch.minimum, [fill(q) for q in target_qs]).detach()
    wanted = rewards + gamma * next_values(values.detach(), mask)
    weight = torch.exp(beta * (target - values.detach()))
    count = mask.bool().sum().clamp_min(1) if norm is None else norm

    def total(x: Tensor) -> Tensor:
        return masked.aggregate(x, mask, norm=count)

    q = total(torch.stack([(wanted - fill(found)).square() for found in qs]).sum(0))
    v = total(expectile(target - values, tau))
    cql = total(-torch.stack([fill(found) for found in q_logprobs]).sum(0))
    awac = total(-weight * logprobs)
    whole = q + v + cql_scale * cql + awac_scale * awac
    return Losses(whole, q.detach(), v.detach(), cql.detach(), awac.detach())


def _check(
    qs: Sequence[Tensor], q_logprobs: Sequence[Tensor], target_qs: Sequence[Tensor], numbers: dict[str, float]
) -> None:
    if not qs or not len(qs) == len(q_logprobs) == len(target_qs):
        raise ValueError(
            f"qs, q_logprobs and target_qs hold {len(qs)}, {len(q_logprobs)} and {len(target_qs)} tensors; give one "
            "of each for every Q head, and one head or more"
        )
    if not 0.0 < numbers["tau"] < 1.0:
        raise ValueError(f"tau={numbers['tau']!r} is out of range; use a number between 0 and 1, neither included")
    _checks.fraction("gamma", numbers["gamma"])
    for name in ("cql_scale", "awac_scale"):
        _checks.at_least(name, numbers[name], 0.0)


def expectile(error: Tensor, tau: float) -> Tensor:
    """|tau - [error < 0]| * error², element by element (arXiv:2110.06169, eq. 4): its minimum is the tau-expectile."""
    square = error.square()  # a choice between two plain numbers would be made in float32
    return torch.where(error < 0, (1.0 - tau) * square, tau * square)


def next_values(values: Tensor, mask: Tensor) -> Tensor:
    """The value of the state in which the row's next action is chosen, by action; 0 after the last one.

    values, mask: [B, A]; returns that shape, with zeros where the mask is 0. Raises ValueError if the shapes differ.
    """
    kept = masked.fill(values, mask)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    beyond = mask.shape[1]
    places = torch.where(mask.bool(), columns, beyond)
    # The first action from each column on, seen from the column before it.
    ahead = places.flip(1).cummin(dim=1).values.flip(1)
    ahead = torch.nn.functional.pad(ahead[:, 1:], (0, 1), value=beyond)
    found = torch.nn.functional.pad(kept, (0, 1)).gather(1, ahead)
    return masked.fill(found, mask)


def guided(logits: Tensor, target_qs: Sequence[Tensor], values: Tensor, beta: float) -> Tensor:
    """Logits of the policy ∝ π_β * exp(beta * (min_i Q̂_i - V)) (equation 8 of the paper), at least float32.

    logits, target_qs: [..., V]; values: [...]. beta 0 is π_β itself. Raises ValueError if shapes differ, and for a
    beta below 0.
    """
    _checks.at_least("beta", beta, 0.0)
    _checks.same_shape(logits=logits, **{f"target_qs[{i}]": q for i, q in enumerate(target_qs)})
    if values.shape != logits.shape[:-1]:
        raise ValueError(f"values has shape {list(values.shape)} beside logits {list(logits.shape)}; give one a state")
    advantages = reduce(torch.minimum, target_qs) - values.unsqueeze(-1)
    return _checks.at_least_float32(logits) + beta * _checks.at_least_float32(advantages)


@torch.no_grad()
def polyak_(targets: Iterable[Tensor], sources: Iterable[Tensor], rate: float) -> None:
    """Moves each target towards its source, in place: target <- rate * source + (1 - rate) * target.

    Raises ValueError for a rate not within (0, 1], and for not as many of both.
    """
    _checks.fraction("rate", rate)
    _checks.above("rate", rate, 0.0)
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, rate)
