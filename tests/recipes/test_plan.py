"""What a run will take is foretold from networks of one layer and two, and comes true."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import write_own_data
from tiny import llama_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from prefero.cli import main
from prefero.config import load_config
from prefero.models.footprint import Alive
from prefero.recipes import plan
from prefero.recipes.plan import MB, _cures, foretell

FEW = """
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
model: {path: base}
sft: {batch_size: 8, steps: 40}
reward: {batch_size: 8, epochs: 2}
ppo: {steps: 30, prompts_per_step: 8, train_batch_size: 8, max_new_tokens: 8, eval_every: 10, critic_layers: 2}
evaluate: {num_prompts: 4}
"""


def test_what_is_alive_is_counted_and_what_is_gone_is_not() -> None:
    before = torch.ones(1000)
    with Alive() as alive:
        view = before[10:].view(2, -1)  # nothing new
        kept = torch.ones(500)
        passing = torch.ones(2000) * 2  # two of them for a moment
        del passing
        peak = alive.mark()
        again = kept + 1
        kept.add_(1)
    assert view.shape[0] == 2 and again[0] == 2
    assert peak == 4 * (500 + 2 * 2000)
    assert alive.now == alive.peak == 4 * (500 + 500)


def test_what_is_laid_out_for_onednn_is_counted_too() -> None:
    weight = torch.randn(32, 64)
    with Alive() as alive:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        assert laid_out.is_mkldnn and alive.now == 4 * 32 * 64
        torch.ops.mkldnn._linear_pointwise(torch.ones(3, 64), laid_out, None, "none", [], "")
        del laid_out
    assert alive.now == 0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path, tmp_path / "other")
    tokenizer = tiny_tokenizer()
    config = llama_config(len(tokenizer), num_hidden_layers=6)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "own.yaml").write_text(FEW)
    return tmp_path


def size(layers: int, head: int = 0) -> int:
    """Bytes of a trunk of so many layers, and of so many numbers beside it."""
    config = llama_config(len(tiny_tokenizer()), num_hidden_layers=layers)
    trunk = LlamaForCausalLM(config).model
    return 4 * (sum(parameter.numel() for parameter in trunk.parameters()) + head)


def test_the_line_through_one_layer_and_two_leads_to_the_whole(project: Path) -> None:
    found = foretell(load_config("own.yaml"))
    assert found.stages == ["sft", "reward", "ppo"]
    vocabulary = len(tiny_tokenizer()) * 32
    actor = {"weights": size(6, vocabulary), "learning": 3 * size(6, vocabulary)}
    critic = {"weights": size(2, 33), "learning": 3 * size(2, 33)}
    assert found.roles("sft") == {"Actor": pytest.approx(actor)}
    assert found.roles("ppo")["Actor"] == pytest.approx({**actor, "weights": 2 * size(6, vocabulary)})  # the reference
    assert found.roles("ppo")["AutoCritic"] == pytest.approx(critic)
    assert found.roles("ppo")["RewardModel"] == pytest.approx({"weights": size(6, 32)})
    assert found.steps == {"sft": 40, "reward": 2 * 4, "ppo": 30}
    held = sum(number for role in found.roles("ppo").values() for number in role.values())
    assert found.phases("ppo")["learn"] - found.baseline > held
    assert not list(project.glob("runs*")), "nothing is left behind"


def test_what_roles_share_is_taken_once(project: Path) -> None:
    options = ["--model.lora-rank", "2", "--reward.lora-rank", "2", "--critic-layers", "0"]
    apart = foretell(load_config("own.yaml", options))
    together = foretell(load_config("own.yaml", [*options, "--ppo.backbone", "shared"]))
    # Counted where it is placed first, the reward model, and shared by actor and critic.
    assert {role: "shared" in kinds for role, kinds in together.roles("ppo").items()} == {
        "RewardModel": False, "Actor": True, "Critic": True,
    }  # fmt: skip
    assert together.roles("ppo")["Actor"]["shared"] > 5 * together.roles("ppo")["Actor"]["weights"]
    held = [found.phases("ppo")["learn"] - found.baseline for found in (together, apart)]
    assert held[0] < held[1]


def test_ranks_share_what_their_strategy_shares(project: Path) -> None:
    alone = foretell(load_config("own.yaml"), "sft")
    both = foretell(load_config("own.yaml", ["--strategy.kind", "fsdp"]), "sft", ranks=2)
    copies = foretell(load_config("own.yaml", ["--strategy.kind", "ddp"]), "sft", ranks=2)
    assert both.roles("sft")["Actor"]["weights"] == pytest.approx(alone.roles("sft")["Actor"]["weights"] / 2)
    assert copies.roles("sft")["Actor"] == pytest.approx(alone.roles("sft")["Actor"])
    assert both.phases("sft")["learn"] < copies.phases("sft")["learn"]


def test_the_command_says_what_to_change(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "own.yaml", "--stage", "sft", "--json", "plan.json", "--sft.batch-size", "4"]) == 0
    said = capsys.readouterr().out
    assert "fits" in said and "sft: 40 steps of" in said and "does not fit" not in said
    told = json.loads((project / "plan.json").read_text())
    assert told["fits"] and told["changes"] == [] and set(told["stages"]) == {"sft"}
    room = int(told["peak_mb"] * MB) - 1
    monkeypatch.setattr(plan, "memory_here", lambda: room)
    assert main(["plan", "own.yaml", "--stage", "sft", "--json", "plan.json"]) == 0
    assert "does not fit" in capsys.readouterr().out
    told = json.loads((project / "plan.json").read_text())
    assert not told["fits"] and told["changes"][0]["change"].startswith("--sft.micro-batch-tokens")


def test_weights_in_few_bytes_are_offered_and_counted(project: Path) -> None:
    options = ["--model.lora-rank", "2", "--reward.lora-rank", "2", "--critic-layers", "0"]
    judged = ["--ppo.rewards.r.use", "rule:max_words:3", "--strategy.precision", "bf16"]
    small = [f"--{stage}.micro-batch-tokens=2048" for stage in ("sft", "reward", "ppo")]
    small += ["--engine.slots=16", "--gradient-checkpointing", "--ppo.backbone", "shared"]
    config = load_config("own.yaml", [*options, *judged, *small])
    last = [change for change, _ in _cures(config, "ppo", 1, room=0)]
    assert [change.rpartition("--")[2] for change in last] == [
        "engine.copies false", "model.frozen bf16", "model.frozen int8"
    ]  # fmt: skip
    assert "model.frozen bf16" not in last[-1], "the one takes the other's place"
    roles = {
        kind: foretell(load_config("own.yaml", [*options, "--model.frozen", kind]), "sft").roles("sft")["Actor"]
        for kind in ("fp32", "bf16", "int8")
    }
    numbers = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    for kind, spared in (("bf16", 2), ("int8", 3)):
        assert roles[kind]["weights"] == pytest.approx(roles["fp32"]["weights"] - spared * numbers)
        assert roles[kind]["learning"] == roles["fp32"]["learning"]
    alone = load_config("own.yaml", ["--model.lora-rank", "4", "--reward.lora-rank", "2", *small[:4]])
    assert not any("frozen" in change for change, _ in _cures(alone, "sft", 1, room=0)), "ranks that cannot go on"


def test_bad_input_is_told_as_the_run_would(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "own.yaml", "--ranks", "2"]) == 2
    assert "strategy.kind naive" in capsys.readouterr().err
    assert main(["plan", "own.yaml", "--model.path", "nowhere"]) == 2
    assert "unknown model 'nowhere'" in capsys.readouterr().err


PEAK = """
import resource, sys
from prefero.cli import main
status = main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(status)
"""


def measured(project: Path, *command: str) -> float:
    """The highest resident set of a command, MB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command], check=True, capture_output=True, text=True, cwd=project
    )
    return float(done.stdout.rsplit("PEAK", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--model.lora-rank", "8", "--reward.lora-rank", "8", "--ppo.backbone", "shared", "--critic-layers", "0"]],
    ids=["all weights", "one backbone"],
)
def test_the_peak_comes_true(project: Path, options: list[str]) -> None:
    """A model of 60 million weights, so that the process itself is the smaller part."""
    tokenizer = tiny_tokenizer()
    config = llama_config(
        16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(project / "base")
    tokenizer.save_pretrained(project / "base")
    few = ["--sft.steps", "3", "--reward.steps", "3", "--reward.epochs", "1", "--ppo.steps", "3", *options]
    command: list[Any] = ["own.yaml", *few]
    subprocess.run([sys.executable, "-m", "prefero", "plan", *command, "--json", "plan.json"], check=True, cwd=project)
    told = json.loads((project / "plan.json").read_text())
    found = measured(project, "pipeline", *command, "--out", "run")
    assert told["peak_mb"] == pytest.approx(found, rel=0.15), told["stages"]
    assert found > 1.8 * told["baseline_mb"], "most of it is the run's"
