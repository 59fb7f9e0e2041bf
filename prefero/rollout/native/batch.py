"""Continuous batching: a fixed number of slots, refilled as soon as answers end, prompts prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from prefero.models.packing import Packing, Texts
from prefero.rollout.native.slots import Decode, Prefill, Slots
from prefero.rollout.rows import Row

Forward = Callable[[Tensor, Tensor, Texts, Tensor], Tensor]
"""Packed token ids [T], their positions [T], who sees whom, and the places whose logits [P, V] are wanted."""
Draw = Callable[[Tensor, Sequence[Row]], None]
"""Gives each row the token drawn from its logits [B, V]."""

_REFILL = 4  # new prompts are taken in once a quarter of the slots is free: a prefill holds everybody up
_WORTH = 8  # tokens that two prompts must share for their keys and values to be copied
_PREFILL = 4096  # tokens of prompts read in one forward pass: what a pass computes takes memory too
_PAIRS = 1 << 26  # of a token and one it may see, in one forward pass: they take a byte each


class Batch:
    """Some rows on their way to an end: `step` gives each row in work its next token and returns those that have ended.

    The row in slot i is active[i], without gaps. Rows wait in the order given; those of one prompt should stand
    together: it is read once for all that start at the same time, and later ones copy what was read.
    """

    def __init__(self, rows: Sequence[Row], slots: Slots, forward: Forward, draw: Draw, device: torch.device) -> None:
        self.waiting = list(reversed(rows))
        self.active: list[Row] = []
        self.slots = slots
        self.held: list[tuple[int, ...]] = [()] * slots.count
        """The beginning of a prompt that a slot holds, also after its answer has ended."""
        self.forward = forward
        self.draw = draw
        self.device = device

    def __iter__(self) -> Iterator[list[Row]]:
        """Steps until nothing is left to do."""
        while self.waiting or self.active:
            yield self.step()

    def step(self) -> list[Row]:
        """One token for every active row, or the first one for new ones; returns the rows that have ended."""
        free = self.slots.count - len(self.active)
        if self.waiting and (not self.active or free * _REFILL >= self.slots.count):
            self._admit([self.waiting.pop() for _ in range(min(free, len(self.waiting)))])
        else:
            self._decode()
        return self._leave()

    def _admit(self, rows: list[Row]) -> None:
        """Prompts into slots, in waves: one that shares a beginning with another of them waits until that was read."""
        first = len(self.active)
        self.active += rows
        groups = [list(group) for _, group in groupby(range(first, len(self.active)), self._prompt)]
        logits: dict[int, Tensor] = {}
        while groups:
            wave = [group for i, group in enumerate(groups) if not self._should_wait(group[0], groups[:i])]
            groups = [group for group in groups if group not in wave]
            for group, row in zip(wave, self._prefill([group[0] for group in wave]), strict=True):
                self._copy(group[0], group[1:], len(self._prompt(group[0])))
                logits |= dict.fromkeys(group, row)
        self.draw(torch.stack([logits[slot] for slot in range(first, len(self.active))]), rows)

    def _prompt(self, slot: int) -> tuple[int, ...]:
        return self.active[slot].prompt.token_ids

    def _should_wait(self, slot: int, before: list[list[int]]) -> bool:
        ours = self._prompt(slot)
        later = max((_alike(ours, self._prompt(group[0])) for group in before), default=0)
        return later >= _WORTH and later > max(_alike(ours, held) for held in self.held)

    def _copy(self, source: int, targets: list[int], length: int) -> None:
        self.slots.copy(source, targets, length)
        for slot in targets:
            self.held[slot] = self.held[source][:length]

    def _prefill(self, targets: list[int]) -> Tensor:
        """Reads the prompts of these slots, but for what any slot holds already; logits [P, V] after each."""
        done, ends = {}, {slot: len(self._prompt(slot)) for slot in targets}
        for slot in targets:
            shared, donor = max((_alike(self._prompt(slot), held), other) for other, held in enumerate(self.held))
            done[slot] = shared if shared >= _WORTH else 0
            self._copy(donor, [slot], done[slot])
        logits: dict[int, Tensor] = {}
        while done:
            parts = {
                slot: self._prompt(slot)[done[slot] : done[slot] + size] for slot, size in _pieces(done, ends).items()
            }
            after = self._read(parts, [done[slot] for slot in parts])
            for (slot, part), row in zip(parts.items(), after, strict=True):
                done[slot] += len(part)
                self.held[slot] = self._prompt(slot)[: done[slot]]
                if done[slot] == ends[slot]:
                    logits[slot] = row
                    del done[slot]
        return torch.stack([logits[slot] for slot in targets])

    def _read(self, parts: dict[int, tuple[int, ...]], begin: list[int]) -> Tensor:
        """The next tokens of some slots, which hold as many as `begin` says; logits [P, V] after each part."""
        lengths, begins, targets = (
            torch.tensor(numbers, device=self.device)
            for numbers in ([len(part) for part in parts.values()], begin, list(parts))
        )
        packing = Packing.of(torch.arange(int(lengths.max()), device=self.device) < lengths.unsqueeze(1))
        ids = torch.tensor([token for part in parts.values() for token in part], device=self.device)
        text = torch.repeat_interleave(torch.arange(len(parts), device=self.device), lengths)
        texts = Prefill(self.slots, packing, targets, begins)
        return self.forward(ids, packing.positions + begins[text], texts, lengths.cumsum(0) - 1)

    def _decode(self) -> None:
        lengths = torch.tensor(
            [len(row.prompt.token_ids) + len(row.token_ids) - 1 for row in self.active], device=self.device
        )
        ids = torch.tensor([row.token_ids[-1] for row in self.active], device=self.device)
        places = torch.arange(len(ids), device=self.device)
        self.draw(self.forward(ids, lengths, Decode(self.slots, lengths), places), self.active)

    def _leave(self) -> list[Row]:
        """Takes out the rows that have ended; the last ones move into the gaps."""
        ended = [row for row in self.active if row.finish_reason is not None]
        for slot in range(len(self.active) - len(ended)):
            if self.active[slot].finish_reason is None:
                continue
            while self.active[-1].finish_reason is not None:
                self.active.pop()
            last = self.active.pop()
            self.slots.copy(len(self.active), [slot], len(last.prompt.token_ids) + len(last.token_ids) - 1)
            self.held[slot] = last.prompt.token_ids
            self.active[slot] = last
        self.active = [row for row in self.active if row.finish_reason is None]
        return ended


def _pieces(done: dict[int, int], ends: dict[int, int]) -> dict[int, int]:
    """How many tokens of each slot's prompt are read in the next forward pass: some of all, in order."""
    pieces: dict[int, int] = {}
    longest = reach = 0
    for slot, begin in done.items():
        size = min(ends[slot] - begin, _PREFILL - sum(pieces.values()), max(1, _PAIRS // ends[slot]))
        longest, reach = max(longest, size), max(reach, begin + size)
        if pieces and (size < 1 or (len(pieces) + 1) * longest * reach > _PAIRS):
            break
        pieces[slot] = size
    return pieces


def _alike(prompt: tuple[int, ...], held: tuple[int, ...]) -> int:
    """How many columns a prompt may take over from what a slot holds; its last token is always read anew."""
    alike, end = 0, min(len(prompt) - 1, len(held))
    while alike < end:
        middle = (alike + end + 1) // 2
        if prompt[alike:middle] == held[alike:middle]:
            alike = middle
        else:
            end = middle - 1
    return alike
