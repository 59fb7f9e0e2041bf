"""Forward passes without padding, for any family that can: hidden states and logits of packed texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BloomModel, PreTrainedModel

from prefero.models import alibi
from prefero.models.packing import NAME, Attending, Packing, Texts
from prefero.models.trunk import (
    check_length,
    drops_out,
    evaluating,
    is_bidirectional,
    out_of_memory,
    padded_hidden_states,
)

_KEPT = "_prefero_kept"  # of a trunk: what `kept_per_token` has found out
# How far hidden states may be apart, relative to all of them. Two ways to round to bf16 are each as much as 1.5 % from
# exact in a network of two layers; attention that mixes texts is off by all of them.
_FAR, _FAR_IN_HALF = 1e-4, 5e-2


def hidden_states(trunk: Any, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last hidden states [B, S, D] of `token_ids` [B, S] under `attention_mask` [B, S]; zeros at padding.

    Padding is not computed where the trunk can do without, and beginnings that texts have in common are computed once.
    """
    if not packs(trunk):
        return padded_hidden_states(trunk, token_ids, attention_mask)
    if attention_mask is None:
        attention_mask = torch.ones_like(token_ids)
    whole = Packing.of(attention_mask, causal=not is_bidirectional(trunk.config))
    # Where tokens are dropped out, each text has its own.
    packing = whole if trunk.training and drops_out(trunk) else whole.deduplicated(token_ids)
    check_length(trunk, token_ids, attention_mask)
    packed = packing.spread(run(trunk, token_ids.flatten()[packing.source], packing.positions, packing))
    apart = packed.new_zeros(token_ids.numel(), packed.shape[1]).index_copy(0, whole.source, packed)
    return apart.view(*token_ids.shape, -1)


def run(trunk: Any, ids: Tensor, positions: Tensor, texts: Texts) -> Tensor:
    """The last hidden states [T, D] of packed token ids [T] at their positions [T]."""
    _check(trunk)
    if isinstance(trunk, BloomModel):
        return alibi.run(trunk, ids, texts)
    hidden: Tensor = trunk(**_inputs(ids, positions, texts)).last_hidden_state
    return hidden[0]


def logits(model: Any, ids: Tensor, positions: Tensor, texts: Texts, places: Tensor) -> Tensor:
    """The logits [P, V] after the packed tokens at `places` [P], by a causal model's own forward."""
    _check(model.base_model)
    if isinstance(model.base_model, BloomModel):
        head: Tensor = model.lm_head(alibi.run(model.base_model, ids, texts)[places])
        return head
    found: Tensor = model(**_inputs(ids, positions, texts), logits_to_keep=places).logits
    return found[0]


def _check(trunk: Any) -> None:
    if not _is_ours(trunk):
        raise ValueError(
            f"the attention of {type(trunk).__name__} was changed to {trunk.config._attn_implementation!r} after "
            "it was first used: use set_attn_implementation before, or make the engine anew"
        )


def _inputs(ids: Tensor, positions: Tensor, texts: Texts) -> dict[str, Any]:
    # A mask of four dimensions is one the model need not make: `texts` says it all.
    return {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0),
            "attention_mask": ids.new_ones(1, 1, 1, 1), "use_cache": False, "texts": texts}  # fmt: skip


def packs(trunk: Any) -> bool:
    """Whether a trunk computes the same for packed texts; found out by trial, once, whatever the family.

    From then on its attention is that of this module, which is transformers' own where nothing is packed.
    """
    return kept_per_token(trunk) > 0 and _is_ours(trunk)


def kept_per_token(trunk: Any) -> int:
    """How many numbers the keys and values of one token are, in all layers together; 0 where texts cannot be packed."""
    known: int | None = getattr(trunk, _KEPT, None)
    if known is None:
        known = _tried(trunk)
        setattr(trunk, _KEPT, known)
    return known


def _is_ours(trunk: Any) -> bool:
    return isinstance(trunk, BloomModel) or trunk.config._attn_implementation == NAME


@dataclass
class _Counted:
    """A packing that notes what it is given: a layer's heads, and what it computes in, are known to attention alone."""

    packing: Packing
    numbers: int = 0
    dtype: torch.dtype = torch.float32

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        self.numbers += sum(heads.shape[1] * heads.shape[3] for heads in (key, value))
        self.dtype = value.dtype
        return self.packing.attend(layer, query, key, value, how)


@torch.no_grad()
def _tried(trunk: Any) -> int:
    config, bloom = trunk.config, isinstance(trunk, BloomModel)
    if not bloom and not (isinstance(trunk, PreTrainedModel) and trunk._can_set_attn_implementation()):
        return 0
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        return 0
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], device=trunk.device)
    words = trunk.get_input_embeddings().num_embeddings  # perhaps fewer than these
    ids = torch.tensor([[3, 1, 2, 0, 0], [2, 0, 1, 3, 1]], device=trunk.device) % words
    before = config._attn_implementation
    with evaluating(trunk):
        theirs = padded_hidden_states(trunk, ids, mask)
        alike = False
        try:
            if not bloom:
                config._attn_implementation = NAME
            packing = Packing.of(mask, causal=not is_bidirectional(config))
            counted = _Counted(packing)
            ours = run(trunk, ids.flatten()[packing.source], packing.positions, counted).float()
            theirs = theirs.flatten(0, 1)[packing.source].float()
            far = _FAR_IN_HALF if counted.dtype.itemsize < 4 else _FAR
            alike = bool(((ours - theirs).norm(dim=1) <= far * theirs.norm(dim=1)).all())
        except Exception as error:  # whatever a forward does with what it does not know
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
        finally:
            if not alike:
                config._attn_implementation = before
    return counted.numbers if alike else 0
