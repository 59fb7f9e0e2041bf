"""Checkpoints of a run: written whole or not at all, checked before they are believed, readable by any number of
processes.

A checkpoint is a folder of safetensors and JSON: `part-R-of-N.safetensors` holds what process R had of every tensor,
`index.json` says where the pieces of each tensor lie, `state.json` holds everything that is no tensor, and
`manifest.json` the size and SHA-256 of them all. It is made under a temporary name; every process syncs its part,
reads it back from the disk and compares it; then the folder is renamed, and only then named by the pointer file
`latest.json`; older ones go last. Rank 0 chooses the checkpoint to go on from, for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from prefero.faults import fault
from prefero.strategies.group import Group

POINTER = "latest.json"
MANIFEST = "manifest.json"
_INDEX = "index.json"
_STATE = "state.json"
_BLOCK = 1 << 20
_NAME = re.compile(r"part-\d+-of-\d+\.safetensors|index\.json|state\.json")
"""What a manifest may list: names inside the folder, never a way out of it."""


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not what was written: the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class _Piece:
    """Rows `start` to `start + length` of a tensor, as one process holds them."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int
    length: int


def _piece(tensor: Tensor, rank: int) -> _Piece | None:
    """What this process has to write of a tensor; whole tensors are rank 0's to write."""
    if not isinstance(tensor, DTensor):
        whole = tensor.detach()
        return _Piece(whole, tuple(whole.shape), 0, whole.shape[0] if whole.dim() else 1) if rank == 0 else None
    local = tensor.to_local().detach()
    start, length = _own_rows(tensor)
    return _Piece(local, tuple(tensor.shape), start, length) if length else None


def _own_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row and the number of rows that this process holds of a tensor shared out over its first dimension."""
    mesh = tensor.device_mesh
    size, rank = mesh.size(), mesh.get_local_rank()
    longest = -(-tensor.shape[0] // size)  # as torch.chunk cuts
    start = min(rank * longest, tensor.shape[0])
    return start, min(longest, tensor.shape[0] - start)


class Checkpoints:
    """The checkpoints of one run (or stage), below `folder`.

    keep: how many of them stay. background: writing goes on while training does; the next save, and `wait`, wait for
    it.
    """

    def __init__(self, folder: Path, group: Group, keep: int = 2, background: bool = True) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: give 1 or more")
        self.folder = folder
        self.group = group.apart() if background else group
        self.keep = keep
        self.background = background
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Saves the tensors (sharded or whole) and the state (plain values, rank 0's) as the checkpoint of this step.

        Every process must call it. What is written are copies made before this returns. Raises OSError (a full disk) of
        this save, or in the background of the one before; a checkpoint that failed leaves nothing behind.
        """
        self.wait()
        fault("checkpoint")
        pieces: dict[str, _Piece] = {}
        for name, tensor in tensors.items():
            piece = _piece(tensor, self.group.rank)
            if piece is not None:
                copy = torch.empty_like(piece.tensor, device="cpu", memory_format=torch.contiguous_format)
                pieces[name] = _Piece(copy.copy_(piece.tensor), piece.shape, piece.start, piece.length)
        text = json.dumps(state)  # now: it may change while the thread writes
        if not self.background:
            self._write(step, pieces, text)
            return
        self._writer = threading.Thread(target=self._write_aside, args=(step, pieces, text), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until what is being written lies on the disk; raises what went wrong there."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_aside(self, step: int, pieces: dict[str, _Piece], state: str) -> None:
        try:
            self._write(step, pieces, state)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that trains, which raises it
            self._error = error

    def _write(self, step: int, pieces: dict[str, _Piece], state: str) -> None:
        rank, size = self.group.rank, self.group.world_size
        final = self.folder / f"step-{step:08d}"
        part = final.with_name(f".{final.name}.part")
        file = part / f"part-{rank}-of-{size}.safetensors"
        problem = ""
        if rank == 0:
            try:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(mode=0o700, parents=True)
            except OSError as error:
                problem = _told(error)
        self.group.wait()
        facts: dict[str, Any] = {}
        try:
            fault("write")
            facts = _write_part(file, {name: piece.tensor for name, piece in pieces.items()})
        except (OSError, SafetensorError, DamagedCheckpointError) as error:
            problem = problem or _told(error)
        # Every process learns of every other's trouble, and all of them give up together.
        where = {name: [list(p.shape), p.start, p.length] for name, p in pieces.items()}
        reports = self.group.gather_json([[file.name, problem, where, facts]])
        troubles = [report[1] for report in reports if report[1]]
        if not troubles and rank == 0:
            try:
                self._commit(part, final, {name: facts for name, _, _, facts in reports}, _index(reports), state)
            except (OSError, DamagedCheckpointError) as error:
                troubles = [_told(error)]
        told = self.group.gather_json([troubles])[0]
        if told:
            if rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"the checkpoint {final} could not be written: {told[0]}; the one before it is untouched")

    def _commit(self, part: Path, final: Path, parts: dict[str, Any], index: str, state: str) -> None:
        """Makes a checkpoint of what all processes have written; parts: what each of their files is, read back."""
        fault("manifest")
        for name, text in ((_INDEX, index), (_STATE, state)):
            _write_text(part / name, text)
        files = parts | {name: _facts(part / name) for name in (_INDEX, _STATE)}
        _write_text(part / MANIFEST, _sealed({"checkpoint": final.name, "files": files}))
        _sync(part)
        fault("rename")
        aside = final.with_name(f".{final.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():  # the same step again, after a resume from before it because this one was damaged
            final.replace(aside)
        part.replace(final)
        _sync(self.folder)
        verify(final, believed=parts)
        shutil.rmtree(aside, ignore_errors=True)
        fault("pointer")
        pointer = self.folder / f".{POINTER}.part"
        _write_text(pointer, _sealed({"checkpoint": final.name}))
        pointer.replace(self.folder / POINTER)
        _sync(self.folder)
        fault("rotate")
        folders = _folders(self.folder)
        own = folders.index(final)
        # What is numbered higher was found damaged when the run went on from before it.
        for old in [*folders[:own], *folders[own + self.keep :]]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, the same for every process; None where none was ever finished.

        say: told of every one that is passed over, and why. Raises DamagedCheckpointError when there are some and all
        are damaged, or some must have been there: nothing is begun again in silence.
        """
        found, trouble = "", ""
        if self.group.rank == 0:
            try:
                found = self._newest(say)
            except DamagedCheckpointError as error:
                trouble = str(error)
        found, trouble = self.group.gather_json([[found, trouble]])[0]
        if trouble:
            raise DamagedCheckpointError(trouble)
        return Checkpoint(self.folder / found) if found else None

    def _newest(self, say: Callable[[str], None]) -> str:
        """The name of the newest whole checkpoint, or nothing; sweeps what broken writes have left."""
        for left in (*self.folder.glob(".step-*.part"), *self.folder.glob(".step-*.old")):
            shutil.rmtree(left, ignore_errors=True)
        folders = _folders(self.folder)
        if not folders and (self.folder / POINTER).exists():
            raise DamagedCheckpointError(
                f"{self.folder} holds no checkpoint any more, although {POINTER} names one. Bring one back from a "
                "backup, or begin again with --overwrite"
            )
        named = _named_by_pointer(self.folder, say) if folders else None
        troubles = []
        for folder in folders:
            try:
                verify(folder)
            except DamagedCheckpointError as error:
                troubles.append(str(error))
                say(f"{error}; trying the one before")
                continue
            if named is not None and folder.name != named:
                say(f"the pointer {self.folder / POINTER} names {named}, the newest whole checkpoint is {folder.name}")
            return folder.name
        if troubles:
            raise DamagedCheckpointError(
                f"{self.folder} holds no whole checkpoint: {'; '.join(troubles)}. Bring one back from a backup, or "
                "begin again with --overwrite"
            )
        return ""


class Checkpoint:
    """A whole checkpoint, to read from; its files stay open as long as it is held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = int(folder.name.partition("-")[2])
        self.state: dict[str, Any] = json.loads((folder / _STATE).read_bytes())
        self._index: dict[str, Any] = json.loads((folder / _INDEX).read_bytes())
        self._open: dict[str, Any] = {}

    def names(self, prefix: str = "") -> Iterator[str]:
        """The names of the tensors that start with `prefix`, in order."""
        return (name for name in sorted(self._index) if name.startswith(prefix))

    def tensor(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor in main memory: whole, or laid out as `like` is, of which only this process's rows are read.

        Raises ValueError when the checkpoint has no such tensor, or one of another shape than `like`.
        """
        if name not in self._index:
            raise ValueError(f"{self.folder} holds no tensor {name}: it was written by another version or config")
        entry = self._index[name]
        shape = tuple(entry["shape"])
        if like is not None and tuple(like.shape) != shape:
            raise ValueError(f"{self.folder} holds {name} of shape {list(shape)}, the run's has {list(like.shape)}")
        if not isinstance(like, DTensor):
            return self._rows(entry, name, 0, shape[0] if shape else 1)
        start, length = _own_rows(like)
        local = self._rows(entry, name, start, length).to(like.to_local().device)
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _rows(self, entry: Mapping[str, Any], name: str, start: int, length: int) -> Tensor:
        found = []
        for file, first, count in entry["pieces"]:
            low, high = max(start, first), min(start + length, first + count)
            if low >= high:
                continue
            tensors = self._file(file)
            if not entry["shape"]:
                return tensors.get_tensor(name)  # type: ignore[no-any-return]
            found.append(tensors.get_slice(name)[low - first : high - first])
        if not found:
            return self._file(entry["pieces"][0][0]).get_slice(name)[0:0]  # type: ignore[no-any-return]
        return torch.cat(found)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _index(reports: list[Any]) -> str:
    entries: dict[str, Any] = {}
    for file, _, pieces, _ in reports:
        for name, (shape, start, length) in pieces.items():
            entries.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([file, start, length])
    return json.dumps(entries)


def verify(folder: Path, believed: Collection[str] = ()) -> None:
    """Checks every file of a checkpoint against its manifest. Raises DamagedCheckpointError naming a bad one.

    believed: files whose content has just been read back by those who wrote them.
    """
    manifest = _unsealed(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not {_INDEX, _STATE} <= set(files):
        raise DamagedCheckpointError(f"{folder / MANIFEST} lists no files of a checkpoint")
    if (own := manifest.get("checkpoint")) != folder.name:
        raise DamagedCheckpointError(f"{folder / MANIFEST} is that of {own!r}, which this folder is not")
    try:
        for name, facts in files.items():
            file = folder / name
            if not _NAME.fullmatch(name) or file.is_symlink():
                raise DamagedCheckpointError(f"{folder / MANIFEST} lists {name!r}, which no checkpoint has")
            if not file.is_file():
                raise DamagedCheckpointError(f"{file} is missing")
            if file.stat().st_size != facts["size"]:
                raise DamagedCheckpointError(f"{file} has {file.stat().st_size} bytes, {facts['size']} were written")
            if name not in believed and _sha256(file) != facts["sha256"]:
                raise DamagedCheckpointError(f"{file} is not what was written: its SHA-256 differs")
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
        index = json.loads((folder / _INDEX).read_bytes())
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{folder} cannot be read: {_told(error)}") from error
    if lost := {piece[0] for entry in index.values() for piece in entry["pieces"]} - files.keys():
        raise DamagedCheckpointError(f"{folder / _INDEX} names {sorted(lost)[0]!r}, which the manifest does not")


def _write_part(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes this process's tensors, reads them back from the disk and compares; returns what the file then is.

    Raises DamagedCheckpointError when the disk gives back something else.
    """
    save_file(tensors, file, metadata={"format": "pt"})
    _sync(file)
    with safe_open(file, framework="pt") as found:
        for name, tensor in tensors.items():
            if not torch.equal(_bits(found.get_tensor(name)), _bits(tensor)):
                raise DamagedCheckpointError(f"{file}: the disk does not give back what was written as {name}")
    return _facts(file)


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: a NaN does not equal itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _named_by_pointer(folder: Path, say: Callable[[str], None]) -> str | None:
    try:
        named = _unsealed(folder / POINTER).get("checkpoint")
    except DamagedCheckpointError as error:
        say(f"{error}; looking for the newest whole checkpoint")
        return None
    return str(named)


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _sealed(content: Mapping[str, Any]) -> str:
    """JSON that carries its own SHA-256, so that a torn or changed file is known."""
    body = json.dumps(content, sort_keys=True)
    return json.dumps({"content": content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def _unsealed(file: Path) -> dict[str, Any]:
    try:
        whole = json.loads(file.read_bytes())
        content, seal = whole["content"], whole["sha256"]
        body = json.dumps(content, sort_keys=True)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if hashlib.sha256(body.encode()).hexdigest() != seal or not isinstance(content, dict):
        raise DamagedCheckpointError(f"{file} is not what was written: its SHA-256 differs")
    return content


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _sync(path: Path) -> None:
    """Until a file, or the names in a folder, are on the disk; what is read of it next comes from there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise") and path.is_file():
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
