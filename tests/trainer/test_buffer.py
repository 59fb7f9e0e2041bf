"""Rows go into the buffer without padding and come out padded again, unchanged."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_world import algorithm, rows, scores
from torch import Tensor

from prefero.replay_buffer import NaiveReplayBuffer
from prefero.replay_buffer.utils import make_experience_batch, split_experience_batch, zero_pad_sequences
from prefero.types import Experience


def numbered(lengths: list[tuple[int, int]], extra: int = 0, level: str = "token") -> Experience:
    """An experience whose numbers say where they belong: row * 100 + action."""
    width, actions = max(p for p, _ in lengths) + extra, max(a for _, a in lengths) + extra
    mask = torch.zeros(len(lengths), width + actions, dtype=torch.long)
    for row, (prompt, action) in enumerate(lengths):
        mask[row, width - prompt : width + action] = 1
    places = torch.arange(len(lengths))[:, None] * 100 + torch.arange(width + actions)[None] - width
    action_mask = mask[:, width:].bool()
    per_action = (places[:, width:] * action_mask).float()
    values = per_action if level == "token" else torch.arange(len(lengths)).float()
    ones = torch.arange(len(lengths)).float()
    return Experience(places * mask, per_action, values, ones, values * 2, mask, action_mask, {"score": ones})


lengths = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(lengths, st.integers(0, 3), st.sampled_from(["token", "sequence"]))
def test_splitting_and_joining_only_removes_needless_padding(
    shape: list[tuple[int, int]], extra: int, level: str
) -> None:
    joined = make_experience_batch(split_experience_batch(numbered(shape, extra, level)))
    tight = numbered(shape, 0, level)
    for name in ("sequences", "action_log_probs", "values", "reward", "advantages", "attention_mask", "action_mask"):
        assert torch.equal(getattr(joined, name), getattr(tight, name)), name
    assert torch.equal(joined.info["score"], tight.info["score"])


def test_a_hole_in_the_actions_survives() -> None:
    made = numbered([(1, 4)])
    made.action_mask[0, 1] = False
    joined = make_experience_batch(split_experience_batch(made))
    assert joined.action_mask.tolist() == [[True, False, True, True]]


def test_rows_are_copies() -> None:
    made = numbered([(2, 2), (1, 3)])
    items = split_experience_batch(made)
    made.sequences.zero_()
    assert items[1].sequences.sum() > 0


def test_the_oldest_rows_leave_first() -> None:
    buffer = NaiveReplayBuffer(2, limit=3)
    buffer.append(numbered([(1, 1), (1, 2)]))
    buffer.append(numbered([(1, 3), (1, 4)]))
    assert [len(buffer[row].action_mask) for row in range(len(buffer))] == [2, 3, 4]
    buffer.clear()
    assert len(buffer) == 0


def test_sampling_draws_different_rows_and_refuses_too_many() -> None:
    buffer = NaiveReplayBuffer(3)
    buffer.append(numbered([(1, 1)] * 3))
    assert sorted(buffer.sample().reward.tolist()) == [0.0, 1.0, 2.0]
    few = NaiveReplayBuffer(1)
    few.append(numbered([(1, 1)] * 100))
    drawn = []
    for seed in (1, 2):  # whatever else has drawn from the global numbers
        random.seed(seed)
        drawn.append(few.sample(random.Random(3)).reward.tolist())
    assert drawn[0] == drawn[1]
    with pytest.raises(ValueError, match="fewer than a batch of 4"):
        large = NaiveReplayBuffer(4)
        large.append(numbered([(1, 1)] * 3))
        large.sample()


@pytest.mark.parametrize(("side", "expected"), [("left", [[1, 2], [0, 3]]), ("right", [[1, 2], [3, 0]])])
def test_zero_pad_sequences(side: str, expected: list[list[int]]) -> None:
    padded: Tensor = zero_pad_sequences([torch.tensor([1, 2]), torch.tensor([3])], side)  # type: ignore[arg-type]
    assert padded.tolist() == expected


def test_experience_keeps_its_seed_interface() -> None:
    made = algorithm().experience(*rows(), scores())
    assert made.to_device("cpu") is made and made.pin_memory() is made
    assert made.num_actions == 5 and len(made) == 6
