"""Losses of a reward model that learns from comparisons."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefero.functional import _checks


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0) -> Tensor:
    """The mean of -log sigmoid(chosen - rejected - margin), plus `centering` times that of (chosen + rejected)².

    chosen, rejected: [N] scores; margin: [N], how much better the chosen one must be; centering >= 0 keeps the scores
    around 0, which the comparisons alone leave free. Returns a scalar. ValueError for no pairs, shapes that differ or
    a negative centering. Source: InstructGPT (arXiv:2203.02155, eq. 1); margin: Llama 2 (arXiv:2307.09288, eq. 2);
    centering: arXiv:2312.09244.
    """
    _checks.at_least("centering", centering, 0.0)
    chosen, rejected = _pairs(chosen, rejected)
    difference = chosen - rejected
    if margin is not None:
        _checks.same_shape(chosen=chosen, margin=margin)
        difference = difference - margin
    loss = -F.logsigmoid(difference).mean()
    return loss + centering * (chosen + rejected).square().mean()


def log_exp(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of log(1 + exp(rejected - chosen)): Bradley-Terry in its other form, equal in value.

    chosen, rejected: [N] scores. Returns a scalar. ValueError for no pairs or shapes that differ. Source:
    arXiv:2204.05862, section 4.1.
    """
    chosen, rejected = _pairs(chosen, rejected)
    return F.softplus(rejected - chosen).mean()


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The part of pairs in which the chosen one scores higher; a tie counts one half, as a coin would.

    chosen, rejected: [N] scores. Returns a scalar without gradient, NaN if a
    score is. ValueError for no pairs or shapes that differ.
    """
    chosen, rejected = _pairs(chosen.detach(), rejected.detach())
    wins = torch.where(chosen == rejected, 0.5, (chosen > rejected).to(chosen.dtype))
    # A NaN compares as false: without this line a broken model would pass for a merely bad one.
    return torch.where((chosen - rejected).isnan() & (chosen != rejected), torch.nan, wins).mean()


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    _checks.same_shape(chosen=chosen, rejected=rejected)
    _checks.not_empty(chosen=chosen)
    return _checks.at_least_float32(chosen), _checks.at_least_float32(rejected)
