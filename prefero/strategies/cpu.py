"""What this CPU does well: threads, bf16, and the faster of two float32 matrix multiplications."""

from __future__ import annotations

import ctypes
import gc
import os
from functools import lru_cache
from pathlib import Path

import torch

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
# True float32 is wrong by 1e-6 here and bf16 by 4e-3: anything between tells them apart.
_FP32_ERROR = 2e-5


@lru_cache(maxsize=1)
def cpu_facts() -> dict[str, str]:
    """What the kernel says of the first CPU; nothing where it says nothing (not Linux)."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU."""
    facts = cpu_facts()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def cpu_maker() -> str:
    """Who made this CPU: "AuthenticAMD", "GenuineIntel", ..."""
    return cpu_facts().get("vendor_id", "")


def supports_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware; without that bf16 is slower than float32."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags())


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself, so that it is worth using."""
    if device.type == "cpu":
        return supports_bf16()
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


def return_freed_memory() -> None:
    """Lets the C library give large blocks back to the system as soon as they are freed, where it is glibc.

    Left alone it learns to keep blocks of up to 32 MB for later, which is most of what sharing weights out saves.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also ends the learning
    mallopt(mmap_threshold, 1 << 18)


def trim_memory() -> None:
    """Gives freed memory that the C library (glibc) keeps for later back to the system.

    Between sampling and learning, say: what the one has freed comes in other sizes than the other wants, and both would
    add up.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def release_memory() -> None:
    """As `trim_memory`, after objects in circles that nothing refers to any more are gone."""
    gc.collect()
    trim_memory()


def usable_cores() -> int:
    """The cores this process may run on (a container's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(num_parameters: int, threads: int | None = None, sharers: int = 1) -> int:
    """Sets torch's threads for models of this size and returns the number.

    threads: what the user asked for; None is one thread below five million parameters (waiting for each other costs
    tiny models more than it brings) and every usable core above. sharers: processes that divide the cores. Raises
    ValueError below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: give 1 or more, or leave it out")
    chosen = threads or (1 if num_parameters < 5_000_000 else max(1, usable_cores() // sharers))
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


def prefer_onednn_fp32(enabled: bool = True) -> bool:
    """Sends float32 products through oneDNN where that is faster and true float32; returns whether it does.

    On AMD's CPUs torch's default library leaves half of the speed unused; on others it is as fast or faster. The maker
    decides, not a stopwatch: a choice that hangs on how busy the machine is would make equal runs differ. The switch
    is named "bf16", and some CPUs would really compute in bf16, so the error is measured first. `enabled=False` or the
    environment variable PREFERO_ONEDNN=0 leaves torch's default.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not enabled or not available or os.environ.get("PREFERO_ONEDNN") == "0":
        return False
    if cpu_maker() != "AuthenticAMD" or matmul_error("bf16") > _FP32_ERROR:
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
