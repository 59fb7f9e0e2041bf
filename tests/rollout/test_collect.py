"""Collecting scored rollouts, and the best of n."""

import math
from itertools import count

import pytest

from prefero.functional.best_of_n import kl_bound
from prefero.rewards.functions import FunctionReward
from prefero.rollout.best_of_n import best_of_n
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.types import Completion, Prompt, Rollout, Score, ScoredRollout

PARAMS = SamplingParams(4)
PROMPTS = [Prompt("a", (5,), "first question"), Prompt("b", (6, 7), "second question")]


class Numbering:
    """An engine whose n-th answer is the number n."""

    def __init__(self):
        self.number = count()

    def generate(self, prompts, params):
        return [Completion((4,), (-1.0,), str(next(self.number)), "length") for _ in prompts]

    def update_weights(self, actor):
        raise NotImplementedError


class Recorded:
    name = "recorded"

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def __call__(self, rollouts):
        self.calls.append(list(rollouts))
        return self.answer(rollouts)


def number(rollouts):
    return [Score(float(r.completion.text), {"part": 1.0}) for r in rollouts]


def test_groups_stand_together_and_are_scored_once():
    reward = Recorded(number)
    rollouts = collect(PROMPTS, Numbering(), reward, PARAMS, num_samples=3)
    assert [r.prompt.id for r in rollouts] == ["a"] * 3 + ["b"] * 3
    assert [r.score.value for r in rollouts] == [0, 1, 2, 3, 4, 5]
    assert all(isinstance(r, ScoredRollout) and r.score.parts == {"part": 1.0} for r in rollouts)
    assert len(reward.calls) == 1
    assert [type(r) for r in reward.calls[0]] == [Rollout] * 6
    assert [r.completion for r in reward.calls[0]] == [r.completion for r in rollouts]


def fourth(value):
    """Scores whose fourth, the first of prompt b's with two samples each being third, is bad."""
    return lambda rollouts: [Score(value if i == 3 else 0.5) for i in range(len(rollouts))]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (fourth(None), r"gave None \(NoneType\).*'b'.*second question.*return a number on every path"),
        (fourth(math.nan), r"gave nan \(float\).*'b'.*second question.*one finite number"),
        (fourth(math.inf), r"gave inf .*'b'.*second question.*one finite number"),
        (fourth(-math.inf), r"gave -inf .*'b'.*second question"),
        (fourth(1e39), r"gave 1e\+39 .*'b'.*second question"),
        (fourth("good"), r"gave 'good' \(str\).*'b'.*second question.*not text"),
        (fourth([1.0]), r"gave \[1.0\] \(list\).*'b'.*second question"),
        (fourth(1j), r"gave 1j \(complex\).*'b'"),
        (lambda rollouts: [Score(1.0)] * 3, r"gave 3 scores for 4 rollouts.*'b'.*second question.*exactly one"),
        (lambda rollouts: [Score(1.0)] * 5, r"gave 5 scores for 4 rollouts.*'b'.*second question.*exactly one"),
        (lambda rollouts: [], r"gave 0 scores for 4 rollouts.*'a'.*first question"),
        (lambda rollouts: None, r"gave a NoneType \(None\) for 4 rollouts.*'a'.*first question.*return a list"),
        (lambda rollouts: (Score(1.0) for _ in rollouts), r"gave a generator .*return a list"),
        (lambda rollouts: "1234", r"gave a str \('1234'\).*return a list"),
        (lambda rollouts: [1.0] * 4, r"gave 1.0 \(float\) for prompt 'a' \('first question'\).*FunctionReward"),
        (
            lambda rollouts: [Score(1.0, {"fluency": math.nan})] * 4,
            r"'recorded/fluency' gave nan .*'a'.*first question",
        ),
    ],
)
def test_a_bad_score_stops_at_once(answer, message):
    with pytest.raises(ValueError, match=message) as caught:
        collect(PROMPTS, Numbering(), Recorded(answer), PARAMS, num_samples=2)
    assert "recorded" in str(caught.value)


def test_a_plain_reward_is_named_by_its_function():
    def politeness(rollouts):
        return []

    with pytest.raises(ValueError, match="'politeness' gave 0 scores"):
        collect(PROMPTS, Numbering(), politeness, PARAMS)


def test_nothing_to_collect_is_refused():
    with pytest.raises(ValueError, match="no prompts"):
        collect([], Numbering(), number, PARAMS)
    with pytest.raises(ValueError, match="num_samples is 0"):
        collect(PROMPTS, Numbering(), number, PARAMS, num_samples=0)


def test_the_best_of_n_is_each_prompts_highest():
    scores = {"0": 1.0, "1": 3.0, "2": 2.0, "3": -5.0, "4": -7.0, "5": -5.0}
    best = best_of_n(PROMPTS, Numbering(), FunctionReward(lambda prompt, completion: scores[completion]), 3, PARAMS)
    assert [(r.prompt.id, r.completion.text, r.score.value) for r in best] == [("a", "1", 3.0), ("b", "3", -5.0)]


def test_best_of_n_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="greedy"):
        best_of_n(PROMPTS, Numbering(), number, 2, SamplingParams(4, greedy=True))
    with pytest.raises(ValueError, match="n is 0"):
        kl_bound(0)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_kl_bound_is_the_kl_of_a_continuous_reward(n):
    """The best of n uniforms has density n x^(n-1); its KL to the uniform, by numerical integration."""
    steps = 200_000
    total = 0.0
    for i in range(steps):
        density = n * ((i + 0.5) / steps) ** (n - 1)
        total += density * math.log(density) / steps if density > 0 else 0.0
    assert kl_bound(n) == pytest.approx(total, abs=1e-4)
