"""The whole model in every process, gradients averaged while backward runs: torch's DistributedDataParallel."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prefero.faults import last_phase
from prefero.strategies.base import Precision, Strategy
from prefero.strategies.group import join
from prefero.strategies.pulse import BrokenRunError
from prefero.strategies.scaling import LossScale


class DDPStrategy(Strategy):
    """A copy of every model in each process of a torchrun launch; without torchrun, one process.

    seed: given to Python, numpy and torch alike in every process. bucket_mb: gradients are averaged in parts of that
    size (MB), each as soon as it is complete. timeout: seconds a process waits for the others before it gives up. The
    rest: see `Strategy`. Every process starts from rank 0's weights. Models are only placed until they first learn, so
    they may be frozen before.
    """

    def __init__(
        self,
        seed: int = 42,
        precision: Precision = "fp32",
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        loss_scale: LossScale | None = None,
        bucket_mb: float = 25.0,
        timeout: float = 600.0,
    ) -> None:
        self.seed = seed
        self.bucket_mb = bucket_mb
        self.timeout = timeout
        self._waiting: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
        """Models that have not learned yet, and the hook that notices when they begin to."""
        super().__init__(precision, max_norm, norm_type, loss_scale)
        self.set_seed(seed)

    def setup_distributed(self) -> None:
        """Joins torchrun's process group."""
        self.group = join(self.timeout)
        self.device = self.group.device

    def set_seed(self, seed: int) -> None:
        """The same seed for Python, numpy and torch."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def setup_model(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        self.group.broadcast([*model.parameters(), *model.buffers()])
        if self.group.world_size > 1 and model not in self._waiting and not _is_replicated(model):
            self._waiting[model] = model.register_forward_pre_hook(self._noticing(), prepend=True, with_kwargs=True)
        return model

    def _noticing(self) -> Callable[[nn.Module, Any, Any], Any]:
        """What is called before a waiting model's forward passes, until one of them learns."""

        def notice(model: nn.Module, args: Any, kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in model.parameters()):
                return None
            if model not in self._waiting:
                raise ValueError(unprepared(model))  # a copy of one that was prepared
            self._replicate(model)
            # Torch's own hook comes too late for this forward pass.
            return replicate.state(model).forward_pre_hook(model, args, kwargs)

        return notice

    def _replicate(self, model: nn.Module) -> None:
        self._waiting.pop(model).remove()
        options: dict[str, Any] = {"device_id": self.device} if self.device.type == "cuda" else {}
        replicate(
            model,
            bucket_cap_mb=self.bucket_mb,
            gradient_as_bucket_view=True,
            init_sync=False,
            **options,
        )

    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        return optimizer

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Processes exchange gradients in the last one only."""
        if self.group.world_size > 1:
            if model in self._waiting:
                self._replicate(model)
            if not _is_replicated(model):
                raise ValueError(unprepared(model))
            cast(Any, model).set_requires_gradient_sync(last)
        yield

    def verify(self, model: nn.Module) -> None:
        everyone = self.group.counts(_fingerprint(model))
        usual = max(everyone, key=everyone.count)
        majority = 2 * everyone.count(usual) > len(everyone)
        others = [f"rank {rank}" for rank, own in enumerate(everyone) if own != usual or not majority]
        if len(set(everyone)) > 1:
            raise BrokenRunError(
                f"the weights of the {type(model).__name__} are no longer the same in all processes: "
                f"{' and '.join(others)} {'went another way' if majority else 'disagree'} (found in phase "
                f"{last_phase()!r}); nothing was saved"
            )


def _is_replicated(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def _fingerprint(model: nn.Module) -> int:
    """A number that changes with any bit of the weights, for all practical purposes."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        pad = -len(bits) % 8
        words = (torch.cat([bits, bits.new_zeros(pad)]) if pad else bits).view(torch.int64)
        total = (total * 1_000_003 + int(words.sum())) % 2**62
    return total


def unprepared(model: nn.Module) -> str:
    """Why a model that `prepare` never saw must not be trained: every process would learn by itself."""
    return f"the {type(model).__name__} was not prepared: pass it through strategy.prepare(...) before it is trained"
