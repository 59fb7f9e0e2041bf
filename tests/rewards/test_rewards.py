"""Plain functions, rules and weighted sums as rewards."""

import math
import sys
import textwrap

import numpy as np
import pytest
import torch

from prefero.rewards.base import Reward
from prefero.rewards.combined import WeightedSum
from prefero.rewards.functions import FunctionReward, load_function
from prefero.rewards.rules import Contains, EndsWithEOS, LengthPenalty, MaxWords, NoRepetition, Vader
from prefero.types import Completion, Prompt, Rollout, Score


def rollout(text="good movie", prompt="how is it", id="p1", finish="stop", tokens=3, **columns):
    completion = Completion((4,) * tokens, (-1.0,) * tokens, text, finish)
    return Rollout(Prompt(id, (5, 6), prompt, columns), completion)


# --- functions ---


def test_a_function_gets_texts_and_the_columns_it_names():
    def plain(prompt, completion):
        return len(prompt) + len(completion)

    def with_answer(prompt, completion, answer, weight=2):
        return weight * (completion == answer)

    def with_all(prompt, completion, **columns):
        return len(columns)

    def keyword_only(question, reply, *, answer):
        return question == "how is it" and reply == answer

    rows = [rollout(answer="good movie", other=1), rollout(text="bad", answer="good", weight=5, other=1)]
    assert FunctionReward(plain)(rows) == [Score(19.0), Score(12.0)]
    assert FunctionReward(with_answer)(rows) == [Score(2.0), Score(0.0)]
    assert FunctionReward(with_all)(rows) == [Score(2.0), Score(3.0)]
    assert FunctionReward(keyword_only)(rows) == [Score(1.0), Score(0.0)]
    assert isinstance(FunctionReward(plain), Reward)
    assert (FunctionReward(plain).name, FunctionReward(plain, "mine").name) == ("plain", "mine")


def test_a_column_called_like_a_text_does_not_get_in_its_way():
    def f(prompt, completion, **columns):
        return float(prompt == "how is it" and sorted(columns) == ["answer"])

    row = Rollout(Prompt("p", (5,), "how is it", {"prompt": "x", "completion": "y", "answer": 1}), rollout().completion)
    assert FunctionReward(f)([row]) == [Score(1.0)]


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True), torch.tensor(1.0)])
def test_every_kind_of_number_is_a_number(value):
    assert FunctionReward(lambda prompt, completion: value)([rollout()]) == [Score(1.0)]


@pytest.mark.parametrize(
    "value", [None, "1", 10**400, math.nan, math.inf, torch.tensor([1.0, 2.0]), [1.0], torch.tensor(math.nan)]
)
def test_a_function_without_a_number_is_stopped_at_its_prompt(value):
    def judge(prompt, completion):
        return value if completion == "second" else 0.0

    with pytest.raises(ValueError, match=r"'judge' gave .* for prompt 'p2' \('and this'\) and completion 'second'"):
        FunctionReward(judge)([rollout(), rollout("second", "and this", "p2")])


def test_a_missing_column_is_named():
    def judge(prompt, completion, answer):
        return 1.0

    with pytest.raises(ValueError, match=r"'judge' needs the column 'answer'.*'p1'.*\['label'\]"):
        FunctionReward(judge)([rollout(label=1)])


def test_functions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"takes \(prompt\).*f\(prompt, completion"):
        FunctionReward(lambda prompt: 1.0)
    with pytest.raises(ValueError, match="cannot be called"):
        FunctionReward(3)


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    code = """
        import dataclasses
        @dataclasses.dataclass
        class Helper:
            bonus: "float" = 0.25
        def shortness(prompt, completion):
            return Helper().bonus + 1 / (1 + len(completion))
        CONSTANT = 3
    """
    (tmp_path / "my_reward_code.py").write_text(textwrap.dedent(code))
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('from inside')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_is_loaded_from_a_file_or_a_module(user_code, monkeypatch):
    from_file = load_function("my_reward_code.py:shortness")
    assert FunctionReward(from_file)([rollout("")]) == [Score(1.25)]
    assert load_function(f"{user_code}/my_reward_code.py:shortness")("", "a") == 0.75
    monkeypatch.syspath_prepend(str(user_code))
    assert load_function("my_reward_code:shortness")("", "a") == 0.75
    assert load_function("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math.sqrt", "'math.sqrt'.*package.module:name"),
        (":name", "package.module:name"),
        ("math:", "package.module:name"),
        ("nowhere.py:f", r"no file .*nowhere\.py .*looked for from"),
        ("my_reward_code.py:shortnes", "defines no 'shortnes'; did you mean shortness"),
        ("my_reward_code.py:CONSTANT", "'CONSTANT' is a int, which cannot be called"),
        ("no_such_package.rewards:f", r"import 'no_such_package.rewards'.*no module 'no_such_package'.*PYTHONPATH"),
        ("email.no_such_part:f", "no module 'email.no_such_part'"),
    ],
)
def test_paths_that_lead_nowhere_say_what_was_tried(user_code, path, message):
    with pytest.raises(ValueError, match=message):
        load_function(path)


def test_errors_inside_the_users_module_come_through(user_code, monkeypatch):
    monkeypatch.syspath_prepend(str(user_code))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_function("needs_more:f")
    before = set(sys.modules)
    with pytest.raises(RuntimeError, match="from inside"):
        load_function("broken.py:f")
    assert not [name for name in set(sys.modules) - before if "broken" in name]


# --- weighted sums ---


def test_a_weighted_sum_reports_each_part_before_its_weight():
    inner = WeightedSum({"x": (FunctionReward(lambda p, c: 3.0), 1.0)})
    whole = WeightedSum({"length": (FunctionReward(lambda p, c: float(len(c))), -0.5), "deep": (inner, 2.0)})
    [first, second] = whole([rollout("abcd"), rollout("")])
    assert first == Score(-2.0 + 6.0, {"length": 4.0, "deep": 3.0, "deep/x": 3.0})
    assert second.value == 6.0
    assert second.parts["length"] == 0.0


def test_a_bad_part_is_named():
    bad = WeightedSum({"fine": (lambda rollouts: [Score(1.0)], 1.0), "odd": (lambda rollouts: [Score(math.nan)], 0.0)})
    with pytest.raises(ValueError, match=r"'odd' gave nan .*'p1'.*how is it"):
        bad([rollout()])
    short = WeightedSum({"short": (lambda rollouts: [Score(1.0)], 1.0)})
    with pytest.raises(ValueError, match="'short' gave 1 scores for 2 rollouts"):
        short([rollout(), rollout()])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "no parts"),
        ({"a": (EndsWithEOS(), math.nan)}, "'a' has weight nan"),
        ({"a": (EndsWithEOS(), "1")}, "'a' has weight '1'"),
        ({"a/b": (EndsWithEOS(), 1.0)}, "'a/b'"),
        ({"": (EndsWithEOS(), 1.0)}, "named ''"),
    ],
)
def test_sums_that_mean_nothing_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(parts)


# --- rules ---


@pytest.mark.parametrize(
    ("rule", "row", "value"),
    [
        (EndsWithEOS(), rollout(finish="stop"), 1.0),
        (EndsWithEOS(), rollout(finish="length"), 0.0),
        (MaxWords(2), rollout(" good  movie"), 1.0),
        (MaxWords(2), rollout("a good movie"), 0.0),
        (MaxWords(0), rollout(""), 1.0),
        (NoRepetition(2), rollout("a b a b a b"), 2 / 5),
        (NoRepetition(2), rollout("a b c d"), 1.0),
        (NoRepetition(1), rollout("The the cat"), 2 / 3),
        (NoRepetition(3), rollout("a b"), 1.0),
        (NoRepetition(3), rollout(""), 1.0),
        (LengthPenalty(free=3, scale=4), rollout(tokens=3), 0.0),
        (LengthPenalty(free=3, scale=4), rollout(tokens=5), -0.5),
        (LengthPenalty(), rollout(tokens=5), -5.0),
        (Contains(("Good", "bad")), rollout("really good."), 0.5),
        (Contains(("oo",)), rollout("good"), 0.0),
    ],
)
def test_rules(rule, row, value):
    assert isinstance(rule, Reward)
    assert rule([row]) == [Score(pytest.approx(value))]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaxWords(-1), "max_words limit is -1"),
        (lambda: MaxWords(1.5), "max_words limit is 1.5"),
        (lambda: NoRepetition(0), "no_repetition size is 0"),
        (lambda: LengthPenalty(scale=0), "length_penalty scale is 0"),
        (lambda: LengthPenalty(free=-2), "length_penalty free is -2"),
        (lambda: Contains("word"), "contains words is 'word'"),
        (lambda: Contains(()), "contains words"),
        (lambda: Vader("prompt"), "vader of is 'prompt'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_vader_reads_the_completion_or_all():
    pytest.importorskip("vaderSentiment")
    happy, sad = rollout("I love this great film", "bad awful horrible"), rollout("I hate this awful film", "x")
    scores = [score.value for score in Vader()([happy, sad, rollout("")])]
    assert scores[0] > 0.5 > -0.5 > scores[1]
    assert scores[2] == 0
    assert Vader("all")([happy])[0].value < scores[0]


def test_vader_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "prefero\[eval\]"'):
        Vader()
