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


class Results:
    """What came out of every launch, in one folder, each finding what those before it left; made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: set[int] = set()
        tiny_llama().save_pretrained(folder / "naive-base", max_shard_size="40KB")
        self.launch(2)  # the others read what it saved

    def launch(self, processes: int) -> None:
        """Every kind of strategy on so many processes, once."""
        if processes in self.launched:
            return
        self.launched.add(processes)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        kinds = LAUNCHES[processes]
        command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), str(self.folder), *kinds]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, f"{kinds} x {processes}:\n{done.stderr[-6000:]}"

    def __getitem__(self, name: str) -> dict[str, Any]:
        """What the strategy saw on as many processes as its name ends with."""
        return json.loads(self.file(f"{name}.json").read_text())

    def file(self, name: str) -> Path:
        """What was written under a name that begins with the strategy's and the number of processes."""
        self.launch(int(name.split("-")[1].partition(".")[0]))
        return self.folder / name


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One for all tests."""
    return Results(tmp_path_factory.mktemp("ranks"))


EXACT = ["ddp-2", "ddp-4", "zero1-2", "zero2-2", "zero3-1", "zero3-2", "zero3-4"]


@pytest.mark.parametrize("name", EXACT)
def test_training_is_that_of_one_process(results: Results, name: str) -> None:
    for key in ("norms", "lora norms"):
        assert results[name][key] == pytest.approx(results["naive-1"][key], abs=1e-5)
    for suffix in ("", "-lora"):
        ours, theirs = (load_file(results.file(f"{which}{suffix}.safetensors")) for which in (name, "naive-1"))
        assert sorted(ours) == sorted(theirs)
        assert all(tensor.dtype == torch.float32 for tensor in ours.values())
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EXACT)
def test_models_may_be_frozen_after_prepare_and_loops_be_ones_own(results: Results, name: str) -> None:
    assert results[name]["frozen after prepare"]
    assert results[name]["by hand"] == pytest.approx(results["naive-1"]["by hand"], abs=1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_samples_are_those_of_one_process(results: Results, name: str) -> None:
    assert results[name]["samples"] == results["naive-1"]["samples"]
    assert results[name]["judged"] == pytest.approx(results["naive-1"]["judged"], abs=1e-5)


@pytest.mark.parametrize("name", ["naive-1", *EXACT, "bf16-2", "fp16-2"])
def test_what_was_saved_comes_back(results: Results, name: str) -> None:
    assert results[name]["same after loading"]
    assert results[name]["steps skipped"] == 0
    exported = AutoModelForCausalLM.from_pretrained(results.file(f"{name}-export")).state_dict()
    saved = load_file(results.file(f"{name}.safetensors"))
    assert all(torch.equal(exported[key], saved[key]) for key in exported)


def test_checkpoints_are_read_by_any_number_of_processes(results: Results) -> None:
    for processes in LAUNCHES:
        results.launch(processes)
    original = load_file(results.file("zero3-2.safetensors"))
    readers = sorted(results.folder.glob("*-from-zero3-2-state.safetensors"))
    assert len(readers) == sum(len(kinds) for kinds in LAUNCHES.values())
    for file in readers:
        ours = load_file(file)
        assert all(torch.equal(ours[key], original[key]) for key in original), file.name


def test_a_model_saved_by_any_strategy_loads_in_one_process(results: Results) -> None:
    state = load_file(results.file("zero3-4.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(results.file("naive-1-export"))
    model.load_state_dict(state)


def test_wrong_requests_are_explained(results: Results) -> None:
    found = {name: results[name] for name in ("zero3-2", "ddp-2", "zero3-4", "naive-1")}
    assert "would lose the optimizer states" in found["zero3-2"]["errors"]["only rank 0"]
    assert "only rank 0" not in found["ddp-2"]["errors"]
    assert "rank0-of-2.pt" in found["zero3-4"]["errors"]["other world"]
    assert "this run has 4" in found["zero3-4"]["errors"]["other world"]
    assert "does not have" in found["zero3-2"]["errors"]["foreign optimizer"]
    assert "drifted" not in found["zero3-2"]["errors"] and "drifted" not in found["naive-1"]["errors"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("ddp-2", "rank 0 and rank 1 disagree"), ("ddp-4", "processes: rank 3 went another way")],
    ids=["ddp-2", "ddp-4"],
)
def test_weights_that_drift_apart_are_noticed(results: Results, name: str, words: str) -> None:
    assert words in results[name]["errors"]["drifted"]


@pytest.mark.parametrize("name", ["zero2-2", "zero3-1", "zero3-2", "zero3-4"])
def test_models_built_without_weights_are_filled_in_part_by_part(results: Results, name: str) -> None:
    assert len(list((results.folder / "naive-base").glob("*.safetensors"))) > 2, "stored in several files"
    for found, alone in zip(results[name]["later"], results["zero3-1"]["later"], strict=True):
        assert all(value for key, value in found.items() if key != "sizes"), found
        assert found["sizes"] == alone["sizes"], "what is drawn is what one process draws"


@pytest.mark.parametrize("name", EXACT)
def test_a_loss_that_is_not_finite_in_one_process_moves_no_weights_in_any(results: Results, name: str) -> None:
    assert results[name]["bad loss"] == {"skipped": 1.0, "moved": False}


def test_rows_are_shared_evenly_and_joined_in_order(results: Results) -> None:
    found = results["zero3-4"]
    for number in (1, 5, 8):
        shares = [(rows, real) for count, rows, real in found["shares"] if count == number]
        assert len({len(rows) for rows, _ in shares}) == 1
        assert [row for rows, real in shares for row in rows[:real]] == list(range(number))
    assert [row[0] for row in found["gathered"]] == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert results["zero3-2"]["judged"][1] == 4


def test_half_precision_trains(results: Results) -> None:
    for name in ("bf16-2", "fp16-2"):
        assert results[name]["norms"] == pytest.approx(results["naive-1"]["norms"], rel=0.05)
