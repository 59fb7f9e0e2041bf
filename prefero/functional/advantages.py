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
