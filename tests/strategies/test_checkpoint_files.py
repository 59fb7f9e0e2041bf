"""Checkpoints of a run on the disk: which stay, which are believed, and what is never followed."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from prefero.strategies import checkpoint
from prefero.strategies.checkpoint import MANIFEST, Checkpoints, DamagedCheckpointError, _sealed
from prefero.strategies.group import Group


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, Group(), keep)
    for step in steps:
        checkpoints.save(step, {"weight": torch.arange(9.0) * step, "flag": torch.tensor(True)}, {"step": step})
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("step-", ".step-")))


def test_the_newest_stay_and_are_what_was_saved(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    found = checkpoints.latest(pytest.fail)
    assert found is not None and found.step == found.state["step"] == 3
    assert torch.equal(found.tensor("weight"), torch.arange(9.0) * 3) and found.tensor("flag").item() is True


def test_what_was_passed_over_as_damaged_does_not_push_out_what_is_written_after_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 6, 10)
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    told: list[str] = []
    found = checkpoints.latest(told.append)
    assert found is not None and found.step == 6 and "step-00000010" in told[0]
    saved(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007"]
    again = checkpoints.latest(pytest.fail)
    assert again is not None and again.step == 7


def test_what_broken_writes_have_left_is_swept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".step-00000001.old").mkdir()
    checkpoints.latest(pytest.fail)
    assert names(tmp_path) == ["step-00000001"]


def test_a_pointer_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    assert checkpoints.latest(pytest.fail) is None
    (tmp_path / "latest.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match="holds no checkpoint any more"):
        checkpoints.latest(pytest.fail)


def listed_outside(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(b"x")
    files = json.loads((folder / MANIFEST).read_text())["content"]["files"]
    files["../outside.safetensors"] = {"size": 1, "sha256": ""}
    (folder / MANIFEST).write_text(_sealed({"checkpoint": folder.name, "files": files}))


def linked(folder: Path) -> None:
    part = next(folder.glob("part-*"))
    part.rename(folder.parent / "elsewhere")
    part.symlink_to(folder.parent / "elsewhere")


def named_by_the_index_alone(folder: Path) -> None:
    index = (folder / "index.json").read_text().replace("part-0-of-1", "part-7-of-9")
    (folder / "index.json").write_text(index)
    files = json.loads((folder / MANIFEST).read_text())["content"]["files"]
    files["index.json"] = {"size": len(index), "sha256": sha256(index.encode()).hexdigest()}
    (folder / MANIFEST).write_text(_sealed({"checkpoint": folder.name, "files": files}))


def a_folder_for_a_file(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


def another_ones(folder: Path) -> None:
    (folder.parent / "step-00000007").mkdir()
    folder.rename(folder.parent / "step-00000007")


@pytest.mark.parametrize(
    "change", [listed_outside, linked, named_by_the_index_alone, a_folder_for_a_file, another_ones]
)
def test_nothing_outside_the_manifests_own_names_is_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    checkpoints = saved(tmp_path, 1)
    change(tmp_path / "step-00000001")
    with pytest.raises(DamagedCheckpointError, match="holds no whole checkpoint"):
        checkpoints.latest(lambda _: None)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), checkpoint._write_part

    def blocked(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_part", blocked)
    checkpoints, weight = Checkpoints(tmp_path, Group()), torch.ones(3)
    checkpoints.save(1, {"weight": weight}, {})
    weight += 1
    assert "step-00000001" not in names(tmp_path), "nobody waited for it"
    may_write.set()
    checkpoints.wait()
    found = checkpoints.latest(pytest.fail)
    assert found is not None and torch.equal(found.tensor("weight"), torch.ones(3))


FULL = """
import resource, sys, torch
from pathlib import Path
from prefero.strategies.checkpoint import Checkpoints
from prefero.strategies.group import Group
checkpoints = Checkpoints(Path(sys.argv[1]), Group())
checkpoints.save(1, {"weight": torch.ones(1000)}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoints.save(2, {"weight": torch.ones(100_000)}, {})
    checkpoints.wait()
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits of a file's size")
def test_a_write_that_the_system_cuts_off_leaves_the_one_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert "could not be written" in done.stdout and "untouched" in done.stdout, done.stdout + done.stderr
    assert names(tmp_path) == ["step-00000001"]
    found = Checkpoints(tmp_path, Group()).latest(pytest.fail)
    assert found is not None and found.tensor("weight").sum() == 1000
