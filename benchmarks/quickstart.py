"""The quickstart over several seeds, and once without the KL penalty: prints the tables of the docs.

python benchmarks/quickstart.py [--seeds 0 1 2 3 4] [--out DIR]

Every run is `prefero quickstart` in a process of its own. A run folder that is finished already is read, not repeated,
so an interrupted benchmark goes on where it stopped. Takes about two minutes a run on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that ended; None otherwise."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return summary if "heldout_reward_after" in summary else None


def quickstart(folder: Path, *flags: str) -> dict[str, Any]:
    """Runs `prefero quickstart` unless it ran before, and returns its summary."""
    if (summary := finished(folder)) is None:
        command = [sys.executable, "-m", "prefero", "quickstart", "--out", str(folder), "--overwrite", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        summary = finished(folder)
    assert summary is not None, f"{folder} holds no finished run"
    return summary


def peak(folder: Path) -> tuple[float, int]:
    """The highest gold of a run's examinations and its iteration."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max((row["eval/gold"], row["step"]) for row in rows if "eval/gold" in row)


def main() -> None:
    """Runs what is missing and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quickstart"))
    args = parser.parse_args()

    print("| seed | gold before | gold after | standard error | in standard errors | on topic | KL | RM accuracy | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        s = quickstart(args.out / f"seed-{seed}", "--seed", str(seed))
        gain, error = s["heldout_reward_after"] - s["heldout_reward_before"], s["heldout_reward_stderr"]
        topic = f"{s['before']['eval/on_topic']:.3f} → {s['after']['eval/on_topic']:.3f}"
        print(
            f"| {seed} | {s['heldout_reward_before']:+.3f} | {s['heldout_reward_after']:+.3f} | {error:.3f} "
            f"| {gain / error:.1f} | {topic} | {s['kl']:.2f} | {s['rm_accuracy']:.3f} | {s['seconds']:.0f} |",
            flush=True,
        )

    first = args.seeds[0]
    free = args.out / f"seed-{first}-kl-0"
    kept, loose = finished(args.out / f"seed-{first}"), quickstart(free, "--seed", str(first), "--kl-coef", "0")
    assert kept is not None
    print(f"\n| seed {first} | supervised model | default (`--kl-coef 0.2`) | `--kl-coef 0` |\n|---|---|---|---|")
    for key, label in (
        ("eval/reward", "reward, by the reward model"),
        ("eval/gold", "gold, by the hidden taste"),
        ("eval/on_topic", "on topic"),
        ("eval/kl", "KL, nats a completion"),
        ("eval/distinct_words", "distinct-word ratio"),
        ("eval/length", "length, tokens"),
    ):
        columns = (kept["before"][key], kept["after"][key], loose["after"][key])
        print(f"| {label} | " + " | ".join(f"{abs(c) if key == 'eval/kl' else c:.3f}" for c in columns) + " |")
    highest, step = peak(free)
    print(f"\nHighest gold on the way, without the penalty: {highest:.3f} at iteration {step}.")
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    print(f"\nMachine: {processor()}, {os.cpu_count()} cores; {versions}.")


def processor() -> str:
    """The processor's own name, where the system tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
