"""One process on one device: CPU, CUDA or MPS."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prefero.strategies.base import Precision, Strategy
from prefero.strategies.group import Group
from prefero.strategies.scaling import LossScale


class NaiveStrategy(Strategy):
    """Everything on one device.

    device: None is CUDA, else MPS, else the CPU. The rest: see `Strategy`. Raises ValueError for an unknown precision
    or a device this machine does not have.
    """

    can_repeat = True

    def __init__(
        self,
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.device = pick_device(device)
        super().__init__(precision, max_norm, norm_type, loss_scale)

    def setup_distributed(self) -> None:
        """Nothing to join."""
        self.group = Group(device=self.device)

    def model_init_context(self) -> AbstractContextManager[Any]:
        """Models are built on the device itself, not in main memory first; in float32, the precision they train in."""
        return self.device

    def setup_model(self, model: nn.Module) -> nn.Module:
        return model.to(self.device)

    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return optimizer


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
