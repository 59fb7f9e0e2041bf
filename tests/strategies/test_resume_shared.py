"""Runs of several processes, killed and resumed: by as many, bitwise; by another number, the same numbers."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import load_script

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Any:
    script = load_script(Path(__file__).parents[2] / "benchmarks" / "resume.py")
    return script.Bench(tmp_path_factory.mktemp("resume"), forks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "step", "kind"),
    [
        ("naive", 6, "kill"),
        ("DDP×2", 4, "kill"),
        ("DDP×2", 11, "term"),
        ("ZeRO-3×2", 1, "kill"),
        ("ZeRO-3×2", 9, "term"),
        ("ZeRO-3×2", 6, "term"),
    ],
)
def test_as_many_processes_end_it_bitwise(bench: Any, layout: str, step: int, kind: str) -> None:
    assert bench.survives(layout, step, kind)


@pytest.mark.slow
@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_and_its_processes_saves_the_run(bench: Any, wish: signal.Signals) -> None:
    """As some schedulers send it: to all of them, and torchrun passes it on once more."""
    out = bench.folder / f"asked-{wish.name}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              "--shutdown-timeout", "120", "-m", "prefero"]  # fmt: skip
    process = subprocess.Popen(
        [*launch, *bench.command, "--strategy.kind", "ddp", "--out", str(out)], cwd=bench.folder, text=True,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").is_file() or "actor/" not in (out / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        for number in [*map(int, children), process.pid]:
            os.kill(number, wish)
        told = process.communicate(timeout=180)[1]
    finally:
        process.kill()
    assert "stopped and saved" in told, told[-4000:]
    bench.resume("DDP×2", out)
    assert bench.same("DDP×2", out)


@pytest.mark.slow
def test_two_machines_do_what_one_process_does(tmp_path: Path) -> None:
    """Two launchers that find each other by address, as they do on two machines (each alone would want the folder)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend",
              "c10d", "--rdzv_endpoint", address, "--local_addr", "127.0.0.1", "-m", "prefero"]  # fmt: skip
    command = ["sft", "quickstart.yaml", "--sft.steps", "4", "--sft.batch-size", "8", "--strategy.precision", "fp32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen([*launch, *command, "--strategy.kind", "ddp", "--out", "two"], cwd=tmp_path, env=environment)
        for _ in range(2)
    ]
    try:
        assert [machine.wait(timeout=180) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    alone = [sys.executable, "-m", "prefero", *command, "--out", "one"]
    subprocess.run(alone, check=True, cwd=tmp_path, env=environment, timeout=180)
    one, two = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("ZeRO-3×2", "naive"), ("DDP×2", "ZeRO-3×4"), ("ZeRO-3×4", "ZeRO-3×2"), ("ZeRO-3×4", "naive")]
)
def test_another_number_of_processes_ends_it_alike(bench: Any, first: str, then: str) -> None:
    assert bench.moved(first, then) <= 1e-5
