"""Tasks of reasoning-gym as rows of prompts: made from a seed, and verified by `rule:reasoning-gym`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

_SCHEME = "reasoning-gym:"


def names(source: str | Path) -> bool:
    """Whether a source is a task of reasoning-gym."""
    return str(source).startswith(_SCHEME)


def rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of `reasoning-gym:TASK?size=500&seed=0&KEY=VALUE`: prompt, answer (one of those that are right), and,
    for the verifier, which item of which task it is.

    Further keys are the task's own (its difficulty); `suffix` is put behind every question. The same source gives the
    same rows. Raises ValueError without the package, and for tasks, keys and values that there are not.
    """
    task, _, query = source.removeprefix(_SCHEME).partition("?")
    try:
        gym: Any = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(f'{source}: needs the package reasoning-gym: pip install "prefero[reasoning]"') from error
    known = gym.factory.DATASETS
    if task not in known:
        close = difflib.get_close_matches(task, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{source}: there is no task {task!r}{hint}; there are {', '.join(known)}")
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        suffix = given.pop("suffix", "")
        options = {"size": 500, "seed": 0} | {key: yaml.safe_load(value) for key, value in given.items()}
        made = gym.create_dataset(task, **options)
    except (TypeError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{source}: {error}; write it as reasoning-gym:{task}?size=500&seed=0") from error
    for index in range(len(made)):
        item = made[index]
        verified_by = {"task": task, "options": options, "index": index}
        yield {"prompt": item["question"] + suffix, "answer": item["answer"], "reasoning_gym": verified_by}
