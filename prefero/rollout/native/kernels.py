"""What a decoding step does between its matrix products, in C++ where a compiler is at hand (kernels.cpp).

It is compiled once (a second), for the processor it runs on, into the user's cache. Without a compiler, or on another
device, torch does the same in more and smaller steps.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefero.cache import cache_root

_FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-std=c++17", "-fassociative-math", "-fno-signed-zeros",
          "-fno-trapping-math", "-fno-math-errno"]  # fmt: skip
_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "decode": [_P, _I, _P, _I, _P, _I, *[_P] * 6, *[_I] * 6, _F],
    "norm": [_P, _P, _F, _P, _I, _I],
    "gate": [_P, _I, _P, _I, _P, _I, _I],
}


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for tensors of this kind."""
    return device.type == "cpu" and dtype in _NAMES and _library() is not None


def decode(
    query: Tensor, key: Tensor, value: Tensor, turn: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    lengths: Tensor, scaling: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of one new token of each text, whose key and value are put where they belong.

    query: [B, heads, D]; key, value: [B, fewer heads, D], rows perhaps apart. turn: cosines and sines [B, D] of rotary
    embeddings, applied first. keys, values: [slots, heads, room, D]. lengths: [B] before it, below room (`Decode` sees
    to that). Returns [B, heads * D]. Raises ValueError for tensors that do not fit together.
    """
    texts, heads, dim = query.shape
    query, key, value = (_rows(part) for part in (query, key, value))
    angles = [] if turn is None else [part.float().contiguous() for part in turn]
    cosine, sine = [part.data_ptr() for part in angles] or (None, None)
    _check({key.dtype, value.dtype, keys.dtype, values.dtype} == {query.dtype}, "tensors of one precision")
    _check(lengths.dtype is torch.int64 and lengths.shape == (texts,), "a length for each text")
    _check(all(part.is_contiguous() for part in (keys, values, lengths)), "keys, values and lengths in one piece")
    _check(keys.shape == values.shape and len(keys) >= texts and keys.shape[3] == dim, "a slot for each text")
    _check(key.shape == value.shape == (texts, keys.shape[1], dim) and heads % keys.shape[1] == 0, "heads that fit")
    _check(all(part.shape == (texts, dim) for part in angles), "an angle for each number of a head")
    out = torch.empty(texts, heads * dim, dtype=query.dtype)
    _library_for("decode", query.dtype)(
        query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0),
        cosine, sine, keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), out.data_ptr(), texts, heads,
        keys.shape[1], dim, keys.shape[2], window or 0, scaling,
    )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Root mean square norm (arXiv:1910.07467) of float32 rows [..., D], in the precision that is wanted."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    dim = x.shape[-1]
    _check(
        x.dtype is weight.dtype is torch.float32 and weight.shape == (dim,), "float32 rows and a weight of their size"
    )
    _library_for("norm", dtype)(
        x.data_ptr(), weight.data_ptr(), epsilon, out.data_ptr(), x.numel() // dim, dim
    )  # fmt: skip
    return out


def gate(gates: Tensor, through: Tensor) -> Tensor:
    """SiLU(gates) * through, [B, D] each, rows perhaps apart (arXiv:2002.05202)."""
    out = torch.empty(gates.shape, dtype=gates.dtype)
    _check(gates.shape == through.shape and gates.dtype is through.dtype, "gates and what they let through alike")
    gates, through = _rows(gates), _rows(through)
    _library_for("gate", gates.dtype)(
        gates.data_ptr(), gates.stride(0), through.data_ptr(), through.stride(0), out.data_ptr(), *gates.shape
    )
    return out


def _check(fits: bool, wanted: str) -> None:
    """What C++ reads it does not look at."""
    if not fits:
        raise ValueError(f"give {wanted}")


def _rows(tensor: Tensor) -> Tensor:
    """As it is, where each row is in one piece."""
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


@cache
def _library_for(function: str, dtype: torch.dtype) -> Any:
    found = getattr(_library(), f"{function}_{_NAMES[dtype]}")
    found.argtypes, found.restype = _ARGUMENTS[function], None
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    if os.environ.get("PREFERO_KERNELS") == "0":
        return None
    command = shlex.split(os.environ.get("CXX") or "c++")
    compiler = shutil.which(command[0])
    if compiler is None:
        return None
    source = resources.files("prefero.rollout.native").joinpath("kernels.cpp").read_text(encoding="utf-8")
    changed = str(Path(compiler).stat().st_mtime_ns)  # a new version of it
    told = "\n".join([source, *command, compiler, changed, *_FLAGS, platform.machine(), _processor()])
    name = f"{hashlib.sha256(told.encode()).hexdigest()[:20]}.so"
    try:
        folder = cache_root() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours_alone(folder):
            return _loaded(command, source, folder / name)
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        with tempfile.TemporaryDirectory() as private:  # once loaded, a library needs no file
            return _loaded(command, source, Path(private) / name)
    except (OSError, subprocess.SubprocessError):
        return None


def _ours_alone(path: Path) -> bool:
    """Whether nobody else could have put something there: what is loaded runs."""
    told = path.stat()
    return not hasattr(os, "geteuid") or (told.st_uid == os.geteuid() and not told.st_mode & 0o022)


def _loaded(command: list[str], source: str, home: Path) -> ctypes.CDLL:
    if not (home.is_file() and _ours_alone(home)):
        _compile(command, source, home)
    return ctypes.CDLL(str(home))


def _compile(command: list[str], source: str, home: Path) -> None:
    """Puts the library where it is looked for, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        made, code = Path(folder) / "kernels.so", Path(folder) / "kernels.cpp"
        code.write_text(source, encoding="utf-8")
        for more in (["-fopenmp"], []):  # some compilers come without it
            done = subprocess.run(  # noqa: S603 - the user's own compiler on our own source
                [*command, *_FLAGS, *more, str(code), "-o", str(made)], check=False, capture_output=True, timeout=120
            )
            if done.returncode == 0:
                made.replace(home)
                return
        raise OSError(done.stderr.decode(errors="replace")[:500])


def _processor() -> str:
    """What the processor can do: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
