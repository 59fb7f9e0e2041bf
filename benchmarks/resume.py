"""Killed at every step and resumed, by one process and by two: prints the resume matrix of docs/strategies-measured.md.

python benchmarks/resume.py [--out DIR] [--steps N ...]

PPO on the quickstart's world, twelve optimizer steps in six iterations of two epochs, a checkpoint after each. In every
layout a run is left alone; then, for each step, one is killed there (SIGKILL, all processes at once) and goes on from
the iteration before, and one is asked to stop there (SIGTERM) and goes on from that very step; resumed in the same
layout, it is compared: "bitwise" means that weights, metrics and samples are the same files. Last, a run that two
processes left half-way is ended by one and by four: the greatest difference of weights and metrics from the run of one
process, whose sums are added up in another order. Takes about twenty minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from forks import Forks
from runs import greatest, this_machine

SHORT = [
    "--ppo.steps", "6", "--ppo.prompts-per-step", "8", "--ppo.train-batch-size", "8", "--ppo.max-epochs", "2",
    "--ppo.max-new-tokens", "12", "--ppo.eval-every", "3", "--ppo.learning-rate", "1e-4",
    "--ppo.critic-learning-rate", "1e-4", "--evaluate.num-prompts", "4", "--evaluate.num-samples", "1",
    "--strategy.precision", "fp32", "--strategy.threads", "1", "--checkpoint.every", "1", "--checkpoint.minutes", "0",
]  # fmt: skip
BEFORE = [
    "--sft.steps", "20", "--reward.steps", "20", "--reward.max-rows", "400", "--ppo.skip", "--strategy.threads", "1",
    "--evaluate.max-pairs", "20", "--evaluate.max-demonstrations", "20",
]  # fmt: skip
LAYOUTS = {
    "naive": (1, ["--strategy.kind", "naive"]),
    "DDP×2": (2, ["--strategy.kind", "ddp"]),
    "ZeRO-3×2": (2, ["--strategy.kind", "fsdp"]),
    "ZeRO-3×4": (4, ["--strategy.kind", "fsdp"]),
}
FILES = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors")
STEPS = range(1, 13)


class Bench:
    """Runs in a folder, all from one supervised model and one reward model."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder.absolute()
        self.forks = forks
        if not (folder / "before" / "checkpoints" / "reward" / "model").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            self._launch(1, ["quickstart", *BEFORE, "--out", "before", "--overwrite"])
        stages = self.folder / "before" / "checkpoints"
        self.command = ["ppo", "quickstart.yaml", "--model.path", str(stages / "sft" / "model"),
                        "--ppo.rewards.learned.use", f"model:{stages / 'reward' / 'model'}", *SHORT]  # fmt: skip

    def begin(self, layout: str, name: str, fault: str = "") -> Path:
        """A new run; with a fault it does not end."""
        out = self.folder / name
        processes, options = LAYOUTS[layout]
        self._launch(processes, [*self.command, *options, "--out", str(out), "--overwrite"], fault)
        return out

    def resume(self, layout: str, out: Path) -> None:
        """Goes on with a run to its end."""
        processes, options = LAYOUTS[layout]
        self._launch(processes, ["resume", str(out), *options])

    def alone(self, layout: str) -> Path:
        """The run of a layout that nothing happens to."""
        out = self.folder / f"alone-{layout}"
        return out if (out / "model" / "model.safetensors").is_file() else self.begin(layout, out.name)

    def same(self, layout: str, out: Path) -> bool:
        """Whether a run is bitwise the one left alone; it is removed."""
        alone = self.alone(layout)
        same = all((out / name).read_bytes() == (alone / name).read_bytes() for name in FILES)
        shutil.rmtree(out)
        return same

    def survives(self, layout: str, step: int, kind: str = "kill") -> bool:
        """Whether a run killed (or asked to stop: "term") at that step and resumed is bitwise the one left alone."""
        out = self.begin(layout, f"{kind}-{layout}", fault=f"{kind}@learn:{step}")
        self.resume(layout, out)
        return self.same(layout, out)

    def moved(self, first: str, then: str) -> float:
        """A run begun in one layout, ended in another: its greatest difference from the run of one process."""
        alone = self.alone("naive")
        out = self.begin(first, f"moved-{first}-{then}", fault="kill@learn:7")
        self.resume(then, out)
        ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (out, alone))
        weights = [float((ours[name] - theirs[name]).abs().max()) for name in theirs]
        metrics = [
            abs(one - other) / max(1.0, abs(other)) for one, other in zip(_numbers(out), _numbers(alone), strict=True)
        ]
        return greatest([*weights, *metrics])

    def _launch(self, processes: int, command: list[str], fault: str = "") -> None:
        errors = self.folder / "errors.txt"
        status = self.forks.run(command, self.folder, {"PREFERO_FAULT": fault}, errors, processes=processes)
        if bool(status) != bool(fault):
            raise SystemExit(f"{' '.join(command)}\nended with {status}:\n{errors.read_text()[-4000:]}")


def _numbers(run: Path) -> list[float]:
    """Every number of a run's metrics, in order."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for _, value in sorted(row.items()) if isinstance(value, float)]


def main() -> None:
    """Prints the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the runs there (default: a folder that is removed)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Forks() as forks:
        bench = Bench(args.out or Path(temporary), forks)
        print(f"| layout | {' | '.join(map(str, args.steps))} |\n|{'---|' * (1 + len(args.steps))}")
        for layout in ("naive", "DDP×2", "ZeRO-3×2"):
            for kind, label in (("kill", "killed"), ("term", "asked to stop")):
                cells = ["bitwise" if bench.survives(layout, step, kind) else "DIFFERS" for step in args.steps]
                print(f"| {layout}, {label} | {' | '.join(cells)} |", flush=True)
        print("\n| begun by | ended by | greatest difference from one process |\n|---|---|---|")
        moves = "ZeRO-3×2 naive, ZeRO-3×2 ZeRO-3×4, ZeRO-3×4 ZeRO-3×2, ZeRO-3×4 naive, DDP×2 naive, naive DDP×2"
        for first, then in (move.split() for move in moves.split(", ")):
            print(f"| {first} | {then} | {bench.moved(first, then):.1e} |", flush=True)
    print(f"\n{this_machine()}")


if __name__ == "__main__":
    main()
