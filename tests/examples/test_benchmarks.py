"""The benchmarks run: speed and plan without building the model, tables of the docs from finished runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

FILE = Path(__file__).parents[2] / "benchmarks" / "ppo_dummy.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(FILE)


@pytest.mark.parametrize(("family", "lora_rank"), [("gpt", 0), ("opt", 4)])
def test_one_line_a_batch_size(
    benchmark: ModuleType, family: str, lora_rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--sizes", "tiny", "--family", family, "--batch_sizes", "2", "3", "--prompt_length", "4",
                    "--max_length", "8", "--num_episodes", "1", "--device", "cpu",
                    "--lora_rank", str(lora_rank)])  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["batch_size"] for line in lines] == [2, 3]
    assert all(line["learning_samples_per_second"] > 0 and line["peak_memory_gib"] > 0 for line in lines)


def test_the_largest_model_is_planned_without_memory(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--sizes", "s", "175b", "--plan"])
    small, large = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert small["parameters"] == 124_439_808  # GPT-2
    assert 174e9 < large["parameters"] < 176e9
    assert large["gradients_and_adam_gib"] == pytest.approx(12 * large["trained"] / 2**30, rel=1e-3)


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
    script = [sys.executable, str(FILE.with_name("smollm2.py")), "--seeds", "0", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PATH": ""}  # nothing is run again
    printed = subprocess.run(script, check=True, capture_output=True, text=True, env=environment, timeout=120).stdout
    lines = printed.splitlines()
    assert lines[2] == (
        "| 0 | 0.9000 | +0.00 → +2.00 (+1.00) | +0.000 → +2.000 (+1.000) | 4.00 (1.83) | 0.00 → 2.00 (1.00) | 1.5 |"
    )
    assert lines[4].startswith("| mean | 0.9000 | +0.00 → +2.50 (+1.25) |")
    assert lines[-3].startswith("| 7 | +2.00 | +2.000 | 4.00 | 2.00 |")
    assert lines[-1].endswith("torch 2.")
