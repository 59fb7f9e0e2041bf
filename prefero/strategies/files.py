"""Tensor files: written whole or not at all, read without running anything."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError  # the name of an error; nothing is unpickled
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Writes named tensors, as safetensors when the path says so, else in torch's format."""
    if path.suffix == ".safetensors":
        # safetensors refuses shared memory, so each of two tied names gets its own copy.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        _atomically(path, lambda file: save_file(copies, file, metadata={"format": "pt"}))
    else:
        write_object({name: tensor.detach() for name, tensor in state.items()}, path)


def write_object(content: Any, path: Path) -> None:
    """Writes tensors and plain containers of numbers in torch's format."""
    _atomically(path, lambda file: torch.save(content, file))


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path, map_location: Any = None) -> dict[str, Tensor]:
    """Named tensors of a file. Raises ValueError when it is missing, damaged or holds anything else."""
    _check_exists(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device=str(map_location or "cpu"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    state = read_object(path, map_location)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} does not hold named tensors: give a file that save_model wrote")
    return state


def read_object(path: Path, map_location: Any = None) -> Any:
    """Tensors and plain containers from torch's format, never code. Raises ValueError on anything else."""
    _check_exists(path)
    try:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and numbers (code to run, perhaps)") from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or not a torch file: {reason}") from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the path of a saved checkpoint")
