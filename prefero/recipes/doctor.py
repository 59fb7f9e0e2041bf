"""`prefero doctor`: what this machine and installation can do, and what is missing for more."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prefero.cache import cache_root
from prefero.data.cache import read_marker
from prefero.data.fetch import ITEMS

_NEEDED = {"torch": (2, 10), "transformers": (5, 3), "jinja2": (3, 1, 6)}
_EXTRAS = {"gguf": "gguf", "datasets": "hub", "pyarrow": "parquet", "vaderSentiment": "eval"}


def doctor() -> None:
    """Prints one line a check; raises ValueError at the end when something needed is missing or too old."""
    problems = list(_required())
    for line in (*_optional(), *_fetched()):
        print(line)
    if problems:
        raise ValueError("; ".join(problems))
    for line in _machine():
        print(line)
    print("ready: try `prefero quickstart`")


def _required() -> Iterator[str]:
    print(f"python {sys.version.split()[0]}")
    for package, floor in _NEEDED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            yield f"{package} is not installed; pip install prefero brings it"
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".") if part.isdigit())
        print(f"{package} {found}")
        if numbers < floor:
            needed = ".".join(map(str, floor))
            yield f"{package} {found} is too old (known security holes); pip install '{package}>={needed}'"


def _machine() -> Iterator[str]:
    import torch  # only now: that it is there was looked up first

    from prefero.rollout.native import kernels
    from prefero.strategies.cpu import prefer_onednn_fp32, supports_bf16

    yield f"cpu: {os.cpu_count()} cores, bf16 {'yes' if supports_bf16() else 'no (fp32 is used)'}"
    route = "oneDNN" if prefer_onednn_fp32() else "the default library"
    yield f"fp32 matrix products: {route} (the faster exact one here)"
    compiled = kernels.available(torch.device("cpu"), torch.float32)
    yield "sampling: " + ("with compiled kernels" if compiled else "slower, for want of a C++ compiler (c++, or $CXX)")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield f"memory: {memory / 2**30:.1f} GiB" if memory else "memory: unknown"
    yield f"disk free here: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        yield f"gpu: {torch.cuda.get_device_name()} ({torch.cuda.device_count()} in all)"
    else:
        yield f"gpu: none ({'Apple MPS present' if torch.backends.mps.is_available() else 'the CPU is used'})"


def _optional() -> Iterator[str]:
    for module, extra in _EXTRAS.items():
        present = importlib.util.find_spec(module) is not None
        yield f"extra {extra}: " + ("yes" if present else f'no; pip install "prefero[{extra}]"')


def _fetched() -> Iterator[str]:
    yield f"cache: {cache_root()}"
    for name, item in ITEMS.items():
        present = read_marker(cache_root() / item.target) is not None
        yield f"  {name}: " + ("yes" if present else f"no; `prefero fetch {name}`")
