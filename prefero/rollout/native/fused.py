"""Decoder layers of Llama's kind in a few steps a token: `kernels` between the products that train.

A layer of Llama, Mistral and Qwen 2 is norm, attention, norm and gated layer, each added to what it was given. Where a
layer is one of these, has just these parts, and a trial shows the same numbers, decoding takes them in one go; whatever
else it is (others look like these, but scale what they ask by its position), it goes on through its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prefero.models.packed import run
from prefero.models.packing import Packing
from prefero.models.trunk import Forwards, evaluating, out_of_memory, replaced
from prefero.rollout.native import kernels
from prefero.rollout.native.slots import Decode, Prefill, Slots

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
_PARTS = {
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_KNOWN = "_prefero_fuses"  # of a trunk: what the trial has shown
_FAR = 1e-4


def fused(trunk: Any) -> Forwards:
    """Forwards of a trunk's layers that decode in few steps; none where that is not known to be the same.

    For `trunk.replaced`. They call the forwards that the layers' linear parts have when they run.
    """
    known: bool | None = getattr(trunk, _KNOWN, None)
    if known is None:
        known = _fits(trunk) and _same(trunk)
        setattr(trunk, _KNOWN, known)
    return [(layer, _forward(layer, number)) for number, layer in enumerate(trunk.layers)] if known else []


def _fits(trunk: Any) -> bool:
    """Whether the layers have the parts of Llama's, and no others."""
    if not kernels.available(trunk.device, torch.float32) or getattr(trunk.config, "sliding_window", None) is not None:
        return False
    for layer in getattr(trunk, "layers", [None]):
        if type(layer).__name__ not in _LAYERS:
            return False
        for name, parts in _PARTS.items():
            module: Any = getattr(layer, name, None) if name else layer
            if not isinstance(module, nn.Module) or {child for child, _ in module.named_children()} != parts:
                return False
        plain = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        if not plain or not all(hasattr(norm, "variance_epsilon") for norm in norms):  # a family may change
            return False
    return True


def _forward(layer: Any, number: int) -> Callable[..., Tensor]:
    usual, mlp = layer.forward, layer.mlp

    def norm(module: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.norm(x, module.weight, module.variance_epsilon, dtype)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        # The model may have moved, or what it computes in, since it was tried.
        if hidden_states.dtype != torch.float32 or not kernels.available(hidden_states.device, dtype):
            found: Tensor = usual(hidden_states, *args, **kwargs)
            return found
        x = hidden_states[0]
        x = x + _attended(layer.self_attn, number, norm(layer.input_layernorm, x, dtype), kwargs)
        read = norm(layer.post_attention_layernorm, x, dtype)
        through = kernels.gate(mlp.gate_proj.forward(read), mlp.up_proj.forward(read))
        return torch.add(x, mlp.down_proj.forward(through)).unsqueeze(0)

    return forward


def _attended(attention: Any, number: int, read: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What attention adds to tokens [T, D]."""
    texts = kwargs["texts"]
    if not isinstance(texts, Decode):
        found: Tensor = attention.forward(hidden_states=read.unsqueeze(0), **kwargs)[0][0]
        return found
    keys, values = texts.slots.keys[number], texts.slots.values[number]
    parts = [part.forward(read) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    query, key, value = (part.unflatten(-1, (-1, keys.shape[-1])) for part in parts)
    cosine, sine = kwargs["position_embeddings"]
    answer = kernels.decode(
        query, key, value, (cosine[0], sine[0]), keys, values, texts.lengths, attention.scaling, None
    )
    added: Tensor = attention.o_proj.forward(answer)
    return added


@torch.no_grad()
def _same(trunk: Any) -> bool:
    """Whether a token after each of two texts comes out as by the layers' own forwards."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], device=trunk.device)
    words = trunk.get_input_embeddings().num_embeddings
    ids, packing = torch.tensor([3, 1, 2, 2, 0, 1, 3], device=trunk.device) % words, Packing.of(mask)
    nothing = torch.zeros(2, dtype=torch.long, device=trunk.device)

    def decoded(forwards: Forwards) -> Tensor:
        slots = Slots(2, 5)
        with replaced(forwards), torch.autocast(trunk.device.type, enabled=False):
            run(trunk, ids, packing.positions, Prefill(slots, packing, nothing + torch.arange(2), nothing))
            return run(trunk, ids[:2], packing.lengths, Decode(slots, packing.lengths))

    with evaluating(trunk):
        theirs = decoded([])
        try:
            ours = decoded([(layer, _forward(layer, number)) for number, layer in enumerate(trunk.layers)])
        except Exception as error:  # whatever a forward is given that it does not know
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            return False
    return bool(((ours - theirs).norm(dim=1) <= _FAR * theirs.norm(dim=1)).all())
