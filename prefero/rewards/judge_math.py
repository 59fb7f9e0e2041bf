"""Loaded inside the sandbox, and nowhere else: whether an answer is the true one, by math-verify."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify

_MOST = 20_000
"""Characters read of an answer, its last ones: what is boxed, or said at the end, is the answer."""


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """{"gold": whether the true answer can be read, "right": whether the given one says the same}."""
    text = question["gold"].rpartition("####")[2].strip()
    gold = []
    # LaTeX without its dollars, as data sets have it, is only found between some.
    for written in (text, f"${text}$"):
        gold = gold or parse(written, parsing_timeout=None, fallback_mode="no_fallback")
    if "answer" not in question or not gold:
        return {"gold": bool(gold)}
    answer = parse(question["answer"][-_MOST:], parsing_timeout=None)
    return {"gold": True, "right": bool(verify(gold, answer, timeout_seconds=None))}
