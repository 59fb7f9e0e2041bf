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


class Batch:
    """Some rows on their way to an end: `step` gives each row in work its next token and returns those that have ended.

    The row in slot i is active[i], without gaps. Rows wait in the order given; those of one prompt should stand
    together: it is read once for all that start at the same time, and later ones copy what was read.
    """

    def __init__(self, rows: Sequence[Row], slots: Slots, forward: Forward, draw: Draw, device: torch.device) -> None:
        self.waiting = list(reversed(rows))
        self.active: list[Row] = []
        self.slots = slots
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
        known = list(range(first))  # slots whose prompts are there already
        logits: dict[int, Tensor] = {}
        while groups:
            wave = [group for i, group in enumerate(groups) if not self._should_wait(group[0], groups[:i], known)]
            groups = [group for group in groups if group not in wave]
            for group, row in zip(wave, self._prefill([group[0] for group in wave], known), strict=True):
                self.slots.copy(group[0], group[1:], len(self._prompt(group[0])))
                logits |= dict.fromkeys(group, row)
                known += group
        self.draw(torch.stack([logits[slot] for slot in range(first, len(self.active))]), rows)

    def _prompt(self, slot: int) -> tuple[int, ...]:
        return self.active[slot].prompt.token_ids

    def _shared(self, slot: int, other: int) -> int:
        """Columns that the prompt of one slot may take over from another; its last token is always read anew."""
        ours, theirs = self._prompt(slot), self._prompt(other)
        alike, end = 0, min(len(ours) - 1, len(theirs))
        while alike < end:
            middle = (alike + end + 1) // 2
            if ours[alike:middle] == theirs[alike:middle]:
                alike = middle
            else:
                end = middle - 1
        return alike

    def _should_wait(self, slot: int, before: list[list[int]], known: list[int]) -> bool:
        now = max((self._shared(slot, other) for other in known), default=0)
        later = max((self._shared(slot, group[0]) for group in before), default=0)
        return later >= max(_WORTH, now + 1)

    def _prefill(self, targets: list[int], known: list[int]) -> Tensor:
        """Reads the prompts of these slots, but for what known slots have read; logits [P, V] after each."""
        taken = []
        for slot in targets:
            donor = max(known, key=lambda other: self._shared(slot, other), default=slot)
            shared = self._shared(slot, donor) if donor != slot else 0
            taken.append(shared if shared >= _WORTH else 0)
            self.slots.copy(donor, [slot], taken[-1])
        new = [self._prompt(slot)[count:] for slot, count in zip(targets, taken, strict=True)]
        lengths = torch.tensor([len(part) for part in new], device=self.device)
        packing = Packing.of(torch.arange(int(lengths.max()), device=self.device) < lengths.unsqueeze(1))
        begins = torch.tensor(taken, device=self.device)
        texts = Prefill(self.slots, packing, torch.tensor(targets, device=self.device), begins)
        ids = torch.tensor([token for part in new for token in part], device=self.device)
        text = torch.repeat_interleave(torch.arange(len(new), device=self.device), lengths)
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
            self.active[slot] = last
        self.active = [row for row in self.active if row.finish_reason is None]
        return ended
