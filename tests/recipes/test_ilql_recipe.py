"""`prefero ilql`: the run folder, its export in use, going on after a kill, and what is refused before it starts."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import FOLDER, rows, write_own_data
from transformers import AutoModelForCausalLM

from prefero.cli import main
from prefero.models.ilql import HEADS_FILE, ILQLActor

FEW = [
    "--steps", "4", "--batch-size", "16", "--max-rows", "200", "--eval-every", "2", "--num-prompts", "6",
    "--evaluate.num-samples", "2", "--max-new-tokens", "8", "--evaluate.max-demonstrations", "20",
]  # fmt: skip
CONFIG = """
data: {trajectories: rated.jsonl}
model: {path: base}
strategy: {precision: fp32, threads: 1}
checkpoint: {every: 1, minutes: 0}
ilql: {steps: 4, batch_size: 8, max_new_tokens: 6, eval_every: 2, beta: 3}
evaluate: {num_prompts: 4, num_samples: 2}
"""
REWARDS = """
def length(prompt, completion, **columns):
    return float(len(completion))
def needs(prompt, completion, stars):
    return float(stars)
def broken(prompt, completion, **columns):
    return float("nan")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["ilql", "configs/ilql.yaml", "--out", str(folder), *FEW]) == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project: rated answers, a model, rewards."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return tmp_path


def write_project(folder: Path) -> None:
    write_own_data(folder, folder / "base")
    asked = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    for index, row in enumerate(asked):
        row["completion"] = " the hotel was" + " good" * (index % 4) + " ."
    rated = [row | {"reward": float(index % 5), "stars": index % 3} for index, row in enumerate(asked)]
    files = {
        "rated.jsonl": rated,
        "unrated.jsonl": asked,
        "half.jsonl": [*rated[:9], asked[9], *rated[10:]],
        "alike.jsonl": [row | {"reward": 1.0} for row in asked],
        "empty_answer.jsonl": [*rated[:9], rated[9] | {"completion": ""}, *rated[10:]],
        "long.jsonl": [*rated, rated[0] | {"completion": " good bad" * 300}],
        "words.jsonl": [*rated[:3], rated[3] | {"reward": "high"}, *rated[4:]],
        "tokens.jsonl": [*rated[:3], rated[3] | {"reward": [1.0] * 50}, *rated[4:]],
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "nan.jsonl").write_text((folder / "rated.jsonl").read_text().replace('"reward": 2.0', '"reward": NaN'))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "own.yaml").write_text(CONFIG)


def test_the_run_folder_is_as_any_other(run: Path) -> None:
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == FOLDER
    by_step = {row["step"]: row for row in rows(run / "metrics.jsonl") if "ilql/loss" in row}
    wanted = {"loss", "q_loss", "v_loss", "cql_loss", "awac_loss", "value", "q", "advantage", "advantage_positive",
              "token_probability"}  # fmt: skip
    assert list(by_step) == [1, 2, 3, 4] and {f"ilql/{name}" for name in wanted} <= set(by_step[4])
    examined = [row["step"] for row in rows(run / "metrics.jsonl") if "eval/gold" in row]
    assert examined == [2, 4]
    assert "ilql/eval_loss" in {name for row in rows(run / "metrics.jsonl") for name in row}


def test_the_summary_says_what_the_values_add(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout_reward_is"] == "hidden taste" and summary["reward_std"] > 0
    for key in ("heldout_reward_before", "heldout_reward_after", "heldout_reward_stderr", "kl"):
        assert isinstance(summary[key], float), key
    assert summary["before"]["eval/kl"] == pytest.approx(0.0, abs=1e-3)
    assert summary["kl"] > 0.01
    assert sum("before" in row for row in rows(run / "samples.jsonl")) == 6


def test_the_export_is_a_plain_model_with_heads_beside_it(run: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    heads = load_file(run / "model" / HEADS_FILE)
    assert heads["q1.outer.weight"].shape[0] == plain.config.vocab_size
    assert ILQLActor.from_pretrained(run / "model").beta == 8.0


def test_it_answers_guided_or_not(run: Path, tmp_path: Path) -> None:
    # Few steps teach little: heads that say "hotel" and nothing else show who is heard.
    loud = tmp_path / "loud"
    shutil.copytree(run / "model", loud)
    actor = ILQLActor.from_pretrained(loud)
    from prefero.data.grammar import GrammarWorld

    tokenizer = GrammarWorld().tokenizer()
    with torch.no_grad():
        for head in (actor.heads.target_q1, actor.heads.target_q2):
            head.outer.bias[tokenizer.convert_tokens_to_ids("hotel")] += 1000.0
    actor.save_pretrained(loud, tokenizer)

    def said(*flags: str) -> list[str]:
        out = tmp_path / "said.jsonl"
        asked = ["--prompt", "how was the park ?", "--num-samples", "3", "--max-new-tokens", "4", "--out", str(out)]
        assert main(["generate", str(loud), *asked, *flags]) == 0
        return [row["completion"].split() for row in rows(out)]

    assert said() == [["hotel"] * 4] * 3 != said("--beta", "0")


def test_beta_is_for_models_with_heads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "base", "--prompt", "how", "--beta", "1"]) == 2
    assert "--beta is 1.0, but base has no value heads" in capsys.readouterr().err


def test_evaluate_asks_the_run_s_own_questions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--out", str(tmp_path / "again")]) == 0
    found = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert found["eval/gold"] == pytest.approx(json.loads((run / "summary.json").read_text())["heldout_reward_after"])


def test_it_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/ilql.yaml", "--stage", "ilql"]) == 0
    assert "ilql" in capsys.readouterr().out


def test_rewards_may_be_functions_and_rows_may_bring_them(folder: Path) -> None:
    assert main(["ilql", "own.yaml", "--out", "rated"]) == 0
    summary = json.loads((folder / "rated" / "summary.json").read_text())
    assert "heldout_reward_after" not in summary  # nobody can score a new answer
    flags = ["--data.trajectories", "unrated.jsonl", "--ilql.rewards.long.use", "rewards.py:length"]
    assert main(["ilql", "own.yaml", "--out", "scored", *flags]) == 0
    summary = json.loads((folder / "scored" / "summary.json").read_text())
    assert summary["heldout_reward_is"] == "reward" and summary["after"]["eval/reward_long"] >= 0
    flags = ["--model.path", "scored", "--model.lora-rank", "2"]
    assert main(["ilql", "own.yaml", "--out", "further", *flags]) == 0
    assert (folder / "further" / "checkpoints" / "adapter").is_dir()


@pytest.mark.parametrize("fault", ["kill@backward:3", "term@backward:2", "kill@evaluate:1"])
def test_stopped_and_resumed_is_left_alone(tmp_path: Path, forks: Any, fault: str) -> None:
    write_project(tmp_path)
    flags = ["--ilql.rewards.long.use", "rewards.py:length"]

    def go(arguments: list[str], fault: str = "") -> int:
        errors = tmp_path / "errors.txt"
        status: int = forks.run(arguments, tmp_path, {"PREFERO_FAULT": fault}, errors)
        assert "Traceback" not in errors.read_text(), errors.read_text()
        return status

    assert go(["ilql", "own.yaml", "--out", "alone", *flags]) == 0
    assert go(["ilql", "own.yaml", "--out", "stopped", *flags], fault) in (-signal.SIGKILL, 75)
    assert go(["resume", "stopped"]) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", f"model/{HEADS_FILE}"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--data.trajectories", ""], ["data.trajectories is empty"]),
        (["--data.trajectories", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["--data.trajectories", "unrated.jsonl"], ["unrated.jsonl:", "no column `reward`", "--ilql.rewards.mine.use"]),
        (["--data.trajectories", "half.jsonl"], ["half.jsonl:10", "no column `reward`"]),
        (["--data.trajectories", "alike.jsonl"], ["were worth the same (1)", "give rewards that differ"]),
        (["--data.trajectories", "nan.jsonl"], ["nan.jsonl:3", "NaN is not JSON"]),
        (["--data.trajectories", "words.jsonl"], ["words.jsonl:4", "'reward' must be a number"]),
        (["--data.trajectories", "tokens.jsonl"], ["tokens.jsonl:4", "50 rewards for"]),
        (["--data.trajectories", "empty_answer.jsonl"], ["empty_answer.jsonl:10", "'completion' is empty"]),
        (["--data.trajectories", "long.jsonl"], ["long.jsonl:", "longer than ilql.max_length 512", "truncate drop"]),
        (["--data.trajectories", "pairs.jsonl"], ["pairs.jsonl: columns", "are no shape accepted here"]),
        (["--ilql.rewards.r.use", "rewards.py:broken"], ["'r'", "nan"]),
        (["--ilql.rewards.r.use", "rewards.py:nothing"], ["defines no 'nothing'"]),
        (["--data.trajectories", "unrated.jsonl", "--ilql.rewards.r.use", "rewards.py:needs"], ["column 'stars'"]),
        (["--ilql.rewards.r.use", "trained"], ["ilql.rewards.r.use is `trained`", "model:FOLDER"]),
        (["--ilql.rewards.r.use", "rule:foo"], ["ilql.rewards.r.use", "the rules are code, contains"]),
        (["--tau", "1"], ["ilql.tau", "less than 1"]),
        (["--max-new-tokens", "500"], ["500 new ones", "lower ilql.max_new_tokens"]),
        (["--model.path", ""], ["model.path is empty"]),
        (["--batch-size", "0"], ["ilql.batch_size"]),
    ],
)
def test_bad_input_is_refused_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], messages: list[str]
) -> None:
    assert main(["ilql", "own.yaml", "--out", "made", *flags]) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert "Traceback" not in error
