"""Every sentence of the older system's FAQ on checkpoints, on two processes, each in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import opt_config
from transformers import OPTForCausalLM

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes saw, by strategy."""
    folder = tmp_path_factory.mktemp("faq")
    OPTForCausalLM(opt_config()).save_pretrained(folder / "opt")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("faq.py")), str(folder)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return {
        kind: [json.loads((folder / f"{kind}-{rank}" / "found.json").read_text()) for rank in (0, 1)]
        for kind in ("DDPStrategy", "ColossalAIStrategy")
    }


@pytest.mark.parametrize("kind", ["DDPStrategy", "ColossalAIStrategy"])
@pytest.mark.parametrize("sentence", ["model on only rank 0", "whole", "float32", "goes on alike"])
def test_true_of_both(found: dict[str, list[dict[str, Any]]], kind: str, sentence: str) -> None:
    assert [seen[sentence] for seen in found[kind]] == [True, True]


def test_replicated_optimizer_states_may_be_saved_once(found: dict[str, list[dict[str, Any]]]) -> None:
    for seen in found["DDPStrategy"]:
        assert seen["only rank 0 for the optimizer"] is True
        assert seen["optimizer files"] == ["actor_optim_checkpoint.pt"]


def test_sharded_optimizer_states_are_a_file_for_each_process(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank, seen in enumerate(found["ColossalAIStrategy"]):
        assert seen["sharded"]
        assert "would lose the optimizer states" in seen["only rank 0 for the optimizer"]
        assert seen["optimizer files"] == [f"actor_optim_checkpoint.rank{rank}-of-2.pt"]
