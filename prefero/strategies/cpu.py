"""What this CPU does well: threads, bf16, and the faster of two float32 matrix multiplications."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path

import torch

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
# True float32 is wrong by 1e-6 here and bf16 by 4e-3: anything between tells them apart.
_FP32_ERROR = 2e-5
_WORTHWHILE = 1.15


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The instruction sets the kernel names for this CPU; empty where it names none (not Linux)."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return frozenset()
    for line in file.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def supports_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without that bf16 is slower than float32."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags())


def usable_cores() -> int:
    """The cores this process may run on (a container's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(num_parameters: int, threads: int | None = None) -> int:
    """Sets torch's threads for models of this size and returns the number.

    threads: what the user asked for; None is one thread below five million parameters (waiting for each other costs
    tiny models more than it brings) and every usable core above. Raises ValueError below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: give 1 or more, or leave it out")
    chosen = threads or (1 if num_parameters < 5_000_000 else usable_cores())
    torch.set_num_threads(chosen)
    return chosen


def matmul_error(precision: str) -> float:
    """The largest relative error of a 64 x 512 x 512 float32 product against float64 under a oneDNN setting."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(64, 512, generator=generator)
    right = torch.randn(512, 512, generator=generator)
    exact = left.double() @ right.double()
    with _Route(precision):
        product = left @ right
    return float((product.double() - exact).abs().max() / exact.abs().max())


def matmul_seconds(precision: str, repeats: int = 5) -> float:
    """The best time of a product of the shape of a small model's feed-forward layer."""
    left, right = torch.randn(512, 576), torch.randn(576, 1536)
    best = float("inf")
    with _Route(precision):
        _ = left @ right
        for _ in range(repeats):
            start = time.perf_counter()
            _ = left @ right
            best = min(best, time.perf_counter() - start)
    return best


def prefer_onednn_fp32(enabled: bool = True) -> bool:
    """Sends float32 products through oneDNN where that is true float32 and clearly faster; returns whether it does.

    On AMD CPUs torch's default library leaves half of the speed unused. The switch is named "bf16", and on CPUs with
    AMX it really would compute in bf16: so the error is measured first, then the time. `enabled=False` or the
    environment variable PREFERO_ONEDNN=0 leaves torch's default.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not enabled or not available or os.environ.get("PREFERO_ONEDNN") == "0":
        return False
    if matmul_error("bf16") > _FP32_ERROR:
        return False
    if matmul_seconds("ieee") < _WORTHWHILE * matmul_seconds("bf16"):
        return False
    _set_route("bf16")
    return True


def _set_route(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


class _Route:
    """A oneDNN float32 setting inside, the former one after."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        self.before: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        _set_route(self.precision)

    def __exit__(self, *_: object) -> None:
        _set_route(self.before)
