"""What is done to runs, and what they make of it: prints the fault table of docs/strategies-measured.md.

python benchmarks/faults.py [--kills 200] [--mutations 1000] [--out DIR] [--only NAME ...]

A short pipeline (SFT, reward model and PPO of the quickstart's world, a checkpoint a step) is made once and left
alone. Then it is made again and again while: SIGKILL comes at every phase; SIGKILL comes at random moments, over and
over until the run has ended; SIGTERM or SIGINT comes; the disk is full at a checkpoint. Each time the run is resumed to
its end, and the weights, metrics and samples must be those of the run that was left alone, to the last bit. Two
processes that torchrun started lose one, or the weights of one drift away: the other must name it, and the run be
resumed. Besides, files of checkpoints are torn, flipped, emptied, lost and swapped: the loader must notice every time
and give the one before; where all of them are lost, the run must not be begun over. Takes half an hour or more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from forks import Forks
from prefero.faults import PHASES
from prefero.recipes.keeper import STOPPED
from prefero.strategies.checkpoint import Checkpoints, DamagedCheckpointError
from prefero.strategies.group import Group
from runs import this_machine

SHORT = [
    "--sft.steps", "3", "--sft.batch-size", "16", "--reward.steps", "3", "--reward.batch-size", "16",
    "--reward.max-rows", "100", "--ppo.steps", "4", "--ppo.prompts-per-step", "8", "--ppo.train-batch-size", "6",
    "--ppo.max-epochs", "2", "--ppo.max-new-tokens", "12", "--ppo.eval-every", "2", "--evaluate.num-prompts", "4",
    "--evaluate.num-samples", "1", "--evaluate.max-pairs", "20", "--evaluate.max-demonstrations", "20",
    "--strategy.precision", "fp32", "--strategy.threads", "1", "--checkpoint.every", "1", "--checkpoint.minutes", "0",
]  # fmt: skip
PATIENCE = 10
DEADLINE = 120
FILES = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "checkpoints/sft/model/model.safetensors",
         "checkpoints/reward/model/model.safetensors", "checkpoints/ppo/metrics.jsonl")  # fmt: skip


@dataclass
class Row:
    """How often something was done, and how often the outcome was right."""

    what: str
    must: str
    done: int = 0
    right: int = 0

    def add(self, right: bool) -> None:
        """One more."""
        self.done += 1
        self.right += right

    def __str__(self) -> str:
        return f"| {self.what} | {self.must} | {self.right} of {self.done} |"


class Bench:
    """Runs in a folder, compared with the one left alone."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder = folder
        self.forks = forks
        if self.run("left-alone") != 0:
            raise RuntimeError(f"the run that is left alone failed: see {folder / 'errors.txt'}")

    def run(self, out: str, fault: str = "", meanwhile: Callable[[int], None] | None = None) -> int:
        """Begins a run or goes on with it."""
        summary = self.folder / out / "summary.json"
        began = summary.is_file()
        if began and "seconds" in json.loads(summary.read_text(encoding="utf-8")):
            return 0  # it was killed after its very end
        arguments = ["resume", out] if began else ["quickstart", *SHORT, "--out", out, "--overwrite"]
        return self.forks.run(
            arguments, self.folder, {"PREFERO_FAULT": fault}, self.folder / "errors.txt", meanwhile=meanwhile
        )

    def same(self, out: str) -> bool:
        """Whether a run is to the last bit the one left alone; it is removed."""
        alone, other = self.folder / "left-alone", self.folder / out
        same = all((other / name).read_bytes() == (alone / name).read_bytes() for name in FILES)
        shutil.rmtree(other)
        return same


def at_every_phase(bench: Bench, times: int = 3) -> Iterator[Row]:
    """SIGKILL at the first, second, ... time that a run comes to each phase."""
    row = Row(f"SIGKILL at each of the phases {', '.join(PHASES)}", "resumed, bitwise the run left alone")
    for phase in PHASES:
        for count in range(1, times + 1):
            killed = bench.run("phase", f"kill@{phase}:{count}") == -signal.SIGKILL
            same = bench.run("phase") == 0 and bench.same("phase")
            if killed or count == 1 or not same:  # every run comes there once; some no second time
                row.add(same and (killed or count > 1))
    yield row


def at_random(bench: Bench, kills: int) -> Iterator[Row]:
    """SIGKILL at random moments until the run has ended, and again from its beginning until there were enough."""
    began = time.monotonic()
    bench.run("timed")
    whole = time.monotonic() - began
    shutil.rmtree(bench.folder / "timed")
    draws, row, killed = random.Random(0), Row("", "resumed, bitwise the run left alone"), 0

    def kill(process: int) -> None:
        time.sleep(draws.uniform(0.05, 0.5) * whole)
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            return

    while killed < kills:
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            status = bench.run("random", meanwhile=kill)
            killed += status == -signal.SIGKILL
        row.add(status == 0 and bench.same("random"))
    row.what = f"SIGKILL at {killed} random moments of {row.done} runs"
    yield row


def asked_to_stop(bench: Bench) -> Iterator[Row]:
    """SIGTERM and SIGINT in every learn phase."""
    for kind, name in (("term", "SIGTERM"), ("int", "SIGINT (Ctrl-C)")):
        row = Row(f"{name} inside a learn phase", f"status {STOPPED}, saved; resumed, bitwise the run left alone")
        for count in range(1, 9):
            status = bench.run(kind, f"{kind}@learn:{count}")
            row.add(status == STOPPED and bench.run(kind) == 0 and bench.same(kind))
        yield row


def on_full_disk(bench: Bench) -> Iterator[Row]:
    """A full disk while each of the checkpoints is written."""
    row = Row("disk full while a checkpoint is written", "an error; the one before is whole; resumed, bitwise the same")
    for count in range(1, 9):
        status = bench.run("full", f"full@write:{count}")
        left = list((bench.folder / "full").rglob("*.part"))
        row.add(status == 2 and not left and bench.run("full") == 0 and bench.same("full"))
    yield row


def lost(bench: Bench) -> Iterator[Row]:
    """One of two processes that torchrun started is killed, stands still, or has its weights changed."""
    must = f"{DEADLINE} s after the launch all have ended, naming it and its phase; resumed to the end"
    kinds = (("kill", "killed"), ("stop", "stopped (SIGSTOP)"))
    for strategy, (kind, what) in product(("ddp", "fsdp"), kinds):
        row = Row(f"one of two processes ({strategy}) {what}", must)
        for rank, place in ((1, "backward:2"), (1, "rollout:1"), (1, "learn:3"), (0, "write:2")):
            words = rf"rank {rank} does not answer any more.* phase '\w+'"
            row.add(_names_it(bench, f"{kind}@{place}:rank{rank}", words, strategy))
        yield row
    row = Row("a weight changed in one of two processes", "noticed before anything is saved; resumed to the end")
    for count in (1, 3, 8):
        row.add(_names_it(bench, "", "rank 0 and rank 1 disagree", "ddp", drift=count))
    yield row


def _names_it(bench: Bench, fault: str, words: str, strategy: str, drift: int = 0) -> bool:
    """Whether a run of two processes that goes wrong says so in these words, in time, and is resumed to its end."""
    out = bench.folder / "lost"
    began = time.monotonic()
    shared = ["--strategy.kind", strategy, "--strategy.timeout", str(PATIENCE)]
    begun = _torchrun(["quickstart", *SHORT, *shared, "--out", str(out), "--overwrite"], fault, drift)
    in_time = time.monotonic() - began < DEADLINE
    told = in_time and begun.returncode != 0 and re.search(rf"prefero: error: .*{words}", begun.stderr) is not None
    ended = _torchrun(["resume", str(out)])
    return (
        told and ended.returncode == 0 and "heldout_reward_after" in (out / "summary.json").read_text(encoding="utf-8")
    )


def _torchrun(command: list[str], fault: str = "", drift: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes; what hangs ends the benchmark."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFERO_FAULT": fault, "DRIFT": str(drift)}
    return subprocess.run(  # noqa: S603
        [*launch, "--worker", *command], capture_output=True, text=True, timeout=PATIENCE + 240, env=environment
    )


def worker(command: list[str]) -> int:
    """The command line; in the second process a weight changes by itself after so many optimizer steps, if asked."""
    from prefero.cli import main as prefero
    from prefero.strategies import DDPStrategy

    steps, whole = int(os.environ["DRIFT"]), DDPStrategy.optimizer_step

    def step(self: DDPStrategy, optimizer: Any, **kwargs: Any) -> Any:
        nonlocal steps
        done = whole(self, optimizer, **kwargs)
        steps -= 1
        if steps == 0 and os.environ["RANK"] == "1":
            optimizer.param_groups[0]["params"][0].data[0] += 1e-3
        return done

    DDPStrategy.optimizer_step = step  # type: ignore[method-assign]
    return prefero(command)


def damaged(bench: Bench, mutations: int) -> Iterator[Row]:
    """Every kind of damage to the files of the newest of two checkpoints, and to the pointer."""
    bench.run("damaged", "term@learn:6")
    state = bench.folder / "damaged" / "checkpoints" / "ppo" / "checkpoints" / "state"
    draws = random.Random(0)
    rows = {name: Row(name, "noticed, named; the one before is loaded") for name in MUTATIONS}
    pointers = Row("pointer emptied, torn, or naming what is not there", "noticed; the newest whole one is loaded")
    number = 0
    while sum(row.done for row in (*rows.values(), pointers)) < mutations:
        number += 1
        copy = bench.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(state, copy)
        older, newest = sorted(copy.glob("step-*"))[-2:]
        if number % 20 == 0:
            content = draws.choice(["", "{", '{"content": {"checkpoint": "step-99999999"}, "sha256": ""}'])
            (copy / "latest.json").write_text(content)
            pointers.add(loaded(copy) == (newest.name, True))
            continue
        name = draws.choice(list(MUTATIONS))
        if MUTATIONS[name](newest, older, draws):
            rows[name].add(loaded(copy) == (older.name, True))
    yield from rows.values()
    yield pointers
    shutil.rmtree(bench.folder / "damaged")


def gone(bench: Bench) -> Iterator[Row]:
    """All that a run could go on from is lost, in part or with the folder it lay in."""
    row = Row("every checkpoint of a stage lost", "refused, naming it; what was logged is still there")
    stage = bench.folder / "gone" / "checkpoints" / "ppo"
    state, log = stage / "checkpoints" / "state", bench.folder / "gone" / "metrics.jsonl"
    for steps, lose in product((2, 3, 5, 6), ("checkpoints", "their folder", "the stage", "all stages")):
        bench.run("gone", f"term@learn:{steps}")
        gone = {"checkpoints": [*state.glob("step-*")], "their folder": [state], "the stage": [stage]}
        for folder in gone.get(lose, [stage.parent]):
            shutil.rmtree(folder)
        before = log.read_bytes()
        status, told = bench.run("gone"), (bench.folder / "errors.txt").read_text(encoding="utf-8")
        row.add(status == 2 and "no checkpoint" in told and log.read_bytes() == before)
        shutil.rmtree(bench.folder / "gone")
    yield row


def loaded(folder: Path) -> tuple[str, bool]:
    """The checkpoint that is found, and whether anything was said of what is wrong."""
    told: list[str] = []
    try:
        found = Checkpoints(folder, Group()).latest(told.append)
    except DamagedCheckpointError as error:
        return f"error: {error}", True
    return (found.folder.name if found else "nothing"), bool(told)


def _file(folder: Path, draws: random.Random) -> Path:
    return draws.choice(sorted(folder.iterdir()))


def _changed(file: Path, content: bytes) -> bool:
    before = file.read_bytes()
    file.write_bytes(content)
    return content != before


def _flip(new: Path, old: Path, draws: random.Random) -> bool:
    file = _file(new, draws)
    content = bytearray(file.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    return _changed(file, bytes(content))


def _tear(new: Path, old: Path, draws: random.Random) -> bool:
    file = _file(new, draws)
    content = file.read_bytes()
    return _changed(file, content[: len(content) * draws.randrange(16) // 16])


def _zero(new: Path, old: Path, draws: random.Random) -> bool:
    file = _file(new, draws)
    return _changed(file, bytes(file.stat().st_size))


def _lose(new: Path, old: Path, draws: random.Random) -> bool:
    _file(new, draws).unlink()
    return True


def _swap(new: Path, old: Path, draws: random.Random) -> bool:
    one, other = draws.sample(sorted(new.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    return _changed(other, content)


def _mix(new: Path, old: Path, draws: random.Random) -> bool:
    file = _file(new, draws)
    return _changed(file, (old / file.name).read_bytes())


def _stale(new: Path, old: Path, draws: random.Random) -> bool:
    shutil.rmtree(new)
    shutil.copytree(old, new)
    return True


MUTATIONS: dict[str, Callable[[Path, Path, random.Random], bool]] = {
    "one bit of a file flipped": _flip,
    "a file torn off at a sixteenth": _tear,
    "a file filled with zeros": _zero,
    "a file lost": _lose,
    "two files swapped": _swap,
    "a file of the checkpoint before": _mix,
    "the checkpoint before in its place": _stale,
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None)
    parts = {
        "phases": at_every_phase,
        "random": lambda bench: at_random(bench, args.kills),
        "stop": asked_to_stop,
        "full": on_full_disk,
        "lost": lost,
        "damage": lambda bench: damaged(bench, args.mutations),
        "gone": gone,
    }
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="prefero-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Forks() as forks:
        bench = Bench(folder, forks)
        print("| what is done | what must be | was |\n|---|---|---|")
        for name in args.only:
            for row in parts[name](bench):
                print(row, flush=True)
    print(f"\n{this_machine()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(sys.argv[2:]))
    main()
