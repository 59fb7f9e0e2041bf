"""Rewards that check an answer: by mathematics, by running its code, by a task's own verifier."""

from __future__ import annotations

import ast
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefero.rewards.base import as_number, column_of
from prefero.rewards.sandbox import Limits, Sandbox, SandboxError
from prefero.types import Prompt, Rollout, Score

Isolation = Literal["never", "isolated", "limited"]
_HERE = Path(__file__).parent
_GIB = 2**30
_AT_ONCE = 64


class _Verified(ABC):
    """A reward whose verdicts come out of a sandbox; what cannot be judged within its limits counts as wrong.

    Of every score the part "unjudged" is 1 where that happened, so that it shows in the metrics.
    """

    name: str
    sandbox: Sandbox

    @abstractmethod
    def job(self, rollout: Rollout) -> dict[str, Any]:
        """What the sandbox is to do for a rollout."""

    @abstractmethod
    def verdict(self, rollout: Rollout, answer: dict[str, Any]) -> float | None:
        """The score by what came of it; None where nothing did."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout."""
        answers = self.sandbox.map([self.job(rollout) for rollout in rollouts])
        scores = []
        for rollout, answer in zip(rollouts, answers, strict=True):
            found = None if answer is None else self.verdict(rollout, answer)
            value = 0.0 if found is None else as_number(found, self.name, rollout)
            scores.append(Score(value, {"unjudged": float(found is None)}))
        return scores


class MathAnswer(_Verified):
    """1 where the completion's answer is mathematically the true one (1/2, 0.5, LaTeX), else 0; by math-verify.

    column: the column with the true answer, as LaTeX or plain; of a text with "####", what stands behind the last one.
    Of a completion, what is boxed counts, else what is said to be the answer, else what looks like one. seconds: the
    most that one answer may take; what takes longer is wrong. Answers are read in processes of their own, isolated
    where the machine permits it. Raises ValueError without the package, and at a true answer that cannot be read.
    """

    def __init__(self, column: str = "answer", seconds: float = 3.0, name: str = "math") -> None:
        _needs_package("math_verify", name, "math")
        self.column, self.name = column, name
        self.sandbox = _judging("judge_math.py", seconds, name, isolated=None)

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a row has no true answer, or one that cannot be read."""
        parts = [prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE)]
        golds = [{"kind": "judge", "question": {"golds": list(map(self._gold, part))}} for part in parts]
        for part, answer in zip(parts, self.sandbox.map(golds), strict=True):
            if answer is not None and answer["verdict"] is not None:  # else it took too long: told when it is asked
                for prompt, readable in zip(part, answer["verdict"]["golds"], strict=True):
                    if not readable:
                        self._refuse(prompt)

    def job(self, rollout: Rollout) -> dict[str, Any]:
        """The question whether the answer is right."""
        return {
            "kind": "judge",
            "question": {"gold": self._gold(rollout.prompt), "answer": rollout.completion.text},
        }

    def verdict(self, rollout: Rollout, answer: dict[str, Any]) -> float | None:
        """1 or 0."""
        found = answer["verdict"]
        if found is not None and not found["gold"]:
            self._refuse(rollout.prompt)
        return None if found is None else float(found["right"])

    def _gold(self, prompt: Prompt) -> str:
        gold = column_of(prompt, self.column, self.name)
        return gold if isinstance(gold, str) else str(gold)

    def _refuse(self, prompt: Prompt) -> None:
        raise ValueError(
            f"reward {self.name!r} cannot read the true answer {self._gold(prompt)[:200]!r} of prompt {prompt.id!r} "
            f"(column {self.column!r}) as mathematics: correct the row, leave it out, or compare texts with rule:exact"
        )


class ReasoningGym(_Verified):
    """What a task of reasoning-gym gives for an answer, by the task's own verifier: 1 for a right one.

    The prompts must come from `reasoning-gym:TASK` (`data.prompts`), whose rows say which task and item they are. The
    answer is what the completion has between <tag> and </tag>, the last such, else all of it. seconds: the most that
    one answer may take. run_code: "isolated" or "limited", as for `CodeTests`, because some verifiers read answers
    with parsers that would run what is written there. Raises ValueError without the package, or where that is refused.
    """

    def __init__(
        self, tag: str = "answer", seconds: float = 5.0, run_code: Isolation = "isolated", name: str = "reasoning-gym"
    ) -> None:
        _needs_package("reasoning_gym", name, "reasoning")
        if run_code not in ("isolated", "limited"):
            raise ValueError(f"{name} run_code is {run_code!r}: give isolated, or limited")
        self.name = name
        self._tagged = re.compile(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", re.DOTALL)
        self.sandbox = _judging("judge_reasoning.py", seconds, name, isolated=run_code == "isolated")

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a row is none of reasoning-gym's."""
        for prompt in prompts:
            row = column_of(prompt, "reasoning_gym", self.name)
            if not isinstance(row, Mapping) or not {"task", "options", "index"} <= row.keys():
                raise ValueError(
                    f"reward {self.name!r}: prompt {prompt.id!r} says {row!r:.200} in the column 'reasoning_gym': take "
                    "the prompts from reasoning-gym:TASK (data.prompts)"
                )

    def job(self, rollout: Rollout) -> dict[str, Any]:
        """The question what the answer is worth."""
        self.check(rollout.prompt)
        found = self._tagged.findall(rollout.completion.text)
        answer = (found[-1] if found else rollout.completion.text).strip()
        return {"kind": "judge", "question": {"row": rollout.prompt.columns["reasoning_gym"], "answer": answer}}

    def verdict(self, rollout: Rollout, answer: dict[str, Any]) -> float | None:
        """Usually between 0 and 1."""
        return None if answer["verdict"] is None else float(answer["verdict"]["score"])


class CodeTests(_Verified):
    """1 where the program in the completion passes all tests of its row, else 0; it is run in a sandbox.

    column: the column with the tests: Python with asserts, or a list of such texts, or a list of {"input", "output"}
    for programs that read and print. The program is the last fenced block of the completion, else all of it; it has
    Python's standard library. run_code: nothing is run unless this says "isolated" (namespaces: no network, no files
    but Python's own; refused where the machine does not permit that) or "limited" (limits alone: the program has your
    files and your network). partial: the share of tests passed instead. seconds, memory: for a program with all its
    tests; in bytes, for each process. Tests meet the program's functions through a socket, so that it can neither see
    what is expected nor decide what is said; only plain values pass, and other objects by reference.

    Raises ValueError without permission to run code, where the machine cannot do as told, and for tests of another
    shape.
    """

    def __init__(
        self,
        column: str = "tests",
        run_code: Isolation = "never",
        partial: bool = False,
        seconds: float = 10.0,
        memory: int = _GIB // 2,
        name: str = "code",
    ) -> None:
        if run_code not in ("isolated", "limited"):
            raise ValueError(
                f"{name} runs programs that a model wrote, and run_code is {run_code!r}: set the option run_code to "
                "isolated (or to limited, where the whole machine may be lost)"
            )
        if not isinstance(partial, bool):
            raise ValueError(f"{name} partial is {partial!r}: give true or false")
        self.column, self.partial, self.name = column, partial, name
        self.sandbox = _sandbox(Limits(seconds=seconds, memory=memory), name, run_code == "isolated")

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a row has no tests that can be used."""
        for prompt in prompts:
            self._tests(prompt)

    def job(self, rollout: Rollout) -> dict[str, Any]:
        """The program with its tests, or with the inputs alone."""
        kind, tests = self._tests(rollout.prompt)
        given = tests if kind == "tests" else [test["input"] for test in tests]
        return {"kind": kind, "program": program_in(rollout.completion.text), kind: given}

    def verdict(self, rollout: Rollout, answer: dict[str, Any]) -> float | None:
        """1 or 0, or the share of tests passed."""
        kind, tests = self._tests(rollout.prompt)
        if kind == "tests":
            passed = answer["passed"]
        else:  # what is expected has never been where the program ran
            pairs = zip(answer["printed"], tests, strict=True)
            passed = [out is not None and _lines(out) == _lines(test["output"]) for out, test in pairs]
        if answer["late"] and not any(passed):
            return None
        return sum(passed) / len(passed) if self.partial else float(all(passed))

    def _tests(self, prompt: Prompt) -> tuple[Literal["tests", "inputs"], list[Any]]:
        given = column_of(prompt, self.column, self.name)
        tests = [given] if isinstance(given, str) else given
        if isinstance(tests, Sequence) and tests:
            if all(isinstance(test, str) for test in tests):
                for test in tests:
                    self._parse(test, prompt)
                return "tests", list(tests)
            if all(_is_pair(test) for test in tests):
                return "inputs", list(tests)
        raise ValueError(
            f"reward {self.name!r} cannot use {given!r:.200} (column {self.column!r} of prompt {prompt.id!r}): give "
            "tests as Python with asserts, a list of such texts, or a list of {input, output}, both texts"
        )

    def _parse(self, test: str, prompt: Prompt) -> None:
        try:
            tree = ast.parse(test)
            if not any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in ast.walk(tree)):
                raise ValueError("nothing in it could fail")
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"reward {self.name!r}: {test!r:.200} of prompt {prompt.id!r} (column {self.column!r}) is no test in "
                f"Python ({error}): correct the row or leave it out"
            ) from None


_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def program_in(text: str) -> str:
    """The last fenced block of a text, also one that was cut off before its end; without any, the text itself."""
    blocks: list[str] = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _is_pair(test: Any) -> bool:
    return isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("input", "output"))


def _lines(text: str) -> list[str]:
    """Lines without the white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _needs_package(module: str, reward: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'reward {reward} needs the package {module}: pip install "prefero[{extra}]"')


def _judging(file: str, seconds: float, name: str, *, isolated: bool | None) -> Sandbox:
    """A sandbox with a judge; isolated None: where the machine permits it."""
    limits = Limits(seconds=seconds, memory=2 * _GIB)
    if isolated is None:
        try:
            return Sandbox(limits, isolated=True, judge=_HERE / file)
        except SandboxError:
            isolated = False
    return _sandbox(limits, name, isolated, file)


def _sandbox(limits: Limits, name: str, isolated: bool, file: str = "") -> Sandbox:
    try:
        return Sandbox(limits, isolated=isolated, judge=_HERE / file if file else "")
    except SandboxError as error:
        cure = (
            "use Linux with user namespaces (in a container: --security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined; on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0), or set the option "
            "run_code to limited where the whole machine may be lost"
            if isolated
            else "run as an ordinary user, with a Python that others can read"
        )
        raise SandboxError(f"reward {name}: this machine refuses the sandbox ({error}): {cure}") from None
