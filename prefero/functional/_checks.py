"""Refusals shared by the formulas: every message names the argument, what it was and what to give instead."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def same_shape(**tensors: Tensor) -> None:
    """Refuses tensors whose shapes differ (nothing is broadcast: a [B] beside a [B, T] is a bug, not a wish)."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} but {first} has {list(reference.shape)}; "
                f"give {' and '.join(tensors)} the same shape"
            )


def not_empty(**tensors: Tensor) -> None:
    """Refuses tensors without a single element, whose mean would be NaN."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty (shape {list(tensor.shape)}); give at least one element")


def at_least(name: str, value: float, low: float) -> None:
    """Refuses a number below `low`, and NaN."""
    if not value >= low:
        raise ValueError(f"{name}={value!r} is out of range; use a number >= {low:g}")


def above(name: str, value: float, low: float) -> None:
    """Refuses a number not strictly above `low`, infinity and NaN."""
    if not (value > low and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} is out of range; use a finite number > {low:g}")


def fraction(name: str, value: float) -> None:
    """Refuses a number outside [0, 1], and NaN."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} is out of range; use a number between 0 and 1")


def token_ids_within(token_ids: Tensor, vocab_size: int) -> None:
    """Refuses ids that are not whole numbers of the vocabulary, such as the ignore label -100."""
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool or token_ids.is_complex():
        raise ValueError(f"token_ids has dtype {token_ids.dtype}; give integer ids")
    if token_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(token_ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token_ids holds {wrong}, outside the vocabulary 0..{vocab_size - 1}; "
            "put any valid id (such as the padding id) in slots to ignore and mask the result"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it came in half precision (sums and exponentials lose digits there), else `x` itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
