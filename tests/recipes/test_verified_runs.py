"""Rewards for reasoning, scores of steps and best-of-n through the real command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import write_own_data
from tiny import llama_config, tiny_tokenizer
from transformers import LlamaForTokenClassification

from prefero.cli import main
from prefero.functional.best_of_n import kl_bound
from prefero.recipes.evaluation import Evaluation, Yardsticks, measure
from prefero.types import Completion, Prompt, Score, ScoredRollout

CONFIG = """
data: {prompts: sums.jsonl}
model: {path: base}
ppo:
  steps: 1
  prompts_per_step: 4
  train_batch_size: 4
  max_new_tokens: 4
evaluate: {num_prompts: 4}
"""
ANSWERS = ["4", "7", "0.5", "11"] * 8
TESTS = ["assert good() == 1"]
STEPS = """
def each(prompt, steps, answer):
    return [float(len(step)) for step in steps]
def short(prompt, steps):
    return []
def broken(prompt, steps):
    return [float("nan")] * len(steps)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, prompts with answers and tests, a process reward model, functions that score steps."""
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path, tmp_path / "base")
    rows = [
        {"prompt": f"how {'was ' * (i + 1)}", "answer": answer, "tests": TESTS, "pairs": [{"input": "", "output": "1"}]}
        for i, answer in enumerate(ANSWERS)
    ]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("words.jsonl").write_text("".join(json.dumps(row | {"answer": "in words"}) + "\n" for row in rows))
    Path("steps.py").write_text(STEPS)
    Path("own.yaml").write_text(CONFIG)
    LlamaForTokenClassification(llama_config(len(tiny_tokenizer()), num_labels=2)).save_pretrained("judge")
    tiny_tokenizer().save_pretrained("judge")
    return tmp_path


def ppo(*flags: str) -> int:
    return main(["ppo", "own.yaml", "--out", "run", "--overwrite", *flags])


def reward(use: str, **options: Any) -> list[str]:
    return ["--rewards.r.use", use, "--rewards.r.options", json.dumps(options)]


def metrics() -> dict[str, float]:
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items()}


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        (reward("rule:math"), "rollout/reward_r/unjudged"),
        (reward("rule:exact", column="answer", pattern="[a-z]+"), "rollout/reward_r"),
        (reward("rule:exact:answer", ignore_case=True), "rollout/reward_r"),
        (reward("rule:format", pattern="(good|bad).*"), "rollout/reward_r"),
        (reward("rule:soft_limit:3", buffer=2), "rollout/reward_r"),
        (reward("rule:code", run_code="isolated", seconds=2), "rollout/reward_r/unjudged"),
        (reward("rule:code:pairs", run_code="isolated", partial=True), "rollout/reward_r/unjudged"),
        (reward("steps.py:each", separator=" ", average=True), "rollout/reward_r/steps"),
        (reward("process:judge", separator=" . "), "rollout/reward_r/worst"),
        (
            ["--data.prompts", "reasoning-gym:chain_sum?size=40&max_terms=2", *reward("rule:reasoning-gym")],
            "rollout/reward_r/unjudged",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-3],
)
def test_rewards_for_reasoning_train(folder: Path, flags: list[str], seen: str) -> None:
    assert ppo(*flags) == 0
    assert seen in metrics()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (reward("rule:code"), ["ppo.rewards.r.use is 'rule:code'", "run_code is 'never'"]),
        (reward("rule:code:answer", run_code="isolated"), ["sums.jsonl:", "is no test in Python"]),
        (reward("rule:exact", colum="x"), ["unknown option 'colum'", "did you mean 'column'"]),
        (reward("rule:exact", column="truth"), ["needs the column 'truth'", "sums.jsonl:"]),
        (reward("rule:exact", name="x"), ["unknown option 'name'"]),
        (reward("rule:format"), ["it needs the option 'pattern'"]),
        (reward("rule:format", pattern="("), ["no regular expression"]),
        (reward("rule:soft_limit", limit=3), ["it needs the option 'buffer'"]),
        (reward("rule:math:truth"), ["needs the column 'truth'"]),
        (
            ["--data.prompts", "words.jsonl", *reward("rule:math")],
            ["cannot read the true answer 'in words'", "words.jsonl:"],
        ),
        (reward("rule:reasoning-gym"), ["needs the column 'reasoning_gym'"]),
        (["--data.prompts", "reasoning-gym:chain_sun", *reward("rule:math")], ["did you mean 'chain_sum'"]),
        (reward("steps.py:each", separator=""), ["ppo.rewards.r.options", "separator is ''"]),
        (reward("steps.py:each", average=True, by=2), ["unknown option 'by'"]),
        (reward("process:base"), ["base is no process reward model", "LlamaForCausalLM"]),
        (reward("process:nowhere"), ["unknown model 'nowhere'"]),
        (reward("trained", column="x"), ["ppo.rewards.r.options are for rules"]),
    ],
    ids=lambda value: None if isinstance(value[0], str) and value[0].startswith("--") else value[0],
)
def test_rewards_that_cannot_score_do_not_begin(
    folder: Path, flags: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppo(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(message in error for message in messages), error
    assert not Path("run").exists()


@pytest.mark.parametrize(("use", "message"), [("short", "return a list of"), ("broken", "gave nan")])
def test_steps_without_scores_stop_the_run(
    folder: Path, use: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppo(*reward(f"steps.py:{use}", separator=" ")) == 2
    assert message in capsys.readouterr().err


def test_an_answer_s_steps_survive_being_written_down() -> None:
    completion = Completion((4, 5), (-1.0, -2.0), "good movie", "stop")
    rollouts = [ScoredRollout(Prompt("a", (1,), "how"), completion, Score(3.0, {"r": 3.0}, ((0, 1.0), (1, 2.0))))]
    made = measure(rollouts, Yardsticks())
    assert Evaluation.from_json(json.loads(json.dumps(made.to_json()))).rollouts[0].score == rollouts[0].score


def test_generate_shows_the_best_of_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "base", "--prompts", "sums.jsonl", "--max-new-tokens", "4", "--out", "made.jsonl"]

    def rewards(*flags: str) -> list[float]:
        assert main([*common, *flags]) == 0
        return [json.loads(line)["reward"] for line in Path("made.jsonl").read_text().splitlines()]

    few, many = (rewards("--best-of", n, "--reward", "rule:contains:good,great") for n in ("1", "8"))
    assert len(few) == len(many) == len(ANSWERS)
    assert all(best >= first for first, best in zip(few, many, strict=True)) and sum(many) > sum(few)
    assert f"at most {kl_bound(8):.3f} nats" in capsys.readouterr().err
    assert main([*common[:-2], "--best-of", "2", "--reward", "rule:max_words:2"]) == 0
    assert "the best of 2)" in capsys.readouterr().out


def test_generate_asks_the_run_s_own_reward(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppo("--rewards.words.use", "rule:max_words:2", "--rewards.right.use", "rule:exact") == 0
    flags = ["--prompts", "sums.jsonl", "--max-new-tokens", "3", "--best-of", "3", "--out", "made.jsonl"]
    assert main(["generate", "run", *flags]) == 0
    assert main(["generate", "run", *flags, "--reward", "words"]) == 0
    assert {json.loads(line)["reward"] for line in Path("made.jsonl").read_text().splitlines()} <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--best-of", "2"], "give --reward USE"),
        (["--best-of", "-1", "--reward", "rule:exact"], "--best-of is -1"),
        (["--best-of", "2", "--num-samples", "2", "--reward", "rule:exact"], "use one"),
        (["--reward", "rule:exact"], "give --best-of N as well"),
        (["--best-of", "2", "--reward", "rule:exact:truth"], "needs the column 'truth'"),
        (["--best-of", "2", "--reward", "rule:exakt"], "--reward names the rule 'exakt'"),
        (["--best-of", "2", "--reward", "trained"], "no reward model was trained"),
        (["--best-of", "2", "--reward", "rule:exact", "--temperature", "0"], "greedy"),
    ],
)
def test_generate_refuses_to_choose_by_nothing(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "base", "--prompts", "sums.jsonl", "--max-new-tokens", "2", *flags]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_draws_reward_against_kl_from_one_set_of_samples(folder: Path) -> None:
    assert ppo("--rewards.r.use", "rule:contains:good,great", "--evaluate.gold", "rule:max_words:3") == 0
    assert main(["evaluate", "run", "--out", "numbers", "--best-of", "6"]) == 0
    summary = json.loads(Path("numbers/summary.json").read_text())
    curve = [summary[f"best_of_{n}"] for n in (1, 2, 4, 6)]
    assert all(set(point) == {"eval/reward", "eval/gold", "eval/kl_chosen", "eval/kl_bound"} for point in curve)
    for name in ("eval/reward", "eval/kl_chosen", "eval/kl_bound"):
        assert [point[name] for point in curve] == sorted(point[name] for point in curve), name
    assert all(point["eval/kl_chosen"] <= point["eval/kl_bound"] + 1e-12 for point in curve)
    assert curve[0]["eval/kl_chosen"] == pytest.approx(0.0, abs=1e-12)
    assert "best of 6" in Path("numbers/report.html").read_text()
    assert main(["evaluate", "run", "--out", "numbers", "--overwrite", "--hhh", "--best-of", "4"]) == 2
