"""The policy's loss: PPO's clipped surrogate, token by token, and what to watch while it is descended."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prefero.functional import _checks, masked

MAX_LOG_RATIO = 20.0


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate as a per-token loss, max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)).

    logprobs, old_logprobs, advantages: the same shape, [B, T]; ratio = exp(logprobs - old_logprobs), its logarithm
    held within ±20. Returns that shape; feed it to `masked.aggregate`. Only `logprobs` gets a gradient. `dual_clip`
    c > 1 caps the loss of a bad token (A < 0) at -c A, where the ratio itself is unbounded. ValueError for negative
    clips, dual_clip <= 1 or shapes that differ. Source: arXiv:1707.06347, eq. 7; dual clip: arXiv:1912.09729, eq. 5.
    """
    _checks.at_least("clip_low", clip_low, 0.0)
    _checks.at_least("clip_high", clip_high, 0.0)
    if dual_clip is not None:
        _checks.above("dual_clip", dual_clip, 1.0)
    _checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    loss = partial(_clipped_surrogate, low=1.0 - clip_low, high=1.0 + clip_high, dual_clip=dual_clip)
    return masked.elementwise(loss, _checks.at_least_float32(logprobs), old_logprobs.detach(), advantages.detach())


def ppo_clip_stats(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    norm: float | Tensor | None = None,
    how: str = "token_mean",
) -> tuple[Tensor, Tensor]:
    """How far one update moved the policy: (clip_fraction, approx_kl), two scalars without gradient.

    logprobs, old_logprobs, mask: [B, T]. clip_fraction is the part of tokens whose ratio lies outside
    [1 - clip_low, 1 + clip_high]; approx_kl is the mean of half the squared log-ratio, in nats per token. `norm` and
    `how` are those of `masked.aggregate`, by default the mean over the tokens in `mask`; so is the ValueError. Source:
    lm-human-preferences `policy/clipfrac` and `policy/approxkl` (arXiv:1909.08593).
    """
    log_ratio = masked.fill(logprobs.detach(), mask) - masked.fill(old_logprobs.detach(), mask)
    ratio = log_ratio.exp()
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    clip_fraction = masked.aggregate(outside.to(ratio.dtype), mask, how, norm)
    return clip_fraction, masked.aggregate(0.5 * log_ratio.square(), mask, how, norm)


def _clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, low: float, high: float, dual_clip: float | None
) -> Tensor:
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
