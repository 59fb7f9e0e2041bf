"""Bad input through the real command line: one line that names row or key, value and cure; no folder left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_pipeline import write_own_data
from tiny import tiny_llama, tiny_tokenizer

from prefero.cli import main

REWARDS = """
def fine(prompt, completion, **columns):
    return 1.0
def nothing(prompt, completion, **columns):
    return None
def text(prompt, completion, **columns):
    return "good"
def several(prompt, completion, **columns):
    return [1.0, 2.0]
def fails(prompt, completion, **columns):
    return columns["answer"]
def needs(prompt, completion, answer):
    return 1.0
def waits(prompt, completion, **columns):
    import time
    print("WAITING", flush=True)
    time.sleep(60)
"""
TALK = [{"role": "user", "content": "how"}]
LATE = json.dumps({"prompt": TALK, "chosen": "good", "rejected": "bad"})  # messages, without a template for them
CONFIG = """
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
model: {path: base}
sft: {steps: 1, batch_size: 8}
reward: {steps: 1, batch_size: 8}
ppo:
  steps: 1
  prompts_per_step: 4
  train_batch_size: 4
  max_new_tokens: 4
  rewards: {r: {use: "rewards.py:fine"}}
evaluate: {num_prompts: 4}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project: a model, a config, three data sets, rewards, and what may be wrong with each."""
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path, tmp_path / "base")
    tokenizer = tiny_tokenizer()
    small = tiny_llama(10)
    for name, model in (("small", small), ("bare", tiny_llama(len(tokenizer)))):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "small")
    (tmp_path / "own.yaml").write_text(CONFIG)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    files = {
        "empty.jsonl": [],
        "corrupt.jsonl": [*lines[:5], '{"prompt": "how', *lines[5:]],
        "escape.jsonl": [json.dumps({"\x1b]0;pwned\x07": "how"})] * 9,
        "no_column.jsonl": ['{"promt": "how"}'] * 9,
        "long.jsonl": [*lines, json.dumps({"prompt": "good bad " * 100})],
        "no_answer.jsonl": ['{"prompt": "how", "completion": ""}'] * 9,
        "late.jsonl": [*(tmp_path / "pairs.jsonl").read_text().splitlines()[:8], LATE],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(row + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--data.prompts", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["--data.prompts", "empty.jsonl"], ["empty.jsonl: no rows"]),
        (["--data.prompts", "corrupt.jsonl"], ["corrupt.jsonl:6: not valid JSON", "--max-bad-rows"]),
        (["--data.prompts", "no_column.jsonl"], ["no_column.jsonl", "did you mean 'prompt'"]),
        (["--data.sft", "no_answer.jsonl"], ["no_answer.jsonl:1: column 'completion' is empty"]),
        (["--data.preferences", "sft.jsonl"], ["sft.jsonl: columns prompt, completion are no shape"]),
        (["--data.prompts", "long.jsonl"], ["long.jsonl:33", "context of 128", "data.truncate"]),
        (["--data.prompts", "long.jsonl", "--max-prompt-length", "64"], ["long.jsonl:33", "data.max_prompt_length"]),
        (["--max-new-tokens", "500"], ["prompts.jsonl:1", "500 new ones", "lower ppo.max_new_tokens"]),
        (["--data.chat", "true"], ["no chat template"]),
        (["--model.path", "nowhere"], ["unknown model 'nowhere'"]),
        (["--model.path", "bsae"], ["did you mean 'base'"]),
        (["--model.path", ""], ["model.path is empty"]),
        (["--model.path", "small"], ["sft.jsonl:1", "vocabulary has 10", "model.tokenizer"]),
        (["--reward.model", "nowhere"], ["unknown model 'nowhere'"]),
        (["--reward.skip", "--sft.skip", "--ppo.skip"], ["nothing to do"]),
        (["--strategy.stage", "2"], ["strategy.stage 2", "strategy.kind naive", "fsdp"]),
        (["--strategy.kind", "ddp", "--strategy.device", "cpu"], ["strategy.device cpu", "ddp", "naive"]),
        (["--strategy.shard-init", "true"], ["strategy.shard_init True", "fsdp"]),
        (["--kl-target", "6", "--kl-horizon", "1", "--prompts-per-step", "8"], ["ppo.kl_horizon 1", "raise it to 8"]),
        (["--data.prompts", "escape.jsonl"], ["escape.jsonl: columns ␛]0;pwned"]),
        (["--critic-layers", "9"], ["ppo.critic_layers is 9", "only 2 layers"]),
        (["--strategy.device", "quantum"], ["quantum"]),
        (["--sft.skip", "--model.path", ""], ["sft.skip is true and model.path is empty"]),
        (["--rewards.r.use", "rule:foo"], ["the rules are code, contains"]),
        (["--rewards.r.use", "rule:max_words"], ["whole number", "rule:max_words:30"]),
        (["--rewards.r.use", "rule:ends_with_eos:5"], ["takes nothing after its name"]),
        (["--rewards.r.use", "model:base"], ["base is no reward model", "LlamaForCausalLM"]),
        (["--rewards.r.use", "model:nowhere"], ["unknown model 'nowhere'"]),
        (["--rewards.r.use", "nowhere.py:f"], ["there is no file"]),
        (["--rewards.r.use", "rewards.py:fien"], ["did you mean fine"]),
        (["--rewards.r.use", "rewards.py:needs"], ["needs the column 'answer'", "prompts.jsonl:1"]),
        (["--data.preferences", "late.jsonl"], ["no chat template"]),
        (["--rewards.r.use", "broken.py:f"], ["broken.py:1", "SyntaxError"]),
        (["--rewards.r.use", ""], ["ppo.rewards.r.use"]),
        (["--evaluate.gold", "foo"], ["evaluate.gold is 'foo'", "rule:NAME or vader"]),
    ],
)
def test_a_pipeline_that_cannot_end_does_not_begin(
    folder: Path, flags: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "own.yaml", "--out", "run", *flags]) == 2
    shown = capsys.readouterr()
    error = shown.err.strip().splitlines()[-1]
    assert error.startswith("prefero: error: ")
    assert all(message in error for message in messages), error
    assert "\x1b" not in error
    assert "sft" not in shown.out
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["sft", "--model.path", "small"], ["sft.jsonl:1", "vocabulary has 10"]),
        (["reward", "--model.path", "small"], ["pairs.jsonl:1", "vocabulary has 10"]),
        (["sft", "--max-length", "4"], ["sft.jsonl:1", "sft.max_length 4"]),
        (["sft", "--model.path", "bare"], ["tokenizer"]),
        (["ppo", "--rewards.r.use", "rewards.py:nothing"], ["None", "for prompt", "how was", "return a number"]),
        (["ppo", "--rewards.r.use", "rewards.py:text"], ["'good'", "for prompt", "how was"]),
        (["ppo", "--rewards.r.use", "rewards.py:several"], ["[1.0, 2.0]", "one finite number per completion"]),
        (["ppo", "--rewards.r.use", "rewards.py:fails"], ["KeyError: 'answer'", "how was", "rewards.py:11"]),
    ],
)
def test_a_stage_that_meets_bad_input_names_it(
    folder: Path, flags: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flags[0], "own.yaml", "--out", "run", *flags[1:]]) == 2
    error = capsys.readouterr().err
    assert "prefero: error: " in error
    assert all(message in error for message in messages), error


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("sft", ["--model.path", "typo"]),
        ("sft", ["--sft.max-length", "4"]),
        ("sft", ["--config", "movies.yaml"]),
        ("reward", ["--model.path", "typo"]),
        ("reward", ["--model.path", "small"]),
        ("ppo", ["--model.path", "typo"]),
        ("ppo", ["--config", "no-reward.yaml"]),
        ("ppo", ["--rewards.r.use", "trained"]),
    ],
)
def test_overwrite_clears_nothing_for_a_run_that_cannot_begin(
    folder: Path, command: str, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(folder / "cache"))  # nothing was fetched
    Path("movies.yaml").write_text("data: {world: movies}\nmodel: {path: base}\n")
    Path("no-reward.yaml").write_text(CONFIG.replace('  rewards: {r: {use: "rewards.py:fine"}}\n', ""))
    assert main([command, "own.yaml", "--out", "run"]) == 0
    kept = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    config, further = (flags[1], []) if flags[0] == "--config" else ("own.yaml", flags)
    assert main([command, config, "--out", "run", "--overwrite", *further]) == 2
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == kept


def test_what_is_cut_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "own.yaml", "--out", "a", "--sft.max-length", "9"]) == 0
    told = capsys.readouterr().err
    assert "rows are cut at sft.max_length 9 tokens; neither their rest nor their end is learned" in told
    assert main(["reward", "own.yaml", "--out", "b", "--reward.max-length", "4"]) == 0
    assert "texts are cut to their last 4 tokens (reward.max_length)" in capsys.readouterr().err
    assert main(["sft", "own.yaml", "--out", "c"]) == 0
    assert "cut" not in capsys.readouterr().err


def test_another_split_than_train_is_named_with_a_colon(folder: Path) -> None:
    Path("talk").mkdir()
    Path("talk/practice.jsonl").write_bytes(Path("sft.jsonl").read_bytes())
    assert main(["sft", "own.yaml", "--out", "a", "--data.sft", "talk"]) == 2
    assert main(["sft", "own.yaml", "--out", "a", "--data.sft", "talk:practice"]) == 0
    assert main(["generate", "base", "--prompts", "talk:practice", "--max-new-tokens", "1"]) == 0


def test_a_run_that_did_not_end_says_so_in_its_report(folder: Path) -> None:
    assert main(["ppo", "own.yaml", "--out", "run", "--rewards.r.use", "rewards.py:nothing"]) == 2
    assert main(["report", "run"]) == 0
    assert "Not finished" in Path("run/report.html").read_text()
    assert main(["ppo", "own.yaml", "--out", "whole"]) == 0
    assert "Not finished" not in Path("whole/report.html").read_text()


def test_an_evaluation_that_cannot_begin_clears_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(folder / "cache"))
    assert main(["ppo", "own.yaml", "--out", "run"]) == 0
    assert main(["evaluate", "run", "--out", "numbers"]) == 0
    kept = Path("numbers/metrics.jsonl").read_bytes()

    def refused(*flags: str) -> bool:
        status = main(["evaluate", "run", "--out", "numbers", "--overwrite", *flags])
        return status == 2 and Path("numbers/metrics.jsonl").read_bytes() == kept

    assert refused("--reference", "typo")
    assert refused("--reward-model", "typo")
    assert refused("--hhh")
    assert "prefero fetch bigbench" in capsys.readouterr().err
    (folder / "cache" / "data" / "bigbench").mkdir(parents=True)
    long = {"prompt": "good " * 200, "chosen": " good", "rejected": " bad", "category": "honest"}
    (folder / "cache" / "data" / "bigbench" / "hhh.jsonl").write_text(json.dumps(long) + "\n")
    assert refused("--hhh")
    assert "hhh.jsonl:1" in capsys.readouterr().err


def test_a_run_folder_is_the_next_stage_s_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "own.yaml", "--out", "first"]) == 0
    assert main(["reward", "own.yaml", "--out", "judge", "--model.path", "first"]) == 0
    flags = ["--model.path", "first", "--rewards.r.use", "model:judge"]
    assert main(["ppo", "own.yaml", "--out", "run", *flags]) == 0
    assert "rollout/reward_r/raw" in Path("run/metrics.jsonl").read_text()  # normalised by the judge's statistics
    Path("judge/model/config.json").unlink()
    assert main(["ppo", "own.yaml", "--out", "again", *flags]) == 2
    assert "'judge': the run in this folder has not finished" in capsys.readouterr().err


def test_only_a_reward_model_may_be_asked_for(folder: Path) -> None:
    assert main(["pipeline", "own.yaml", "--out", "run", "--sft.skip", "--ppo.skip"]) == 0
    assert "rm_accuracy" in json.loads(Path("run/summary.json").read_text())
    assert json.loads(Path("run/model/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_many_answers_to_one_prompt_are_split(folder: Path) -> None:
    rows = [{"prompt": "how ?", "completion": f" good {'bad ' * i}."} for i in range(1, 60)]
    Path("one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["sft", "own.yaml", "--out", "run", "--data.sft", "one.jsonl"]) == 0
    assert main(["sft", "own.yaml", "--out", "two", "--data.sft", "one.jsonl", "--data.sft-heldout", "sft.jsonl"]) == 0


def test_rows_too_long_are_left_out_when_asked_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("sft.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "good " * 100, "completion": " bad"}) + "\n")
    flags = ["--max-length", "20", "--heldout-fraction", "0.5"]
    assert main(["sft", "own.yaml", "--out", "run", *flags]) == 2
    assert "sft.jsonl:33: the prompt alone fills sft.max_length 20" in capsys.readouterr().err
    assert main(["sft", "own.yaml", "--out", "run", "--overwrite", *flags, "--data.truncate", "drop"]) == 0
    assert "1 rows left out, longer than sft.max_length 20 tokens" in capsys.readouterr().err
    flags = ["--data.prompts", "long.jsonl", "--max-prompt-length", "64", "--data.truncate", "drop"]
    assert main(["ppo", "own.yaml", "--out", "ppo", *flags]) == 0
    assert "1 rows left out, longer than data.max_prompt_length 64 tokens" in capsys.readouterr().err


def test_human_preferences_are_asked_of_policy_and_reward_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy taught to answer "the hotel was good ." finds that likelier than anything else."""
    rates = ["--sft.learning-rate", "1e-2", "--reward.learning-rate", "1e-2"]
    assert main(["pipeline", "own.yaml", "--out", "run", "--sft.steps", "60", "--reward.steps", "60", *rates]) == 0
    cache = Path("cache")
    monkeypatch.setenv("PREFERO_CACHE", str(cache))
    (cache / "data" / "bigbench").mkdir(parents=True)
    pair = {"prompt": "how was the hotel ?", "chosen": " the hotel was good .", "rejected": " great awful but"}
    pair["category"] = "honest"
    other = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"], "category": "helpful"}
    judged = pair | {"chosen": " good .", "rejected": " bad .", "category": "harmless"}
    rows = "".join(json.dumps(row) + "\n" for row in (pair, other, judged))
    (cache / "data" / "bigbench" / "hhh.jsonl").write_text(rows)
    capsys.readouterr()
    assert main(["evaluate", "run", "--hhh", "--out", "numbers"]) == 0
    numbers = json.loads(Path("numbers/summary.json").read_text())
    assert numbers["hhh/logprob_mean_honest"] == numbers["hhh/logprob_sum_honest"] == 1.0
    assert numbers["hhh/logprob_mean_helpful"] == numbers["hhh/logprob_sum_helpful"] == 0.0
    assert numbers["hhh/reward_model_harmless"] == 1.0
    assert 0 < numbers["hhh/logprob_mean_all"] < 1
    assert "hhh/logprob_mean_honest: 1.0000" in capsys.readouterr().out


def test_bad_rows_within_the_budget_are_named_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "own.yaml", "--out", "run", "--data.prompts", "corrupt.jsonl", "--max-bad-rows", "1"]) == 0
    notes = capsys.readouterr().err
    assert notes.count("corrupt.jsonl:6: left out: not valid JSON") == 1
    assert "corrupt.jsonl: 1 bad rows left out, 32 kept" in notes


def test_without_a_gold_scorer_nothing_is_called_gold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "own.yaml", "--out", "run"]) == 0
    assert "gold" not in capsys.readouterr().out
    assert "gold" not in Path("run/samples.jsonl").read_text()


def test_a_model_without_a_tokenizer_is_used_with_another_s(folder: Path) -> None:
    flags = ["--model.path", "bare", "--model.tokenizer", "base", "--sft.skip"]
    assert main(["pipeline", "own.yaml", "--out", "run", *flags]) == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--level", "sequence", "--kl-target", "2"],
        ["--model.lora-rank", "2"],
        ["--ppo.num-samples", "2", "--save-every", "1", "--ppo.steps", "2"],
        ["--precision", "bf16"],
        ["--gradient-checkpointing", "--critic-layers", "1"],
        ["--evaluate.gold", "rule:max_words:2", "--best-of", "2"],
    ],
)
def test_switches_of_ppo_run_and_leave_a_whole_folder(
    folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ppo", "own.yaml", "--out", "run", *flags]) == 0
    output = capsys.readouterr()
    assert "Writing model" not in output.err + output.out  # transformers' own bars
    assert json.loads(Path("run/summary.json").read_text())["kl"] is not None
    assert Path("run/model/config.json").is_file()
    saved = Path("run/checkpoints/step-000001/config.json")
    assert saved.is_file() == ("--save-every" in flags)


def hears_ctrl_c() -> None:
    # A test run that was put into the background ignores Ctrl-C, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(how: Callable[[subprocess.Popen[str]], None], arguments: Sequence[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "prefero", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hears_ctrl_c
    ) as process:
        assert process.stdout is not None
        assert any("WAITING" in line for line in process.stdout)
        time.sleep(0.1)
        how(process)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors


def stop(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C, and once more because the reward that is being waited for never ends."""
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)  # what comes at once counts as the same wish
    process.send_signal(signal.SIGINT)


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()


@pytest.mark.parametrize(("how", "status"), [(stop, 130), (kill, -signal.SIGKILL)])
def test_a_run_that_was_stopped_stays_readable(
    folder: Path, how: Callable[[subprocess.Popen[str]], None], status: int
) -> None:
    code, errors = interrupted(how, ["ppo", "own.yaml", "--out", "run", "--rewards.r.use", "rewards.py:waits"])
    assert code == status
    assert "Traceback" not in errors
    assert main(["report", "run"]) == 0
    assert "default-src" in Path("run/report.html").read_text()
    assert main(["ppo", "own.yaml", "--out", "run"]) == 2
    assert main(["ppo", "own.yaml", "--out", "run", "--overwrite"]) == 0


def test_an_evaluation_has_nothing_to_save_and_stops_at_once(folder: Path) -> None:
    Path("waits.yaml").write_text(CONFIG.replace("num_prompts: 4", "num_prompts: 4, gold: rewards.py:waits"))
    arguments = ["evaluate", "base", "--config", "waits.yaml", "--out", "run"]
    code, errors = interrupted(lambda process: process.send_signal(signal.SIGINT), arguments)
    assert code == 130
    assert "saving" not in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "500"], "context of 128"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--num-samples", "0"], "--num-samples"),
        (["--out", "nowhere/x.jsonl"], "no folder nowhere"),
    ],
)
def test_generate_refuses_odd_settings(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "base", "--prompt", "how was", *flags]) == 2
    assert message in capsys.readouterr().err


def test_generate_leaves_out_bad_rows_as_its_error_advises(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "base", "--prompts", "corrupt.jsonl", "--max-new-tokens", "2"]
    assert main(arguments) == 2
    assert "--max-bad-rows" in capsys.readouterr().err
    assert main([*arguments, "--max-bad-rows", "1"]) == 0


def test_generate_refuses_bytes_that_are_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "base", "--prompt", "\udcff movie"]) == 2
    assert "prompt 1 holds bytes that are not UTF-8" in capsys.readouterr().err


def test_chat_refuses_a_system_message_that_has_no_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "base", "--system", "be kind"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_terminal_without_the_letters_gets_escapes(folder: Path) -> None:
    command = [sys.executable, "-m", "prefero", "generate", "base", "--prompt", "ü movie", "--max-new-tokens", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"> \\xfc movie\n")


@pytest.mark.parametrize("templated", [True, False])
def test_what_a_model_writes_is_no_command_to_the_terminal(
    folder: Path, templated: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(["\x1b]0;evil\x07\x1b[2J"] * 1 + [f"\x1b[{n}m" for n in range(30)])
    if templated:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained("hostile")
    tiny_llama(len(tokenizer)).save_pretrained("hostile")
    lines = iter(["\x1b[1m", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "hostile", "--max-new-tokens", "20"]) == 0
    assert main(["generate", "hostile", "--prompt", "\x1b[1m \x1b[2m", "--max-new-tokens", "20"]) == 0
    shown = capsys.readouterr().out
    assert "␛[" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_a_terminal_shows_one_bar_at_a_time(folder: Path) -> None:
    """On a pseudo-terminal: the run's own display, and no second bar from a trainer or from transformers."""
    import pty

    command = [sys.executable, "-m", "prefero", "ppo", "own.yaml", "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "60"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=60) == 0
    os.close(ours)
    text = shown.decode()
    assert "ppo done" in text
    assert "0/?" not in text
    assert "fit " not in text
    assert "Writing" not in text
