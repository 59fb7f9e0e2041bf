"""The benchmarks run, small, and tables of the docs come from finished runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import load_script
from transformers import AutoModelForCausalLM

from prefero.strategies.checkpoint import Checkpoints
from prefero.strategies.group import Group

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.experiment
@pytest.mark.parametrize("name", ["benchmark_gpt_dummy", "benchmark_opt_lora_dummy"])
def test_the_older_systems_recipe_runs_small(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script(FOLDER / f"{name}.py")
    options = {"model": "tiny", "strategy": "naive", "prompt_length": 4, "max_length": 8, "num_episodes": 2,
               "max_timesteps": 2, "update_timesteps": 2, "max_epochs": 1, "train_batch_size": 4,
               "experience_batch_size": 2}  # fmt: skip
    script.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert line["experience_samples_per_second"] > 0 and line["learning_samples_per_second"] > 0
    assert line["learning_tflops_per_process"] > 0 and line["peak_memory_gib"] > 0


@pytest.mark.parametrize(
    ("name", "model", "low", "high"),
    [("benchmark_gpt_dummy", "s", 124e6, 125e6), ("benchmark_gpt_dummy", "175b", 174e9, 176e9),
     ("benchmark_opt_lora_dummy", "125m", 125e6, 126e6), ("benchmark_opt_lora_dummy", "13b", 12.7e9, 13.1e9)],
)  # fmt: skip
def test_the_size_ladder_has_the_sizes_it_names(name: str, model: str, low: float, high: float) -> None:
    config = load_script(FOLDER / f"{name}.py").config(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    assert low < sum(parameter.numel() for parameter in network.parameters()) < high


@pytest.mark.parametrize("ranks", [8, 1024])
def test_a_rank_of_many_holds_its_share_of_a_very_large_model(ranks: int) -> None:
    """The short form of `benchmarks/shards.py`: one shape of its table."""
    asked = f"import json, shards; print(json.dumps(shards.held(shards.SHAPES['7B (Llama 2)'], {ranks})))"
    done = subprocess.run(
        [sys.executable, "-c", asked], check=True, capture_output=True, text=True, cwd=FOLDER, timeout=300
    )
    total, states, at_work = json.loads(done.stdout)
    assert total == 6_738_415_616
    # Parameters, gradients and two moments in float32; rows that do not divide evenly are rounded up.
    assert 16 * total / ranks <= states <= 1.02 * 16 * total / ranks
    assert at_work - states == 8 * 2 * 32000 * 4096 + 8 * 4096, "embeddings, head and last norm are the largest part"


def test_the_largest_shape_is_found_by_halving_and_nothing_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = load_script(FOLDER / "capacity.py")
    needs, tried = {shape: 2.0**place for place, shape in enumerate(capacity.SHAPES)}, []

    def attempt(way: str, shape: str, cap: float, device: str) -> Any:
        tried.append((way, shape, cap))
        fits = needs[shape] * (4 if way == "plain" else 1) <= cap
        return capacity.Try(way, shape, cap, fits, *([needs[shape], 2.0, 1.0, 0.5] if fits else []))

    monkeypatch.setattr(capacity, "attempt", attempt)
    ladder = capacity.Ladder(list(capacity.SHAPES), "cpu")
    lines = list(capacity.capacity(ladder, [100.0, 3.0], ["plain", "LoRA"]))
    assert [line.split(" | ")[1:5] for line in lines[2:]] == [
        ["plain", "none", "|", "|"], ["LoRA", "m", "2e-09e9", "-"],
        ["plain", "2b", "1.6e-08e9", "1.0"], ["LoRA", "6b", "6.4e-08e9", "4.0"],
    ]  # fmt: skip
    largest = ladder.largest("LoRA", 100.0)
    assert largest.shape == "6b" and not ladder.at("LoRA", "8b", 100.0).fits
    made = len(tried)
    assert len(set(tried)) == made and made <= 4 * 4
    assert len(list(capacity.equal_sizes(ladder, [3.0, 100.0], ["plain", "LoRA"]))) == 2 + 2 * 2
    assert not {shape for _, shape, _ in tried[made:]} - {"s", "2b"}


def test_an_end_for_want_of_memory_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = load_script(FOLDER / "capacity.py")
    for status in (capacity.TOO_LARGE, -9, 137):
        monkeypatch.setattr(subprocess, "run", lambda *_, s=status, **__: subprocess.CompletedProcess([], s, "", "why"))
        assert not capacity.attempt("LoRA", "s", 4.0, "cpu").fits
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "why"))
    with pytest.raises(SystemExit, match="LoRA, s ended with 1:\nwhy"):
        capacity.attempt("LoRA", "s", 4.0, "cpu")


@pytest.mark.parametrize("way", ["plain", "all weights", "LoRA", "LoRA, bf16", "one backbone, int8"])
def test_an_iteration_of_every_way_fits_in_much_memory(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    capacity = load_script(FOLDER / "capacity.py")
    capacity.worker(way, "tiny", 1000.0, "cpu")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters"] == 12 * 2 * 32**2 + 50257 * 32 and found["seconds"] > 0
    assert 0 <= found["above_imports"] < found["taken"] < 100


@pytest.mark.slow
def test_capacity_prints_its_tables(tmp_path: Path) -> None:
    ways = ["plain", "one backbone, int8"]
    command = [sys.executable, str(FOLDER / "capacity.py"), "--quick", "--caps", "0.1", "8", "--ways", *ways]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "tries.json")], check=True, capture_output=True, text=True, timeout=300
    )
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line[1:3] for line in lines[1:5]] == [["plain", "none"], ["one backbone, int8", "none"],
                                                  ["plain", "small"], ["one backbone, int8", "small"]]  # fmt: skip
    assert [line[0] for line in lines[6:]] == ["| tiny", "| tiny", "| small", "| small"]
    tries = json.loads((tmp_path / "tries.json").read_text())
    assert {one["cap"] for one in tries if not one["fits"]} == {0.1}, "imports alone are more"


@pytest.mark.slow
@pytest.mark.dist
def test_sharing_out_lowers_what_each_process_holds() -> None:
    """The short form of `benchmarks/memory.py`: held between backward and step, GPT-2 small."""
    memory = load_script(FOLDER / "memory.py")
    replicated, shared, shared_by_four = (
        memory.measure(*memory.LAYOUTS[name], steps=2)[0] for name in ("DDP×2", "ZeRO-3×2", "ZeRO-3×4")
    )
    assert shared <= 0.6 * replicated and shared_by_four <= 0.35 * replicated


def test_damage_to_checkpoints_is_always_noticed(tmp_path: Path) -> None:
    """The short form of `benchmarks/faults.py --only damage`, on a checkpoint made here."""
    faults = load_script(FOLDER / "faults.py")
    state = tmp_path / "damaged" / "checkpoints" / "ppo" / "checkpoints" / "state"
    checkpoints = Checkpoints(state, Group())
    for step in (1, 2):
        checkpoints.save(step, {"weight": torch.arange(9.0) * step, "bias": torch.ones(step)}, {"step": step})
    checkpoints.wait()

    class Ready:
        folder = tmp_path

        def run(self, *_: object) -> int:
            return 0

    rows = list(faults.damaged(Ready(), 150))
    assert [row.what for row in rows[:-1]] == list(faults.MUTATIONS)
    for row in rows:
        assert row.done > 0 and row.right == row.done, str(row)


def finished_run(folder: Path, *, reward: float, kl: float) -> None:
    """A run folder as the pipeline leaves it, with made-up numbers."""
    keys = ("eval/reward_reward_model/raw", "eval/gold", "eval/distinct_words")
    kinds = {
        name: dict.fromkeys(keys, reward * share) | {"eval/kl": kl * share, "eval/reward": reward}
        for name, share in (("before", 0.0), ("after", 1.0), ("best_of_16", 0.5))
    }
    kinds["best_of_16"]["eval/kl_bound"] = 1.83
    summary = kinds | {"rm_accuracy": 0.9, "seconds": 90.0, "heldout_reward_after": reward, "versions": {"torch": "2"}}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": "ppo", "step": 7, **kinds["after"]}) + "\n")


def test_the_real_runs_table_is_made_of_the_runs_own_numbers(tmp_path: Path) -> None:
    finished_run(tmp_path / "seed-0", reward=2.0, kl=4.0)
    finished_run(tmp_path / "seed-1", reward=3.0, kl=5.0)
    script = [sys.executable, str(FOLDER / "smollm2.py"), "--seeds", "0", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PATH": ""}  # nothing is run again
    printed = subprocess.run(script, check=True, capture_output=True, text=True, env=environment, timeout=120).stdout
    lines = printed.splitlines()
    assert lines[2] == (
        "| 0 | 0.9000 | +0.00 → +2.00 (+1.00) | +0.000 → +2.000 (+1.000) | 4.00 (1.83) | 0.00 → 2.00 (1.00) | 1.5 |"
    )
    assert lines[4].startswith("| mean | 0.9000 | +0.00 → +2.50 (+1.25) |")
    assert lines[-3].startswith("| 7 | +2.00 | +2.000 | 4.00 | 2.00 |")
    assert lines[-1].endswith("torch 2.")
