"""Sums, means, whitening and aggregation over the tokens that count, blind to whatever the other slots hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefero.functional import _checks

WHITEN_EPSILON = 1e-8


def fill(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where `mask` is zero; neither the value there nor its gradient survives.

    x, mask: the same shape; mask may be bool, integer or float, and anything but 0 counts as 1. Half precision comes
    back as float32. Multiplying by the mask would not do: NaN * 0 is NaN. ValueError if the shapes differ.
    """
    _checks.same_shape(x=x, mask=mask)
    x = _checks.at_least_float32(x)
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The sum of `x` over the slots where `mask` is not 0.

    x, mask: the same shape. Returns a scalar, or `x` without dimension `dim`. ValueError if the shapes differ.
    """
    kept = fill(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The mean of `x` over the slots where `mask` is not 0; 0 where there is no such slot.

    x, mask: the same shape. Returns a scalar, or `x` without dimension `dim`. ValueError if the shapes differ.
    """
    total = sum(x, mask, dim)
    count = _count(mask, total.dtype, dim)
    return total / count.clamp_min(1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """`x` with variance 1 (and mean 0) over the slots where `mask` is not 0; zeros elsewhere.

    x, mask: the same shape; returns that shape. `shift_mean=False` puts the mean back, as for rewards;
    `unbiased=True` divides the squares by n-1. With one slot, or all values equal, the whitened value is 0.
    ValueError if the shapes differ. Source: lm-human-preferences `whiten` (arXiv:1909.08593), biased variance, 1e-8
    inside the root.
    """
    center = mean(x, mask)
    # The centred copy is filled again: subtracting the mean has put something into the masked slots.
    centered = fill(fill(x, mask) - center, mask)
    count = _count(mask, centered.dtype, None)
    variance = centered.square().sum() / (count - float(unbiased)).clamp_min(1)
    whitened = centered * torch.rsqrt(variance + WHITEN_EPSILON)
    return whitened if shift_mean else fill(whitened + center, mask)


def aggregate(x: Tensor, mask: Tensor, how: str = "token_mean", norm: float | Tensor | None = None) -> Tensor:
    """One loss from per-token losses, as a sum over this batch divided by a count that may be the global one.

    x, mask: [B, T]; returns a scalar. `how`:
    - "token_mean": the sum over tokens / `norm`, by default the number of tokens in `mask`;
    - "sequence_mean": the sum over sequences of their own token mean / `norm`, by default the number of sequences
      that have a token;
    - "sequence_sum_norm": the sum over tokens / `norm`, which must be given: the number of sequences for the mean of
      sequence sums, or that times the longest completion allowed (Dr. GRPO, arXiv:2503.20783).
    Give `norm` as the count over all micro-batches and processes, and the gradients of the parts add up to the
    gradient of the whole. Nothing to count gives 0. ValueError for an unknown `how`, a missing or non-positive
    `norm`, or shapes that differ.
    """
    if how not in _AGGREGATES:
        raise ValueError(f"how={how!r} is unknown; use one of {', '.join(map(repr, _AGGREGATES))}")
    if isinstance(norm, int | float):
        _checks.above("norm", norm, 0)
    numerator, count = _AGGREGATES[how](x, mask)
    if norm is not None:
        count = torch.as_tensor(norm, dtype=numerator.dtype, device=numerator.device)
    elif how == "sequence_sum_norm":
        raise ValueError('norm=None with how="sequence_sum_norm"; give the number to divide the sum by')
    # Nothing counted anywhere: 0/1 instead of 0/0.
    return numerator / torch.where(count > 0, count, torch.ones_like(count))


def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, with no gradient at all into slots whose own upstream gradient is zero.

    `function` must work element by element on tensors of one shape. A masked-out slot gets upstream gradient 0, but
    0 * inf is NaN: with this gate a poisoned slot stays silent in the backward pass too. Gradients of first order
    only.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result: Tensor = _Elementwise.apply(function, *tensors)  # type: ignore[no-untyped-call]
        return result
    return function(*tensors)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        inputs = [
            t.detach().requires_grad_(needed) for t, needed in zip(tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad():
            output = function(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        slopes = torch.autograd.grad(output, wanted, torch.ones_like(output))
        ctx.save_for_backward(*slopes)
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes = iter(ctx.saved_tensors)
        silent = gradient == 0
        return (
            None,
            *(
                torch.where(silent, 0.0, gradient * (slope := next(slopes))).to(slope.dtype) if needed else None
                for needed in ctx.needs_input_grad[1:]
            ),
        )


def _count(mask: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    kept = mask.bool()
    return (kept.sum() if dim is None else kept.sum(dim)).to(dtype)


def _tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    total = sum(x, mask)
    return total, _count(mask, total.dtype, None)


def _sequences(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 2:
        raise ValueError(f'how="sequence_mean" needs x of shape [B, T], not {list(x.shape)}; use how="token_mean"')
    total = mean(x, mask, dim=-1).sum()
    return total, mask.bool().any(-1).sum().to(total.dtype)


_AGGREGATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "token_mean": _tokens,
    "sequence_mean": _sequences,
    "sequence_sum_norm": _tokens,
}
