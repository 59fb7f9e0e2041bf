"""The benchmark runs, sweeps batch sizes and plans the largest model without building it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "ppo_dummy.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppo_dummy", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
