"""Texts of different lengths in one row without padding: the work of a forward pass is that of its real tokens.

Every layer but attention treats tokens one by one, so texts may stand one after another in a row [1, T]. Attention goes
through transformers' attention interface to `attention`, which sets the texts apart again: what is learned from stands
by itself (`Packing`), what is sampled also sees the keys and values that the engine keeps. BLOOM, which has no such
interface, gets its attention from `alibi.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefero.models import blocks

_WORTH = 15 / 16  # of all tokens: with more than these left, beginnings in common are not worth looking up
NAME = "prefero"
"""Under which transformers knows the attention of this module."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a packed row [1, T] stand in their texts [S, L], each beginning in column 0.

    source: [T] where each token stood in the flattened padded batch. positions: [T], counted within each text.
    index: [S, L] the packed number of each text's tokens (any, where a text has ended). place: [T] the other way
    round, into the flattened [S, L]. lengths: [S]. causal: whether a token sees only those before it. shared: whether
    some of the tokens stand in several texts.
    """

    source: Tensor
    positions: Tensor
    index: Tensor
    place: Tensor
    lengths: Tensor
    causal: bool
    shared: bool = False

    @staticmethod
    def of(attention_mask: Tensor, *, causal: bool = True) -> Packing:
        """The packing of a padded batch whose real tokens the mask [B, S] marks."""
        lengths = attention_mask.long().sum(dim=1)
        source = attention_mask.flatten().nonzero().squeeze(1)
        ends = lengths.cumsum(0)
        text = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        positions = torch.arange(len(source), device=lengths.device) - (ends - lengths)[text]
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        index = ((ends - lengths).unsqueeze(1) + columns).clamp_max(len(source) - 1)
        return Packing(source, positions, index, text * len(columns) + positions, lengths, causal)

    def deduplicated(self, token_ids: Tensor) -> Packing:
        """The same with beginnings that texts have in common (prompts) packed once; token_ids: the padded batch [B, S].

        What a causal network computes for them is the same in each. As it was where that would spare too little.
        """
        columns = torch.arange(self.index.shape[1], device=self.index.device)
        real = columns < self.lengths.unsqueeze(1)
        ids = token_ids.flatten()[self.source][self.index].masked_fill(~real, -1)
        order = torch.tensor(sorted(range(len(ids)), key=ids.tolist().__getitem__), device=ids.device)
        ids, real = ids[order], real[order]
        # In this order a text shares most with the one before it: as many tokens as they begin with alike.
        alike = ((ids[1:] == ids[:-1]) & real[1:]).long().cumprod(1).bool()
        first = real & ~torch.cat([torch.zeros_like(real[:1]), alike])
        if not self.causal or int(first.sum()) > _WORTH * len(self.source):
            return self
        number = (first.flatten().cumsum(0) - 1).clamp_min(0).view_as(ids)  # a row may hold nothing at all
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        holder = torch.where(first, rows, 0).cummax(0).values
        index = torch.empty_like(number)
        index[order] = number.gather(0, holder)
        place = (order.unsqueeze(1) * len(columns) + columns)[first]
        source = self.source[self.index.flatten()[place]]
        return Packing(source, (columns + torch.zeros_like(rows))[first], index, place, self.lengths, True, shared=True)

    def spread(self, packed: Tensor) -> Tensor:
        """From packed vectors [T, D] to those of all real tokens, text by text."""
        if not self.shared:
            return packed
        real = torch.arange(self.index.shape[1], device=self.index.device) < self.lengths.unsqueeze(1)
        return packed.index_select(0, self.index[real])

    @cached_property
    def alike(self) -> list[blocks.Texts]:
        """The texts by their lengths, for attention on a CPU."""
        return blocks.alike(self.index, self.place, self.lengths, causal=self.causal)

    def apart(self, packed: Tensor) -> Tensor:
        """From heads of packed tokens [1, H, T, D] to texts [S, H, L, D]."""
        texts = packed[0].transpose(0, 1).index_select(0, self.index.flatten())
        return texts.view(*self.index.shape, *texts.shape[1:]).transpose(1, 2)

    def together(self, texts: Tensor) -> Tensor:
        """From texts [S, H, L, D] to packed tokens [1, T, H, D]."""
        return texts.transpose(1, 2).flatten(0, 1).index_select(0, self.place).unsqueeze(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        """Attention of each text to itself: [1, H, T, D] to [1, T, H, D]."""
        if query.device.type == "cpu" and how.plain(self.index.shape[1]):
            scale = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
            query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
            return blocks.attend(query, key, value, self.alike, scale, shared=self.shared).unsqueeze(0)
        query, key, value = (self.apart(part) for part in (query, key, value))
        columns = torch.arange(self.index.shape[1], device=self.index.device)
        ended = (columns < self.lengths.unsqueeze(1))[:, None, None, :]
        visible = band(columns, columns, how.window) if self.causal else ended
        return self.together(how.attend(query, key, value, visible, causal=self.causal))


class Texts(Protocol):
    """What a packed row is made of, and so who may see whom."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        """Attention in one layer: [1, H, T, D] (keys and values perhaps of fewer heads) to [1, T, H, D]."""
        ...


def band(queries: Tensor, keys: Tensor, window: int | None) -> Tensor | None:
    """Which keys a query sees by position ([..., Q] and [..., K] to [..., Q, K]) within a sliding window.

    None where the window is at least as long as the texts, so that being causal says it all.
    """
    if window is None or window >= keys.shape[-1]:
        return None
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class Attending:
    """How a layer attends: dropout, scale, sliding window, soft cap, and slopes [H] of a bias that grows with the key's
    position (ALiBi, arXiv 2108.12409), as its model asks for them.
    """

    dropout: float = 0.0
    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None

    def plain(self, length: int) -> bool:
        """Whether nothing but the products and their scale is asked for in texts of this length."""
        narrow = self.window is not None and self.window < length
        return not (narrow or self.dropout or self.softcap is not None or self.slopes is not None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, *, causal: bool) -> Tensor:
        """Attention of [S, H, Q, D] to [S, H or fewer, K, D]; visible: broadcastable to [S, H, Q, K], None for all.

        causal: the last query stands at the last key and each sees what is not after it, unless `visible` says it.
        """
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and (self.softcap is not None or (key.is_cuda and visible is not None)):
            # Torch's fast kernels on a GPU take either a mask or heads of queries that share their keys.
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            groups = 1
        if visible is None and causal and (self.slopes is not None or self.softcap is not None):
            rows, columns = query.shape[2], key.shape[2]
            visible = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        if self.slopes is not None:
            places = torch.arange(key.shape[2], device=key.device)
            bias = (self.slopes[:, None, None] * places).to(query.dtype).unsqueeze(0)
            visible = bias if visible is None else torch.where(visible, bias, -torch.inf)
        if self.softcap is None:
            return nn.functional.scaled_dot_product_attention(
                query, key, value, visible, self.dropout, causal and visible is None, scale=self.scaling,
                enable_gqa=groups > 1,
            )  # fmt: skip
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return nn.functional.dropout(weights, self.dropout) @ value


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    texts: Texts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention [B, T, H, D] over packed texts; where there are none, transformers' own."""
    if texts is not None:
        _check_window(module, kwargs)
        how = Attending(dropout, scaling, kwargs.get("sliding_window"), kwargs.get("softcap"))
        return texts.attend(getattr(module, "layer_idx", 0), query, key, value, how), None
    if (softcap := kwargs.get("softcap")) is not None:  # which torch's own does not know
        how = Attending(dropout, scaling, softcap=softcap)
        return how.attend(query, key, value, attention_mask, causal=True).transpose(1, 2), None
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]
    return output, None


def _check_window(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a layer that does not see everything before, where only the mask would say so."""
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and layer is not None:
        limited = kinds[layer] != "full_attention"
    else:
        limited = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    if limited and kwargs.get("sliding_window") is None:
        raise ValueError("this layer's sliding window is known to its mask alone: use padded texts")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
