"""What both kinds of data set need."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefero.data.formats import Table
from prefero.data.sources import Rows, as_rows


def is_rank_0() -> bool:
    """Whether this process is the one that prints: the only one, or rank 0 of a process group."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def tolerant_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Rows, int]:
    """The rows and how many of them may be bad: what their reader allowed, or one in a hundred of a plain sequence.

    The public preference sets hold a few empty and equal answers among many thousand rows, and a script that hands
    them over unread has no place to say so.
    """
    if isinstance(rows, Rows):
        return rows, rows.max_bad_rows
    listed = list(rows)
    return as_rows(listed, max_bad_rows=len(listed) // 100), len(listed) // 100


def report_left_out(table: Table[Any]) -> None:
    """Warns, on rank 0, how many rows a data set leaves out and why."""
    if is_rank_0() and (table.bad or table.dropped):
        first = f"; first: line {table.bad[0].line}, {table.bad[0].why}" if table.bad else ""
        ties = f", {table.dropped['tie']} ties" if table.dropped.get("tie") else ""
        warnings.warn(f"{table.source}: left out {len(table.bad)} bad rows{ties}{first}", stacklevel=3)


def padded(ids: Sequence[int], length: int, fill: int) -> Tensor:
    """Ids [length] as a tensor, filled up on the right."""
    return torch.tensor([*ids, *[fill] * (length - len(ids))], dtype=torch.long)
