"""Loaded inside the sandbox, and nowhere else: what a task of reasoning-gym gives for an answer."""

from __future__ import annotations

from typing import Any

import reasoning_gym


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """{"score"}: the task's own verdict, usually between 0 and 1."""
    row = question["row"]
    tasks = reasoning_gym.create_dataset(row["task"], **row["options"])
    return {"score": float(tasks.score_answer(question["answer"], tasks[row["index"]]))}
