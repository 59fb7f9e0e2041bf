"""What each process holds, by strategy, for GPT-2 small: prints a table of docs/strategies-measured.md.

python benchmarks/memory.py [--rounds N]

Each layout trains a randomly initialised GPT-2 small on short rows in processes of its own; the layouts take turns for
`rounds` rounds (default 3) and the medians are shown. All of them give freed memory back to the system at once, as
sharded strategies do (`strategies.cpu.return_freed_memory`). Memory is a process's resident set above what it had after
its imports, in MB, of the process that has most: "held" is between backward and step, when parameters, gradients and
optimizer states are all there; "peak" is the highest ever. Times are the median step's, against the first layout's of
the same round. Takes about a quarter of an hour and 8 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from runs import this_machine

ROWS, LENGTH = 4, 16
LAYOUTS = {
    "naive": ("naive", 1),
    "DDP×2": ("ddp", 2),
    "ZeRO-1×2": ("zero1", 2),
    "ZeRO-2×2": ("zero2", 2),
    "ZeRO-3×2": ("zero3", 2),
    "ZeRO-3×4": ("zero3", 4),
}


def resident() -> float:
    """This process's resident set, MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this benchmark reads /proc/self/status, which Linux has")


def worker(kind: str, steps: int) -> None:
    """One process of a layout; rank 0 prints what came out."""
    import torch
    from transformers import GPT2Config

    from prefero.models.gpt import GPTActor
    from prefero.optimizer import HybridAdam
    from prefero.strategies import DDPStrategy, FSDPStrategy, NaiveStrategy
    from prefero.strategies.cpu import return_freed_memory

    torch.set_num_threads(1)
    return_freed_memory()
    make = {"naive": lambda: NaiveStrategy("cpu"), "ddp": DDPStrategy}
    stage = int(kind[-1]) if kind.startswith("zero") else 3
    strategy = make.get(kind, lambda: FSDPStrategy(stage, shard_init=True))()  # type: ignore[arg-type]
    group = strategy.group
    baseline = resident()
    with strategy.model_init_context():
        actor = GPTActor(config=GPT2Config())
    optimizer = HybridAdam(actor.parameters())
    actor, optimizer = strategy.prepare((actor, optimizer))
    rows = torch.randint(0, 50257, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))[group.share(ROWS).rows]
    held, times = 0.0, []
    for _ in range(steps):
        began = time.perf_counter()
        with strategy.micro_batch(actor, last=True):
            strategy.backward(-actor(rows, LENGTH - 1).sum() / (ROWS * LENGTH), actor, optimizer)
        paused = time.perf_counter()
        gc.collect()
        held = resident() - baseline
        resumed = time.perf_counter()
        strategy.optimizer_step(optimizer)
        group.wait()
        times.append(time.perf_counter() - began - (resumed - paused))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - baseline
    numbers = group.max(torch.tensor([held, peak, median(times[1:])], dtype=torch.float64))
    if strategy.is_rank_0:
        print(json.dumps(numbers.tolist()))


def measure(kind: str, processes: int, steps: int = 4) -> list[float]:
    """held, peak and seconds of one layout."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", kind, str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=600)  # noqa: S603
    numbers: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]))
    else:
        table(args.rounds)


def table(rounds: int) -> None:
    """All layouts in turn, `rounds` times."""
    found: dict[str, list[list[float]]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        for name, layout in LAYOUTS.items():
            found[name].append(measure(*layout))
    medians: dict[str, tuple[float, float, float]] = {}
    for name, runs in found.items():
        ratios = [own[2] / first[2] for own, first in zip(runs, found["naive"], strict=True)]
        medians[name] = (median(run[0] for run in runs), median(run[1] for run in runs), median(ratios))
    print("| layout | held, MB | of DDP's | peak, MB | of DDP's | step time, of naive's |\n|---|---|---|---|---|---|")
    of = medians["DDP×2"]
    for name, (held, peak, ratio) in medians.items():
        print(f"| {name} | {held:.0f} | {held / of[0]:.2f} | {peak:.0f} | {peak / of[1]:.2f} | {ratio:.2f} |")
    print(f"\n{this_machine()} Medians of {rounds} round{'s' * (rounds > 1)}.")


if __name__ == "__main__":
    main()
