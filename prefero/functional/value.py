"""The critic's loss: squared error to the returns, held near the values of collection time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prefero.functional import _checks, masked


def clipped(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """PPO's clipped value loss per token, half the larger of (V - R)² and (clip(V, V_old ± clip) - R)².

    values, old_values, returns: the same shape, [B, T]; returns that shape; feed it to `masked.aggregate`. Only
    `values` gets a gradient. `clip=math.inf` is the plain squared error. ValueError for a negative clip or shapes
    that differ. Source: lm-human-preferences (arXiv:1909.08593) after OpenAI Baselines' PPO2.
    """
    _checks.at_least("clip", clip, 0.0)
    _checks.same_shape(values=values, old_values=old_values, returns=returns)
    loss = partial(_clipped_square, clip=clip)
    return masked.elementwise(loss, _checks.at_least_float32(values), old_values.detach(), returns.detach())


def _clipped_square(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
