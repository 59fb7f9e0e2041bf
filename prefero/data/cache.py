"""The upkeep of the cache folder: its lock, and the markers that say what is finished and whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: two fetchers at once are then the user's own care
    fcntl = None  # type: ignore[assignment]

MARKER = "prefero-fetch.json"


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the cache for one writer; the kernel lets go when the process dies, so a lock never goes stale.

    Raises ValueError when another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "fetch.lock"
    with path.open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another `prefero fetch` is filling {root} now; wait until it has finished and run yours again "
                    "(what it fetched is not fetched twice)"
                ) from None
        yield


def write_marker(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the finished-marker: the facts given, and the SHA-256 of every file in the folder."""
    files = {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MARKER, None)
    (folder / MARKER).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The folder's finished-marker, or None when there is none that can be read."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("files"), dict) else None


def damaged_files(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Names of the files that the marker lists and that are gone or changed."""
    files = marker["files"]
    return [n for n in files if not (folder / n).is_file() or sha256_of(folder / n) != files[n]]
