"""One process on one device: CPU, CUDA or MPS."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prefero.strategies.base import Strategy
from prefero.strategies.cpu import supports_bf16


class NaiveStrategy(Strategy):
    """Everything on one device.

    device: None is CUDA, else MPS, else the CPU. precision: "fp32", "bf16" (autocast over float32 weights) or "auto"
    (bf16 where the hardware multiplies it natively). max_norm: gradient clipping of every step, 0 is none. Raises
    ValueError for an unknown precision or a device this machine does not have.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        precision: Literal["fp32", "bf16", "auto"] = "fp32",
        max_norm: float = 0.0,
    ) -> None:
        super().__init__()
        if precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"precision={precision!r}: choose 'fp32', 'bf16' or 'auto'")
        self.device = pick_device(device)
        native = precision == "auto" and has_native_bf16(self.device)
        self.precision = "bf16" if native or precision == "bf16" else "fp32"
        self.max_norm = max_norm

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Models are built on the device itself, not in main memory first; in float32, the precision they train in."""
        return self.device

    def setup_distributed(self) -> None:
        """Nothing to join."""

    def setup_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return optimizer

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def optimizer_step(self, optimizer: Optimizer, max_norm: float | None = None) -> float:
        """See `Strategy.optimizer_step`."""
        limit = self.max_norm if max_norm is None else max_norm
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = float(norm)
        if math.isfinite(size):
            if limit > 0.0:
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            optimizer.step()
        else:
            self.skipped_steps += 1
        optimizer.zero_grad(set_to_none=True)
        return size

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device named, or the best one here. Raises ValueError when the machine does not have it."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device is None:
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device: use 'cpu', 'cuda', 'cuda:0' or 'mps'") from error
    if (chosen.type == "cuda" and not cuda) or (chosen.type == "mps" and not mps):
        raise ValueError(f"device={str(device)!r} is not on this machine: use device='cpu'")
    return chosen


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself, so that it is worth using."""
    if device.type == "cpu":
        return supports_bf16()
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False
