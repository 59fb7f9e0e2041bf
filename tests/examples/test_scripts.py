"""The seed's example scripts, run with models that need no download."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)


def run(script: str, *flags: str) -> None:
    sys.modules.pop(script, None)
    importlib.import_module(script).main(["--device", "cpu", *flags])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(20)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


SHORT = ["--tiny", "--num_episodes", "1", "--max_timesteps", "1", "--update_timesteps", "1", "--max_epochs", "1",
         "--experience_batch_size", "4", "--train_batch_size", "4"]  # fmt: skip


@pytest.mark.parametrize("model", ["gpt2", "bloom", "opt", "llama"])
def test_train_dummy(model: str, tmp_path: Path) -> None:
    run("train_dummy", *SHORT, "--model", model, "--prompt_length", "4", "--max_length", "8", "--lora_rank", "4",
        "--save_ckpt_path", "saved", "--need_optim_ckpt")  # fmt: skip
    assert (tmp_path / "actor_checkpoint_dummy.pt").stat().st_size > 1000
    assert (tmp_path / "actor_checkpoint_dummy.pt.optim").exists()
    assert (tmp_path / "saved" / "checkpoint" / "episode_0" / "actor.pt").exists()


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "colossalai_zero2", "colossalai_gemini"])
def test_the_same_script_on_two_processes(strategy: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*SHORT, "--strategy", strategy, "--prompt_length", "4", "--max_length", "8", "--need_optim_ckpt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "train_dummy.py"), *flags], env=environment, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "actor_checkpoint_dummy.pt").stat().st_size > 1000
    assert len(list(tmp_path.glob("actor_checkpoint_dummy*optim"))) == (1 if strategy == "ddp" else 2)


def test_the_three_stages_and_inference_flow_into_each_other(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": f"say {n}", "input": "", "output": f"good {n}"} for n in range(8)])
    )
    (tmp_path / "prompts.csv").write_text("act,prompt\n" + "\n".join(f"a,say {n}" for n in range(8)) + "\n")
    run("train_sft", "--tiny", "--dataset", "alpaca.json", "--lr", "0.01")
    assert "loss" in capsys.readouterr().out
    run("train_reward_model", "--tiny", "--model", "gpt2", "--dataset", str(pairs), "--max_len", "32", "--lr", "0.01",
        "--loss_fn", "log_exp")  # fmt: skip
    assert "accuracy" in capsys.readouterr().out
    run("train_prompts", "prompts.csv", *SHORT, "--rm_path", "rm_ckpt.pth", "--sft_path", "sft_ckpt.pt",
        "--max_length", "16")  # fmt: skip
    sft, ppo = (
        torch.load(tmp_path / name, weights_only=True) for name in ("sft_ckpt.pt", "actor_checkpoint_prompts.pt")
    )
    assert sft.keys() == ppo.keys() and any(not torch.equal(sft[name], ppo[name]) for name in sft)
    assert all((sft[name] - ppo[name]).abs().max() < 1e-3 for name in sft)  # it did start from there
    run("inference", "--tiny", "--model_path", "actor_checkpoint_prompts.pt", "--input", "say 3", "--max_length", "20")
    assert capsys.readouterr().out.startswith("say 3")


def test_without_a_reward_model_one_is_warned(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"say {n}" for n in range(8)) + "\n")
    with pytest.warns(UserWarning, match="untrained reward model"):
        run("train_prompts", "prompts.csv", *SHORT, "--max_length", "10")


def test_a_deberta_reward_model(pairs: Path, tmp_path: Path) -> None:
    run("train_reward_model", "--tiny", "--model", "deberta", "--dataset", str(pairs), "--max_len", "32", "--test")
    assert (tmp_path / "rm_ckpt.pth").exists()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_dummy", ["--tiny", "--strategy", "ddp"], "--device cpu goes with --strategy naive"),
        ("inference", [], "--pretrain"),
        ("train_prompts", ["missing.csv", "--tiny"], "missing.csv"),
    ],
)
def test_what_is_missing_is_named(script: str, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(script, *flags)


def test_help_names_the_seeds_flags(capsys: pytest.CaptureFixture[str]) -> None:
    seeds: dict[str, Any] = {
        "train_dummy": "strategy model pretrain save_path need_optim_ckpt num_episodes max_timesteps update_timesteps "
        "max_epochs train_batch_size experience_batch_size lora_rank save_ckpt_path save_ckpt_interval",
        "train_prompts": "strategy model pretrain save_path need_optim_ckpt num_episodes max_timesteps "
        "update_timesteps max_epochs train_batch_size experience_batch_size lora_rank",
        "train_reward_model": "strategy model pretrain model_path need_optim_ckpt dataset subset save_path max_epochs "
        "batch_size max_len lora_rank loss_fn test",
        "train_sft": "strategy model pretrain dataset save_path need_optim_ckpt max_epochs batch_size lora_rank "
        "log_interval",
        "inference": "model pretrain model_path input max_length",
    }
    for script, flags in seeds.items():
        with pytest.raises(SystemExit):
            run(script, "--help")
        shown = capsys.readouterr().out
        assert all(f"--{flag}" in shown for flag in flags.split()), script
