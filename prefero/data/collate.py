"""Encoded rows to padded tensors with explicit masks; what an id is never decides what is padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prefero.data.tokenize import EncodedComparison, EncodedLabel, EncodedPair, Example
from prefero.types import (
    LabelledBatch,
    PairBatch,
    PreferenceBatch,
    Prompt,
    ReferencedLabelledBatch,
    ReferencedPairBatch,
    TokenBatch,
)

References = Mapping[Example, float]
"""What the reference makes of each text: the log-probability of its completion, summed over the tokens."""


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


def collate_pairs(pairs: Sequence[EncodedPair], pad_id: int = 0, references: References | None = None) -> PairBatch:
    """Encoded pairs as a PairBatch in which every distinct text stands once.

    references: what the reference makes of every text; the batch is then a ReferencedPairBatch.
    """
    rows: dict[Example, int] = {}
    places = [[rows.setdefault(text, len(rows)) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    texts = collate_examples(list(rows), pad_id)
    chosen, rejected = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
    counted = torch.ones(len(pairs), dtype=torch.bool)
    plain = PairBatch(**vars(texts), chosen=chosen.contiguous(), rejected=rejected.contiguous(), counted=counted)
    if references is None:
        return plain
    return ReferencedPairBatch(**vars(plain), ref_logprobs=_known(references, list(rows)))


def collate_labelled(
    rows: Sequence[EncodedLabel], pad_id: int = 0, references: References | None = None
) -> LabelledBatch:
    """Encoded labelled rows as a LabelledBatch; references: as in `collate_pairs`."""
    answers, unrelated = [row.answer for row in rows], [row.unrelated for row in rows]
    texts, others = collate_examples(answers, pad_id), collate_examples(unrelated, pad_id)
    desirable = torch.tensor([row.desirable for row in rows])
    plain = LabelledBatch(
        **vars(texts),
        unrelated_ids=others.token_ids,
        unrelated_attention_mask=others.attention_mask,
        unrelated_loss_mask=others.loss_mask,
        desirable=desirable,
        counted=torch.ones_like(desirable),
    )
    if references is None:
        return plain
    known, known_unrelated = _known(references, answers), _known(references, unrelated)
    return ReferencedLabelledBatch(**vars(plain), ref_logprobs=known, ref_unrelated_logprobs=known_unrelated)


def _known(references: References, texts: Sequence[Example]) -> Tensor:
    return torch.tensor([references[text] for text in texts], dtype=torch.float32)


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
