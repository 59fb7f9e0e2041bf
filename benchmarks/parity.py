"""Every way of sharing a run over processes, against one process: prints the parity matrix of docs/strategies.md.

python benchmarks/parity.py [--json FILE] [--out DIR] [--cells NAME ...]

Each cell is the quickstart, cut short, run by the command line as a user would: SFT, reward model and PPO. What is
compared are all rows of metrics.jsonl and the exported weights of the three models; a number is the greatest absolute
difference ("any metric": relative where the metric is above 1). Cells that are finished already are read, not repeated.
Takes about a minute a cell on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SHORT = {
    "sft.steps": "6",
    "sft.batch-size": "16",
    "sft.learning-rate": "1e-4",
    "reward.steps": "6",
    "reward.batch-size": "16",
    "reward.max-rows": "200",
    "reward.learning-rate": "1e-4",
    "ppo.steps": "3",
    "ppo.prompts-per-step": "13",
    "ppo.train-batch-size": "8",
    "ppo.max-new-tokens": "12",
    "ppo.eval-every": "0",
    "ppo.learning-rate": "1e-4",
    "ppo.critic-learning-rate": "1e-4",
    "evaluate.num-prompts": "6",
    "evaluate.num-samples": "1",
    "evaluate.max-pairs": "41",
    "evaluate.max-demonstrations": "41",
    "strategy.precision": "fp32",
    "strategy.threads": "1",
}
LORA = ["--model.lora-rank", "4", "--reward.lora-rank", "4"]
CHECKPOINTING = ["--model.gradient-checkpointing"]


def accumulation(times: int) -> list[str]:
    """Options that cut every optimizer step of SHORT, shared by two processes, into so many forwards."""
    sizes = {"sft": 16, "reward": 16, "ppo": 8}
    return [word for stage, size in sizes.items() for word in (f"--{stage}.micro-batch-size", str(size // 2 // times))]


VARIANTS = {
    "full": [],
    "LoRA": LORA,
    "accumulation 2": accumulation(2),
    "accumulation 4": accumulation(4),
    "activation checkpointing": CHECKPOINTING,
}
STRATEGIES = {
    "naive": ["--strategy.kind", "naive"],
    "DDP": ["--strategy.kind", "ddp"],
    "ZeRO-1": ["--strategy.kind", "fsdp", "--strategy.stage", "1"],
    "ZeRO-2": ["--strategy.kind", "fsdp", "--strategy.stage", "2"],
    "ZeRO-3": ["--strategy.kind", "fsdp", "--strategy.stage", "3"],
}
GROUPS = {
    "loss": ("/loss", "_loss"),
    "KL": ("/kl", "approx_kl"),
    "reward": ("/reward", "/score", "rollout/length"),
    "gradient norm": ("gradient_norm_max",),
}


@dataclass(frozen=True)
class Cell:
    """One run: a strategy on so many processes, with the options of a variant."""

    strategy: str
    processes: int
    variant: str

    @property
    def name(self) -> str:
        return f"{self.strategy}×{self.processes}, {self.variant}"

    @property
    def folder(self) -> str:
        return self.name.replace("×", "-x").replace(", ", "-").replace(" ", "-").lower()


def cells() -> list[Cell]:
    """The matrix; every variant's naive cell comes first, because the others are compared with it."""
    many = [("DDP", 2), ("ZeRO-1", 2), ("ZeRO-2", 2), ("ZeRO-3", 2), ("DDP", 4), ("ZeRO-3", 4)]
    matrix = [Cell("naive", 1, "full"), Cell("naive", 1, "LoRA")]
    matrix += [Cell("naive", 1, variant) for variant in VARIANTS if variant not in ("full", "LoRA")]
    return matrix + [Cell(strategy, processes, variant) for variant in VARIANTS for strategy, processes in many]


def run(cell: Cell, out: Path) -> Path:
    """The run folder of a cell, made by the command line unless it is there already."""
    folder = out / cell.folder
    if _finished(folder):
        return folder
    short = [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    launcher = [sys.executable, "-m"]
    if cell.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(cell.processes), "-m"]
    command = [*launcher, "prefero", "quickstart", *short, *VARIANTS[cell.variant], *STRATEGIES[cell.strategy]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        [*command, "--out", str(folder), "--overwrite"], capture_output=True, text=True, env=environment, timeout=900
    )
    if done.returncode:
        raise SystemExit(f"{cell.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return folder


def _finished(folder: Path) -> bool:
    file = folder / "summary.json"
    return file.is_file() and "heldout_reward_after" in json.loads(file.read_text(encoding="utf-8"))


def compare(folder: Path, reference: Path) -> dict[str, float]:
    """The greatest absolute difference between two runs in every group of numbers, and in the final weights."""
    ours, theirs = _rows(folder), _rows(reference)
    if [sorted(row) for row in ours] != [sorted(row) for row in theirs]:
        raise SystemExit(f"{folder} and {reference} logged different rows")
    greatest = dict.fromkeys((*GROUPS, "any metric"), 0.0)
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            if not isinstance(value, float | int) or not isinstance(other[name], float | int):
                continue
            difference = abs(value - other[name])
            greatest["any metric"] = max(greatest["any metric"], difference / max(1.0, abs(other[name])))
            for group, endings in GROUPS.items():
                if any(ending in name for ending in endings):
                    greatest[group] = max(greatest[group], difference)
    greatest["weights"] = max(_weights(folder, reference, stage) for stage in ("sft", "reward", "ppo"))
    samples = [(row["prompt"], row.get("completion")) for row in _rows(folder, "samples")]
    expected = [(row["prompt"], row.get("completion")) for row in _rows(reference, "samples")]
    greatest["samples that differ"] = float(sum(a != b for a, b in zip(samples, expected, strict=True)))
    return greatest


def _rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _weights(folder: Path, reference: Path, stage: str) -> float:
    file = Path("checkpoints") / stage / "model" / "model.safetensors"
    ours, theirs = load_file(folder / file), load_file(reference / file)
    assert sorted(ours) == sorted(theirs), f"{folder / file} has other tensors"
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def baseline(cell: Cell) -> Cell:
    """What a cell must equal: one process that does everything at once (with adapters where the cell has them)."""
    return Cell("naive", 1, "LoRA" if cell.variant == "LoRA" else "full")


def main() -> None:
    """Runs what is missing and prints the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--out", type=Path, help="keep the runs there (default: a folder that is removed)")
    parser.add_argument("--cells", nargs="+", help="only these, by name, e.g. 'ZeRO-3×2, LoRA'")
    args = parser.parse_args()
    chosen = [cell for cell in cells() if not args.cells or cell.name in args.cells]
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        print(f"| cell | {' | '.join((*GROUPS, 'any metric', 'weights', 'samples that differ'))} |")
        print("|---|" + "---|" * (len(GROUPS) + 3))
        table: dict[str, dict[str, float]] = {}
        for cell in chosen:
            reference = run(baseline(cell), out)
            numbers = table[cell.name] = compare(run(cell, out), reference)
            shown = " | ".join(f"{number:.0f}" if name.startswith("samples") else f"{number:.1e}"
                               for name, number in numbers.items())  # fmt: skip
            print(f"| {cell.name} | {shown} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
