"""What both sides of a comparison are given: the same texts and lengths, and how they tell what they took.

Standard library only, because it is imported in the peers' own environments.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EOS, FIRST = 2, 4


@dataclass(frozen=True)
class Work:
    """One piece of work.

    kind: decode, sft, reward, ppo. rows: texts a step; samples: answers of each prompt. prompt, new: tokens. lengths:
    "equal"; "geometric" for answers that are decoded (a bias on the end token: mean 30); "ragged" for texts to learn.
    dtype: bf16 or fp32. lora: PPO trains adapters. steps: how many are timed, after `warm` that are not. profile: one
    step is told part by part instead (our side only).
    """

    kind: str
    rows: int
    prompt: int
    new: int
    samples: int = 1
    lengths: str = "equal"
    dtype: str = "bf16"
    lora: bool = False
    steps: int = 3
    profile: bool = False

    @property
    def warm(self) -> int:
        """Steps before those that are timed: they fetch their memory from the system, for texts of any length."""
        return 4 if self.lengths == "ragged" else 2

    def draw(self, step: int) -> random.Random:
        """Random numbers that are a step's own."""
        return random.Random(1000 * step + 7)

    def texts(self, vocabulary: int, step: int, kind: int = 0) -> list[list[int]]:
        """Token ids of a step's texts: prompts alone for decode and ppo, prompts and answers otherwise."""
        draw = self.draw(2 * step + kind)
        learned = self.kind in ("sft", "reward")
        sizes = [self.prompt + (self.answer(draw) if learned else 0) for _ in range(self.rows)]
        return [[draw.randrange(FIRST, vocabulary) for _ in range(size)] for size in sizes]

    def answer(self, draw: random.Random) -> int:
        """One answer's length."""
        if self.lengths == "ragged":  # log-normal, as answers of people are
            return max(8, min(self.new, round(draw.lognormvariate(0.0, 0.6) * self.new / 3)))
        return self.new


def given() -> tuple[Path, Work]:
    """The model's folder and the work, from the command line."""
    return Path(sys.argv[1]), Work(**json.loads(sys.argv[2]))


def peak_mb() -> float:
    """The highest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Work, step: Callable[[int], int]) -> list[tuple[float, int]]:
    """Seconds of each step and what it says it did, after those that are not timed."""
    found = []
    for number in range(work.warm):
        step(number)
    for number in range(work.warm, work.warm + work.steps):
        began = time.perf_counter()
        did = step(number)
        found.append((time.perf_counter() - began, did))
    return found


def tell(found: list[tuple[float, int]], version: str, **more: Any) -> None:
    """The last line a side prints."""
    print(json.dumps({"steps": found, "peak_mb": peak_mb(), "version": version, **more}))
