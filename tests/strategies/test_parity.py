"""The quickstart's three stages by the command line: every strategy, by one key, gives the numbers of one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

pytestmark = pytest.mark.dist

PARITY: Any = load_script(Path(__file__).parents[2] / "benchmarks" / "parity.py")
# The whole matrix of full fine-tuning; of the variants, one cell for each way of sharing.
CELLS = [cell for cell in PARITY.cells() if cell.variant == "full" and cell.strategy != "naive"] + [
    PARITY.Cell(*cell)
    for cell in (
        ("ZeRO-3", 2, "LoRA"), ("DDP", 4, "LoRA"), ("naive", 1, "accumulation 4"), ("ZeRO-1", 2, "accumulation 2"),
        ("ZeRO-2", 4, "accumulation 4"), ("naive", 1, "60 tokens a pass"), ("ZeRO-3", 2, "60 tokens a pass"),
        ("DDP", 2, "activation checkpointing"),
        ("ZeRO-3", 2, "activation checkpointing"), ("DDP", 2, "one backbone"), ("ZeRO-3", 2, "one backbone"),
        ("ZeRO-2", 4, "hydra"), ("DDP", 2, "hydra"), ("ZeRO-3", 2, "upper layers"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


def equal(folder: Path, baseline: Path) -> None:
    differences = PARITY.compare(folder, baseline)
    assert differences.pop("samples that differ") == 0
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.folder)
def test_shared_is_alone(out: Path, forks: Any, cell: Any) -> None:
    equal(PARITY.run(cell, out, forks), PARITY.run(PARITY.baseline(cell), out, forks))


@pytest.mark.slow
def test_torchrun_starts_it(out: Path, forks: Any) -> None:
    cell = PARITY.Cell("ZeRO-3", 2, "full")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "prefero"]
    subprocess.run(
        [sys.executable, "-m", *launcher, "quickstart", *cell.options, "--out", str(out / "torchrun")],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    equal(out / "torchrun", PARITY.run(PARITY.baseline(cell), out, forks))
