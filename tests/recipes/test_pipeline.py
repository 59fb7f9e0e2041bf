"""The user's path, end to end on a few steps: each export is the next stage's input, every folder is the same."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefero.cli import main
from prefero.models.shared import reward_on
from prefero.recipes import rewards

FOLDER = {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "checkpoints", "model"}
FEW = [
    "--sft.steps", "4", "--sft.batch-size", "16", "--reward.steps", "3", "--reward.batch-size", "16",
    "--reward.max-rows", "200", "--ppo.steps", "2", "--prompts-per-step", "8", "--train-batch-size", "8",
    "--max-new-tokens", "8", "--ppo.eval-every", "1", "--num-prompts", "6", "--evaluate.num-samples", "1",
    "--max-pairs", "64",
]  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["quickstart", "--out", str(folder), *FEW]) == 0
    yield folder


def test_every_run_folder_holds_the_same_names(run: Path) -> None:
    for folder in (run, *(run / "checkpoints" / stage for stage in ("sft", "reward", "ppo"))):
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == FOLDER, folder


def test_the_summary_has_the_headline_numbers(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "heldout_reward_before",
        "heldout_reward_after",
        "heldout_reward_stderr",
        "kl",
        "rm_accuracy",
        "seconds",
    ):
        assert isinstance(summary[key], float), key
    assert summary["before"]["eval/gold"] == pytest.approx(summary["heldout_reward_before"])


def test_the_metrics_cover_every_stage(run: Path) -> None:
    by_stage: dict[str, set[str]] = {}
    for row in rows(run / "metrics.jsonl"):
        by_stage.setdefault(row["stage"], set()).update(row)
    assert {"sft/loss", "sft/eval_loss"} <= by_stage["sft"]
    assert {"reward/loss", "reward/accuracy", "reward/eval_accuracy"} <= by_stage["reward"]
    wanted = {
        "rollout/reward", "rollout/kl", "rollout/length", "rollout/kl_coef", "policy/loss", "value/loss",
        "policy/clip_fraction", "policy/entropy", "value/explained_variance", "eval/gold", "eval/reward", "eval/kl",
        "eval/on_topic", "eval/length", "eval/distinct_words",
    }  # fmt: skip
    assert wanted <= by_stage["ppo"]


def test_the_report_is_written_and_closed_to_scripts(run: Path) -> None:
    html = (run / "report.html").read_text()
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org/", "")
    assert "https://" not in html


def test_samples_show_the_same_prompts_before_and_after(run: Path) -> None:
    pairs = [row for row in rows(run / "samples.jsonl") if "before" in row]
    assert len(pairs) == 6
    assert all(row["prompt"] and isinstance(row["gold_after"], float) for row in pairs)


def test_transformers_loads_the_exports(run: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("how was the hotel ?", return_tensors="pt")
    assert policy(**ids).logits.shape[-1] == policy.config.vocab_size
    judge = AutoModelForSequenceClassification.from_pretrained(run / "checkpoints" / "reward" / "model")
    assert judge.config.num_labels == 1


def test_two_runs_with_one_seed_write_the_same_bytes(run: Path, tmp_path: Path) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "again"), *FEW]) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name


def test_the_supervised_loss_is_measured_on_so_many_held_out_texts(tmp_path: Path) -> None:
    def held_out_tokens(name: str, *flags: str) -> float:
        flags = ("--steps", "1", "--batch-size", "16", *flags)
        assert main(["sft", "configs/quickstart.yaml", "--out", str(tmp_path / name), *flags]) == 0
        return float(rows(tmp_path / name / "metrics.jsonl")[-1]["sft/eval_loss"])

    # One text alone gives another mean than many, and more than there are gives the mean of all (1,000).
    one, all_of_them = held_out_tokens("one", "--max-demonstrations", "1"), held_out_tokens("all")
    assert one != all_of_them
    assert held_out_tokens("more", "--max-demonstrations", "1000") == all_of_them


def test_adapters_learn_at_their_own_rate_and_all_weights_at_the_one_written(tmp_path: Path) -> None:
    def rate(rank: int) -> float:
        flags = ["--steps", "1", "--batch-size", "16", "--lora-rank", str(rank), "--lora-learning-rate-factor", "8"]
        flags += ["--sft.learning-rate", "1e-4", "--sft.schedule", "constant", "--sft.warmup-fraction", "0"]
        folder = tmp_path / str(rank)
        assert main(["sft", "configs/quickstart.yaml", "--out", str(folder), *flags]) == 0
        return float(rows(folder / "metrics.jsonl")[0]["sft/lr"])

    assert rate(4) == pytest.approx(8e-4)
    assert rate(0) == pytest.approx(1e-4)


def test_adapters_are_also_written_alone_as_peft_reads_them(run: Path, tmp_path: Path) -> None:
    base, out = run / "checkpoints" / "sft" / "model", tmp_path / "adapted"
    flags = ["--steps", "2", "--batch-size", "16", "--lora-rank", "4", "--model.path", str(base)]
    assert main(["sft", "configs/quickstart.yaml", "--out", str(out), *flags]) == 0
    assert not list(run.glob("checkpoints/*/checkpoints/adapter")), "a run without adapters has none"
    ids = torch.arange(3, 15)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    alone = PeftModel.from_pretrained(deepcopy(plain), out / "checkpoints" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain(ids).logits, merged(ids).logits, atol=1e-5)


@pytest.mark.parametrize("backbone", ["shared", "hydra"])
def test_four_roles_on_one_backbone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    found: list[Any] = []
    monkeypatch.setattr(rewards, "reward_on", lambda *given: found.append(reward_on(*given)) or found[-1])
    flags = ["--model.lora-rank", "4", "--reward.lora-rank", "2", "--ppo.backbone", backbone, "--precision", "fp32"]
    flags += ["--model.path", str(run / "checkpoints" / "sft" / "model"), "--sft.skip", "true"]
    out = tmp_path / backbone
    assert main(["pipeline", "configs/quickstart.yaml", "--out", str(out), *FEW, *flags]) == 0
    assert len(found) == 1 and found[0] is not None, "the reward model is adapters on the policy's weights"
    learned = [row for row in rows(out / "metrics.jsonl") if "policy/loss" in row]
    assert len(learned) == 2 and all("value/loss" in row and "value/explained_variance" in row for row in learned)
    # Its scores are those of the whole reward model that was exported.
    raw = json.loads((out / "summary.json").read_text())["before"]["eval/reward_reward_model/raw"]
    flags[flags.index(backbone)] = "separate"
    assert main(["pipeline", "configs/quickstart.yaml", "--out", str(tmp_path / "apart"), *FEW, *flags]) == 0
    apart = json.loads((tmp_path / "apart" / "summary.json").read_text())["before"]["eval/reward_reward_model/raw"]
    assert raw == pytest.approx(apart, abs=1e-4)


def test_another_seed_is_another_run(run: Path, tmp_path: Path) -> None:
    flags = ["--steps", "4", "--batch-size", "16", "--seed", "1"]
    assert main(["sft", "configs/quickstart.yaml", "--out", str(tmp_path / "other"), *flags]) == 0
    first = next(row for row in rows(run / "metrics.jsonl") if row["stage"] == "sft")
    assert rows(tmp_path / "other" / "metrics.jsonl")[0]["sft/loss"] != first["sft/loss"]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["quickstart", "--out", str(run), *FEW]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_stages_run_alone_on_the_users_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT from a folder, a reward model from comparisons, PPO with two rewards: each fed by the one before."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    write_own_data(tmp_path, base)
    config = tmp_path / "own.yaml"
    # One config for all stages: what a later one reads need not be there yet.
    config.write_text(
        f"data: {{sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}}\nmodel: {{path: {base}}}\n"
        "ppo: {rewards: {judge: {use: 'model:r/model'}}}\n"
    )
    small = ["--batch-size", "8", "--steps", "2"]
    assert main(["sft", str(config), "--out", "s", *small]) == 0
    assert main(["reward", str(config), "--out", "r", "--model.path", "s/model", *small]) == 0
    assert main(["ppo", str(config), "--out", "p", "--model.path", "s/model",
                 "--rewards.length.use", "my_rewards.py:brevity", "--rewards.length.weight", "0.5", "--steps", "2",
                 "--prompts-per-step", "4", "--train-batch-size", "4", "--max-new-tokens", "5"]) == 0  # fmt: skip
    last = [row for row in rows(tmp_path / "p" / "metrics.jsonl") if "rollout/reward" in row][-1]
    total = last["rollout/reward_judge"] + 0.5 * last["rollout/reward_length"]
    assert last["rollout/reward"] == pytest.approx(total, abs=1e-5)
    for folder in ("s", "r", "p"):
        assert {path.name for path in (tmp_path / folder).iterdir() if not path.name.startswith(".")} == FOLDER


def write_own_data(folder: Path, base: Path) -> None:
    from tiny import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    tiny_llama(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    questions = [f"how was the {thing} ?" for thing in ("movie", "hotel")] + [
        f"tell me about the {w}" for w in ("a", "it")
    ]
    questions = [
        f"{q} {w}" for q in questions for w in ("good", "bad", "great", "awful", "movie", "hotel", "and", "but")
    ]
    lines = {
        "sft.jsonl": [{"prompt": q, "completion": " the hotel was good ."} for q in questions],
        "pairs.jsonl": [{"prompt": q, "chosen": " good .", "rejected": " bad ."} for q in questions],
        "prompts.jsonl": [{"prompt": q} for q in questions],
    }
    for name, content in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "my_rewards.py").write_text(
        "def brevity(prompt, completion, **columns):\n    return -len(completion.split())\n"
        "def broken(prompt, completion, **columns):\n    return float('nan')\n"
    )


def test_a_reward_that_gives_nan_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path, tmp_path / "base")
    (tmp_path / "own.yaml").write_text("data: {prompts: prompts.jsonl}\nmodel: {path: base}\nreward: {skip: true}\n")
    arguments = ["ppo", "own.yaml", "--out", "p", "--rewards.r.use", "my_rewards.py:broken", "--max-new-tokens", "4"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "nan" in error
    assert "how was the" in error or "tell me" in error
    assert json.loads((tmp_path / "p" / "summary.json").read_text())["versions"]


def test_generate_continues_prompts_the_same_way_each_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(run), "--prompt", "how was the hotel ?", "--num-samples", "2", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("> how was the hotel ?") == 2
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


def test_generate_writes_json_lines(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "how was the hotel ?"}\n{"prompt": "is the park worth my time ?"}\n')
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(run), "--prompts", str(prompts), "--out", str(out), "--temperature", "0"]) == 0
    assert [row["prompt"] for row in rows(out)] == ["how was the hotel ?", "is the park worth my time ?"]


def test_chat_answers_lines_from_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["how was the hotel ?", "/new", "how was the park ?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", str(run), "--max-new-tokens", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_evaluate_examines_a_finished_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = str(run / "checkpoints" / "sft")
    assert main(["evaluate", str(run), "--reference", reference, "--out", str(tmp_path / "e")]) == 0
    measured = json.loads((tmp_path / "e" / "summary.json").read_text())
    reported = json.loads((run / "summary.json").read_text())["after"]
    for name in ("eval/gold", "eval/reward", "eval/kl", "eval/length"):
        assert measured[name] == pytest.approx(reported[name], abs=1e-4), name
    assert "eval/gold" in capsys.readouterr().out


def test_report_can_be_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "default-src" in (run / "report.html").read_text()


def test_doctor_looks_around(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "ready" in capsys.readouterr().out
