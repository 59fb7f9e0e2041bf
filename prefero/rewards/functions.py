"""Plain Python functions as rewards, and finding them by name."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from prefero.rewards.base import as_number, reward_name
from prefero.types import Prompt, Rollout, Score


class FunctionReward:
    """A plain function `f(prompt, completion, **columns) -> float` as a reward.

    It gets the texts of prompt and completion and, by name, the further columns of the prompt's data row: those it
    has parameters for, or all if it takes `**columns`. name: what it is called in errors and metrics; by default the
    function's name. Raises ValueError for a function of another shape, a column it needs and a row lacks, and any
    answer but a finite number.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise ValueError(f"reward function is {function!r}, which cannot be called: give a function")
        self.function = function
        self.name = name or reward_name(function)
        parameters = list(inspect.signature(function).parameters.values())
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise ValueError(
                f"reward function {self.name!r} takes {inspect.signature(function)}: define it as "
                "f(prompt, completion, **columns), returning a number"
            )
        named = [*positional[2:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)]
        self._taken = {p.name for p in positional[:2]}
        self._accepts = {p.name for p in named}
        self._needs = {p.name for p in named if p.default is p.empty}
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout."""
        return [self._score(rollout) for rollout in rollouts]

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a prompt's row lacks a column that the function needs."""
        for prompt in prompts:
            missing = sorted(self._needs - prompt.columns.keys())
            if missing:
                raise ValueError(
                    f"reward function {self.name!r} needs the column {missing[0]!r}, which prompt {prompt.id!r} "
                    f"does not have (it has {sorted(prompt.columns)}): name the column in the data, or give the "
                    "parameter a default"
                )

    def call(self, prompt: Prompt, answer: Any) -> Any:
        """What the function says of an answer to the prompt, as it is."""
        self.check(prompt)
        wanted = {
            name: value
            for name, value in prompt.columns.items()
            if name in self._accepts or (self._takes_all and name not in self._taken)
        }
        return self.function(prompt.text, answer, **wanted)

    def _score(self, rollout: Rollout) -> Score:
        value = self.call(rollout.prompt, rollout.completion.text)
        return Score(as_number(value, self.name, rollout))


def load_function(path: str) -> Callable[..., Any]:
    """The function named by "package.module:name" or "path/to/file.py:name"; importing it runs that module.

    Raises ValueError saying what was tried: no colon, no such file or module, no such name (with near matches), or
    something that cannot be called. Errors inside the module itself come through as they are.
    """
    where, colon, name = path.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(
            f"function path is {path!r}: write package.module:name or path/to/file.py:name, with a colon before the "
            "function's name"
        )
    module = _file_module(where, path) if where.endswith(".py") else _named_module(where, path)
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, [known for known in vars(module) if not known.startswith("_")], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"function path {path!r}: {where} was loaded, but defines no {name!r}{hint}")
    function: Any = getattr(module, name)
    if not callable(function):
        raise ValueError(
            f"function path {path!r}: {name!r} is a {type(function).__name__}, which cannot be called: name a function"
        )
    return function  # type: ignore[no-any-return]


def _file_module(where: str, path: str) -> ModuleType:
    file = Path(where).expanduser().resolve()
    if not file.is_file():
        raise ValueError(
            f"function path {path!r}: there is no file {file} (looked for from {Path.cwd()}): correct the path"
        )
    name = f"prefero_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling inside the file look their own module up
    loaded = False
    try:
        spec.loader.exec_module(module)
        loaded = True
    finally:
        if not loaded:
            del sys.modules[name]
    return module


def _named_module(where: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # Only a missing module of the path itself is the path's fault; one missing inside it is that module's.
        if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
            raise
        raise ValueError(
            f"function path {path!r}: tried to import {where!r}, but there is no module {error.name!r}: install it, "
            f"put its folder on PYTHONPATH, or give a file as {where.replace('.', '/')}.py:{path.rpartition(':')[2]}"
        ) from error
