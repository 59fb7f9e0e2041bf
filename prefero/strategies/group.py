"""The processes that share one run: how they meet, and the few things they tell each other. Tensors and JSON only."""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefero.strategies.pulse import Pulse

_GOODBYE = 5.0  # seconds for the process group to end
_LAUNCHED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Share:
    """One process's part of some rows.

    rows: their numbers, as many on every process, so that all of them forward equally often. num_real: how many of them
    count; those behind repeat a row to fill up and are dropped again.
    """

    rows: list[int]
    num_real: int


@dataclass(frozen=True)
class Group:
    """This process among `world_size`; alone it gives back what it is given."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 immutable
    members: Any = None  # torch's process group; None is the one of all processes
    pulse: Pulse | None = None
    patience: timedelta | None = None  # how long to wait for the others

    def apart(self) -> Group:
        """The same processes with a line of their own in main memory, which a background thread may use."""
        if self.world_size == 1:
            return self
        line = dist.new_group(backend="gloo", timeout=self.patience)
        return Group(self.rank, self.world_size, torch.device("cpu"), line, patience=self.patience)

    def share(self, num_rows: int) -> Share:
        """This process's part of `num_rows` rows: consecutive ones, so that joined by rank they are in order again."""
        if num_rows < 1:
            raise ValueError(
                f"there are {num_rows} rows to share out over {self.world_size} processes: give one or more"
            )
        length = -(-num_rows // self.world_size)
        small, longer = divmod(num_rows, self.world_size)
        start = self.rank * small + min(self.rank, longer)
        num_real = small + (self.rank < longer)
        real = list(range(start, start + num_real))
        return Share(real + [real[-1] if real else 0] * (length - num_real), num_real)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes; lies where the tensor lay."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(total, group=self.members)
        return total.to(tensor.device)

    def max(self, tensor: Tensor) -> Tensor:
        """The greatest of the processes' numbers, entry by entry; lies where the tensor lay."""
        if self.world_size == 1:
            return tensor
        greatest = tensor.detach().to(self.device, copy=True).contiguous()
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=self.members)
        return greatest.to(tensor.device)

    def same(self, number: float) -> bool:
        """Whether every process has this number."""
        if self.world_size == 1:
            return True
        greatest, least = self.max(torch.tensor([number, -number], dtype=torch.float64))
        return bool(greatest == -least)

    def wish(self, asked: bool) -> bool:
        """Whether any of the processes asks for something."""
        return bool(self.max(torch.tensor(float(asked))) > 0)

    def agreed(self, number: int) -> int:
        """Rank 0's number, on every process."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0, group=self.members)
        return int(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows [N, ...] of all processes in rank order; only N may differ. Lies where the tensor lay."""
        if self.world_size == 1:
            return tensor
        counts = self.counts(len(tensor))
        padded = torch.zeros(max(counts), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.members)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(tensor.device)

    def gather_json(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all processes in rank order, as JSON brings them back (tuples become lists)."""
        if self.world_size == 1:
            return list(rows)
        text = json.dumps(list(rows)).encode()
        data = self.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        joined: list[Any] = []
        start = 0
        for count in self.counts(len(text)):
            joined += json.loads(data[start : start + count].numpy().tobytes())
            start += count
        return joined

    def counts(self, number: int) -> list[int]:
        """Every process's number, by rank."""
        if self.world_size == 1:
            return [number]
        parts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, torch.tensor([number], dtype=torch.int64, device=self.device), group=self.members)
        return [int(part) for part in parts]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process rank 0's values, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            there = tensor.detach().to(self.device)
            dist.broadcast(there, 0, group=self.members)
            tensor.detach().copy_(there)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            self.counts(0)


def join(timeout: float) -> Group:
    """Joins the process group that torchrun started, or makes one of this process alone.

    timeout: seconds after which a process that waits for another gives up. Raises ValueError when only a part of what
    torchrun sets is there.
    """
    cuda, deadline = torch.cuda.is_available(), timedelta(seconds=timeout)
    if dist.is_initialized():
        return _member(cuda, deadline)
    missing = [name for name in _LAUNCHED_BY if name not in os.environ]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if not missing:
        if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
            # On one machine nobody outside may listen in.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
        dist.init_process_group(backend, timeout=deadline)
        atexit.register(_leave)
    elif len(missing) == len(_LAUNCHED_BY):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=deadline)  # type: ignore[attr-defined]
    else:
        raise ValueError(
            f"{', '.join(missing)} not set in the environment: start with `torchrun --nproc_per_node N -m prefero "
            "...`, or unset the rest to run one process"
        )
    return _member(cuda, deadline)


def _leave() -> None:
    """Ends the process group's threads: one that still lets go of tensors when Python goes down aborts it (SIGABRT)."""
    if dist.is_initialized():
        # Where other processes are gone, or elsewhere, this may wait for them: not for long.
        ending = threading.Thread(target=dist.destroy_process_group, daemon=True)
        ending.start()
        ending.join(_GOODBYE)


ALONE = Group()
"""No other process."""


def _member(cuda: bool, patience: timedelta) -> Group:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pulse = _pulse(rank, world_size)
    if pulse is not None:
        pulse.patience = patience.total_seconds()
    return Group(rank, world_size, device, pulse=pulse, patience=patience)


@cache
def _pulse(rank: int, world_size: int) -> Pulse | None:
    """One for all strategies of this process; none without others, or without a launch that has a store."""
    launched = world_size > 1 and all(name in os.environ for name in _LAUNCHED_BY)
    return Pulse(rank, world_size) if launched else None
