"""ILQL in several processes: one process's numbers, heads and answers, however the model is shared out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefero.models.ilql import HEADS_FILE

pytestmark = pytest.mark.dist

COMMAND = [
    "ilql", "ilql.yaml", "--steps", "4", "--batch-size", "9", "--max-rows", "60", "--eval-every", "2", "--num-prompts",
    "5", "--evaluate.num-samples", "2", "--max-new-tokens", "8", "--evaluate.max-demonstrations", "20",
    "--strategy.precision", "fp32", "--ilql.sync-every", "2", "--max-grad-norm", "0.5",
    "--learning-rate", "1e-4", "--head-learning-rate", "1e-4", "--strategy.threads", "1",
]  # fmt: skip
KINDS = {"zero3": ["fsdp", "--strategy.stage", "3"], "zero1": ["fsdp", "--strategy.stage", "1"], "ddp": ["ddp"]}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("ilql")
    assert forks.run([*COMMAND, "--out", "alone"], folder, {}, folder / "errors.txt") == 0
    return folder / "alone"


@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_alone(alone: Path, forks: Any, kind: str) -> None:
    folder = alone.parent
    command = [*COMMAND, "--out", kind, "--strategy.kind", *KINDS[kind]]
    assert forks.run(command, folder, {}, folder / "errors.txt", processes=2) == 0
    for name in ("model.safetensors", HEADS_FILE):
        ours, theirs = (load_file(folder / out / "model" / name) for out in (kind, "alone"))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0, msg=f"{name}: {key}")
    for ours, theirs in zip(metrics(folder / kind), metrics(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"stage"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key
    slow, fast = (load_file(folder / kind / "model" / HEADS_FILE)[f"{of}.outer.weight"] for of in ("target_q1", "q1"))
    assert not torch.equal(slow, fast)
