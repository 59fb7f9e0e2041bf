"""A run that was stopped or killed anywhere, and resumed, is to the last bit the run that was left alone."""

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_pipeline import write_own_data

from prefero.cli import main
from prefero.config import load_config
from prefero.recipes.keeper import STOPPED
from prefero.recipes.run import _forgotten

CONFIG = """
data: {sft: sft.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl}
model: {path: base}
strategy: {precision: fp32, threads: 1}
checkpoint: {every: 1, minutes: 0}
sft: {steps: 3, batch_size: 8}
reward: {steps: 3, batch_size: 8, dropout: true}
ppo:
  steps: 3
  prompts_per_step: 6
  train_batch_size: 4
  max_epochs: 2
  max_new_tokens: 6
  eval_every: 2
  kl_target: 0.5
  kl_horizon: 50
  learning_rate: 1e-3
evaluate: {num_prompts: 4, num_samples: 2, best_of: 2}
"""
FILES = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors", "checkpoints/ppo/metrics.jsonl",
         "checkpoints/ppo/samples.jsonl", "checkpoints/reward/model/model.safetensors")  # fmt: skip


class Project(NamedTuple):
    """A user's folder, and what runs commands in it."""

    folder: Path
    forks: Any

    def run(self, out: str, fault: str = "", options: Sequence[str] = ()) -> int:
        """Begins the pipeline or goes on with it, let fail where `fault` says; its exit status."""
        began = (self.folder / out).exists()
        arguments = ["resume", out] if began else ["pipeline", "own.yaml", "--out", out, *options]
        errors = self.folder / "errors.txt"
        status: int = self.forks.run(arguments, self.folder, {"PREFERO_FAULT": fault}, errors)
        assert "Traceback" not in errors.read_text(), errors.read_text()
        return status

    def differing(self, out: str) -> list[str]:
        """The files that are not to the last byte those of the run that was left alone."""
        alone, other = self.folder / "left-alone", self.folder / out
        return [name for name in FILES if (other / name).read_bytes() != (alone / name).read_bytes()]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, forks: Any) -> Project:
    """A user's project and the run that was left alone."""
    folder = tmp_path_factory.mktemp("project")
    write_own_data(folder, folder / "base")
    (folder / "own.yaml").write_text(CONFIG)
    made = Project(folder, forks)
    assert made.run("left-alone") == 0
    return made


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("kill@backward:2", -signal.SIGKILL),  # supervised
        ("term@backward:5", STOPPED),  # the reward model, with dropout
        ("kill@rollout:4", -signal.SIGKILL),
        ("kill@learn:5", -signal.SIGKILL),  # inside a PPO epoch
        ("term@learn:2", STOPPED),
        ("term@learn:7", STOPPED),
        ("kill@manifest:9", -signal.SIGKILL),
        ("kill@pointer:11", -signal.SIGKILL),
    ],
)
def test_stopped_and_resumed_is_left_alone(project: Project, fault: str, status: int) -> None:
    out = fault.replace("@", "-").replace(":", "-")
    assert project.run(out, fault) == status
    assert project.run(out) == 0
    assert project.differing(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 13))
@pytest.mark.parametrize("kind", ["kill", "term"])
def test_at_every_step_of_ppo(project: Project, kind: str, step: int) -> None:
    out = f"{kind}-at-{step}"
    assert project.run(out, f"{kind}@learn:{step}") == (-signal.SIGKILL if kind == "kill" else STOPPED)
    assert project.run(out) == 0
    assert project.differing(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["shared", "hydra"])
def test_roles_on_one_backbone_resume_too(project: Project, backbone: str) -> None:
    options = ["--model.lora-rank", "2", "--reward.lora-rank", "2", "--ppo.backbone", backbone]
    other = Project(project.folder / backbone, project.forks)
    shutil.copytree(project.folder, other.folder, ignore=shutil.ignore_patterns("left-alone", "kill*", "term*", "many"))
    assert other.run("left-alone", options=options) == 0
    assert other.run("killed", "kill@learn:7", options=options) == -signal.SIGKILL
    assert other.run("killed") == 0
    assert other.differing("killed") == []


def test_a_run_survives_many_kills(project: Project) -> None:
    faults = ["kill@learn:2", "kill@rollout:2", "kill@judge:1", "kill@rename:1", "kill@step:3", "kill@evaluate:1"]
    statuses = [project.run("many", fault) for fault in faults]
    assert statuses.count(-signal.SIGKILL) >= 5
    assert statuses[-1] == 0 or project.run("many") == 0
    assert project.differing("many") == []


def test_what_may_not_change_is_named(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    assert project.run("other", "term@learn:1") == STOPPED
    assert main(["resume", "other", "--ppo.kl-horizon", "60"]) == 2
    assert "ppo.kl_horizon (50, now 60)" in capsys.readouterr().err
    assert main(["resume", "other", "--strategy.max-grad-norm", "0"]) == 2
    assert "strategy.max_grad_norm (1.0, now 0.0)" in capsys.readouterr().err
    assert main(["resume", "other", "--checkpoint.keep", "3", "--strategy.max-skipped", "9", "--ppo.gamma", "0.9"]) == 2
    assert "another config: ppo.gamma (1.0, now 0.9); resume" in capsys.readouterr().err
    assert main(["resume", "other", "--strategy.precision", "bf16"]) == 2
    assert "begun in fp32 and would go on in bf16: resume it with --strategy.precision fp32" in capsys.readouterr().err
    assert main(["pipeline", "own.yaml", "--resume"]) == 2
    assert "none in runs/own-pipeline, runs/own-pipeline-2, ...: name its folder with --out" in capsys.readouterr().err
    assert main(["resume", "left-alone"]) == 2
    assert "prefero report left-alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ([], {"stage": 2, "shard_init": True, "timeout": 60.0}),
        (["--strategy.kind", "fsdp"], {"stage": 2, "shard_init": True, "timeout": 60.0}),
        (["--strategy.kind=ddp"], {"stage": 3, "shard_init": False, "timeout": 60.0}),
        (["--strategy.kind", "naive"], {"stage": 3, "shard_init": False, "timeout": 600.0}),
    ],
)
def test_going_on_with_a_named_kind_forgets_what_has_no_effect_with_it(
    typed: list[str], kept: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("strategy: {kind: fsdp, stage: 2, shard_init: true, timeout: 60}")
    strategy = load_config(file, [*_forgotten(typed, "ppo"), *typed]).strategy
    assert {key: getattr(strategy, key) for key in kept} == kept


def test_the_last_interrupted_run_of_a_config_is_found_by_itself(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    ended = ["sft", "own.yaml", "--sft.steps", "1"]
    assert main(ended) == 0
    arguments, errors = ["sft", "own.yaml", "--sft.steps", "2"], project.folder / "errors.txt"
    assert project.forks.run(arguments, project.folder, {"PREFERO_FAULT": "kill@write:2"}, errors) == -signal.SIGKILL
    assert main(ended) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["own-sft", "own-sft-2", "own-sft-3"]
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    assert "run folder: runs/own-sft-2" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 2


def test_what_changed_meanwhile_is_refused(project: Project) -> None:
    assert project.run("edited", "term@learn:1") == STOPPED
    told = {
        "prompts.jsonl": "prompts.jsonl has changed since the run began",
        "base/model.safetensors": "base (model.safetensors) has changed since the run began",
        "edited/config.yaml": "ppo.gamma (1.0, now 0.5)",
    }
    for name, message in told.items():
        file = project.folder / name
        before = file.read_bytes()
        change = {".jsonl": (b"a", b"o"), ".yaml": (b"gamma: 1.0", b"gamma: 0.5")}
        end = bytes([before[-1] ^ 1])
        after = before.replace(*change[file.suffix]) if file.suffix in change else before[:-1] + end
        assert after != before
        try:
            file.write_bytes(after)
            assert project.run("edited") == 2
            assert message in (project.folder / "errors.txt").read_text()
        finally:
            file.write_bytes(before)
    assert project.run("edited") == 0
    assert project.differing("edited") == []


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_an_error(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    assert project.run("damaged", "term@learn:6") == STOPPED
    state = project.folder / "damaged" / "checkpoints" / "ppo" / "checkpoints" / "state"
    newest = max(state.glob("step-*"))
    file = next(newest.glob("part-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert project.run("damaged") == 0
    assert project.differing("damaged") == []

    assert project.run("ruined", "term@learn:6") == STOPPED
    state = project.folder / "ruined" / "checkpoints" / "ppo" / "checkpoints" / "state"
    for folder in state.glob("step-*"):
        (folder / "manifest.json").write_text("{")
    assert main(["resume", "ruined"]) == 2
    message = capsys.readouterr().err
    assert "holds no whole checkpoint" in message
    assert "--overwrite" in message


@pytest.mark.parametrize("lost", ["checkpoints", "their folder", "the stage", "all stages"])
def test_a_run_whose_checkpoints_are_lost_is_not_begun_again_in_silence(project: Project, lost: str) -> None:
    out = f"lost-{lost.replace(' ', '-')}"
    assert project.run(out, "term@learn:4") == STOPPED
    stage = project.folder / out / "checkpoints" / "ppo"
    state = stage / "checkpoints" / "state"
    log = project.folder / out / "metrics.jsonl"
    logged = log.read_bytes()
    gone = {"checkpoints": [*state.glob("step-*")], "their folder": [state], "the stage": [stage]}
    for folder in gone.get(lost, [stage.parent]):
        shutil.rmtree(folder)
    assert project.run(out) == 2
    assert "no checkpoint" in (project.folder / "errors.txt").read_text()
    assert log.read_bytes() == logged != b""


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(project: Project) -> None:
    assert project.run("full", "full@write:9") == 2
    left = project.folder / "full" / "checkpoints"
    assert not list(left.rglob("*.part"))
    assert json.loads(next(left.rglob("latest.json")).read_text())
    assert project.run("full") == 0
    assert project.differing("full") == []


def test_a_budget_of_kl_ends_ppo_early_and_a_resumed_run_ends_there_too(project: Project) -> None:
    def summary(out: str) -> dict[str, Any]:
        return json.loads((project.folder / out / "summary.json").read_text())  # type: ignore[no-any-return]

    budget = ["--ppo.kl-budget", "1e-3", "--ppo.learning-rate", "1e-2"]
    assert project.run("budget", options=budget) == 0
    assert summary("budget")["stopped_at_kl"] > 1e-3
    assert "stopped_at_kl" not in summary("left-alone")
    rows = [json.loads(line) for line in (project.folder / "budget" / "metrics.jsonl").read_text().splitlines()]
    ppo = [row for row in rows if row["stage"] == "ppo"]
    assert [row["step"] for row in ppo if "actor/gradient_norm_max" in row] == [1], (
        "learned from the first iteration only"
    )
    assert [row["step"] for row in ppo if "eval/kl" in row] == [0, 1], "the policy that is left is examined"

    assert project.run("budget-killed", "kill@learn:2", options=budget) == -signal.SIGKILL
    assert project.run("budget-killed") == 0
    for name in FILES:
        assert (project.folder / "budget-killed" / name).read_bytes() == (project.folder / "budget" / name).read_bytes()
