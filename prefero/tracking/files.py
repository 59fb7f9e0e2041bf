"""Values to JSON, and files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

MAX_LINE_BYTES = 16 * 1024 * 1024


def to_plain(value: Any, where: str = "value") -> Any:
    """The value as dicts, lists, str, int, float, bool and None.

    Mappings, sequences, sets (sorted), dataclasses, enums, paths and anything with `.tolist()` (tensors, arrays) are
    converted. Raises ValueError naming the place of a value that has no such form.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) and type(value) is not str else value
    if isinstance(value, Enum):
        return to_plain(value.value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [to_plain(item, where) for item in sorted(value, key=repr)]
    if isinstance(value, list | tuple):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value), where)
    if hasattr(value, "tolist"):
        return to_plain(value.tolist(), where)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which a run's files cannot hold; convert it to a number or a string"
    )


def finite(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """The plain value with every NaN and infinity as None, and the dotted keys where that happened."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, [path]
    lost: list[str] = []
    if isinstance(value, dict):
        clean: dict[str, Any] = {}
        for key, item in value.items():
            clean[key], more = finite(item, f"{path}.{key}" if path else key)
            lost += more
        return clean, lost
    if isinstance(value, list):
        items = []
        for index, item in enumerate(value):
            kept, more = finite(item, f"{path}[{index}]")
            items.append(kept)
            lost += more
        return items, lost
    return value, lost


def json_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """UTF-8 JSON of a plain, finite value; a lone surrogate becomes its JSON escape, so it comes back as it was."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    # "backslashreplace" writes a surrogate as \udc80, and in JSON it can only stand inside a string, where that is
    # exactly the escape a reader expects.
    return text.encode("utf-8", "backslashreplace")


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces the file as one act: temporary file, fsync, rename, fsync of the folder. A reader never sees a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut (does nothing where folders cannot be opened)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file in order; None for a line that is damaged, too long or not an object.

    A last line cut off by a crash is such a damaged line: no proper beginning of a JSON object is one itself.
    """
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):  # step over the remainder, keeping none of it
                    line = file.readline(MAX_LINE_BYTES)
                yield None
            elif line.strip():
                yield parse_row(line)


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object on one line of UTF-8, or None."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a 5000-digit number, or brackets without end
        return None
    return row if isinstance(row, dict) else None
