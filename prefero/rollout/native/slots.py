"""Keys and values of the texts being answered, one slot a text, and how packed tokens attend to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefero.models.packing import Attending, Packing
from prefero.rollout.native import kernels


class Slots:
    """For every layer, keys and values [count, heads, room, D] in the precision attention computes in.

    A layer's memory is taken when it first writes: only then its heads are known. Text i occupies slot i, its tokens
    stand in columns 0, 1, ...; what lies beyond a text's length is left over and never looked at.
    """

    def __init__(self, count: int, room: int) -> None:
        self.count, self.room = count, room
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def at(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, made like these heads [1, H, T, D]."""
        if layer not in self.keys:
            self.keys[layer], self.values[layer] = self._like(key), self._like(value)
        return self.keys[layer], self.values[layer]

    def _like(self, heads: Tensor) -> Tensor:
        device = heads.device.type
        # Autocast would turn them, all of them, at every step.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else heads.dtype
        return heads.new_zeros((self.count, heads.shape[1], self.room, heads.shape[3]), dtype=dtype)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """The first `length` columns of one slot into others."""
        into = torch.tensor([target for target in targets if target != source])
        if len(into):
            for pool in (*self.keys.values(), *self.values.values()):
                pool[into.to(pool.device), :, :length] = pool[source, :, :length]


@dataclass
class Prefill:
    """The first tokens of new texts, packed: `packing` sets them apart, text i goes into slot targets[i].

    begins: how many columns of each slot are filled already (with a beginning it shares with another text).
    """

    slots: Slots
    packing: Packing
    targets: Tensor
    begins: Tensor
    seen: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.packing.place // self.packing.index.shape[1]
        self.rows, self.columns = self.targets[text], self.packing.positions + self.begins[text]
        self.goes_on = bool(self.begins.any())
        self.reach = int((self.begins + self.packing.lengths).max())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        """Each text to itself and to what its slot holds; the new keys and values are put there."""
        keys, values = self.slots.at(layer, key, value)
        own, reach = self.packing, self.reach
        keys[self.rows, :, self.columns] = key[0].transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.columns] = value[0].transpose(0, 1).to(values.dtype)
        if not self.goes_on:
            return own.attend(layer, query, key, value, how)
        visible = self.seen.get(how.window)
        if visible is None:
            columns = torch.arange(own.index.shape[1], device=self.columns.device)
            at = self.begins.unsqueeze(1) + columns
            visible = self.seen[how.window] = _seen(at, reach, how.window).unsqueeze(1)
        return own.together(
            how.attend(
                own.apart(query), keys[self.targets, :, :reach], values[self.targets, :, :reach], visible, causal=False
            )
        )


@dataclass
class Decode:
    """One further token of each of the texts in the first slots; lengths: [B] before it."""

    slots: Slots
    lengths: Tensor
    seen: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reach = int(self.lengths.max()) + 1
        if self.reach > self.slots.room:
            raise ValueError(f"a text of {self.reach} tokens in slots of {self.slots.room}: give more room")
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attending) -> Tensor:
        """Each new token to its own text: [1, H, B, D] to [1, B, H, D]."""
        keys, values = self.slots.at(layer, key, value)
        count = len(self.lengths)
        plain = how.softcap is None and how.slopes is None and keys.shape[-1] == values.shape[-1]
        if plain and kernels.available(keys.device, keys.dtype):
            query, key, value = (heads[0].transpose(0, 1).to(keys.dtype) for heads in (query, key, value))
            scaling = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
            out = kernels.decode(query, key, value, None, keys, values, self.lengths, scaling, how.window)
            return out.view(1, count, query.shape[1], -1)
        keys[self.rows, :, self.lengths] = key[0].transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.lengths] = value[0].transpose(0, 1).to(values.dtype)
        visible = self.seen.get(how.window)
        if visible is None:
            visible = self.seen[how.window] = _seen(self.lengths, self.reach, how.window)[:, None, None]
        # Queries that share a head of keys stand as if they were tokens of one head, so that no key is copied.
        heads = keys.shape[1]
        apart = query[0].transpose(0, 1).reshape(count, heads, -1, query.shape[-1])
        keys, values = (pool[:count, :, : self.reach] for pool in (keys, values))
        return how.attend(apart, keys, values, visible, causal=False).flatten(1, 2).unsqueeze(0)


def _seen(at: Tensor, reach: int, window: int | None) -> Tensor:
    """Which of `reach` columns a token at column `at` [...] sees: [..., reach]."""
    columns, at = torch.arange(reach, device=at.device), at.unsqueeze(-1)
    visible = columns <= at
    return visible if window is None else visible.logical_and_(columns > at - window)
