"""The numbers of an examination, on answers written by hand."""

import math

import pytest

from prefero.recipes.evaluation import Evaluation, Yardsticks, before_after_rows, measure, paired_standard_error
from prefero.types import Completion, Prompt, Score, ScoredRollout


def answers(*rows: tuple[str, str, float]) -> list[ScoredRollout]:
    """Rollouts from (prompt, answer, reward); an answer with a full stop has ended by itself."""
    made = []
    for prompt, text, reward in rows:
        tokens = tuple(range(len(text.split())))
        ended = "stop" if text.endswith(".") else "length"
        completion = Completion(tokens, (0.0,) * len(tokens), text, ended)
        made.append(ScoredRollout(Prompt(prompt, (1,), prompt), completion, Score(reward, {"own": reward / 2})))
    return made


def examined(*rows: tuple[str, str, float]) -> Evaluation:
    return measure(answers(*rows), Yardsticks())


def test_means() -> None:
    metrics = examined(
        ("a", "one two three.", 1.0), ("b", "one", 4.0), ("a", "One two", 1.0), ("b", "one", 2.0)
    ).metrics
    assert metrics["eval/reward"] == 2.0 and metrics["eval/reward_own"] == 1.0
    assert metrics["eval/length"] == 1.75 and metrics["eval/ended"] == 0.25
    assert metrics["eval/distinct_completions"] == 0.75


def test_distinct_words_do_not_depend_on_how_often_a_prompt_was_answered() -> None:
    once = (("a", "good film", 0.0), ("b", "good plot", 0.0))
    assert examined(*once).metrics["eval/distinct_words"] == 0.75
    assert examined(*once, *once, *once).metrics["eval/distinct_words"] == 0.75
    repeated = (("a", "good good", 0.0), ("b", "Good", 0.0))
    assert examined(*once, *repeated).metrics["eval/distinct_words"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert examined(("a", "", 0.0)).metrics["eval/distinct_words"] == 0.0


def test_a_difference_has_the_standard_error_over_prompts() -> None:
    before = examined(
        ("a", "x", 0.0), ("a", "x", 2.0), ("b", "x", 1.0), ("b", "x", 1.0), ("c", "x", 0.0), ("c", "x", 0.0)
    )
    after = examined(
        ("a", "y", 1.0), ("a", "y", 1.0), ("b", "y", 2.0), ("b", "y", 4.0), ("c", "y", 1.0), ("c", "y", 1.0)
    )
    # Means of the prompts: +0, +2, +1; their deviation is 1.
    assert paired_standard_error(before, after) == pytest.approx(1 / math.sqrt(3))
    assert paired_standard_error(examined(("a", "x", 0.0)), examined(("a", "y", 1.0))) == math.inf
    rows = before_after_rows(before, after, count=2)
    assert [(row["prompt"], row["before"], row["after"], row["reward_after"]) for row in rows] == [
        ("a", "x", "y", 1.0), ("b", "x", "y", 2.0),
    ]  # fmt: skip
