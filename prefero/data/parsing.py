"""From bytes to candidate rows: strict JSON, JSON lines, CSV, TSV and parquet.

Every reader yields (line or row number, candidate); a candidate is a parsed value or the BadRowError it raised, so that
whoever counts bad rows can leave it out and go on.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

MAX_LINE_BYTES = 64 * 2**20  # a longer line is not a row: it is a file without newlines, or a gzip bomb
_INT64 = 2**63


class BadRowError(ValueError):
    """One row cannot be used; the message says why, the reader adds where and the cure."""


def check_value(value: Any, where: str = "", depth: int = 0) -> None:
    """Raises BadRowError for NaN, infinity, integers beyond 64 bits, NUL, lone surrogates and deep nesting."""
    label = f"column {where!r}: " if where else ""
    if isinstance(value, str):
        if "\0" in value:
            raise BadRowError(f"{label}the text holds a NUL character")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRowError(f"{label}the text holds bytes that are not UTF-8, or a lone surrogate") from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(f"{label}{value} is not a finite number")
    elif isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise BadRowError(f"{label}the integer does not fit in 64 bits")
    elif isinstance(value, (Mapping, list, tuple)):
        if depth >= 32:
            raise BadRowError(f"{label}nested more than 32 levels deep")
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(key, str):
                check_value(key, depth=depth + 1)
            check_value(item, where or str(key), depth + 1)


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no duplicate keys. Raises BadRowError."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise BadRowError("nested too deeply") from error
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise BadRowError(f"not valid JSON: {what}{' (the line looks cut short)' if cut else ''}") from error
    except BadRowError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadRowError(f"not valid JSON: {error}") from error


def _refuse_constant(name: str) -> Any:
    raise BadRowError(f"{name} is not JSON; write null or a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRowError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return row


def _lines(file: IO[bytes], source: str) -> Iterator[bytes]:
    """Lines cut at "\n" alone (str.splitlines would also cut at U+2028 inside a JSON string), of bounded length."""
    first = True
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"{source}: a line is longer than {MAX_LINE_BYTES // 2**20} MiB; is this one row a line?")
        if first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{source}:1: the file is UTF-16; save it as UTF-8")
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False


def jsonl_rows(file: IO[bytes], source: str) -> Iterator[tuple[int, Any]]:
    """One JSON value a line; blank lines are skipped."""
    for number, line in enumerate(_lines(file, source), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line.decode("utf-8"))
        except BadRowError as error:
            yield number, error
        except UnicodeDecodeError as error:
            yield number, BadRowError(f"not UTF-8 (byte {error.start + 1} of the line)")


def table_rows(file: IO[bytes], source: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """A header and one row a line (quoted cells may span lines), every cell a string."""
    # undecodable bytes become surrogates here and a BadRowError in check_value, so the row structure survives them
    text = (line.decode("utf-8", "surrogateescape") for line in _lines(file, source))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, BadRowError(f"not a valid row: {error}")
            line = reader.line_num + 1
            continue
        if cells and header is None:
            header = cells
            if len(set(header)) < len(header) or not all(name.strip() for name in header):
                raise ValueError(f"{source}:{line}: the header needs distinct, non-empty column names, got {header}")
        elif cells and header is not None:
            fits = len(cells) == len(header)
            yield (
                line,
                (
                    dict(zip(header, cells, strict=True))
                    if fits
                    else BadRowError(f"{len(cells)} cells where the header has {len(header)} columns")
                ),
            )
        line = reader.line_num + 1


def json_rows(file: IO[bytes], source: str, split: str) -> Iterator[tuple[int, Any]]:
    """One JSON array of rows, or an object holding it under the split's name or "data"; or JSON lines after all."""
    data = file.read()
    try:
        document = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except BadRowError as error:
        if "Extra data" in str(error):
            yield from jsonl_rows(io.BytesIO(data), source)
            return
        raise ValueError(
            f"{source}: {error}; a .json file must hold one array of rows (one row a line is .jsonl)"
        ) from error
    if isinstance(document, Mapping):
        key = split if split in document else "data"
        document = document.get(key, [document])
    if not isinstance(document, list):
        raise ValueError(f"{source}: must hold an array of rows, got {type(document).__name__}")
    yield from enumerate(document, 1)


def parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a parquet file; needs the extra `parquet`."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f'{path}: reading parquet needs an extra: pip install "prefero[parquet]"') from error
    arrow_error = importlib.import_module("pyarrow").ArrowException
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, ValueError, arrow_error) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}; check the file or fetch it again") from error
