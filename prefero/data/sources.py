"""Rows from files and hubs: read once, checked once, every complaint naming the file, the line and the cure."""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, cast, overload

from prefero.data import reasoning
from prefero.data.parsing import (
    MAX_LINE_BYTES,
    BadRowError,
    check_value,
    json_rows,
    jsonl_rows,
    parquet_rows,
    table_rows,
)

Row: TypeAlias = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".tsv.gz")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Complaint(NamedTuple):
    """A row left out: its line (in a file) or number (in a list), and why."""

    line: int
    why: str


class Rows(Sequence[Row]):
    """Rows that remember where they came from.

    items: the good rows. source: the file, hub name or "rows". lines: for each row its line in the file (its number,
    from 1, elsewhere). bad: the rows left out so far. max_bad_rows: how many may be left out before reading stops.
    """

    def __init__(
        self,
        items: Iterable[Row],
        source: str = "rows",
        *,
        lines: Iterable[int] | None = None,
        bad: Iterable[Complaint] = (),
        max_bad_rows: int = 0,
    ) -> None:
        self.items = list(items)
        self.source = source
        self.lines = list(range(1, len(self.items) + 1) if lines is None else lines)
        self.bad = list(bad)
        self.max_bad_rows = max_bad_rows
        assert len(self.lines) == len(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(
                self.items[index],
                self.source,
                lines=self.lines[index],
                bad=self.bad,
                max_bad_rows=self.max_bad_rows,
            )
        return self.items[index]

    def __repr__(self) -> str:
        return f"Rows({self.source!r}, {len(self)} rows, {len(self.bad)} bad)"

    @property
    def columns(self) -> list[str]:
        """Every column some row has, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.items for name in row))

    def where(self, index: int) -> str:
        """`file:line` of a row."""
        return f"{self.source}:{self.lines[index]}"

    def row_id(self, index: int) -> str:
        """A short name of a row, for ids and messages: the file without its folders, and the line."""
        name = Path(self.source).name if self.source.lower().endswith(SUFFIXES) else self.source
        return f"{name}:{self.lines[index]}"


class Budget:
    """Counts the rows left out of one source and stops when there are more than allowed."""

    def __init__(self, source: str, max_bad_rows: int, bad: Iterable[Complaint] = ()) -> None:
        if max_bad_rows < 0:
            raise ValueError(f"max_bad_rows = {max_bad_rows}: must be 0 or more (0 stops at the first bad row)")
        self.source, self.max_bad_rows, self.bad = source, max_bad_rows, list(bad)

    def spend(self, line: int, why: str) -> None:
        """Leaves the row out, or raises ValueError when the budget is used up."""
        self.bad.append(Complaint(line, why))
        if len(self.bad) > self.max_bad_rows:
            count = f" ({len(self.bad)} bad rows so far)" if self.max_bad_rows else ""
            raise ValueError(
                f"{self.source}:{line}: {why}{count}; fix the line or pass --max-bad-rows N to leave out N such rows"
            )


def nearest(name: str, names: Iterable[str]) -> str:
    """A ready-made hint: the names most like `name`, or nothing."""
    close = difflib.get_close_matches(name, [str(known) for known in names], n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(known) for known in close)}?)" if close else ""


def read_rows(
    source: str | Path,
    *,
    split: str = "train",
    max_bad_rows: int = 0,
    subset: str | None = None,
    data_dir: str | None = None,
) -> Rows:
    """Reads rows from a local file, a folder of one file a split, or a hub data set.

    source: a path ending in .jsonl, .json, .csv, .tsv or .parquet (.jsonl, .csv and .tsv also with .gz), a folder
    holding `<split>.<one of these>`, or "owner/name" on the hub (needs the extra `hub`); `source:split` names both at
    once. "reasoning-gym:TASK?size=500&seed=0" makes prompts (`data.reasoning`). subset, data_dir: the hub data set's
    configuration and folder (hh-rlhf keeps its subsets in folders).
    Raises ValueError, naming the file, the line and the cure, for more than `max_bad_rows` bad rows, for a source that
    is missing, unreadable or without rows.
    """
    if reasoning.names(source):
        return _collect(enumerate(reasoning.rows(str(source)), 1), str(source), max_bad_rows)
    name, split = _named(source, split)
    path = Path(name).expanduser()
    if path.is_dir():
        return _read_file(_split_file(path, split), "train", max_bad_rows)
    if path.exists():
        _no_hub_options(name, subset, data_dir)
        return _read_file(path, split, max_bad_rows)
    if not _HUB_NAME.fullmatch(name) or name.endswith(SUFFIXES):
        raise ValueError(_missing_file(path))
    return _read_hub(name, split, max_bad_rows, subset, data_dir)


def local_file(source: str | Path) -> Path | None:
    """The file that `read_rows` reads; None where it asks the hub or makes the rows."""
    if reasoning.names(source):
        return None
    name, split = _named(source, "train")
    path = Path(name).expanduser()
    if path.is_dir():
        return _split_file(path, split)
    return path if path.is_file() else None


def _named(source: str | Path, split: str) -> tuple[str, str]:
    """A source and its split, which `source:split` names both."""
    name, colon, last = str(source).rpartition(":")
    return (name, last) if colon and not Path(source).expanduser().exists() else (str(source), split)


def as_rows(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int = 0) -> Rows:
    """Any sequence of mappings (a list of dicts, a `datasets.Dataset`) as checked Rows; Rows pass through."""
    if isinstance(rows, Rows):
        return rows
    if isinstance(rows, (str, bytes, Mapping)):
        raise ValueError(
            f"rows must be a sequence of mappings, got {type(rows).__name__}; read files with read_rows(path)"
        )
    return _collect(enumerate(rows, 1), "rows", max_bad_rows)


def require_columns(rows: Rows, columns: Sequence[str]) -> None:
    """Raises ValueError when no row has one of `columns`, listing those present and suggesting the nearest."""
    present = rows.columns
    for name in columns:
        if name not in present:
            raise ValueError(
                f"{rows.source}: no column {name!r}{nearest(name, present)}; columns present: {', '.join(present)}"
            )


def _collect(numbered: Iterable[tuple[int, Any]], source: str, max_bad_rows: int) -> Rows:
    """Checks numbered candidates (a row, or the BadRowError its parser raised) into Rows."""
    budget = Budget(source, max_bad_rows)
    items: list[Row] = []
    lines: list[int] = []
    for line, candidate in numbered:
        try:
            if isinstance(candidate, BadRowError):
                raise candidate
            if not isinstance(candidate, Mapping):
                raise BadRowError(f"a row must be an object with named columns, got {type(candidate).__name__}")
            if not all(isinstance(key, str) for key in candidate):
                raise BadRowError("every column name must be a string")
            check_value(candidate)
        except BadRowError as error:
            budget.spend(line, str(error))
            continue
        items.append(dict(candidate))
        lines.append(line)
    if not items:
        left_out = f": all {len(budget.bad)} were bad, first {budget.bad[0]}" if budget.bad else ""
        raise ValueError(f"{source}: no rows{left_out}; give a data set with at least one row")
    return Rows(items, source, lines=lines, bad=budget.bad, max_bad_rows=max_bad_rows)


def _read_file(path: Path, split: str, max_bad_rows: int) -> Rows:
    name, source = path.name.lower(), str(path)
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if split != "train" and kind != "json":
        raise ValueError(f"split = {split!r}: {source} is one file with one split; name the other split's file instead")
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{source}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    if kind == "parquet":
        return _collect(parquet_rows(path), source, max_bad_rows)
    readers: dict[str, Callable[[IO[bytes]], Iterator[tuple[int, Any]]]] = {
        "jsonl": lambda file: jsonl_rows(file, source),
        "json": lambda file: json_rows(file, source, split),
        "csv": lambda file: table_rows(file, source, ","),
        "tsv": lambda file: table_rows(file, source, "\t"),
    }
    limit = csv.field_size_limit(MAX_LINE_BYTES)  # the default, 128 KiB, is less than one long prompt
    try:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            return _collect(readers[kind](cast(IO[bytes], file)), source, max_bad_rows)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: cannot be read: {error}; check the file or fetch it again") from error
    finally:
        csv.field_size_limit(limit)


def _read_hub(name: str, split: str, max_bad_rows: int, subset: str | None, data_dir: str | None) -> Rows:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f'source = {name!r}: no such file; as a hub data set it needs an extra: pip install "prefero[hub]"'
        ) from error
    try:
        dataset = datasets.load_dataset(name, subset, data_dir=data_dir, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source = {name!r}, split = {split!r}: no such file, and the hub did not give it: {error}; "
            "check the name and the network, or download it and give the local path"
        ) from error
    return _collect(enumerate(dataset, 1), name, max_bad_rows)


def _no_hub_options(source: str, subset: str | None, data_dir: str | None) -> None:
    for key, value in (("subset", subset), ("data_dir", data_dir)):
        if value is not None:
            raise ValueError(f"{key} = {value!r} is for hub data sets, but {source} is a local file; leave it out")


def _split_file(folder: Path, split: str) -> Path:
    found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    names = sorted(path.name for path in folder.iterdir())
    if found:
        raise ValueError(f"{folder}: several files for split {split!r}: {', '.join(p.name for p in found)}; name one")
    raise ValueError(
        f"{folder}: no file for split {split!r}{nearest(split, [name.partition('.')[0] for name in names])}; "
        f"expected {split}.jsonl (or {', '.join(SUFFIXES[1:])}); the folder holds: {', '.join(names[:10]) or 'nothing'}"
    )


def _missing_file(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    if not path.parent.is_dir():
        hint = f" (the folder {str(path.parent)!r} does not exist either)"
    return f"{path}: no such file{hint}; give a path, a folder of splits, or a hub name like owner/name"
