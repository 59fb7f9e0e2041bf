"""Several processes on gloo: what one process computes, saves and loads, two and four do as well."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).with_name("ranks.py")
LAUNCHES = {2: ["zero3", "ddp", "zero1", "zero2", "bf16", "fp16"], 1: ["naive", "zero3"], 4: ["zero3", "ddp"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What came out of every launch, in one folder, each finding what those before it left."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(folder / "naive-base", max_shard_size="40KB")
    for processes, kinds in LAUNCHES.items():
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(folder), *kinds]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, f"{kinds} x {processes}:\n{done.stderr[-6000:]}"
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    return folder, found


EXACT = ["ddp-2", "ddp-4", "zero1-2", "zero2-2", "zero3-1", "zero3-2", "zero3-4"]


@pytest.mark.parametrize("name", EXACT)
def test_training_is_that_of_one_process(results: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, found = results
    for key in ("norms", "lora norms"):
        assert found[name][key] == pytest.approx(found["naive-1"][key], abs=1e-5)
    for suffix in ("", "-lora"):
        ours, theirs = (load_file(folder / f"{which}{suffix}.safetensors") for which in (name, "naive-1"))
        assert sorted(ours) == sorted(theirs)
        assert all(tensor.dtype == torch.float32 for tensor in ours.values())
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EXACT)
def test_samples_are_those_of_one_process(results: tuple[Path, dict[str, Any]], name: str) -> None:
    assert results[1][name]["samples"] == results[1]["naive-1"]["samples"]


@pytest.mark.parametrize("name", ["naive-1", *EXACT, "bf16-2", "fp16-2"])
def test_what_was_saved_comes_back(results: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, found = results
    assert found[name]["same after loading"]
    assert found[name]["steps skipped"] == 0
    exported = AutoModelForCausalLM.from_pretrained(folder / f"{name}-export").state_dict()
    saved = load_file(folder / f"{name}.safetensors")
    assert all(torch.equal(exported[key], saved[key]) for key in exported)


def test_checkpoints_are_read_by_any_number_of_processes(results: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = results
    original = load_file(folder / "zero3-2.safetensors")
    readers = sorted(folder.glob("*-from-zero3-2-state.safetensors"))
    assert len(readers) == sum(len(kinds) for kinds in LAUNCHES.values())
    for file in readers:
        ours = load_file(file)
        assert all(torch.equal(ours[key], original[key]) for key in original), file.name


def test_a_model_saved_by_any_strategy_loads_in_one_process(results: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = results
    state = load_file(folder / "zero3-4.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "naive-1-export")
    model.load_state_dict(state)


def test_wrong_requests_are_explained(results: tuple[Path, dict[str, Any]]) -> None:
    found = results[1]
    assert "would lose the optimizer states" in found["zero3-2"]["errors"]["only rank 0"]
    assert "only rank 0" not in found["ddp-2"]["errors"]
    assert "rank0-of-2.pt" in found["zero3-4"]["errors"]["other world"]
    assert "this run has 4" in found["zero3-4"]["errors"]["other world"]
    assert "does not have" in found["zero3-2"]["errors"]["foreign optimizer"]
    assert "rank 0 and rank 1 disagree" in found["ddp-2"]["errors"]["drifted"]
    assert "processes: rank 3 went another way" in found["ddp-4"]["errors"]["drifted"]
    assert "drifted" not in found["zero3-2"]["errors"] and "drifted" not in found["naive-1"]["errors"]


@pytest.mark.parametrize("name", ["zero2-2", "zero3-1", "zero3-2", "zero3-4"])
def test_models_built_without_weights_are_filled_in_part_by_part(
    results: tuple[Path, dict[str, Any]], name: str
) -> None:
    assert len(list((results[0] / "naive-base").glob("*.safetensors"))) > 2, "stored in several files"
    for found, alone in zip(results[1][name]["later"], results[1]["zero3-1"]["later"], strict=True):
        assert all(value for key, value in found.items() if key != "sizes"), found
        assert found["sizes"] == alone["sizes"], "what is drawn is what one process draws"


@pytest.mark.parametrize("name", EXACT)
def test_a_loss_that_is_not_finite_in_one_process_moves_no_weights_in_any(
    results: tuple[Path, dict[str, Any]], name: str
) -> None:
    assert results[1][name]["bad loss"] == {"skipped": 1.0, "moved": False}


def test_rows_are_shared_evenly_and_joined_in_order(results: tuple[Path, dict[str, Any]]) -> None:
    found = results[1]["zero3-4"]
    for number in (1, 5, 8):
        shares = [(rows, real) for count, rows, real in found["shares"] if count == number]
        assert len({len(rows) for rows, _ in shares}) == 1
        assert [row for rows, real in shares for row in rows[:real]] == list(range(number))
    assert [row[0] for row in found["gathered"]] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert results[1]["zero3-2"]["judged"][1] == 4


def test_half_precision_trains(results: tuple[Path, dict[str, Any]]) -> None:
    for name in ("bf16-2", "fp16-2"):
        assert results[1][name]["norms"] == pytest.approx(results[1]["naive-1"]["norms"], rel=0.05)
