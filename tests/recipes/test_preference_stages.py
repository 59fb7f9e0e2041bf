"""`prefero dpo` and its kin: what they leave behind, how they resume, what they refuse and keep of the reference."""

import json
import math
import re
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_pipeline import FOLDER, rows, write_own_data
from transformers import AutoModelForCausalLM

from prefero.cli import main
from prefero.config import PREFERENCE_STAGES, PreferenceConfig, load_config
from prefero.recipes.keeper import STOPPED

ROOT = Path(__file__).parents[2]
CONFIG = """
data: {sft: sft.jsonl, preferences: several.jsonl}
model: {path: base}
strategy: {precision: fp32, threads: 1}
checkpoint: {every: 1, minutes: 0}
sft: {steps: 2, batch_size: 8, learning_rate: 1e-3}
""" + "".join(
    f"{name}: {{steps: 4, batch_size: 7, eval_every: 2, learning_rate: 1e-2, max_new_tokens: 6, warmup_fraction: 0}}\n"
    for name in PREFERENCE_STAGES
)
GIVEN = ["--data.preferences-heldout"]
SMALL = ["--evaluate.num-prompts", "4", "--evaluate.num-samples", "2"]


class Project(NamedTuple):
    """A user's folder, and what runs commands in it."""

    folder: Path
    forks: Any

    def run(self, name: str, out: str, fault: str = "", *options: str, processes: int = 1) -> int:
        """Begins a command or goes on with it, let fail where `fault` says; its exit status."""
        began = (self.folder / out).exists()
        arguments = ["resume", out] if began else [name, "own.yaml", "--out", out, *SMALL, *options]
        errors = self.folder / "errors.txt"
        status: int = self.forks.run(
            arguments, self.folder, {"PREFERO_FAULT": fault}, errors=errors, processes=processes
        )
        assert "Traceback" not in errors.read_text(), errors.read_text()
        return status

    def same(self, name: str, one: str, other: str) -> None:
        """Bitwise."""
        stage = Path("checkpoints") / name
        for file in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", stage / "metrics.jsonl"):
            assert (self.folder / one / file).read_bytes() == (self.folder / other / file).read_bytes(), file


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    write_own_data(folder, folder / "base")
    questions = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    answers = [" good .", " the movie was great .", " bad and awful", " it was the hotel ."]
    pairs = [{"prompt": q, "chosen": answers[i % 2], "rejected": answers[2 + j]}
             for i, q in enumerate(questions) for j in range(2)]  # fmt: skip
    labels = [{"prompt": q, "completion": answers[i % 4], "label": i % 4 < 2} for i, q in enumerate(questions)]
    long = [*pairs, {"prompt": "good bad " * 40, "chosen": " good", "rejected": " bad"}]
    for name, content in (("several", pairs), ("labels", labels), ("long", long)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "equal.jsonl").write_text('{"prompt": "how", "chosen": " good", "rejected": " good"}\n' * 9)
    (folder / "empty.jsonl").write_text('{"prompt": "how", "chosen": " good", "rejected": " "}\n' * 9)
    (folder / "unknown.jsonl").write_text('{"prompt": "how", "chosen": " xyzzy", "rejected": " plugh"}\n' * 9)
    (folder / "own.yaml").write_text(CONFIG)
    yield Project(folder, forks)


@pytest.fixture(scope="module")
def done(project: Project) -> Path:
    """Every command, run once."""
    for name in PREFERENCE_STAGES:
        assert project.run(name, name) == 0
    return project.folder


@pytest.mark.parametrize("name", PREFERENCE_STAGES)
def test_every_command_leaves_what_every_run_leaves(done: Path, name: str) -> None:
    for folder in (done / name, *(done / name / "checkpoints" / stage for stage in ("sft", name))):
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == FOLDER, folder
    summary = json.loads((done / name / "summary.json").read_text())
    assert summary["command"] == name and isinstance(summary["seconds"], float)
    assert summary["preference_accuracy"] == summary[f"{name}/eval_accuracy"] > 0.6
    assert summary["kl"] == summary["after"]["eval/kl"] and summary["before"].keys() <= summary["after"].keys()
    samples = rows(done / name / "samples.jsonl")
    assert len(samples) == 3 and all(row.keys() >= {"prompt", "before", "after"} for row in samples)
    assert not any("reward_before" in row for row in samples)
    exported = AutoModelForCausalLM.from_pretrained(done / name / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(done / name / "checkpoints" / "sft" / "model").state_dict()
    assert any(not torch.equal(exported[key], before[key]) for key in exported)
    assert "default-src 'none'" in (done / name / "report.html").read_text()


@pytest.mark.parametrize("name", PREFERENCE_STAGES)
def test_every_metric_has_its_sentence(done: Path, name: str) -> None:
    logged = {key for row in rows(done / name / "metrics.jsonl") if row["stage"] == name for key in row}
    assert {f"{name}/loss", f"{name}/accuracy", f"{name}/margin", f"{name}/eval_loss", "eval/length"} <= logged
    told = {key.replace(f"{name}/eval_", f"{name}/") for key in logged if key.startswith(f"{name}/")}
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert told == set(re.findall(rf"^\| `({name}/\w+)`", page, re.MULTILINE))
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    assert f"({name}.md)" in metrics


@pytest.mark.parametrize("name", PREFERENCE_STAGES)
def test_the_defaults_on_its_page_are_the_defaults(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", page.partition("## The switches")[2], re.MULTILINE))
    settings = getattr(load_config(None), name)
    named = {key: getattr(settings, key) for key in told if hasattr(settings, key)}
    assert {key: type(value)(told[key]) for key, value in named.items()} == named
    own = {item.name for item in fields(settings)} - {item.name for item in fields(PreferenceConfig)}
    assert own <= named.keys() and {"beta", "learning_rate", "batch_size"} <= named.keys()


def test_a_command_without_sft_is_one_stage(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    options = ["--sft.skip", "--model.path", "dpo/checkpoints/sft/model", *SMALL]
    assert main(["dpo", "own.yaml", "--out", "alone", *options]) == 0
    assert not (done / "alone" / "checkpoints" / "sft").exists()
    theirs = [row for row in rows(done / "dpo" / "metrics.jsonl") if row["stage"] == "dpo"]
    assert rows(done / "alone" / "metrics.jsonl") == theirs


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_plan_counts_all_rows_and_computes_few(
    done: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    assert main(["plan", "own.yaml", "--stage", name, "--steps", "0", "--sft.skip", "--json", f"plan-{name}.json"]) == 0
    stages = json.loads((done / f"plan-{name}.json").read_text())["stages"]
    pairs = len(rows(done / "several.jsonl"))
    kept = {"dpo": range(pairs - 20, pairs), "kto": range(2 * pairs - 40, 2 * pairs)}[name]
    assert list(stages) == [name] and stages[name]["steps"] in {-(-count // 7) for count in kept}
    assert {"learn", "sample"} <= stages[name]["phases_mb"].keys()
    assert f"{name}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "fault", "status"),
    [
        ("dpo", "kill@backward:4", -signal.SIGKILL),
        ("dpo", "kill@evaluate:1", -signal.SIGKILL),  # the reference is known, nothing is learned yet
        ("dpo", "kill@evaluate:2", -signal.SIGKILL),
        ("kto", "term@backward:5", STOPPED),
        ("kto", "kill@checkpoint:5", -signal.SIGKILL),
        ("orpo", "kill@step:4", -signal.SIGKILL),
    ],
)
def test_stopped_and_resumed_is_left_alone(done: Path, project: Project, name: str, fault: str, status: int) -> None:
    out = f"{name}-{fault}".replace("@", "-").replace(":", "-")
    assert project.run(name, out, fault) == status
    file = done / out / "checkpoints" / name / "checkpoints" / "reference.safetensors"
    asked = file.stat().st_mtime_ns if name != "orpo" else 0
    assert project.run(name, out) == 0
    project.same(name, name, out)
    assert name == "orpo" or file.stat().st_mtime_ns == asked, "the reference was asked again"


def test_a_resumed_run_that_lost_its_references_asks_the_reference_not_the_policy(done: Path, project: Project) -> None:
    assert project.run("dpo", "lost", "term@backward:5") == STOPPED
    (done / "lost" / "checkpoints" / "dpo" / "checkpoints" / "reference.safetensors").unlink()
    assert project.run("dpo", "lost") == 0
    project.same("dpo", "dpo", "lost")


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_adapters_off_and_numbers_kept_are_one_reference(
    done: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    for reference in ("cached", "adapters"):
        options = ["--model.lora-rank", "2", "--reference", reference, "--overwrite"]
        assert main([name, "own.yaml", "--out", f"{name}-{reference}", *SMALL, *options]) == 0
        kept = done / f"{name}-{reference}" / "checkpoints" / name / "checkpoints" / "reference.safetensors"
        assert kept.is_file() == (reference == "cached")
    ours, theirs = (rows(done / f"{name}-{which}" / "metrics.jsonl") for which in ("cached", "adapters"))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=2e-4)
    assert (done / f"{name}-cached" / "checkpoints" / name / "checkpoints" / "adapter").is_dir()


def test_an_adapter_that_goes_on_is_its_own_reference_as_it_began(
    done: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights in few bytes SFT's adapter is not merged: without it the policy is not what the stage began with."""
    monkeypatch.chdir(done)
    lora = ["--model.lora-rank", "2", "--model.frozen", "int8", "--lora-learning-rate-factor", "10"]
    for reference in ("cached", "adapters"):
        assert project.run("dpo", f"few-{reference}", "", *lora, "--reference", reference) == 0
    first, other = (rows(done / f"few-{which}" / "metrics.jsonl") for which in ("cached", "adapters"))
    for one, two in zip(first, other, strict=True):
        assert one == pytest.approx(two, abs=2e-4)
    step = next(row for row in first if "dpo/loss" in row)
    assert step["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(step["dpo/margin"]) < 1e-4
    assert project.run("dpo", "few-lost", "term@backward:5", *lora) == STOPPED
    (done / "few-lost" / "checkpoints" / "dpo" / "checkpoints" / "reference.safetensors").unlink()
    assert project.run("dpo", "few-lost") == 0
    project.same("dpo", "few-cached", "few-lost")
    assert (done / "few-lost" / "checkpoints" / "adapter").is_dir()


def test_kto_takes_labels_and_dpo_says_that_it_does_not(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    options = ["--data.preferences", "labels.jsonl", *SMALL]
    assert main(["kto", "own.yaml", "--out", "labels", *options]) == 0
    assert main(["dpo", "own.yaml", "--out", "x", *options]) == 2
    assert "labels.jsonl: columns prompt, completion, label are no shape accepted here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["dpo", "--data.preferences", "equal.jsonl"], ["equal.jsonl:1", "chosen and the rejected answer are"]),
        (["kto", "--data.preferences", "equal.jsonl"], ["equal.jsonl:1", "are the same"]),
        (["simpo", "--data.preferences", "empty.jsonl"], ["empty.jsonl:1", "'rejected' is empty"]),
        (["dpo", *GIVEN, "several.jsonl", "--data.preferences", "unknown.jsonl"], ["are the same tokens"]),
        (["cpo", "--cpo.max-length", "5"], ["cpo.max_length 5 nothing is left of the answers", "--data.truncate drop"]),
        (["dpo", *GIVEN, "long.jsonl", "--max-prompt-length", "64"], ["long.jsonl:65", "data.max_prompt_length"]),
        (["dpo", "--data.preferences", ""], ["data.preferences is empty but this stage needs it"]),
        (["dpo", "--sft.skip", "--model.path", ""], ["model.path is empty; give --model.path FOLDER"]),
        (["orpo", "--sft.skip", "--model.path", ""], ["the data brings no model of its own"]),
        (["kto", "--dpo.max-new-tokens", "6", "--max-new-tokens", "900"], ["900 new ones", "lower kto.max_new_tokens"]),
        (["dpo", "--reference", "adapters"], ["dpo.reference is adapters, but model.lora_rank is 0"]),
        (["dpo", "--kind", "cdpo"], ["dpo.kind cdpo needs a dpo.label_smoothing above 0"]),
        (["dpo", "--kind", "ipo", "--label-smoothing", "0.1"], ["has no effect with dpo.kind ipo"]),
        (["dpo", "--kind", "ipa"], ["dpo.kind: 'ipa' will not do"]),
        (["dpo", "--beta", "0"], ["dpo.beta: 0 will not do"]),
        (["simpo", "--simpo.kind", "ipo"], ["unknown key --simpo.kind"]),
        (["dpo", "--evaluate.gold", "foo"], ["evaluate.gold is 'foo'"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_made(
    done: Path, arguments: list[str], messages: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(done)
    assert main([arguments[0], "own.yaml", "--out", "refused", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert not (done / "refused").exists()


ADAPTERS = ["--model.lora-rank", "2", "--reference", "adapters"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "options", "shared"),
    [
        ("dpo", [], "--strategy.kind ddp"),
        ("dpo", [], "--strategy.kind fsdp"),
        ("dpo", ADAPTERS, "--strategy.kind fsdp --strategy.stage 2"),
        ("kto", [], "--strategy.kind ddp"),
        ("kto", ["--micro-batch-tokens", "60"], "--strategy.kind fsdp"),
        ("kto", ADAPTERS, "--strategy.kind ddp"),
        ("orpo", ["--nll", "text"], "--strategy.kind fsdp --strategy.stage 1"),
    ],
)
def test_shared_is_alone(
    project: Project, name: str, options: list[str], shared: str, request: pytest.FixtureRequest
) -> None:
    out = request.node.callspec.id.replace(" ", "-")
    assert project.run(name, f"{out}-alone", "", *options) == 0
    assert project.run(name, f"{out}-shared", "", *options, *shared.split(), processes=2) == 0
    ours, theirs = (rows(project.folder / f"{out}-{how}" / "metrics.jsonl") for how in ("shared", "alone"))
    assert len(ours) == len(theirs) > 8
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-4), (one, other)
