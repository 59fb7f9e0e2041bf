"""Who deserves the reward: generalised advantage estimation over the tokens the policy chose."""

from __future__ import annotations

import torch
from torch import Tensor

from prefero.functional import _checks, masked


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, where masked-out tokens (padding, tool output) are skipped as if they were not there.

    rewards, values, mask: [B, T]; values[:, t] is the value of the state in which token t is chosen. Returns
    (advantages, returns), [B, T] each, returns = advantages + values, both 0 outside the mask. The value after a
    row's last token is 0: a completion is an episode that ends. With delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lam A_{t+1}, where t+1 means the *next unmasked* token. ValueError for gamma or lam outside
    [0, 1] or shapes that differ. Source: arXiv:1506.02438, eq. 16.
    """
    _checks.fraction("gamma", gamma)
    _checks.fraction("lam", lam)
    _checks.same_shape(rewards=rewards, values=values, mask=mask)
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {list(rewards.shape)}; give [B, T]")
    rewards, values = masked.fill(rewards, mask), masked.fill(values, mask)
    kept = mask.bool()
    next_value = next_advantage = torch.zeros_like(values[:, :1])
    backwards: list[Tensor] = [values[:, :0]]
    for t in range(values.shape[1] - 1, -1, -1):
        here = slice(t, t + 1)
        delta = rewards[:, here] + gamma * next_value - values[:, here]
        next_advantage = torch.where(kept[:, here], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(kept[:, here], values[:, here], next_value)
        backwards.append(next_advantage)
    advantages = masked.fill(torch.cat(backwards[::-1], dim=1), mask)
    return advantages, advantages + values


def group_relative(rewards: Tensor, group: Tensor, scale: str = "group", epsilon: float = 1e-6) -> Tensor:
    """How much better each completion is than the mean of its group, the completions of one prompt.

    rewards: [B]; group: [B] integer ids, equal for completions of one prompt, in any order. Returns [B]. scale: "group"
    divides by the group's standard deviation (unbiased) + epsilon, which is GRPO; "none" leaves the difference, which
    is Dr. GRPO; "batch" divides by the standard deviation of all rewards. Groups whose rewards are equal get 0.
    ValueError for a group of one (there is nothing to compare), a reward that is not finite, an unknown scale, a
    negative epsilon or shapes that differ. Source: arXiv:2402.03300, section 4.1; "none": arXiv:2503.20783.
    """
    if scale not in ("group", "none", "batch"):
        raise ValueError(f"scale={scale!r} is unknown; use 'group', 'none' or 'batch'")
    _checks.at_least("epsilon", epsilon, 0.0)
    rewards, member, count = _grouped(rewards, group)
    difference = rewards - (_over_groups(rewards, member, count) / count)[member]
    if scale == "none":
        return difference
    if scale == "batch":
        return difference / (rewards.std() + epsilon)
    variance = _over_groups(difference.square(), member, count) / (count - 1)
    # Equal rewards whose mean is rounded differ from it by a last digit, which must not be blown up.
    equal = _over_groups((rewards != rewards[_first(member, count)][member]).to(rewards.dtype), member, count) == 0
    return torch.where(equal[member], 0.0, difference / (variance.sqrt()[member] + epsilon))


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """How much better each completion is than the mean of the *others* of its group: an unbiased baseline.

    rewards: [B]; group: [B] integer ids, equal for completions of one prompt. Returns [B], n / (n - 1) times
    `group_relative` without scale. ValueError for a group of one, a reward that is not finite or shapes that differ.
    Source: RLOO, arXiv:2402.14740.
    """
    rewards, member, count = _grouped(rewards, group)
    others = _over_groups(rewards, member, count)[member] - rewards
    return rewards - others / (count[member] - 1)


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """The return from each token on, whitened over all tokens of the batch (REINFORCE++).

    rewards, mask: [B, T], the penalised reward of each token; masked-out tokens are skipped as in `gae`. Returns
    [B, T], 0 outside the mask; the variance is the unbiased one. The form with a baseline is `group_relative` (scale
    "none") whitened over the batch. ValueError for gamma outside [0, 1] or shapes that differ. Source:
    arXiv:2501.03262, section 3.
    """
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return masked.whiten(returns, mask, unbiased=True)


def _grouped(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, the number of each one's group, and how many each group has."""
    _checks.same_shape(rewards=rewards, group=group)
    _checks.not_empty(rewards=rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards has shape {list(rewards.shape)}; give [B], one number a completion")
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards[{bad[0]}] is {float(rewards[bad[0]])}; give finite rewards")
    names, member, count = torch.unique(group, return_inverse=True, return_counts=True)
    if bool((count < 2).any()):
        alone = int(names[count < 2][0])
        raise ValueError(f"group {alone} has a single completion, and nothing to compare it with; give it two or more")
    rewards = _checks.at_least_float32(rewards.detach())
    return rewards, member, count.to(rewards.dtype)


def _over_groups(x: Tensor, member: Tensor, count: Tensor) -> Tensor:
    return torch.zeros_like(count).index_add_(0, member, x)


def _first(member: Tensor, count: Tensor) -> Tensor:
    """A row of each group."""
    rows = torch.zeros(len(count), dtype=torch.long, device=member.device)
    return rows.index_copy_(0, member, torch.arange(len(member), device=member.device))
