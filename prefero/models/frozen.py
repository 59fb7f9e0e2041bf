"""What is frozen below adapters, in few bytes: bfloat16, or int8 with a scale for each output (QLoRA's idea,
arXiv:2305.14314, with the weight-only int8 of arXiv:2206.01861).

Only the matrices of linear layers below adapters, which are nearly all weights of a network; embeddings, heads, norms
and biases stay what they were. bfloat16 rounds a weight to within 1/256 of itself, which a forward pass in bf16 does
anyway; int8 to within 1/254 of the largest weight that goes to the same output. What is computed is what a float32
matrix of the rounded values would compute: it is widened in float32, piece by piece, for as long as a product takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

KINDS = ("fp32", "bf16", "int8")
SCALE = "int8_scale"
_PIECE, _PIECE_ELSEWHERE = 1 << 20, 1 << 26
"""Numbers widened at once: what a CPU's cache holds; an accelerator wants fewer calls."""


def check_kind(kind: str) -> None:
    """Raises ValueError unless weights can be kept so."""
    if kind not in KINDS:
        raise ValueError(f"frozen={kind!r}: choose one of {', '.join(KINDS)}")


class FrozenLinear(nn.Linear):
    """A linear layer that does not learn, its matrix [out, in] in bfloat16, or in int8 with a scale [out, 1].

    turned: the model's own matrix is [in, out] (GPT-2's `Conv1D`). The bias is the layer's own, and may learn.
    Raises ValueError for a matrix that is not finite.
    """

    def __init__(self, of: Any, kind: str) -> None:
        nn.Module.__init__(self)
        self.turned = isinstance(of, Conv1D)
        matrix = of.weight.detach().t() if self.turned else of.weight.detach()
        self.out_features, self.in_features = matrix.shape
        small, scale = (matrix.to(torch.bfloat16), None) if kind == "bf16" else rounded(matrix)
        self.weight = nn.Parameter(small.contiguous(), requires_grad=False)
        self.register_buffer(SCALE, scale)
        self.bias = of.bias
        self.train(of.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer's it was: in the precision of the autocast around, or of the inputs."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            product: Tensor = _Product.apply(inputs, self.weight, getattr(self, SCALE), self.bias)  # type: ignore[no-untyped-call]
        return product

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] as this dtype."""
        return widened(self.weight, getattr(self, SCALE), dtype)


@torch.no_grad()
def keep_frozen(model: Any, kind: str, *, all_layers: bool = False) -> None:
    """Keeps the matrices below a model's adapters as `kind`, in place; nothing else changes.

    model: an `Actor`, `Critic` or `RewardModel`. Where it was built without weights, they are read or drawn a layer at
    a time, so that the float32 ones never stand beside each other. all_layers: every linear layer below the head, in a
    model without adapters, which then do not learn. Raises ValueError for an unknown kind, or where nothing is frozen.
    """
    check_kind(kind)
    if kind == "fp32":
        return
    chosen = set(_all_linear(model.model) if all_layers else _below_adapters(model))
    if not chosen:
        raise ValueError(f"frozen={kind!r}, but no weights are frozen below adapters: give a lora_rank, or use fp32")
    for part in (*_parts(model), model):  # what stands in no stack comes last
        if any(parameter.is_meta for parameter in part.parameters()):
            model.fill(part)
        for parent in part.modules():
            for name, child in parent.named_children():
                if child in chosen and not isinstance(child, FrozenLinear):
                    setattr(parent, name, FrozenLinear(child, kind))


def _below_adapters(model: nn.Module) -> Iterator[nn.Module]:
    layers = (layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer))
    return (layer for layer in layers if is_plain_linear(layer))


def _all_linear(network: nn.Module) -> Iterator[nn.Module]:
    head = getattr(network, "get_output_embeddings", lambda: None)()
    return (part for part in network.modules() if is_plain_linear(part) and part is not head)


def is_plain_linear(module: Any) -> bool:
    """Whether a layer is a linear one and nothing more: not a descendant with a way of its own (a router, say)."""
    usual = (nn.Linear.forward, Conv1D.forward, FrozenLinear.forward)
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in usual


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network's stacks, one after another."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _parts(child)


def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as int8, and the float32 scale [out, 1] of each output. Raises ValueError if not finite."""
    largest = matrix.abs().amax(1, keepdim=True).float()
    if not bool(largest.isfinite().all()):
        raise ValueError("a matrix with weights that are not finite cannot be rounded to int8: use frozen='fp32'")
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    small = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    for rows in _slices(len(matrix), matrix.shape[1], matrix.device):
        small[rows] = (matrix[rows].float() / scale[rows]).round().clamp(-127, 127)
    return small, scale


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A matrix [out, in] that is kept in few bytes as another dtype; scaled in float32, whatever that is."""
    if scale is None:
        return weight.to(dtype)
    wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in _slices(len(weight), weight.shape[1], weight.device):
        wide[rows] = weight[rows].float().mul_(scale[rows])
    return wide


def whole(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor `name` of a state dict; a matrix that is kept as int8 is widened to float32, [out, in]."""
    scale = state.get(f"{name.removesuffix('weight')}{SCALE}") if name.endswith("weight") else None
    return state[name] if scale is None else widened(state[name], scale, torch.float32)


def _slices(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """So many rows (or columns) of this width, in pieces."""
    piece = _PIECE if device.type == "cpu" else _PIECE_ELSEWHERE
    step = max(1, piece // width)
    return (slice(start, start + step) for start in range(0, count, step))


class _Product(torch.autograd.Function):
    """Inputs times a matrix in few bytes, widened in pieces that each make a part of the outputs: none is summed up."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bias = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(inputs.dtype)
        if weight.dtype == inputs.dtype:
            return nn.functional.linear(inputs, weight, bias)
        product = inputs.new_empty(*inputs.shape[:-1], len(weight))
        outputs, width = weight.shape
        for rows in _slices(outputs, width, weight.device):
            part = widened(weight[rows], None if scale is None else scale[rows], inputs.dtype)
            product[..., rows] = nn.functional.linear(inputs, part, None if bias is None else bias[rows])
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        of_inputs = of_bias = None
        if ctx.needs_input_grad[0] and weight.dtype == gradient.dtype:
            of_inputs = gradient @ weight
        elif ctx.needs_input_grad[0]:
            outputs, width = weight.shape
            of_inputs = gradient.new_empty(*gradient.shape[:-1], width)
            for columns in _slices(width, outputs, weight.device):
                of_inputs[..., columns] = gradient @ widened(weight[:, columns], scale, gradient.dtype)
        if ctx.bias is not None and ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0, dtype=torch.promote_types(gradient.dtype, ctx.bias)).to(ctx.bias)
        return of_inputs, None, None, of_bias
