"""Shared settings: one thread for tiny models, no hub, the same seed for every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
