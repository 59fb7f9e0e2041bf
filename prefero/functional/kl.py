"""How far the policy has moved from the reference: estimators, the penalty in the reward, an adaptive coefficient.

Direction: everything here estimates KL(policy || reference) from tokens that the *policy* sampled, so the log-ratio
of k1 is `logprobs - ref_logprobs` and that inside k3's exponential is `ref_logprobs - logprobs`. With the ratio of k3
turned round, exp(logprobs - ref_logprobs) - 1 - (logprobs - ref_logprobs), the expectation under the policy is the
chi-squared divergence minus the KL, which is not what it looks like and explodes where the reference is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefero.functional import _checks, masked

MAX_LOG_RATIO = 20.0
MAX_ERROR = 0.2


def estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """A per-token estimate of KL(policy || reference) at tokens sampled from the policy.

    logprobs, ref_logprobs: the same shape, [B, T], in nats; returns that shape, differentiable in both. With
    d = logprobs - ref_logprobs: "k1" is d, unbiased, of either sign; "k2" is d²/2, biased in value, but its
    *gradient* is that of the KL on policy; "k3" is exp(-d) - 1 + d, unbiased and never negative, but its gradient on
    policy is that of KL(reference || policy). So as a penalty: k1 in the reward, k2 in the loss, or k3 in the loss
    times the importance ratio. exp's argument is held within ±20. ValueError for an unknown kind or shapes that
    differ. Source: Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    if kind not in _ESTIMATORS:
        raise ValueError(f"kind={kind!r} is not a KL estimator; use one of {', '.join(map(repr, _ESTIMATORS))}")
    _checks.same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return masked.elementwise(
        _ESTIMATORS[kind], _checks.at_least_float32(logprobs), _checks.at_least_float32(ref_logprobs)
    )


def penalised_rewards(
    score: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    action_mask: Tensor,
    coefficient: float,
    kind: str = "k1",
) -> Tensor:
    """Per-token rewards: minus `coefficient` times the KL estimate, plus the score on the last action token.

    score: [B], or [B, A] where tokens have scores of their own (process rewards), which stay where they are; logprobs,
    ref_logprobs, action_mask: [B, A]; coefficient >= 0. Returns [B, A] without gradient (the
    penalty is part of the reward), 0 outside the mask. The last action token is the EOS when there is one; a row
    without any action token has nowhere to put its score and gets zeros. ValueError for an unknown kind, a negative
    coefficient or shapes that do not fit. Source: InstructGPT (arXiv:2203.02155, eq. 2); token by token as in
    arXiv:1909.08593.
    """
    _checks.at_least("coefficient", coefficient, 0.0)
    _checks.same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, action_mask=action_mask)
    if action_mask.dim() != 2 or score.shape not in (action_mask.shape, action_mask.shape[:1]):
        raise ValueError(
            f"score has shape {list(score.shape)} beside action_mask {list(action_mask.shape)}; give [B] or [B, A], "
            "and [B, A]"
        )
    penalty = masked.fill(estimate(logprobs.detach(), ref_logprobs.detach(), kind), action_mask)
    score = score.detach().to(penalty.dtype)
    if score.dim() == 1:
        return masked.fill(score.unsqueeze(-1).expand_as(penalty), last_actions(action_mask)) - coefficient * penalty
    return masked.fill(score, action_mask) - coefficient * penalty


def last_actions(action_mask: Tensor) -> Tensor:
    """Where the last action token of each row stands, [B, A] of booleans; nowhere in a row without any."""
    kept = action_mask.bool()
    # A token is the last one when no action token stands to its right; tool output may stand between.
    return kept & (kept.flip(-1).cumsum(-1).flip(-1) == 1)


class AdaptiveCoefficient:
    """A KL coefficient that rises when the KL is above its target and falls when it is below.

    initial: the coefficient to start from, >= 0; target: nats per completion, > 0; horizon: in completions, > 0.
    `value` is the coefficient now. ValueError for numbers out of range. Source: arXiv:1909.08593, section 2.2.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        _checks.at_least("initial", initial, 0.0)
        _checks.above("target", target, 0.0)
        _checks.above("horizon", horizon, 0.0)
        self.value = float(initial)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> float:
        """Takes the mean KL of `num_samples` completions, in nats per completion, and returns the new coefficient.

        coefficient *= 1 + clip(kl / target - 1, ±0.2) * num_samples / horizon. ValueError if `kl` is not finite,
        `num_samples` is negative, or so large that one update could end the penalty for good.
        """
        _checks.above("kl", kl, -float("inf"))
        _checks.at_least("num_samples", num_samples, 0)
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        if MAX_ERROR * num_samples >= self.horizon:
            raise ValueError(
                f"horizon={self.horizon} is within reach of one step of num_samples={num_samples}, which could end the "
                f"penalty for good: take a horizon above {MAX_ERROR * num_samples:g}, better many times num_samples"
            )
        self.value *= 1.0 + error * num_samples / self.horizon
        return self.value


def _k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def _k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    difference = ref_logprobs - logprobs
    # expm1 keeps the digits that exp(x) - 1 loses near x = 0, where a policy spends its first updates.
    return torch.expm1(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - difference


_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
