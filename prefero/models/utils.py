"""The seed system's tensor helpers, on top of `prefero.functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from prefero.functional import kl, masked
from prefero.functional.logprobs import token_logprobs


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log p(label) [B, T] of logits [B, T, V] that are already aligned with labels [B, T]."""
    # The house's function shifts by one, so one column is put before the labels and after the logits.
    before = torch.cat([labels[:, :1], labels], dim=1)
    return token_logprobs(torch.cat([logits, logits[:, -1:]], dim=1), before)[:, 1:]


def compute_approx_kl(log_probs: Tensor, log_probs_base: Tensor, action_mask: Tensor | None = None) -> Tensor:
    """KL(policy || base) a row [B], in nats per token, from tokens of the policy [B, A]: the mean of k3.

    k3 = exp(-d) - 1 + d with d = log_probs - log_probs_base, never negative (joschu.net/blog/kl-approx.html).
    """
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask
    return masked.mean(kl.estimate(log_probs, log_probs_base, kind="k3"), mask, dim=1)


def compute_reward(
    r: Tensor | float,
    kl_coef: float,
    log_probs: Tensor,
    log_probs_base: Tensor,
    action_mask: Tensor | None = None,
) -> Tensor | float:
    """One reward a row [B]: r - kl_coef KL; a kl_coef of zero or less leaves r alone."""
    if kl_coef <= 0.0:
        return r
    return r - kl_coef * compute_approx_kl(log_probs, log_probs_base, action_mask)


def masked_mean(tensor: Tensor, mask: Tensor, dim: int = 1) -> Tensor:
    """The mean over `dim` where the mask is set, 0 where it never is."""
    return masked.mean(tensor, mask.expand_as(tensor), dim=dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over `dim` where the mask is set, 0 elsewhere."""
    mask = mask.expand_as(tensor)
    centered = masked.fill(masked.fill(tensor, mask) - masked.mean(tensor, mask, dim=dim).unsqueeze(dim), mask)
    variance = masked.mean(centered.square(), mask, dim=dim).unsqueeze(dim)
    return centered * torch.rsqrt(variance.clamp(min=eps))


def normalize(tensor: Tensor, dim: int = 0, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over `dim`."""
    return masked_normalize(tensor, torch.ones_like(tensor, dtype=torch.bool), dim, eps)
