"""Layers with their weights at hand: for sampling, where the same weights meet a few tokens again and again.

A forward pass in another precision casts every weight anew, and an adapter adds two small products to every large one.
The forwards made here do neither: weights are cast once, and in float32 adapters are added to them. In half precision
adapters stay apart, as the trainer has them: added, most of a small one would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefero.models.frozen import FrozenLinear, is_plain_linear
from prefero.models.lora import ADAPTER, update_of
from prefero.models.trunk import Forwards

_TOKENS = 32  # for so many at once the layout of weights is best: a step of decoding
_SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that families give the same input, one after another: one product does for all."""


@torch.no_grad()
def at_hand(trunk: nn.Module) -> Forwards:
    """Forwards that multiply by ready copies of the weights, in the precision of the autocast around, if any.

    For `trunk.replaced`; they hold as long as the weights are not changed. Layers without adapters whose weights have
    that precision already, and layers of other kinds, are left alone, and no memory is used for them.
    """
    device = next(trunk.parameters()).device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    made: Forwards = []
    done: set[int] = set()
    for module in trunk.modules():
        for names in _SIDE_BY_SIDE:
            parts: list[Any] = [getattr(module, name, None) for name in names]
            if all(_gains(part, wanted) for part in parts):
                made += zip(parts, _side_by_side(parts, wanted), strict=True)
                done |= {id(part) for part in parts}
    for module in trunk.modules():
        if id(module) not in done and _gains(module, wanted):
            made.append((module, _alone(module, wanted)))
        done |= {id(part) for part in module.modules()} if isinstance(module, LoraLayer) else set()
    return made


def _gains(module: Any, wanted: torch.dtype | None) -> bool:
    """Whether a layer has an adapter that is on and plain, or weights of another precision than is wanted."""
    if not isinstance(module, LoraLayer):
        return is_plain_linear(module) and wanted is not None and module.weight.dtype != wanted
    plain = type(module) is LoraLinear and not (module.merged or module.lora_variant or any(module.lora_bias.values()))
    if not (plain and module.active_adapters == [ADAPTER] and is_plain_linear(module.get_base_layer())):
        return False
    return wanted is not None or _computes_in(module.get_base_layer()).itemsize >= 4


def _computes_in(base: Any) -> torch.dtype:
    """What a linear layer computes in where nothing is cast."""
    dtype: torch.dtype = torch.float32 if isinstance(base, FrozenLinear) else base.weight.dtype
    return dtype


def _matrix(base: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's matrix [out, in]."""
    if isinstance(base, FrozenLinear):
        return base.matrix(dtype)
    weight: Tensor = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return weight.to(dtype)


@dataclass(frozen=True)
class _Copy:
    """A layer's weight [out, in] and bias, and its adapter [rank, in], [out, rank], where that stays apart."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(module: Any, wanted: torch.dtype | None) -> _Copy:
        adapted = isinstance(module, LoraLayer) and not module.disable_adapters
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        dtype = wanted or _computes_in(base)
        weight, adapter = _matrix(base, dtype), None
        if adapted and dtype.itemsize >= 4:
            weight = weight + update_of(module).to(dtype)
        elif adapted:
            left, right = (getattr(module, f"lora_{part}")[ADAPTER].weight for part in "AB")
            adapter = left.to(dtype), right.to(dtype) * module.scaling[ADAPTER]
        return _Copy(weight.contiguous(), None if base.bias is None else base.bias.to(dtype), adapter)

    def without_weight(self) -> _Copy:
        """What `adapted` needs, so that the weight can go."""
        return _Copy(self.weight.new_empty(0), None, self.adapter)

    def adapted(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The output with what the adapter adds."""
        if self.adapter is None:
            return output
        down, up = self.adapter
        return output + nn.functional.linear(nn.functional.linear(inputs.to(down.dtype), down), up)


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Inputs to what a linear layer makes of them; the weights laid out for it where oneDNN does bf16."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _lays_out():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)
        return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, laid_out, bias, "none", [], "")
    return lambda inputs: nn.functional.linear(inputs, weight, bias)


@cache
def _lays_out() -> bool:
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    known = all(hasattr(torch.ops.mkldnn, name) for name in names)  # torch's own, for its compiler
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _alone(module: Any, wanted: torch.dtype | None) -> Callable[..., Tensor]:
    own = _Copy.of(module, wanted)
    product, dtype = _product(own.weight, own.bias), own.weight.dtype
    own = own.without_weight()

    def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
        return own.adapted(inputs, product(inputs.to(dtype)))

    return forward


def _side_by_side(modules: Sequence[Any], wanted: torch.dtype | None) -> list[Callable[..., Tensor]]:
    """Forwards of which the first computes for all, and the others give what it left for them."""
    copies = [_Copy.of(module, wanted) for module in modules]
    sizes = [len(own.weight) for own in copies]
    biases = [own.bias for own in copies if own.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(copies) else None
    if biases and bias is None:  # some with, some without: no family has that, and each can do for itself
        return [_alone(module, wanted) for module in modules]
    weight = torch.cat([own.weight for own in copies])
    product, dtype = _product(weight, bias), weight.dtype
    adapters = [own.without_weight() for own in copies]
    seen: list[Any] = [None, ()]

    def forward_of(number: int) -> Callable[..., Tensor]:
        def forward(inputs: Tensor, *_: Any, **__: Any) -> Tensor:
            if seen[0] is not inputs:
                seen[:] = inputs, torch.split(product(inputs.to(dtype)), sizes, dim=-1)
            part: Tensor = seen[1][number]
            if number == len(sizes) - 1:
                seen[:] = None, ()
            return adapters[number].adapted(inputs, part)

        return forward

    return [forward_of(number) for number in range(len(sizes))]
