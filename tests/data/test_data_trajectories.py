"""Rewarded texts: which rows are read, where rewards come to stand, what is refused."""

import math
import statistics
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

from prefero.data import (
    Rows,
    Trajectory,
    collate_trajectories,
    encode_trajectory,
    rewarded,
    scale_of,
    standardised,
    to_trajectories,
)
from prefero.data.formats import Demonstration
from prefero.data.tokenize import Example, TooLongError

ROW = {"prompt": "how was the movie", "completion": " it was good", "reward": 0.5}
TALK = [
    {"role": "user", "content": "how"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "great"},
]


def read(*rows: dict[str, Any]) -> list[Trajectory]:
    return list(to_trajectories(Rows(list(rows), "mine.jsonl")))


def test_rows_keep_their_reward_and_their_other_columns() -> None:
    one, two, three = read(
        ROW | {"movie": "x"}, ROW | {"reward": [1, 2]}, {k: ROW[k] for k in ("prompt", "completion")}
    )
    assert (one.reward, dict(one.columns)) == (0.5, {"movie": "x"})
    assert (two.reward, three.reward) == ((1.0, 2.0), None)
    assert one.row == Demonstration("mine.jsonl:1", "how was the movie", " it was good")


def test_rewards_from_tables_are_numbers_too() -> None:
    assert read(ROW | {"reward": "-1.5"})[0].reward == -1.5


def test_talks_are_rewarded_as_a_whole() -> None:
    assert read({"messages": TALK, "reward": 1.0})[0].row.messages == tuple(TALK)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reward": "high"}, "'reward' must be a number"),
        ({"reward": True}, "'reward' must be a number"),
        ({"reward": math.nan}, "'reward' must be finite"),
        ({"reward": [1.0, math.inf]}, "'reward' must be finite"),
        ({"reward": {"a": 1}}, "'reward' must be a number"),
        ({"completion": ""}, "'completion' is empty"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"mine.jsonl:2: column {why}"):
        read(ROW, ROW | change)
    assert len(to_trajectories(Rows([ROW, ROW | change], "mine.jsonl"), max_bad_rows=1)) == 1


def test_the_reward_stands_at_the_end_or_at_every_token() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode_trajectory(tokenizer, read(ROW)[0])
    assert sum(whole.example.loss_mask) == 4 and whole.example.token_ids[-1] == tokenizer.eos_token_id
    assert whole.rewards == (*[0.0] * (len(whole.rewards) - 1), 0.5)
    each = encode_trajectory(tokenizer, read(ROW | {"reward": [1, 2, 3, 4]})[0])
    assert each.rewards[-4:] == (1.0, 2.0, 3.0, 4.0) and each.worth == 10.0
    assert all(chosen or not reward for chosen, reward in zip(each.example.loss_mask, each.rewards, strict=True))


def test_what_somebody_else_said_in_between_is_not_rewarded() -> None:
    talk = Example((5, 6, 7, 8, 9), (0, 1, 0, 0, 1))
    assert rewarded("x", talk, 3.0).rewards == (0.0, 0.0, 0.0, 0.0, 3.0)
    assert rewarded("x", talk, [1.0, 2.0]).rewards == (0.0, 1.0, 0.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("example", "reward", "why"),
    [
        (Example((5, 6), (0, 0)), 1.0, "x: no token of it was chosen"),
        (Example((5, 6), (0, 1)), [1.0, 2.0], "x: 2 rewards for 1 chosen tokens"),
        (Example((5, 6), (0, 1)), math.nan, "x: the reward nan is no finite number"),
    ],
)
def test_rewards_that_cannot_be_given_are_refused(example: Example, reward: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        rewarded("x", example, reward)


def test_rows_without_a_reward_and_rows_that_are_too_long_are_named() -> None:
    row = read({k: ROW[k] for k in ("prompt", "completion")})[0]
    with pytest.raises(ValueError, match=r"mine.jsonl:1: it has no reward; give"):
        encode_trajectory(tiny_tokenizer(), row)
    with pytest.raises(TooLongError, match=r"mine.jsonl:1: 8 tokens do not fit"):
        encode_trajectory(tiny_tokenizer(), read(ROW)[0], 7)


def test_what_texts_are_worth_gets_mean_0_and_deviation_1() -> None:
    example = Example((5, 6, 7), (0, 1, 1))
    rows = [rewarded("x", example, reward) for reward in (1.0, 5.0, [2.0, 4.0], [-3.0, 1.0])]
    made = [standardised(row, *scale_of(rows)) for row in rows]
    worths = [row.worth for row in made]
    assert statistics.fmean(worths) == pytest.approx(0) and statistics.pstdev(worths) == pytest.approx(1)
    assert sorted(worths) == [row.worth for row in sorted(made, key=lambda row: row.worth)]
    # What is taken from all alike comes at the end: a reward on the way stays a reward on the way.
    deviation = scale_of(rows)[1]
    assert made[0].rewards[1] == 0.0 and made[2].rewards[1] == pytest.approx(2.0 / deviation)


def test_texts_that_are_all_worth_the_same_teach_nothing() -> None:
    example = Example((5, 6), (0, 1))
    with pytest.raises(ValueError, match=r"all 3 texts were worth the same \(0.1\).*give rewards that differ"):
        scale_of([rewarded("x", example, 0.1)] * 3)


def test_batches_are_padded_on_the_right_with_nothing() -> None:
    rows = [rewarded("a", Example((5, 6, 7), (0, 1, 1)), 2.0), rewarded("b", Example((5, 6), (0, 1)), -1.0)]
    batch = collate_trajectories(rows, 9)
    assert batch.token_ids.tolist() == [[5, 6, 7], [5, 6, 9]]
    assert batch.loss_mask.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert torch.equal(batch.rewards, torch.tensor([[0.0, 0.0, 2.0], [0.0, -1.0, 0.0]]))
