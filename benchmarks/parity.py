"""Every way of sharing a run over processes against one: prints the parity matrix of docs/strategies-measured.md.

python benchmarks/parity.py [--json FILE] [--out DIR] [--cells NAME ...]

Each cell is the quickstart, cut short, run by the command line: SFT, reward model and PPO. What is compared are all
rows of metrics.jsonl and the exported weights of the three models; a number is the greatest absolute difference ("any
metric": relative where the metric is above 1). Cells that are finished already are read, not repeated. Takes about a
quarter of a minute a cell on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from forks import Forks
from runs import greatest, this_machine

SHORT = {
    "sft.steps": "6",
    "sft.batch-size": "16",
    "sft.learning-rate": "1e-4",
    "reward.steps": "6",
    "reward.batch-size": "16",
    "reward.max-rows": "200",
    "reward.learning-rate": "1e-4",
    "ppo.steps": "3",
    "ppo.prompts-per-step": "29",
    "ppo.train-batch-size": "16",
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
VARIANTS = {
    "full": [],
    "LoRA": ["--model.lora-rank", "4", "--reward.lora-rank", "4"],
    "accumulation 2": [],
    "accumulation 4": [],
    "60 tokens a pass": [f"--{stage}.micro-batch-tokens=60" for stage in ("sft", "reward", "ppo")],
    "activation checkpointing": ["--model.gradient-checkpointing"],
    "one backbone": ["--model.lora-rank", "4", "--reward.lora-rank", "4", "--ppo.backbone", "shared"],
    "hydra": ["--model.lora-rank", "4", "--reward.lora-rank", "4", "--ppo.backbone", "hydra"],
    "upper layers": ["--model.num-layers-unfrozen", "1", "--ppo.backbone", "shared"],
}
OTHER_NETWORKS = ("LoRA", "one backbone", "hydra", "upper layers")
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

    @property
    def options(self) -> list[str]:
        """What the command line is given; accumulation cuts each process's share of a batch of 16 in so many."""
        options = [*(word for key, value in SHORT.items() for word in (f"--{key}", value)), *STRATEGIES[self.strategy]]
        if self.variant.startswith("accumulation"):
            size = str(16 // self.processes // int(self.variant.split()[1]))
            options += [f"--{stage}.micro-batch-size={size}" for stage in ("sft", "reward", "ppo")]
        return options + VARIANTS[self.variant]


def cells() -> list[Cell]:
    """The matrix; every variant's naive cell comes first, because the others are compared with it."""
    shared = [strategy for strategy in STRATEGIES if strategy != "naive"]
    matrix = [Cell("naive", 1, variant) for variant in VARIANTS]
    matrix += [Cell(strategy, 1, "full") for strategy in shared]
    return matrix + [
        Cell(strategy, processes, variant) for variant in VARIANTS for processes in (2, 4) for strategy in shared
    ]


def run(cell: Cell, out: Path, forks: Forks) -> Path:
    """The run folder of a cell, made by the command line unless it is there already."""
    folder = out / cell.folder
    if not _finished(folder):
        out.mkdir(parents=True, exist_ok=True)
        command = ["quickstart", *cell.options, "--out", folder.name, "--overwrite"]
        errors = out / f"{folder.name}.txt"
        status = forks.run(command, out, errors=errors, processes=cell.processes)
        if status:
            raise SystemExit(f"{cell.name} ended with {status}:\n{errors.read_text(encoding='utf-8')[-4000:]}")
    return folder


def _finished(folder: Path) -> bool:
    file = folder / "summary.json"
    return file.is_file() and "heldout_reward_after" in json.loads(file.read_text(encoding="utf-8"))


def compare(folder: Path, reference: Path) -> dict[str, float]:
    """The greatest absolute difference between two runs in every group of numbers, and in the final weights."""
    ours, theirs = _rows(folder), _rows(reference)
    if [sorted(row) for row in ours] != [sorted(row) for row in theirs]:
        raise SystemExit(f"{folder} and {reference} logged different rows")
    differences: dict[str, list[float]] = {name: [0.0] for name in (*GROUPS, "any metric")}
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            if not isinstance(value, float | int) or not isinstance(other[name], float | int):
                continue
            difference = abs(value - other[name])
            differences["any metric"].append(difference / max(1.0, abs(other[name])))
            for group, endings in GROUPS.items():
                if any(ending in name for ending in endings):
                    differences[group].append(difference)
    differences["weights"] = [_weights(folder, reference, stage) for stage in ("sft", "reward", "ppo")]
    table = {name: greatest(found) for name, found in differences.items()}
    samples = [(row["prompt"], row.get("completion")) for row in _rows(folder, "samples")]
    expected = [(row["prompt"], row.get("completion")) for row in _rows(reference, "samples")]
    table["samples that differ"] = float(sum(a != b for a, b in zip(samples, expected, strict=True)))
    return table


def _rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _weights(folder: Path, reference: Path, stage: str) -> float:
    file = Path("checkpoints") / stage / "model" / "model.safetensors"
    ours, theirs = load_file(folder / file), load_file(reference / file)
    assert sorted(ours) == sorted(theirs), f"{folder / file} has other tensors"
    return greatest(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def baseline(cell: Cell) -> Cell:
    """What a cell must equal: one process that does everything at once (of the same networks)."""
    return Cell("naive", 1, cell.variant if cell.variant in OTHER_NETWORKS else "full")


def main() -> None:
    """Runs what is missing and prints the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--out", type=Path, help="keep the runs there (default: a folder that is removed)")
    parser.add_argument("--cells", nargs="+", help="only these, by name, e.g. 'ZeRO-3×2, LoRA'")
    args = parser.parse_args()
    chosen = [cell for cell in cells() if not args.cells or cell.name in args.cells]
    with tempfile.TemporaryDirectory() as temporary, Forks() as forks:
        out = args.out or Path(temporary)
        print(f"| cell | {' | '.join((*GROUPS, 'any metric', 'weights', 'samples that differ'))} |")
        print("|---|" + "---|" * (len(GROUPS) + 3))
        table: dict[str, dict[str, float]] = {}
        for cell in chosen:
            reference = run(baseline(cell), out, forks)
            numbers = table[cell.name] = compare(run(cell, out, forks), reference)
            shown = " | ".join(f"{number:.0f}" if name.startswith("samples") else f"{number:.1e}"
                               for name, number in numbers.items())  # fmt: skip
            print(f"| {cell.name} | {shown} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"\n{this_machine()}")


if __name__ == "__main__":
    main()
