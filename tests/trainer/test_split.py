"""What one forward pass is given: so many rows, so many tokens, and as many micro-batches in every process."""

import pytest
import torch

from prefero.strategies.group import Group
from prefero.trainer.split import MicroBatches, MicroBatchLimit, split_preferences, split_tokens
from prefero.types import PreferenceBatch, TokenBatch

LENGTHS = [3, 7, 1, 11, 4, 2]


class Others(Group):
    """A group in which another process has five micro-batches."""

    def counts(self, number: int) -> list[int]:
        return [number, 5]


def sizes(limit: MicroBatchLimit, lengths: list[int], group: Group | None = None) -> list[int]:
    slices = limit.slices(torch.tensor(lengths), None, *([group] if group else []))
    assert [row for part in slices for row in range(len(lengths))[part]] == list(range(len(lengths)))
    return [part.stop - part.start for part in slices]


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (None, None, [6]),
        (4, None, [4, 2]),
        (1, None, [1] * 6),
        (None, 13, [1, 1, 1, 1, 2]),
        (None, 14, [2, 1, 1, 2]),
        (None, 21, [3, 1, 2]),
        (None, 1, [1] * 6),
        (None, 100, [6]),
        (1, 100, [1] * 6),
        (2, 25, [2, 2, 2]),
    ],
)
def test_rows_and_tokens_are_at_most_what_was_said(rows, tokens, expected):
    """Tokens as they are computed: every text as long as the longest."""
    assert sizes(MicroBatchLimit(rows, tokens), LENGTHS) == expected


def test_every_process_has_as_many():
    assert sizes(MicroBatchLimit(tokens=100), LENGTHS, Others(0, 2)) == [1, 1, 1, 2, 1]
    assert sizes(MicroBatchLimit(tokens=100), LENGTHS) == [6]


def test_a_text_of_many_comparisons_counts_once():
    mask = (torch.arange(10) < torch.tensor([[10], [4], [6], [8]])).long()
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 0], [3, 1]])
    batch = PreferenceBatch(mask, mask, pairs[:, 0], pairs[:, 1], torch.zeros(5), torch.ones(5, dtype=torch.bool))
    parts = split_preferences(batch, MicroBatchLimit(tokens=30))
    assert [len(part) for part in parts] == [3, 2]
    assert [part.attention_mask.sum(dim=1).tolist() for part in parts] == [[10, 4, 6], [10, 4, 8]]
    assert len(split_preferences(batch, MicroBatchLimit(tokens=40))) == 1


def test_halving_goes_on_until_each_is_one_row():
    """Also where a boundary only moves and the number of micro-batches stays."""
    mask = (torch.arange(10) < torch.tensor([[5], [5], [5], [10]])).long()
    batch = TokenBatch(mask, mask, mask)
    micro_batches = MicroBatches(lambda limit: split_tokens(batch, limit), MicroBatchLimit(tokens=16))
    seen = [[len(part) for part in micro_batches.parts]]
    while micro_batches.halve():
        seen.append([len(part) for part in micro_batches.parts])
    assert seen == [[3, 1], [1, 1, 1, 1]]
    micro_batches = MicroBatches(lambda limit: split_tokens(batch, limit))
    assert micro_batches.halve() and micro_batches.limit == MicroBatchLimit(tokens=20)


def test_limits_below_one_are_refused():
    for name, limits in (("micro_batch_size", (0, None)), ("micro_batch_tokens", (None, -3))):
        with pytest.raises(ValueError, match=f"{name}=.* must be 1 or more"):
            MicroBatchLimit(*limits)
