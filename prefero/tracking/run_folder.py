"""The folder a run leaves behind: the same seven names, whatever the command."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from prefero.tracking.files import finite, json_bytes, read_rows, sync_folder, to_plain, write_atomic
from prefero.tracking.jsonl import JsonlTracker
from prefero.tracking.lock import FolderLock
from prefero.tracking.redaction import redact

# metrics.jsonl comes first when a run is made and last when it is removed: it is what tells a run's folder from a
# project that happens to have a config.yaml and a model/ in it.
_FILES = ("metrics.jsonl", "config.yaml", "samples.jsonl", "summary.json", "report.html")
_FOLDERS = ("checkpoints", "model")
_PACKAGES = ("prefero", "torch", "transformers", "peft", "tokenizers", "numpy")
_NO_REPORT = b"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Report not written yet</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'"></head>
<body><p>The report is written when the run ends.</p>
<p>To write it now: <code>prefero report</code> and the name of this folder.</p></body></html>
"""


def versions() -> dict[str, str]:
    """The versions that shape a run's numbers: Python, the platform and the packages (without importing them)."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class RunFolder:
    """A run on disk: config.yaml, metrics.jsonl, samples.jsonl, summary.json, report.html, checkpoints/, model/.

    Made by `RunFolder.create` (for the one process that writes; use it as a context manager or call `close`) or by
    `RunFolder.open` (to read, also while the run goes on).
    """

    def __init__(self, path: Path, lock: FolderLock | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False) -> RunFolder:
        """Makes the folder and writes the config, secrets redacted.

        overwrite: removes an earlier run's own files first, and nothing else. Raises ValueError when the folder holds
        a run already, is being written by another process, or is a file.
        """
        folder = Path(path).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give the name of a folder with --out")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FolderLock(folder)
        try:
            if held := [name for name in (*_FILES, *_FOLDERS) if _holds(folder / name)]:
                _make_room(folder, held, overwrite)
            run = cls(folder, lock)
            run._lay_out(config)
        except BaseException:
            lock.release()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path, *, writing: bool = False) -> RunFolder:
        """Opens a run that exists; writing: hold it for this process, to go on with it.

        Raises ValueError naming the files that are missing.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"there is no run folder {folder}; give the folder that a run wrote with --out")
        if missing := [name for name in _FILES if name != "report.html" and not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} is not a run folder: {', '.join(missing)} missing; "
                "give the folder that a run wrote with --out"
            )
        return cls(folder, FolderLock(folder) if writing else None)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def config(self) -> Any:
        """The config as it was written (secrets are gone). Raises ValueError when the file is damaged."""
        try:
            return yaml.safe_load(self.config_file.read_bytes())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{self.config_file} cannot be read as YAML: {error}") from error

    def summary(self) -> dict[str, Any]:
        """The numbers a run ended with; before that only its command and the versions.

        Raises ValueError when the file is damaged.
        """
        try:
            summary = json.loads(self.summary_file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.summary_file} cannot be read as JSON: {error}") from error
        if not isinstance(summary, dict):
            raise ValueError(
                f"{self.summary_file} holds a {type(summary).__name__}, not an object; run the command again"
            )
        return summary

    def metrics(self) -> Iterator[dict[str, Any] | None]:
        """The rows of metrics.jsonl, None for a damaged line."""
        return read_rows(self.metrics_file)

    def samples(self) -> Iterator[dict[str, Any] | None]:
        """The rows of samples.jsonl, None for a damaged line."""
        return read_rows(self.samples_file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replaces summary.json as one act; secrets are redacted, NaN becomes null (its key under "nonfinite").

        `versions` is added unless given. Raises ValueError for a value that JSON cannot hold.
        """
        clean, lost = finite(redact(to_plain(dict(summary), "summary")))
        clean.setdefault("versions", versions())
        if lost:
            clean["nonfinite"] = lost
        write_atomic(self.summary_file, json_bytes(clean, indent=2) + b"\n")

    def write_report(self, html: str) -> Path:
        """Replaces report.html as one act and returns its path."""
        write_atomic(self.report_file, html.encode("utf-8", "backslashreplace"))
        return self.report_file

    def tracker(self, stage: str = "") -> JsonlTracker:
        """A tracker that appends to this run's metrics.jsonl and samples.jsonl."""
        return JsonlTracker(self.metrics_file, self.samples_file, stage=stage)

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lay_out(self, config: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(redact(to_plain(dict(config), "config")), sort_keys=False, allow_unicode=True, width=120)
        for file in (self.metrics_file, self.samples_file):
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        write_atomic(self.config_file, text.encode("utf-8", "backslashreplace"))
        self.write_summary({})
        write_atomic(self.report_file, _NO_REPORT)
        for folder in (self.checkpoints, self.model):
            folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.path)


def _holds(path: Path) -> bool:
    """Whether a name is taken by more than an empty folder."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()


def _make_room(folder: Path, held: list[str], overwrite: bool) -> None:
    if not overwrite:
        raise ValueError(
            f"{folder} already holds a run ({', '.join(held)}); "
            "give another folder with --out, or --overwrite to replace it"
        )
    if _FILES[0] not in held:
        raise ValueError(
            f"{folder} holds {', '.join(held)} but no {_FILES[0]}, so these are not a run's files and "
            "--overwrite leaves them alone; give another folder with --out"
        )
    for name in (*_FOLDERS, *reversed(_FILES)):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
