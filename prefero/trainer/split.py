"""A global batch taken apart: each process's share of it, and what one forward pass is given of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from prefero.strategies.group import ALONE, Group, Share
from prefero.types import (
    Experience,
    LabelledBatch,
    PairBatch,
    PreferenceBatch,
    ReferencedLabelledBatch,
    ReferencedPairBatch,
    TokenBatch,
)


class Batch(Protocol):
    """What can be cut: rows, and the texts they are about."""

    @property
    def attention_mask(self) -> Tensor: ...

    def __len__(self) -> int: ...


BatchT = TypeVar("BatchT", bound=Batch)
RowsT = TypeVar("RowsT", bound=TokenBatch)


@dataclass(frozen=True)
class MicroBatchLimit:
    """The most that one forward pass is given: rows, and tokens with every text as long as the longest (None: any).

    What a row alone has may be more. Raises ValueError for a limit below 1.
    """

    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("micro_batch_size", self.rows), ("micro_batch_tokens", self.tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be 1 or more, or None")

    def slices(self, lengths: Tensor, texts: Tensor | None = None, group: Group = ALONE) -> list[slice]:
        """Slices that cover all rows, as many of them in every process of the group.

        lengths: the tokens of each text. texts: [rows, n], the numbers of those a row is about; None: row i is text i.
        """
        if self.rows is None and self.tokens is None:
            return [slice(0, len(lengths if texts is None else texts))]
        sizes = lengths.tolist()
        needed = [[row] for row in range(len(sizes))] if texts is None else texts.tolist()
        found: list[slice] = []
        begin, known, longest = 0, set[int](), 0
        for row, own in enumerate(needed):
            wider = max(longest, *(sizes[text] for text in own))
            too_many = self.rows is not None and row - begin >= self.rows
            too_much = self.tokens is not None and len(known.union(own)) * wider > self.tokens
            if row > begin and (too_many or too_much):
                found.append(slice(begin, row))
                begin, known, wider = row, set(), max(sizes[text] for text in own)
            known.update(own)
            longest = wider
        found.append(slice(begin, len(needed)))
        if self.tokens is not None and group.world_size > 1:
            # Where weights are shared out, every process must forward equally often; all have as many rows.
            most = max(group.counts(len(found)))
            while len(found) < most:
                place, largest = max(enumerate(found), key=lambda item: item[1].stop - item[1].start)
                middle = (largest.start + largest.stop + 1) // 2
                found[place : place + 1] = [slice(largest.start, middle), slice(middle, largest.stop)]
        return found


NO_LIMIT = MicroBatchLimit()


class MicroBatches(Generic[BatchT]):
    """A batch cut into parts, one forward pass each; where memory does not suffice, into smaller ones."""

    def __init__(self, cut: Callable[[MicroBatchLimit], Sequence[BatchT]], limit: MicroBatchLimit = NO_LIMIT) -> None:
        self.cut, self.limit = cut, limit
        self.parts = cut(limit)

    def halve(self) -> bool:
        """Parts of half the tokens from here on; false where each is one row."""
        masks = [part.attention_mask for part in self.parts if len(part) > 1]
        if not masks:
            return False
        tokens = max(len(mask) * int(mask.sum(dim=1).max()) for mask in masks)
        self.limit = replace(self.limit, tokens=max(1, tokens // 2))
        self.parts = self.cut(self.limit)
        return True


def split_experience(
    experience: Experience, limit: MicroBatchLimit = NO_LIMIT, group: Group = ALONE
) -> list[Experience]:
    """Micro-batches of an experience."""
    lengths = experience.attention_mask.sum(dim=1)
    return [experience.map(lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
            for rows in limit.slices(lengths, group=group)]  # fmt: skip


def split_tokens(batch: RowsT, limit: MicroBatchLimit = NO_LIMIT, group: Group = ALONE) -> list[RowsT]:
    """Micro-batches of rows to learn from, each cut to its own longest row."""
    parts = []
    for rows in limit.slices(batch.attention_mask.sum(dim=1), group=group):
        attention_mask = batch.attention_mask[rows]
        width = max(int(attention_mask.any(dim=0).nonzero()[-1]) + 1, 2) if attention_mask.any() else 2
        parts.append(replace(batch, **{name: tensor[rows, :width] for name, tensor in vars(batch).items()}))
    return parts


def split_preferences(
    batch: PreferenceBatch, limit: MicroBatchLimit = NO_LIMIT, group: Group = ALONE
) -> list[PreferenceBatch]:
    """Micro-batches of comparisons, each with just the texts it compares."""
    parts = []
    for rows in limit.slices(
        batch.attention_mask.sum(dim=1), torch.stack([batch.chosen, batch.rejected], dim=1), group
    ):
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


def split_pairs(batch: PairBatch, limit: MicroBatchLimit = NO_LIMIT, group: Group = ALONE) -> list[PairBatch]:
    """Micro-batches of pairs, each with just the texts they are about."""
    pairs, parts = torch.stack([batch.chosen, batch.rejected], dim=1), []
    for rows in limit.slices(batch.attention_mask.sum(dim=1), pairs, group):
        texts, places = torch.unique(pairs[rows], return_inverse=True)
        width = _width(batch.attention_mask[texts])
        part = replace(
            batch,
            token_ids=batch.token_ids[texts, :width],
            attention_mask=batch.attention_mask[texts, :width],
            loss_mask=batch.loss_mask[texts, :width],
            chosen=places[:, 0],
            rejected=places[:, 1],
            counted=batch.counted[rows],
        )
        if isinstance(batch, ReferencedPairBatch):
            assert isinstance(part, ReferencedPairBatch)
            part = replace(part, ref_logprobs=batch.ref_logprobs[texts])
        parts.append(part)
    return parts


def split_labelled(
    batch: LabelledBatch, limit: MicroBatchLimit = NO_LIMIT, group: Group = ALONE
) -> list[LabelledBatch]:
    """Micro-batches of labelled texts; a row is as long as the longer of its two texts."""
    lengths = torch.maximum(batch.attention_mask.sum(dim=1), batch.unrelated_attention_mask.sum(dim=1))
    return [_labelled_rows(batch, rows) for rows in limit.slices(lengths, group=group)]


def _labelled_rows(batch: LabelledBatch, rows: slice | list[int]) -> LabelledBatch:
    width, unrelated = _width(batch.attention_mask[rows]), _width(batch.unrelated_attention_mask[rows])
    part = replace(
        batch,
        token_ids=batch.token_ids[rows][:, :width],
        attention_mask=batch.attention_mask[rows][:, :width],
        loss_mask=batch.loss_mask[rows][:, :width],
        unrelated_ids=batch.unrelated_ids[rows][:, :unrelated],
        unrelated_attention_mask=batch.unrelated_attention_mask[rows][:, :unrelated],
        unrelated_loss_mask=batch.unrelated_loss_mask[rows][:, :unrelated],
        desirable=batch.desirable[rows],
        counted=batch.counted[rows],
    )
    if isinstance(batch, ReferencedLabelledBatch):
        assert isinstance(part, ReferencedLabelledBatch)
        known, unknown = batch.ref_logprobs[rows], batch.ref_unrelated_logprobs[rows]
        return replace(part, ref_logprobs=known, ref_unrelated_logprobs=unknown)
    return part


def _width(attention_mask: Tensor) -> int:
    """Columns up to the last real token, and two at least: the first one is predicted by nothing."""
    return max(int(attention_mask.any(dim=0).nonzero()[-1]) + 1, 2)


def share_experience(experience: Experience, share: Share) -> Experience:
    """One process's rows of an experience; in rows that only fill up no action counts."""
    if share.rows == list(range(len(experience))):
        return experience
    own = experience.map(lambda tensor: tensor[share.rows])
    own.action_mask[share.num_real :] = 0
    return own


def share_tokens(batch: RowsT, share: Share) -> RowsT:
    """One process's rows to learn from; in rows that only fill up no token counts."""
    if share.rows == list(range(len(batch))):
        return batch
    own = replace(batch, **{name: tensor[share.rows] for name, tensor in vars(batch).items()})
    own.loss_mask[share.num_real :] = 0
    return own


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


def share_pairs(batch: PairBatch, share: Share) -> PairBatch:
    """One process's pairs with the texts they need; those that only fill up do not count."""
    if share.rows == list(range(len(batch))):
        return batch
    counted = batch.counted[share.rows]
    counted[share.num_real :] = False
    rows = replace(batch, chosen=batch.chosen[share.rows], rejected=batch.rejected[share.rows], counted=counted)
    return split_pairs(rows)[0]


def share_labelled(batch: LabelledBatch, share: Share) -> LabelledBatch:
    """One process's labelled texts; those that only fill up do not count."""
    if share.rows == list(range(len(batch))):
        return batch
    own = _labelled_rows(batch, share.rows)
    own.counted[share.num_real :] = False
    return own
