"""Loaded inside the sandbox, and nowhere else: whether an answer is the true one, by math-verify."""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify

_MOST = 20_000
"""Characters read of an answer, its last ones: what is boxed, or said at the end, is the answer."""
_WORD = re.compile("[A-Za-z]{3}")


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """{"gold": whether the true answer can be read, "right": whether the given one says the same}.

    Of several true answers ("golds"), which of them can be read.
    """
    if "golds" in question:
        return {"golds": [bool(_read(gold)) for gold in question["golds"]]}
    gold = _read(question["gold"])
    answer = parse(question["answer"][-_MOST:], parsing_timeout=None) if gold else []
    # The deadline is the sandbox's: alarms would not end what does not return to Python.
    return {"gold": bool(gold), "right": bool(gold and verify(gold, answer, timeout_seconds=None))}


def _read(gold: str) -> list[Any]:
    """A true answer; LaTeX without its dollars, as data sets have it, is read whole only between some.

    Words are none: between dollars they would be read as products of letters, which no answer in words ever equals.
    """
    text = gold.rpartition("####")[2].strip()
    bare = "$" not in text and "\\boxed" not in text and ("\\" in text or not _WORD.search(text))
    read: list[Any] = []
    for written in (f"${text}$", text) if bare else (text,):
        read = read or parse(written, parsing_timeout=None, fallback_mode="no_fallback")
    return read
