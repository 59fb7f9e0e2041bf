"""Shared settings: one thread for tiny models, no hub, the same seed for every test; one server of forks for all."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from scripts import load_script


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """Runs the command line in processes of its own that need not import everything anew."""
    with load_script(Path(__file__).parents[1] / "benchmarks" / "forks.py").Forks() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not marked `gpu` runs anywhere."""
    for item in items:
        if "gpu" not in item.keywords:
            item.add_marker("cpu")
