"""The run folder: the same seven names, one writer, nothing lost, nothing leaked, nothing of others removed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hostile_texts import HOSTILE

from prefero.tracking import RunFolder
from prefero.tracking import files as files_module

NAMES = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "report.html", "samples.jsonl", "summary.json"]


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_holds_exactly_the_seven_names(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", {"seed": 3}) as run:
        assert names(run.path) == sorted([*NAMES, ".lock"])
    assert names(run.path) == NAMES
    assert run.checkpoints.is_dir()
    assert run.model.is_dir()
    assert run.config() == {"seed": 3}
    assert run.name == "run"


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.write_summary({"kl": 1.0})
        run.write_report("<p>")
        for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
            assert (run.path / name).stat().st_mode & 0o077 == 0, name


def test_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {"seed": 1}).close()
    with pytest.raises(ValueError, match=r"already holds a run.*--out.*--overwrite") as raised:
        RunFolder.create(tmp_path, {"seed": 2})
    assert str(tmp_path) in str(raised.value)
    assert RunFolder.open(tmp_path).config() == {"seed": 1}
    assert names(tmp_path) == NAMES  # and the refusal left no lock


def test_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(tmp_path / "file", {})


def test_overwrite_removes_the_runs_own_files_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, {"seed": 1})
    run.tracker("sft").log({"sft/loss": 1.0}, 1)
    (run.checkpoints / "step_1").mkdir()
    (run.checkpoints / "step_1" / "weights").write_text("old")
    run.close()
    (tmp_path / "notes.txt").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    run.model.rmdir()
    run.model.symlink_to(outside)
    with RunFolder.create(tmp_path, {"seed": 2}, overwrite=True) as run:
        assert run.config() == {"seed": 2}
        assert run.metrics_file.read_bytes() == b""
        assert not any(run.checkpoints.iterdir())
        assert not run.model.is_symlink()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (outside / "kept").read_text() == "kept"


def test_overwrite_leaves_a_project_alone_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "network.py").write_text("precious")
    (tmp_path / "config.yaml").write_text("also: precious")
    with pytest.raises(ValueError, match="not a run's files"):
        RunFolder.create(tmp_path, {}, overwrite=True)
    assert (tmp_path / "model" / "network.py").read_text() == "precious"
    assert (tmp_path / "config.yaml").read_text() == "also: precious"


def test_open_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    RunFolder.create(tmp_path, {}).close()
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml, samples\.jsonl missing"):
        RunFolder.open(tmp_path)


def test_damaged_config_and_summary_name_their_file(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {}).close()
    run = RunFolder.open(tmp_path)
    run.config_file.write_text("a: [1\n")
    run.summary_file.write_text('{"kl": ')
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        run.config()
    with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
        run.summary()
    run.summary_file.write_text("[1]")
    with pytest.raises(ValueError, match="not an object"):
        run.summary()


def test_a_second_writer_is_refused_in_and_out_of_the_process(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        RunFolder.create(tmp_path / "run", {}, overwrite=True)
    code = "import sys; from prefero.tracking import RunFolder; RunFolder.open(sys.argv[1], writing=True)"
    other = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert f"in use by process {os.getpid()}" in other.stderr
    RunFolder.open(run.path)  # readers need no lock
    run.close()
    RunFolder.open(run.path, writing=True).close()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    run.close()
    code = """if True:
        import os, signal, sys
        from prefero.tracking import RunFolder
        RunFolder.open(sys.argv[1], writing=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert (run.path / ".lock").exists()
    RunFolder.open(run.path, writing=True).close()
    (run.path / ".lock").write_bytes(b"")  # killed before its id was written
    RunFolder.open(run.path, writing=True).close()


def test_the_lock_of_a_reused_process_id_is_taken_over_but_not_another_machines(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, {}).close()
    run = RunFolder.open(tmp_path, writing=True)
    owner = json.loads((tmp_path / ".lock").read_text())
    run.close()
    (tmp_path / ".lock").write_text(json.dumps(owner | {"host": "elsewhere"}))
    with pytest.raises(ValueError, match=r"machine 'elsewhere'.*delete"):
        RunFolder.open(tmp_path, writing=True)
    if owner["started"] is not None:
        (tmp_path / ".lock").write_text(json.dumps(owner | {"started": "1"}))
        RunFolder.open(tmp_path, writing=True).close()


def test_summary_is_replaced_as_one_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        run.write_summary({"kl": 1.5})

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files_module.os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            run.write_summary({"kl": 2.5})
        monkeypatch.undo()
        assert run.summary()["kl"] == 1.5
        assert names(run.path) == sorted([*NAMES, ".lock"])  # no temporary file stays


def test_summary_is_synced_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        events: list[str] = []
        sync, replace = os.fsync, Path.replace
        monkeypatch.setattr(files_module.os, "fsync", lambda fd: (events.append("fsync"), sync(fd)))
        monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))[1])
        run.write_summary({"kl": 1.0})
        assert events == ["fsync", "replace", "fsync"]


def test_summary_values(tmp_path: Path) -> None:
    @dataclass
    class Part:
        where: Path
        sizes: tuple[int, ...]

    with RunFolder.create(tmp_path / "run", {}) as run:
        run.write_summary({"kl": float("nan"), "rm": torch.tensor(0.5), "part": Part(Path("a/b"), (1, 2))})
        summary = run.summary()
        assert summary["kl"] is None
        assert summary["nonfinite"] == ["kl"]
        assert (summary["rm"], summary["part"]) == (0.5, {"where": "a/b", "sizes": [1, 2]})
        assert summary["versions"]["torch"] == torch.__version__
        with pytest.raises(ValueError, match=r"summary\.model is a object"):
            run.write_summary({"model": object()})


def test_hostile_texts_come_back_as_they_were(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"texts": list(HOSTILE), HOSTILE[0]: "\ud800"}) as run:
        assert run.config() == {"texts": list(HOSTILE), HOSTILE[0]: "\ud800"}
        run.write_summary({"texts": HOSTILE})
        assert run.summary()["texts"] == list(HOSTILE)


def test_secrets_reach_no_file(tmp_path: Path) -> None:
    canary = "canary1234567890canary"
    config = {
        "hub": {"token": canary, "hfToken": canary, "api_key": canary, "nested": {"password": [canary, {"x": canary}]}},
        "url": f"https://user:{canary}@host.example/path",
        "odd_url": f"postgres://u:p@{canary}@host.example/db",
        "query": f"https://host.example/?a=1&access_token={canary}&b=2",
        "text": f"Authorization: Bearer {canary}",
        "free": f"the key is hf_{canary} or sk-{canary}",
        "wandb-secret": canary,
        "pin_password": 12345678901,
    }
    with RunFolder.create(tmp_path / "run", config) as run:
        run.write_summary(config)
        everything = b"".join(path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert canary.encode() not in everything
    assert b"12345678901" not in everything
    written = yaml.safe_load(run.config_file.read_text())
    assert written["url"] == "https://[redacted]@host.example/path"
    assert written["query"] == "https://host.example/?a=1&access_token=[redacted]&b=2"


def test_what_is_no_secret_stays(tmp_path: Path) -> None:
    config = {
        "max_new_tokens": 16, "eos_token": "</s>", "pad_token": "<pad>", "token_ids": [1, 2], "loss_per_token": 0.5,
        "hub": {"token": None, "use_token": True}, "keys": "a", "prompt": "basic understanding of the bearer market",
        "url": "https://host.example/a@b?q=1", "tokenizer": "gpt2",
    }  # fmt: skip
    with RunFolder.create(tmp_path / "run", config) as run:
        assert run.config() == config
