"""The quickstart's three stages by the command line: shared by processes, the numbers are those of one."""

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return load_script(Path(__file__).parents[2] / "benchmarks" / "parity.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "processes", "variant"),
    [("DDP", 2, "full"), ("ZeRO-1", 2, "accumulation 2"), ("ZeRO-3", 2, "LoRA"), ("ZeRO-3", 4, "full")],
)
def test_shared_is_alone(
    parity: ModuleType, tmp_path_factory: pytest.TempPathFactory, strategy: str, processes: int, variant: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "parity"
    cell = parity.Cell(strategy, processes, variant)
    differences = parity.compare(parity.run(cell, out), parity.run(parity.baseline(cell), out))
    assert differences.pop("samples that differ") == 0
    assert max(differences.values()) <= 1e-5, differences
