"""The policy's loss: PPO's clipped surrogate, its forms for sequences and for weights, and what to watch meanwhile."""

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


def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """GSPO's surrogate: PPO's, with one ratio a sequence, the geometric mean of its tokens' ratios.

    logprobs, old_logprobs, mask: [B, T]; advantages: [B], or [B, T] with one number a row. Returns [B, T], the
    sequence's loss at each of its tokens and 0 outside the mask; feed it to `masked.aggregate(how="sequence_mean")`.
    Only `logprobs` gets a gradient. Clips are far smaller than PPO's (3e-4 and 4e-4 in the paper), for the mean of many
    log-ratios moves less than each. ValueError for negative clips or shapes that do not fit. Source:
    arXiv:2507.18071, eq. 5 to 7.
    """
    _checks.at_least("clip_low", clip_low, 0.0)
    _checks.at_least("clip_high", clip_high, 0.0)
    _checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    per_row = _per_row(advantages, mask)
    log_ratio = masked.mean(masked.fill(logprobs, mask) - masked.fill(old_logprobs.detach(), mask), mask, dim=1)
    loss = _clipped_surrogate(
        log_ratio, torch.zeros_like(log_ratio), per_row.to(log_ratio.dtype),
        low=1.0 - clip_low, high=1.0 + clip_high, dual_clip=None,
    )  # fmt: skip
    return masked.fill(loss.unsqueeze(1).expand_as(logprobs), mask)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float | None,
    clip_high: float,
) -> Tensor:
    """CISPO: the policy gradient of every token, its importance weight clipped and held constant.

    logprobs, old_logprobs, advantages: the same shape, [B, T]. Returns that shape, -clip(ratio, 1 - clip_low,
    1 + clip_high) A logprobs; feed it to `masked.aggregate`. Only `logprobs` gets a gradient, and no token loses its
    own. `clip_low=None`: weights have no lower bound, as in the paper's experiments. ValueError for negative clips or
    shapes that differ. Source: MiniMax-M1, arXiv:2506.13585.
    """
    if clip_low is not None:
        _checks.at_least("clip_low", clip_low, 0.0)
    _checks.at_least("clip_high", clip_high, 0.0)
    _checks.same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low = 0.0 if clip_low is None else 1.0 - clip_low
    loss = partial(_weighted_logprobs, low=low, high=1.0 + clip_high)
    return masked.elementwise(loss, _checks.at_least_float32(logprobs), old_logprobs.detach(), advantages.detach())


def truncated_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """How much more likely a token was for the policy of record than for the one that sampled it, at most `cap`.

    logprobs, behaviour_logprobs: the same shape, [B, T]. Returns min(exp(logprobs - behaviour_logprobs), cap), without
    gradient, to be multiplied with per-token losses. ValueError for a cap not above 0 or shapes that differ. Source:
    Ionides, "Truncated importance sampling" (2008).
    """
    _checks.above("cap", cap, 0.0)
    _checks.same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    log_ratio = _checks.at_least_float32(logprobs.detach()) - _checks.at_least_float32(behaviour_logprobs.detach())
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp_max(cap)


def _weighted_logprobs(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, low: float, high: float
) -> Tensor:
    ratio = (logprobs.detach() - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return -ratio.clamp(low, high) * advantages * logprobs


def _per_row(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B] as it is, or the one number of each row of [B, T]."""
    advantages = advantages.detach()
    if advantages.shape == mask.shape:
        kept = masked.fill(advantages, mask)
        per_row = masked.mean(kept, mask, dim=1)
        if not torch.allclose(kept, masked.fill(per_row.unsqueeze(1).expand_as(kept), mask), rtol=1e-5, atol=1e-6):
            raise ValueError(
                "advantages differ within a sequence, which has one ratio; give one number a sequence, [B]"
            )
        return per_row
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages has shape {list(advantages.shape)} beside mask {list(mask.shape)}; give [B]")
    return advantages


def _clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, low: float, high: float, dual_clip: float | None
) -> Tensor:
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
