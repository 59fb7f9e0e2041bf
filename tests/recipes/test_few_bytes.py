"""`model.frozen`: each stage goes on with the adapter of the one before, on the same rounded weights."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import load_script
from test_pipeline import write_own_data
from transformers import AutoModelForCausalLM

from prefero.cli import main
from prefero.config import ConfigError, load_config
from prefero.models.frozen import rounded, widened
from prefero.recipes.start import Start, start_of

CONFIG = """
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
model: {path: base, lora_rank: 2, frozen: int8}
strategy: {precision: fp32, threads: 1}
checkpoint: {every: 1, minutes: 0}
sft: {steps: 6, batch_size: 8, learning_rate: 1e-2}
reward: {steps: 3, batch_size: 8, lora_rank: 2, learning_rate: 1e-3}
ppo:
  steps: 2
  backbone: shared
  prompts_per_step: 6
  train_batch_size: 6
  max_new_tokens: 6
  learning_rate: 1e-12
evaluate: {num_prompts: 4}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_own_data(folder, folder / "base")
    (folder / "own.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def pipeline(project: Path, forks: Any) -> Path:
    """A run of all stages whose policy learns in the first only."""
    assert forks.run(["pipeline", "own.yaml", "--out", "whole"], project, {}, project / "errors.txt") == 0
    return project / "whole"


def base_in(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The base model as a run reads it."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            small, scale = rounded(tensor) if kind == "int8" else (tensor.bfloat16(), None)
            state[name] = widened(small, scale, torch.float32)
    return state


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_ppo_begins_as_what_sft_made(project: Path, pipeline: Path) -> None:
    sft, ppo, base = exported(pipeline / "checkpoints/sft/model"), exported(pipeline / "model"), project / "base"
    moved = {name: float((sft[name] - value).abs().max()) for name, value in base_in("int8", base).items()}
    assert {name.endswith("_proj.weight") for name, far in moved.items() if far > 0} == {True}
    for name, tensor in sft.items():
        torch.testing.assert_close(ppo[name], tensor, rtol=0, atol=1e-7)
    summary = json.loads((pipeline / "summary.json").read_text())
    assert abs(summary["before"]["eval/kl"]) < 1e-4, "the reference is what SFT made"
    assert "keeps a network of its own" not in (project / "errors.txt").read_text()
    told = json.loads((pipeline / "checkpoints/adapter/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_an_update_smaller_than_the_rounding_survives(
    kind: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    base, options = base_in(kind, project / "base"), ["--model.frozen", kind]
    assert main(["sft", "own.yaml", "--out", f"sft-{kind}", "--sft.learning-rate", "1e-5", *options]) == 0
    reward = ["--ppo.rewards.r.use", "my_rewards.py:brevity", "--reward.skip", "true"]
    arguments = ["ppo", "own.yaml", "--out", f"ppo-{kind}", "--model.path", f"sft-{kind}", *reward, *options]
    assert main(arguments) == 0
    sft, ppo = exported(project / f"sft-{kind}/model"), exported(project / f"ppo-{kind}/model")
    for name in (name for name in base if name.endswith("_proj.weight")):
        small, scale = rounded(sft[name])
        again = widened(small, scale, torch.float32) if kind == "int8" else sft[name].bfloat16().float()
        update = sft[name] - base[name]
        assert (again - sft[name]).norm() > 0.9 * update.norm() > 0, "rounding would lose it"
        assert (ppo[name] - sft[name]).norm() < 1e-3 * update.norm(), name


def test_a_run_in_few_bytes_resumes_to_the_last_bit(project: Path, forks: Any) -> None:
    rates = ["--ppo.learning-rate", "1e-3", "--model.frozen", "int8"]
    assert forks.run(["pipeline", "own.yaml", "--out", "left", *rates], project, {}, project / "e.txt") == 0
    for fault in ("kill@backward:4", "kill@learn:2"):
        out = fault.replace("@", "-").replace(":", "-")
        arguments = ["pipeline", "own.yaml", "--out", out, *rates]
        assert forks.run(arguments, project, {"PREFERO_FAULT": fault}, project / "e.txt") == -signal.SIGKILL
        assert forks.run(["resume", out], project, {}, project / "e.txt") == 0
        for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
            assert (project / out / name).read_bytes() == (project / "left" / name).read_bytes(), name


@pytest.mark.dist
def test_two_processes_are_as_one(project: Path, forks: Any) -> None:
    compare = load_script(Path(__file__).parents[2] / "benchmarks" / "parity.py").compare
    rates = ["--ppo.learning-rate", "1e-4", "--sft.learning-rate", "1e-3"]
    for out, processes, kind in (("one", 1, "naive"), ("two", 2, "ddp")):
        arguments = ["pipeline", "own.yaml", "--out", out, "--strategy.kind", kind, *rates]
        assert forks.run(arguments, project, {}, project / "e.txt", processes=processes) == 0
    differences = compare(project / "two", project / "one")
    assert differences.pop("samples that differ") == 0
    assert max(differences.values()) <= 1e-5, differences


def test_what_an_adapter_stands_on_may_not_change(project: Path, forks: Any) -> None:
    assert forks.run(["sft", "own.yaml", "--out", "stood"], project, {}, project / "e.txt") == 0
    reward = ["--ppo.rewards.r.use", "my_rewards.py:brevity", "--reward.skip", "true", "--model.path", "stood"]
    arguments = ["ppo", "own.yaml", "--out", "on-it", *reward]
    assert forks.run(arguments, project, {"PREFERO_FAULT": "kill@learn:1"}, project / "e.txt") == -signal.SIGKILL
    file = project / "base" / "model.safetensors"
    before = file.read_bytes()
    try:
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        assert forks.run(["resume", "on-it"], project, {}, project / "e.txt") == 2
        assert f"stood ({file}) has changed since the run began" in (project / "e.txt").read_text()
    finally:
        file.write_bytes(before)
    assert forks.run(["resume", "on-it"], project, {}, project / "e.txt") == 0


def test_what_goes_on_and_what_cannot(project: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    base, adapter = str(project / "base"), Path("whole/checkpoints/adapter")
    assert start_of("whole", "int8", 2, "model.lora_rank") == Start(base, adapter)
    for frozen, rank in (("fp32", 2), ("int8", 0)):
        assert start_of("whole", frozen, rank, "model.lora_rank") == Start("whole")
    with pytest.raises(ConfigError, match=r"has rank 2, and goes on .* set model\.lora_rank to 2"):
        start_of("whole", "int8", 4, "model.lora_rank")
    file = adapter / "adapter_config.json"
    told = file.read_text()
    try:
        for given, message in (
            ("whole", "which has an adapter merged that model.frozen int8 would round"),
            ("./gone", "stands on weights that are not there: unknown model './gone'"),
            ("", "weights that were drawn for its run alone"),
        ):
            file.write_text(json.dumps(json.loads(told) | {"base_model_name_or_path": given}))
            with pytest.raises(ConfigError, match=message):
                start_of("whole", "int8", 2, "model.lora_rank")
    finally:
        file.write_text(told)
    arguments = ["ppo", "own.yaml", "--model.path", "whole", "--model.lora-rank", "3", "--sft.lora-rank", "3",
                 "--reward.lora-rank", "3", "--ppo.rewards.r.use", "my_rewards.py:brevity"]  # fmt: skip
    assert main([*arguments, "--out", "never"]) == 2
    assert not Path("never").exists(), "found before anything is made"
    shutil.rmtree(project / "whole" / "checkpoints" / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"no stage has any; set model\.lora_rank \(or sft\.lora_rank, reward\.lora_rank\)"),
        (["--model.lora-rank", "4", "--model.path", "x", "--strategy.kind", "fsdp"], "cannot be shared out"),
        (["--model.lora-rank", "4"], r"give model\.path, or set sft\.lora_rank 0"),
        (["--sft.lora-rank", "4", "--model.path", "x", "--model.lora-rank", "2"], r"model\.lora_rank is 2, .* to 4"),
        (["--model.lora-rank", "4", "--model.path", "x", "--reward.lora-rank", "2"], r"reward\.lora_rank is 2, .* 4"),
    ],
)
def test_configs_that_cannot_be_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/quickstart.yaml", ["--model.frozen", "int8", *options])


@pytest.mark.parametrize("options", [
    ["--sft.lora-rank", "4", "--model.path", "x"],
    ["--reward.lora-rank", "4"],
    ["--model.lora-rank", "4", "--sft.lora-rank", "0"],
    ["--model.lora-rank", "4", "--sft.skip", "true", "--model.path", "x", "--reward.lora-rank", "2"],
])  # fmt: skip
def test_adapters_of_any_stage_are_enough(options: list[str]) -> None:
    load_config("configs/quickstart.yaml", ["--model.frozen", "int8", *options])
