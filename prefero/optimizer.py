"""Adam under the seed system's names; torch's fused kernel does the work on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


class HybridAdam(torch.optim.Adam):
    """Adam with decoupled weight decay (AdamW, arXiv 1711.05101), or with L2 decay when adamw_mode is False.

    Defaults are the seed's: no weight decay. The fused kernel (eight times faster on a CPU) is used where torch has
    one for the parameters. states_on_cpu: the moments stay in main memory wherever the parameters are; every step
    happens there, with gradients brought over and new weights sent back. Parameters that learn nothing cost nothing.
    Raises ValueError for the seed's options that have no meaning here (no bias correction, NVMe offload).
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_mode: bool = True,
        nvme_offload_fraction: float = 0.0,
        nvme_offload_dir: str | None = None,
        *,
        states_on_cpu: bool = False,
    ) -> None:
        if not bias_correction:
            raise ValueError("bias_correction=False is not supported: leave it True")
        for name, given in (("nvme_offload_fraction", nvme_offload_fraction), ("nvme_offload_dir", nvme_offload_dir)):
            if given:
                raise ValueError(
                    f"{name}={given!r} is not supported: leave it out (states_on_cpu=True frees the accelerator)"
                )
        self.states_on_cpu = states_on_cpu
        groups = [
            {**group, "params": list(group["params"])} if isinstance(group, dict) else group for group in model_params
        ]
        super().__init__(
            groups,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=adamw_mode,
            fused=_can_fuse(_parameters(groups)) or None,
        )
        if any(parameter.is_meta for parameter in _parameters(groups)):
            # Weights that are yet to come will be on a device that can.
            self._undecided = self.register_step_pre_hook(_fuse_if_possible)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of Adam; closure: computes the loss anew, as torch's own."""
        if not self.states_on_cpu:
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        with torch.no_grad(), self._brought_over():
            super().step()
        return loss

    @contextmanager
    def _brought_over(self) -> Iterator[None]:
        """Inside, groups and states are those of copies in main memory, which go back to the parameters after."""
        own = [group["params"] for group in self.param_groups]
        copies: dict[Tensor, Tensor] = {}
        for group, parameters in zip(self.param_groups, own, strict=True):
            for parameter in (p for p in parameters if p.grad is not None):
                copy = copies[parameter] = torch.empty_like(parameter, device="cpu").copy_(parameter)
                copy.grad = parameter.grad.to("cpu")
                self.state[copy] = {kind: value.to("cpu") for kind, value in self.state.pop(parameter, {}).items()}
            group["params"] = [copies[p] for p in parameters if p in copies]
        try:
            yield
        finally:
            for group, parameters in zip(self.param_groups, own, strict=True):
                group["params"] = parameters
            for parameter, copy in copies.items():
                parameter.copy_(copy)
                self.state[parameter] = self.state.pop(copy)


class CPUAdam(HybridAdam):
    """The same optimizer under the seed's name for parameters on a CPU."""


def _parameters(groups: list[Any]) -> list[Tensor]:
    return [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]


def _can_fuse(parameters: list[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in parameters)


def _fuse_if_possible(optimizer: Any, *_: Any) -> None:
    """Before the first step, when the weights are there."""
    for group in optimizer.param_groups:
        group["fused"] = _can_fuse(group["params"]) or None
    optimizer._undecided.remove()
