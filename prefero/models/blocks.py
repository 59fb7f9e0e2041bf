"""Attention of packed texts on a CPU, a block of scores at a time, made and forgotten while it is in the caches.

Torch's own kernels pad all texts to the longest, and in the backward pass pay for every small tile; here texts of like
length go together, and the products are those that oneDNN or MKL make whole. It rounds where torch's kernels round:
scores, weights and their gradients are float32 (or wider), what is multiplied with values is in the type of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SCORES = 2**16  # of one head: with nine heads in float32, 2 MiB, which stay in the caches
_ROWS = 128  # of queries at once: with fewer of them products are slow, so long texts get larger blocks,
_MOST = 2**19  # up to so many scores
_PADDING = 16  # tokens by which texts may always differ and still go together


@dataclass(frozen=True)
class Texts:
    """Texts of like length: who asks, and who is asked.

    queries: [S, Q] the packed numbers of the tokens that ask, the last of each text; keys: [S, K] of all its tokens.
    There, tokens that pad a text to the longest are any. positions: [S, Q] where the queries stand. lengths: [S].
    asked, held: the numbers, in the flattened queries and keys, of what is no padding.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    lengths: Tensor
    asked: Tensor
    held: Tensor
    causal: bool

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Rows of queries to take at once, and how many keys they see at most."""
        texts, rows = self.queries.shape
        columns = self.keys.shape[1]
        step = max(_SCORES // (texts * columns), min(_ROWS, _MOST // columns), 1)
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            last = int(self.positions[:, block].max()) if self.causal else columns - 1
            yield block, min(last + 1, columns)

    def hidden(self, block: slice, columns: int) -> tuple[int, Tensor]:
        """Which keys a block of queries does not see: the first column of which this is not true for all, and the rest
        [S, Q, K'].
        """
        numbers = torch.arange(columns)
        if self.causal:
            positions = self.positions[:, block]
            first = min(int(positions.min()) + 1, columns)
            return first, numbers[first:] > positions.unsqueeze(-1)
        first = min(int(self.lengths.min()), columns)
        return first, (numbers[first:] >= self.lengths.unsqueeze(-1)).unsqueeze(1)


def alike(index: Tensor, place: Tensor, lengths: Tensor, *, causal: bool) -> list[Texts]:
    """Texts sorted into such of like length; index [S, L], place [T], lengths [S]: as in `Packing`."""
    own = torch.bincount(place // index.shape[1], minlength=len(lengths)).tolist()
    sizes = lengths.tolist()
    order = sorted((size, mine, text) for text, (size, mine) in enumerate(zip(sizes, own, strict=True)) if mine)
    groups: list[list[tuple[int, int, int]]] = []
    for size, mine, text in order:
        now = groups[-1] if groups else []
        rows = max([mine, *(other for _, other, _ in now)])
        if now and (len(now) + 1) * rows * size <= _SCORES and size <= now[0][0] * 5 // 4 + _PADDING:
            now.append((size, mine, text))
        else:
            groups.append([(size, mine, text)])
    return [_together(group, index, causal=causal) for group in groups]


def _together(group: list[tuple[int, int, int]], index: Tensor, *, causal: bool) -> Texts:
    sizes, own, texts = (torch.tensor(column) for column in zip(*group, strict=True))
    columns, rows = torch.arange(int(sizes.max())), torch.arange(int(own.max()))
    keys = index[texts][:, : len(columns)]
    positions = ((sizes - own).unsqueeze(1) + rows).clamp_max(len(columns) - 1)
    asked = (rows < own.unsqueeze(1)).flatten().nonzero().squeeze(1)
    held = (columns < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1)
    return Texts(keys.gather(1, positions), keys, positions, sizes, asked, held, causal)


def attend(query: Tensor, key: Tensor, value: Tensor, texts: list[Texts], scale: float, *, shared: bool) -> Tensor:
    """Attention of packed tokens: query [T, H, D], key and value [T, H or fewer, D] to [T, H, D].

    shared: whether a key may stand in several texts.
    """
    if torch.is_autocast_enabled("cpu"):  # which casts for torch's own attention
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        attended: Tensor = _Attention.apply(query, key, value, texts, scale, shared)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    """Weights are made anew in the backward pass: queries, keys and values are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, texts: list[Texts], scale: float, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.texts, ctx.scale, ctx.shared = texts, scale, shared
        attended = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for some in texts:
            _put(attended, some.queries, some.asked, _answers(some, query, key, value, scale))
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError("attention on a CPU has no second derivative: leave create_graph out of backward()")
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), _zeros(key), _zeros(value)
        put = _add if ctx.shared else _put
        with torch.autocast("cpu", enabled=False):
            for some in ctx.texts:
                of_queries, of_keys, of_values = _gradients(some, query, key, value, gradients[0], ctx.scale)
                _put(to_query, some.queries, some.asked, of_queries)
                put(to_key, some.keys, some.held, of_keys)
                put(to_value, some.keys, some.held, of_values)
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None, None


def _answers(some: Texts, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What the queries of some texts get: [S, heads, group, Q, D]."""
    heads = key.shape[1]
    queries, keys, values = (
        _rows(query, some.queries, heads),
        _rows(key, some.keys, heads),
        _rows(value, some.keys, heads),
    )
    answers = values.new_empty(*queries.shape[:4], values.shape[4])
    for block, columns in some.blocks():
        weights = _weights(some, block, columns, queries, keys, scale).to(values.dtype)
        answers[:, :, :, block] = _product(weights, values[..., :columns, :])
    return answers


def _gradients(
    some: Texts, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of some texts' queries, keys and values, given the gradient [T, H, D] of what the queries got."""
    heads = key.shape[1]
    queries, keys, values = (
        _rows(query, some.queries, heads),
        _rows(key, some.keys, heads),
        _rows(value, some.keys, heads),
    )
    errors = _rows(gradient, some.queries, heads)
    padding = torch.ones(some.queries.numel(), dtype=torch.bool)
    padding[some.asked] = False
    errors.masked_fill_(padding.view(len(some.queries), 1, 1, -1, 1), 0.0)
    of_queries, of_keys, of_values = torch.empty_like(queries), _zeros(keys), _zeros(values)
    for block, columns in some.blocks():
        weights = _weights(some, block, columns, queries, keys, scale)
        error = errors[:, :, :, block]
        of_weights = _product(error.to(weights.dtype), values[..., :columns, :].to(weights.dtype).mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(scale).to(query.dtype)
        of_queries[:, :, :, block] = _product(of_scores, keys[..., :columns, :])
        of_keys[..., :columns, :] += _over_rows(of_scores, queries[:, :, :, block])
        of_values[..., :columns, :] += _over_rows(weights.to(value.dtype), error)
    return of_queries, of_keys, of_values


def _rows(packed: Tensor, numbers: Tensor, heads: int) -> Tensor:
    """From packed [T, H, D] to texts [S, heads, H / heads, rows, D]."""
    rows = packed.index_select(0, numbers.flatten())
    return rows.view(*numbers.shape, heads, -1, packed.shape[2]).permute(0, 2, 3, 1, 4).contiguous()


def _put(packed: Tensor, numbers: Tensor, real: Tensor, texts: Tensor) -> None:
    """The way back, of what is no padding."""
    packed.index_copy_(0, *_real(numbers, real, texts))


def _add(packed: Tensor, numbers: Tensor, real: Tensor, texts: Tensor) -> None:
    packed.index_add_(0, *_real(numbers, real, texts))


def _real(numbers: Tensor, real: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    rows = texts.permute(0, 3, 1, 2, 4).reshape(numbers.numel(), -1, texts.shape[4])
    if len(real) == len(rows):
        return numbers.flatten(), rows
    return numbers.flatten()[real], rows[real]


def _zeros(like: Tensor) -> Tensor:
    """Where gradients of several blocks are summed."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _weights(some: Texts, block: slice, columns: int, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax(scale q k) of a block of queries [S, heads, group, rows, K] over the first `columns` keys."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = _product((queries[:, :, :, block].to(wide) * scale), keys[..., :columns, :].to(wide).mT)
    first, hidden = some.hidden(block, columns)
    scores[..., first:].masked_fill_(hidden[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[S, heads, group, rows, X] times [S, heads, 1, X, Y], the heads of a group in one product."""
    texts, heads, group, rows, _ = left.shape
    product = torch.bmm(left.reshape(texts * heads, group * rows, -1), right.flatten(0, 2))
    return product.view(texts, heads, group, rows, -1)


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """The sum over a group's heads and rows of outer products: [..., group, rows, X], [..., Y] to [..., 1, X, Y]."""
    texts, heads, group, rows, _ = left.shape
    flat = (part.reshape(texts * heads, group * rows, -1) for part in (left, right))
    return torch.bmm(next(flat).mT, next(flat)).view(texts, heads, 1, -1, right.shape[-1])
