"""Scores of steps: how texts are split, with which token a step ends, and who scores them."""

import math
from typing import Any

import pytest
import torch
from tiny import WORDS, llama_config, tiny_tokenizer
from transformers import LlamaForTokenClassification

from prefero.rewards.base import checked_scores
from prefero.rewards.combined import WeightedSum
from prefero.rewards.functions import FunctionReward
from prefero.rewards.process import StepFunction, StepModel, StepReward, split_steps, step_ends
from prefero.types import Completion, Prompt, Rollout, Score

TOKENIZER = tiny_tokenizer()


def rollout(text: str, token_ids: tuple[int, ...] = (4, 5, 6, 2), **columns: Any) -> Rollout:
    completion = Completion(token_ids, (-1.0,) * len(token_ids), text, "stop")
    return Rollout(Prompt("p1", (9,), "how", columns), completion)


def spelt(text: str) -> Rollout:
    """A completion with one token a character and an end token."""
    return rollout(text, (*map(ord, text), 0))


def letters(token_ids: Any) -> str:
    return "".join(chr(token) for token in token_ids if token)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\n\nb", ["a\n\n", "b"]),
        ("a\n\nb\n\n", ["a\n\n", "b\n\n"]),
        ("a\n\n\n\n b", ["a\n\n\n\n", " b"]),
        ("\n\na", ["\n\na"]),
        ("a\n\n \n\nb", ["a\n\n \n\n", "b"]),
        ("a", ["a"]),
        ("", [""]),
        ("\n\n", ["\n\n"]),
    ],
)
def test_steps_put_together_are_the_text(text: str, steps: list[str]) -> None:
    assert split_steps(text) == steps
    assert "".join(steps) == text


def test_a_step_ends_with_the_token_that_completes_it() -> None:
    row = spelt("ab\n\ncde\n\nf")
    assert step_ends(row, split_steps(row.completion.text), letters) == [3, 8, 10]  # the last one: the end token
    # Tokens of several characters; one of them ends two steps.
    pieces = {9: "how", 1: "a", 2: "\n\nb", 3: "\n\n", 4: "\n\nc\n\nd", 5: ""}

    def decode(ids: Any) -> str:
        return "".join(pieces[token] for token in ids)

    row = rollout("a\n\nb\n\nc\n\nd", (1, 2, 4, 5))
    assert step_ends(row, split_steps(row.completion.text), decode) == [1, 2, 2, 3]


def test_a_function_scores_steps_and_may_use_columns() -> None:
    def judge(prompt: str, steps: list[str], answer: str, bonus: float = 0.5) -> list[float]:
        assert prompt == "how"
        return [len(step.strip()) + bonus * (answer in step) for step in steps]

    reward = StepReward(StepFunction(judge), letters, name="judge")
    [score] = checked_scores(reward, [Rollout(Prompt("p1", (), "how", {"answer": "b"}), spelt("a\n\nbb").completion)])
    assert score == Score(3.5, {"steps": 2.0, "worst": 1.0}, ((2, 1.0), (5, 2.5)))
    average = StepReward(StepFunction(judge), letters, average=True)
    [score] = average([Rollout(Prompt("p1", (), "how", {"answer": "b"}), spelt("a\n\nbb").completion)])
    assert score.value == 1.75 and score.steps == ((2, 0.5), (5, 1.25))
    lines = StepReward(StepFunction(lambda prompt, steps: [1.0] * len(steps)), letters, separator="\n")
    assert lines([spelt("a\nb\nc")])[0].value == 3.0
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        reward.check(Prompt("p1", (), "how", {}))


@pytest.mark.parametrize("given", [[1.0], [1.0, 2.0, 3.0], 1.0, "ab", None])
def test_lists_of_another_length_are_named(given: Any) -> None:
    reward = StepReward(StepFunction(lambda prompt, steps: given), letters, name="judge")
    with pytest.raises(ValueError, match=r"'judge' gave .* for the 2 steps .* 'p1' \('how'\): return a list of 2"):
        reward([spelt("a\n\nb")])


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1"])
def test_steps_that_are_no_numbers_are_named(bad: Any) -> None:
    reward = StepReward(StepFunction(lambda prompt, steps: [0.0, bad]), letters, name="judge")
    with pytest.raises(ValueError, match=r"'judge' gave .* for prompt 'p1'"):
        reward([spelt("a\n\nb")])


@pytest.mark.parametrize("index", [-1, 4, 1.0, True])
def test_steps_outside_the_completion_are_named(index: Any) -> None:
    with pytest.raises(ValueError, match=r"'odd' gave a step at token .* has 4 tokens"):
        checked_scores(lambda rollouts: [Score(1.0, {}, ((index, 1.0),))], [rollout("x")], "odd")
    with pytest.raises(ValueError, match="'odd step' gave nan"):
        checked_scores(lambda rollouts: [Score(1.0, {}, ((0, math.nan),))], [rollout("x")], "odd")


def test_a_weighted_sum_weighs_steps_and_adds_them_up() -> None:
    first = StepReward(StepFunction(lambda prompt, steps: [1.0, 2.0]), letters)
    second = StepReward(StepFunction(lambda prompt, steps: [10.0]), letters, separator="##")
    third = FunctionReward(lambda prompt, completion: 100.0)
    whole = WeightedSum({"a": (first, 2.0), "b": (second, 0.5), "c": (third, 1.0)})
    [score] = whole([spelt("a\n\nb")])
    assert score.value == 2.0 * 3.0 + 0.5 * 10.0 + 100.0
    assert score.steps == ((2, 2.0), (4, 4.0 + 5.0))
    assert score.parts["a/steps"] == 2.0


@pytest.mark.parametrize("changes", [{"separator": ""}, {"separator": 3}, {"average": 1}])
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        StepReward(StepFunction(lambda prompt, steps: []), letters, **changes)


# --- a process reward model ---


def judge_of(num_labels: int) -> LlamaForTokenClassification:
    model = LlamaForTokenClassification(llama_config(num_labels=num_labels)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


OTHER = tiny_tokenizer([*reversed(WORDS), "yes", "no"])  # the judge's own words, not the policy's
ROWS = [rollout(text) for text in ("good . yes", "the movie was . good . bad", "", "no . " * 5)]


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
@torch.no_grad()
def test_a_model_is_read_at_the_end_of_every_step(num_labels: int, batch_size: int) -> None:
    model = judge_of(num_labels)
    steps = [split_steps(row.completion.text, " . ") for row in ROWS]
    scores = StepModel(model, OTHER, batch_size)(ROWS, steps)
    for own, given in zip(steps, scores, strict=True):
        expected = []
        for count in range(1, len(own) + 1):  # each step alone, with all before it and nothing behind
            logits = model(torch.tensor([OTHER("how").input_ids + OTHER("".join(own[:count])).input_ids])).logits[0, -1]
            expected.append(float(logits[0] if num_labels == 1 else logits.softmax(-1)[1]))
        assert given == pytest.approx(expected, abs=1e-5)
    assert len({value for own in scores for value in own}) > 4


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_refused() -> None:
    model, steps = judge_of(1), [["good .", " yes"]]
    long = Rollout(Prompt("p1", (), "bad " * 30 + "how", {}), rollout("good . yes").completion)
    short = Rollout(Prompt("p1", (), "bad how", {}), rollout("good . yes").completion)
    cut = StepModel(model, OTHER, max_length=5)([long], steps)
    assert cut[0] == pytest.approx(StepModel(model, OTHER)([short], steps)[0], abs=1e-5)
    with pytest.raises(ValueError, match=r"reads 2 tokens, but a completion of prompt 'p1' has 3"):
        StepModel(model, OTHER, max_length=2)([short], steps)
    with pytest.raises(ValueError, match="batch_size is 0"):
        StepModel(model, OTHER, 0)


def test_modes_are_left_alone() -> None:
    model = judge_of(1).train()
    StepModel(model, OTHER)(ROWS, [[row.completion.text] for row in ROWS])
    assert model.training and torch.is_grad_enabled()
