"""What the benchmarks share: runs of the command line that are made once and then read, and the machine's name."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def run(folder: Path, *command: str) -> dict[str, Any]:
    """The summary of `prefero COMMAND... --out FOLDER`, run in a process of its own unless it has been already.

    A finished run is read, not repeated, so a benchmark that was interrupted goes on where it stopped.
    """
    if (summary := finished(folder)) is None:
        whole = [sys.executable, "-m", "prefero", *command, "--out", str(folder), "--overwrite"]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        summary = finished(folder)
    assert summary is not None, f"{folder} holds no finished run"
    return summary


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that ended; None otherwise."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary if "heldout_reward_after" in summary else None


def greatest(differences: Iterable[float]) -> float:
    """The greatest of some differences; infinity where one is not a number, which `max` would pass over."""
    found = list(differences)
    return max(found) if all(map(math.isfinite, found)) else math.inf


def examinations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that hold a held-out evaluation, in order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "eval/kl" in row]


def machine(summary: dict[str, Any]) -> str:
    """The processor, its cores and the versions a run was made with, as one line."""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"Machine: {_processor()}, {os.cpu_count()} cores; {versions}."


def this_machine() -> str:
    """The processor, its cores and the versions of Python and torch, as one line."""
    cores, python = os.cpu_count(), platform.python_version()
    return f"Machine: {_processor()}, {cores} cores; Python {python}, torch {version('torch')}."


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
