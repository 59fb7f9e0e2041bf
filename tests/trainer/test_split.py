"""What one forward pass is given: so many rows, so many tokens, and as many passes in every process."""

import pytest
import torch

from prefero.strategies.group import Group
from prefero.trainer.split import Portion


class Others(Group):
    """A group in which another process makes five passes."""

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clamp_min(5.0)


def sizes(portion: Portion, lengths: list[int], group: Group | None = None) -> list[int]:
    slices = portion.slices(torch.tensor(lengths), *([group] if group else []))
    assert [row for part in slices for row in range(len(lengths))[part]] == list(range(len(lengths)))
    return [part.stop - part.start for part in slices]


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (None, None, [6]),
        (4, None, [4, 2]),
        (1, None, [1] * 6),
        (None, 10, [2, 1, 1, 2]),
        (None, 1, [1] * 6),
        (None, 100, [6]),
        (1, 10, [1] * 6),
        (2, 16, [2, 2, 2]),
    ],
)
def test_rows_and_tokens_are_at_most_what_was_said(rows, tokens, expected):
    lengths = [3, 7, 1, 11, 4, 2]
    assert sizes(Portion(rows, tokens), lengths) == expected


def test_every_process_makes_as_many_passes():
    assert sizes(Portion(tokens=100), [3, 7, 1, 11, 4, 2], Others(0, 2)) == [1, 1, 1, 2, 1]
    assert sizes(Portion(tokens=100), [3, 7, 1, 11, 4, 2]) == [6]


def test_limits_below_one_are_refused():
    for name, limits in (("micro_batch_size", (0, None)), ("micro_batch_tokens", (None, -3))):
        with pytest.raises(ValueError, match=f"{name}=.* must be 1 or more"):
            Portion(*limits)
