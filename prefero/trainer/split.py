"""A global batch taken apart: each process's share of it, and what one forward pass is given of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from prefero.strategies.group import ALONE, Group, Share
from prefero.types import Experience, PreferenceBatch, TokenBatch

BatchT = TypeVar("BatchT", bound=Sized)


@dataclass(frozen=True)
class Portion:
    """How much one forward pass is given: so many rows and so many tokens at most (None: no limit).

    A row alone may have more tokens. Raises ValueError for a limit below 1.
    """

    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("micro_batch_size", self.rows), ("micro_batch_tokens", self.tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be 1 or more, or None")

    def slices(self, lengths: Tensor, group: Group = ALONE) -> list[slice]:
        """Slices that cover all rows, given the tokens of each; as many of them in every process of the group."""
        ends: list[int] = []
        tokens = 0
        sizes = lengths.tolist()
        for row, length in enumerate(sizes):
            begun = row - (ends[-1] if ends else 0)
            if begun and (begun == self.rows or (self.tokens is not None and tokens + length > self.tokens)):
                ends.append(row)
                tokens = 0
            tokens += length
        found = [slice(*pair) for pair in pairwise([0, *ends, len(sizes)])]
        if self.tokens is not None and group.world_size > 1:
            # Where weights are shared out, every process must forward equally often.
            most = int(group.max(torch.tensor([float(len(found))], dtype=torch.float64))[0])
            while len(found) < most:
                place, longest = max(enumerate(found), key=lambda item: item[1].stop - item[1].start)
                middle = (longest.start + longest.stop + 1) // 2
                found[place : place + 1] = [slice(longest.start, middle), slice(middle, longest.stop)]
        return found


WHOLE = Portion()


class Passes(Generic[BatchT]):
    """A batch cut into parts, one forward pass each; where memory does not suffice, into smaller ones."""

    def __init__(self, cut: Callable[[Portion], Sequence[BatchT]], portion: Portion = WHOLE) -> None:
        self.cut, self.portion = cut, portion
        self.parts = cut(portion)

    def halve(self) -> bool:
        """Parts of half the rows from here on; false where they cannot be smaller."""
        smaller = replace(self.portion, rows=(max(map(len, self.parts)) + 1) // 2)
        parts = self.cut(smaller)
        if len(parts) <= len(self.parts):
            return False
        self.parts, self.portion = parts, smaller
        return True


def split_experience(experience: Experience, portion: Portion = WHOLE, group: Group = ALONE) -> list[Experience]:
    """Micro-batches of an experience."""
    lengths = experience.attention_mask.sum(dim=1)
    return [experience.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
            for rows in portion.slices(lengths, group)]  # fmt: skip


def split_tokens(batch: TokenBatch, portion: Portion = WHOLE, group: Group = ALONE) -> list[TokenBatch]:
    """Micro-batches of rows to imitate, each cut to its own longest row."""
    parts = []
    for rows in portion.slices(batch.attention_mask.sum(dim=1), group):
        attention_mask = batch.attention_mask[rows]
        width = max(int(attention_mask.any(dim=0).nonzero()[-1]) + 1, 2) if attention_mask.any() else 2
        parts.append(
            TokenBatch(batch.token_ids[rows, :width], attention_mask[:, :width], batch.loss_mask[rows, :width])
        )
    return parts


def split_preferences(batch: PreferenceBatch, portion: Portion = WHOLE, group: Group = ALONE) -> list[PreferenceBatch]:
    """Micro-batches of comparisons, each with just the texts it compares."""
    lengths = batch.attention_mask.sum(dim=1)
    parts = []
    for rows in portion.slices(lengths[batch.chosen] + lengths[batch.rejected], group):
        chosen, rejected = batch.chosen[rows], batch.rejected[rows]
        texts, places = torch.unique(torch.cat([chosen, rejected]), return_inverse=True)
        attention_mask = batch.attention_mask[texts]
        width = int(attention_mask.any(dim=0).nonzero()[-1]) + 1
        parts.append(
            PreferenceBatch(
                token_ids=batch.token_ids[texts, :width],
                attention_mask=attention_mask[:, :width],
                chosen=places[: len(chosen)],
                rejected=places[len(chosen) :],
                margin=batch.margin[rows],
                counted=batch.counted[rows],
            )
        )
    return parts


def share_experience(experience: Experience, share: Share) -> Experience:
    """One process's rows of an experience; in rows that only fill up no action counts."""
    if share.rows == list(range(len(experience))):
        return experience
    own = experience.map(lambda tensor: tensor[share.rows])
    own.action_mask[share.num_real :] = 0
    return own


def share_tokens(batch: TokenBatch, share: Share) -> TokenBatch:
    """One process's rows to imitate; in rows that only fill up no token counts."""
    if share.rows == list(range(len(batch))):
        return batch
    loss_mask = batch.loss_mask[share.rows]
    loss_mask[share.num_real :] = 0
    return TokenBatch(batch.token_ids[share.rows], batch.attention_mask[share.rows], loss_mask)


def share_preferences(batch: PreferenceBatch, share: Share) -> PreferenceBatch:
    """One process's comparisons with the texts they need; those that only fill up do not count."""
    if share.rows == list(range(len(batch))):
        return batch
    counted = batch.counted[share.rows]
    counted[share.num_real :] = False
    rows = replace(
        batch, chosen=batch.chosen[share.rows], rejected=batch.rejected[share.rows], margin=batch.margin[share.rows],
        counted=counted,
    )  # fmt: skip
    return split_preferences(rows)[0]
