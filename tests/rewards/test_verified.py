"""Answers checked: by mathematics, by tests, by a task's verifier, and by rules that compare texts."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from prefero.data.sources import read_rows
from prefero.rewards.base import Checks, Reward
from prefero.rewards.rules import Exact, Format, SoftLimit
from prefero.rewards.verified import CodeTests, MathAnswer, ReasoningGym, program_in
from prefero.types import Completion, Prompt, Rollout, Score


def rollout(text: str, tokens: int = 3, **columns: Any) -> Rollout:
    return Rollout(Prompt("p1", (5,), "how much", columns), Completion((4,) * tokens, (-1.0,) * tokens, text, "stop"))


def right(reward: Reward, *rollouts: Rollout) -> list[float]:
    return [score.value for score in reward(rollouts)]


# --- mathematics ---


@pytest.fixture(scope="module")
def mathematics() -> Iterator[MathAnswer]:
    reward = MathAnswer()
    yield reward
    reward.sandbox.close()


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [
        ("1/2", r"so it is $\boxed{0.5}$", 1.0),
        (r"\frac{1}{2}", "The answer is 0.5", 1.0),
        (r"$\frac{1}{2}$", r"\boxed{\frac12}", 1.0),
        ("She sells 48 / 2 = 24.\n#### 72", "In all 72.", 1.0),
        ("She sells 48 / 2 = 24.\n#### 72", "In all 24.", 0.0),
        ("x^2 + 1", "$1 + x^2$", 1.0),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1.0),
        ("42", "", 0.0),
        ("42", "41", 0.0),
        ("42", "first 41, then $\\boxed{42}$", 1.0),
        (7, "7", 1.0),
    ],
)
def test_what_is_the_same_in_mathematics_is_right(
    mathematics: MathAnswer, gold: Any, answer: str, value: float
) -> None:
    assert mathematics([rollout(answer, answer=gold)]) == [Score(value, {"unjudged": 0.0})]


HOSTILE = [
    r"$9^{9^{9^{9}}}$", "9**9**9**9", "$10^{100000000}$", "$(1+x)^{100000}$", r"$\int_0^1 e^{e^{e^{x^{x}}}}dx$",
    "$" + "{" * 9000, r"\boxed{" * 3000, "(" * 20000, "$" + "1+" * 9000 + "1$", "5" * 100000, "\x00\ud800 \x1b[31m",
    "$" + r"\sqrt{" * 4000 + "5" + "}" * 4000 + "$", "__import__('os').system('sleep 99')", r"$\text{" * 2000,
]  # fmt: skip


def test_no_text_hangs_or_ends_the_judge() -> None:
    reward = MathAnswer(seconds=1.0)
    begun = time.monotonic()
    scores = reward([*(rollout(text, answer="6") for text in HOSTILE), rollout("6", answer="6")])
    assert time.monotonic() - begun < 3.0 * len(HOSTILE)
    assert [score.value for score in scores] == [0.0] * len(HOSTILE) + [1.0]
    assert [score.parts["unjudged"] for score in scores[:2]] == [1.0, 1.0]
    assert scores[-1].parts["unjudged"] == 0.0


@pytest.mark.parametrize("gold", ["see the picture", "", "???"])
def test_a_true_answer_that_is_none_is_named_at_once(mathematics: MathAnswer, gold: str) -> None:
    assert isinstance(mathematics, Checks)
    fine = rollout("", answer="1").prompt
    with pytest.raises(ValueError, match=r"cannot read the true answer .* of prompt 'p1'.*rule:exact"):
        mathematics.check(fine, rollout("", answer=gold).prompt)
    with pytest.raises(ValueError, match="cannot read the true answer"):
        mathematics([rollout("1", answer="1"), rollout("1", answer=gold)])
    with pytest.raises(ValueError, match=r"needs the column 'answer'.*it has \['solution'\]"):
        mathematics.check(rollout("", solution="1").prompt)


# --- code ---


@pytest.fixture(scope="module")
def code() -> Iterator[CodeTests]:
    reward = CodeTests(run_code="isolated", seconds=5.0)
    yield reward
    reward.sandbox.close()


RIGHT = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
WRONG = "```python\ndef add(a, b):\n    return a - b\n```"
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]


def test_code_is_judged_by_its_tests(code: CodeTests) -> None:
    assert right(code, rollout(RIGHT, tests=ASSERTS), rollout(WRONG, tests=ASSERTS)) == [1.0, 0.0]
    assert right(code, rollout("no code at all", tests="\n".join(ASSERTS))) == [0.0]
    printing = rollout(
        "print(int(input()) + 1)", tests=[{"input": "1", "output": "2"}, {"input": "5", "output": " 6 "}]
    )
    assert right(code, printing) == [0.0]  # white space at the beginning counts
    printing = rollout(
        "print(int(input()) + 1)", tests=[{"input": "1", "output": "2\n"}, {"input": "5", "output": "6"}]
    )
    assert right(code, printing) == [1.0]


def test_a_share_of_the_tests_where_that_is_wanted() -> None:
    reward = CodeTests(run_code="isolated", partial=True, seconds=2.0)
    [half, none] = reward([rollout(WRONG, tests=ASSERTS), rollout("while True: pass", tests=ASSERTS)])
    assert half == Score(0.5, {"unjudged": 0.0})
    assert none == Score(0.0, {"unjudged": 1.0})
    reward.sandbox.close()


def test_nothing_is_run_unless_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="run_code is 'never': set the option run_code to isolated"):
        CodeTests()


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "give tests as Python"),
        (3, "give tests as Python"),
        ([{"input": "1"}], "give tests as Python"),
        (["assert add(1, 2) == 3", 4], "give tests as Python"),
        ("assert add(1,", "is no test in Python"),
        (["assert add(1, 2) == 3", "72"], "nothing in it could fail"),
    ],
)
def test_tests_that_cannot_be_used_are_named(code: CodeTests, tests: Any, message: str) -> None:
    for meet in (lambda: code.check(rollout("", tests=tests).prompt), lambda: code([rollout(RIGHT, tests=tests)])):
        with pytest.raises(ValueError, match=f"'p1'.*{message}"):
            meet()


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
    ],
)
def test_the_last_fenced_block_is_the_program(text: str, program: str) -> None:
    assert program_in(text) == program


# --- reasoning-gym ---


@pytest.fixture(scope="module")
def gym() -> Iterator[ReasoningGym]:
    reward = ReasoningGym()
    yield reward
    reward.sandbox.close()


def asked(source: str) -> list[dict[str, Any]]:
    return list(read_rows(source).items)


@pytest.mark.parametrize("task", ["chain_sum", "word_sorting", "simple_equations", "maze"])
def test_a_task_s_own_answer_is_right_for_its_verifier(gym: ReasoningGym, task: str) -> None:
    rows = asked(f"reasoning-gym:{task}?size=2&seed=3")
    answers = [f"<answer>no</answer> so <answer> {row['answer']}\n</answer>" for row in rows]
    assert right(gym, *(rollout(text, **row) for text, row in zip(answers, rows, strict=True))) == [1.0, 1.0]
    assert right(gym, rollout(rows[0]["answer"], **rows[0])) == [1.0]
    assert max(right(gym, rollout("zzz", **rows[0]), rollout("", **rows[0]))) < 0.5


def test_an_answer_that_is_code_stays_inside(gym: ReasoningGym) -> None:
    [row] = asked("reasoning-gym:countdown?size=1")
    texts = ["__import__('os')._exit(0)", "9**9**9**9", "(" * 5000]
    scores = gym([rollout(text, **row) for text in texts])
    assert all(score.value < 0.5 for score in scores)
    assert scores[0].parts["unjudged"] == 1.0


def test_the_same_source_gives_the_same_rows() -> None:
    rows = asked("reasoning-gym:chain_sum?size=4&seed=7&min_terms=2&max_terms=2&suffix=%0AAnswer:")
    assert rows == asked("reasoning-gym:chain_sum?size=4&seed=7&min_terms=2&max_terms=2&suffix=%0AAnswer:")
    assert rows != asked("reasoning-gym:chain_sum?size=4&seed=8&min_terms=2&max_terms=2&suffix=%0AAnswer:")
    assert len(rows) == 4 and all(row["prompt"].endswith("\nAnswer:") for row in rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:chain_sun", "did you mean 'chain_sum'"),
        ("reasoning-gym:", "there is no task ''"),
        ("reasoning-gym:chain_sum?min_term=2", "min_term"),
        ("reasoning-gym:chain_sum?min_terms=9&max_terms=2", "max_terms"),
        ("reasoning-gym:chain_sum?size", "size=500&seed=0"),
        ("reasoning-gym:chain_sum?size=0", "size must be positive"),
    ],
)
def test_sources_that_are_none_say_why(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(source)


def test_rows_of_elsewhere_are_refused(gym: ReasoningGym) -> None:
    with pytest.raises(ValueError, match="needs the column 'reasoning_gym'"):
        gym.check(rollout("", answer="1").prompt)
    with pytest.raises(ValueError, match="take the prompts from reasoning-gym:TASK"):
        gym.check(rollout("", reasoning_gym={"task": "maze"}).prompt)
    with pytest.raises(ValueError, match="run_code is 'never'"):
        ReasoningGym(run_code="never")


@pytest.mark.parametrize(("kind", "extra"), [(MathAnswer, "math"), (ReasoningGym, "reasoning")])
def test_without_its_package_a_rule_names_the_extra(kind: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf'pip install "prefero\[{extra}\]"'):
        kind()


# --- texts ---


@pytest.mark.parametrize(
    ("rule", "row", "value"),
    [
        (Exact(), rollout(" Paris \n", answer="Paris"), 1.0),
        (Exact(), rollout("paris", answer="Paris"), 0.0),
        (Exact(ignore_case=True), rollout("paris", answer="Paris"), 1.0),
        (Exact("truth"), rollout("in  Paris", truth="in Paris"), 1.0),
        (Exact(pattern=r"Answer: (\w+)"), rollout("Answer: Rome. No, Answer: Paris", answer="Paris"), 1.0),
        (Exact(pattern=r"\d+"), rollout("first 3, then 4", answer=4), 1.0),
        (Exact(pattern=r"\d+"), rollout("none", answer="none"), 0.0),
        (Exact(pattern=r"(a)|(b)"), rollout("b", answer="b"), 0.0),
        (Format("<think>.*</think><answer>.*</answer>"), rollout("<think>a\nb</think><answer>c</answer>\n"), 1.0),
        (Format("<think>.*</think>"), rollout("well <think>a</think>"), 0.0),
        (SoftLimit(10, 4), rollout("", tokens=6), 0.0),
        (SoftLimit(10, 4), rollout("", tokens=7), -0.25),
        (SoftLimit(10, 4), rollout("", tokens=10), -1.0),
        (SoftLimit(10, 4), rollout("", tokens=99), -1.0),
    ],
)
def test_rules_of_texts(rule: Reward, row: Rollout, value: float) -> None:
    assert rule([row]) == [Score(pytest.approx(value))]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Exact(pattern="("), r"exact pattern is '\(', no regular expression"),
        (lambda: Exact(pattern=3), "exact pattern is 3"),  # type: ignore[arg-type]
        (lambda: Format(""), "format pattern is empty"),
        (lambda: SoftLimit(0, 1), "soft_limit limit is 0"),
        (lambda: SoftLimit(3, 4), "no more than the limit, 3"),
        (lambda: Exact().check(rollout("", truth="x").prompt), "needs the column 'answer'"),
        (lambda: Exact()([rollout("", truth="x")]), "needs the column 'answer'"),
        (lambda: MathAnswer(seconds=0), "seconds is 0"),
        (lambda: CodeTests(run_code="isolated", partial=1), "partial is 1"),  # type: ignore[arg-type]
    ],
)
def test_rules_that_mean_nothing_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
