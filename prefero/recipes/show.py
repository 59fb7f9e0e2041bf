"""What a training command says when it is done."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from prefero.tracking.console import print_plain, sample_table
from prefero.tracking.run_folder import RunFolder


def show_result(folder: Path) -> None:
    """Samples before and after, the headline numbers, where everything lies, and what to try next."""
    run = RunFolder.open(folder)
    pairs = [row for row in run.samples() if row and "before" in row]
    if pairs:
        sample_table(pairs)
    for line in (*_numbers(run.summary()), *_places(run), *_next(run)):
        print_plain(line, sys.stdout)


def _numbers(summary: dict[str, Any]) -> list[str]:
    lines = [""]
    if "heldout_reward_after" in summary:
        before, after = summary["heldout_reward_before"], summary["heldout_reward_after"]
        error = summary["heldout_reward_stderr"]
        uncertain = "" if error is None else f" (difference {after - before:+.3f}, standard error {error:.3f})"
        lines.append(f"held-out {summary['heldout_reward_is']}: {before:+.3f} -> {after:+.3f}{uncertain}")
        for key, label in (("eval/on_topic", "on topic"), ("eval/distinct_words", "distinct-word ratio"),
                           ("eval/length", "length in tokens")):  # fmt: skip
            if key in summary["after"]:
                lines.append(f"{label}: {summary['before'][key]:.3f} -> {summary['after'][key]:.3f}")
    if "kl" in summary:
        lines.append(f"KL from the reference: {summary['kl']:.2f} nats a completion")
    if "preference_accuracy" in summary:
        lines.append(f"accuracy of the policy's own reward on held-out rows: {summary['preference_accuracy']:.3f}")
    if "rm_accuracy" in summary:
        lines.append(f"reward model accuracy on held-out comparisons: {summary['rm_accuracy']:.3f}")
    if "seconds" in summary:
        lines.append(f"seconds: {summary['seconds']}")
    return lines


def _places(run: RunFolder) -> list[str]:
    return ["", f"report: {run.report_file}", f"model:  {run.model}"]


def _next(run: RunFolder) -> list[str]:
    lines = ["", "next:"]
    if (run.model / "generation_config.json").is_file():
        lines += [f"  prefero chat {_quoted(run.path)}", f"  prefero generate {_quoted(run.path)} --prompt TEXT"]
    if run.config().get("data", {}).get("world") == "grammar":
        lines.append("  prefero quickstart --kl-coef 0        # watch a reward being over-optimised")
        lines.append("  prefero fetch smollm2 minilm rotten-tomatoes   # then: a real model, on this machine")
        lines.append("  prefero pipeline configs/smollm2-sentiment.yaml")
    return lines if len(lines) > 2 else []


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
