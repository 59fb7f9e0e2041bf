"""Runs of several processes, killed and resumed: by as many, bitwise; by another number, the same numbers."""

from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Any:
    script = load_script(Path(__file__).parents[2] / "benchmarks" / "resume.py")
    return script.Bench(tmp_path_factory.mktemp("resume"), forks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "step"), [("naive", 6), ("DDP×2", 4), ("DDP×2", 11), ("ZeRO-3×2", 1), ("ZeRO-3×2", 9)]
)
def test_as_many_processes_end_it_bitwise(bench: Any, layout: str, step: int) -> None:
    assert bench.survives(layout, step)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("ZeRO-3×2", "naive"), ("DDP×2", "ZeRO-3×4")])
def test_another_number_of_processes_ends_it_alike(bench: Any, first: str, then: str) -> None:
    assert bench.moved(first, then) <= 1e-5
