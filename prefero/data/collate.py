"""Encoded rows to padded tensors with explicit masks; what an id is never decides what is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefero.data.tokenize import EncodedComparison, Example
from prefero.types import PreferenceBatch, Prompt, TokenBatch


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [B, T] padded on the right and their mask [B, T], 1 on real tokens."""
    return _pad(sequences, pad_id, left=False)


def left_pad(prompts: Sequence[Prompt | Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts' ids [B, P] padded on the left, ready to be continued, and their mask [B, P], 1 on real tokens."""
    return _pad([p.token_ids if isinstance(p, Prompt) else p for p in prompts], pad_id, left=True)


def collate_examples(examples: Sequence[Example], pad_id: int) -> TokenBatch:
    """Encoded examples as a TokenBatch [B, T]; padding has no attention and no loss."""
    token_ids, attention_mask = right_pad([example.token_ids for example in examples], pad_id)
    loss_mask, _ = right_pad([example.loss_mask for example in examples], 0)
    return TokenBatch(token_ids, attention_mask, loss_mask)


def collate_comparisons(comparisons: Sequence[EncodedComparison], pad_id: int) -> PreferenceBatch:
    """Encoded comparisons as a PreferenceBatch in which every distinct sequence stands once.

    K answers of one prompt give K(K-1)/2 comparisons but only K sequences to forward.
    """
    rows: dict[tuple[int, ...], int] = {}
    pairs = [
        [rows.setdefault(sequence, len(rows)) for sequence in (comparison.chosen, comparison.rejected)]
        for comparison in comparisons
    ]
    token_ids, attention_mask = right_pad(list(rows), pad_id)
    chosen, rejected = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    margin = torch.tensor([comparison.margin for comparison in comparisons], dtype=torch.float32)
    return PreferenceBatch(
        token_ids,
        attention_mask,
        chosen.contiguous(),
        rejected.contiguous(),
        margin,
        torch.ones_like(margin, dtype=torch.bool),
    )


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    if not sequences:
        raise ValueError("an empty list cannot be made a batch; give at least one row")
    width = max(len(sequence) for sequence in sequences)
    token_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        token_ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return token_ids, mask
