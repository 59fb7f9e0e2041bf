"""What a run is made of, written into its checkpoints, and whether it still is when the run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import prefero
from prefero.config import KINDS_OF_KEYS, Config, ConfigError, flat, to_dict
from prefero.data.sources import local_file
from prefero.models.loading import resolve
from prefero.models.lora import AdapterFile
from prefero.recipes.start import adapter_of
from prefero.tracking.files import to_plain
from prefero.tracking.redaction import redact
from prefero.tracking.run_folder import versions

_MAY_DIFFER = (
    "checkpoint.",
    "strategy.precision",
    "strategy.max_skipped",
    "strategy.threads",
    *(f"strategy.{key}" for key in ("kind", *KINDS_OF_KEYS)),
)
"""Where a run computes and when it is saved. (The precision that `auto` meant is compared with the checkpoint's.)"""
_WHOLE = 1 << 20  # bytes up to which all of a file is read
_PIECES, _PIECE = 256, 4096  # what is read of a larger one: so many pieces, evenly spread, of so many bytes


def origin(config: Config) -> dict[str, Any]:
    """What a run's numbers hang on: config, versions, the digest of our own code, and of what it reads from disk."""
    return {
        "config": _plain(to_dict(config)),
        "versions": {**versions(), "code of prefero": _own_code()},
        "files": {name: _digest(file) for name, file in _files(config)},
    }


def check_origin(then: Mapping[str, Any], now: Mapping[str, Any], where: Path, say: Callable[[str], None]) -> None:
    """Says which versions are others than when the checkpoint at `where` was written.

    Raises ConfigError naming what else is: a key of the config, or a file. What only one of the two reads is no matter.
    """
    check_config(then["config"], now["config"], str(where))
    for name, digest in now["files"].items():
        if then["files"].get(name, digest) != digest:
            raise ConfigError(f"{name} has changed since the run began: bring it back, or begin again with --overwrite")
    old, new = then["versions"], now["versions"]
    if changed := [f"{name} {old.get(name)} (now {new[name]})" for name in new if old.get(name) != new[name]]:
        say(f"{where} was written with {', '.join(changed)}: what follows may differ in last digits")


def check_config(then: Mapping[str, Any], now: Mapping[str, Any], whose: str) -> None:
    """Raises ConfigError naming the keys, but those of `_MAY_DIFFER`, that a run was begun with other values of."""
    old, new = (flat(_plain(settings)) for settings in (then, now))
    changed = sorted(
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not key.startswith(_MAY_DIFFER)
    )
    if changed:
        told = ", ".join(f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in changed[:5])
        raise ConfigError(f"{whose} was begun with another config: {told}; resume with the same, or give a new --out")


def _plain(settings: Mapping[str, Any]) -> Any:
    return redact(to_plain(dict(settings), "config"))


@cache
def _own_code() -> str:
    folder = Path(prefero.__file__).parent
    contents = (file.read_bytes() for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]))
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    """What the config names on this disk, by the name it gives: rows, weights of models, code of rewards."""
    rows = (f"{kind}{part}" for kind in ("sft", "preferences", "prompts", "trajectories") for part in ("", "_heldout"))
    for name in (str(getattr(config.data, key)) for key in rows):
        file = local_file(name) if name else None
        if file is not None:
            yield name, file
    parts = (*config.ppo.rewards.values(), *config.ilql.rewards.values())
    used = [*(part.use for part in parts), config.evaluate.gold]
    for use in used:
        code = Path(use.rpartition(":")[0])
        if code.suffix == ".py" and code.is_file():
            yield str(code), code
    judges = (use.partition(":")[2] for use in used if use.startswith(("model:", "process:")))
    for name in {config.model.path, config.reward.model, *judges} - {"", "policy"}:
        try:
            folders = list(_folders(name, config.model.frozen))
        except ValueError:
            continue  # of a stage that is not run, which may be yet to come; preflight has found what this one needs
        for folder in folders:
            found = (file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
            for file in [folder] if folder.is_file() else found:
                yield f"{name} ({file.name})" if folder == folders[0] else f"{name} ({file})", file


def _folders(name: str, frozen: str) -> Iterator[Path]:
    """Where a model's weights lie, its adapter, and, where that goes on, what it stands on."""
    yield Path(resolve(name))
    if (adapter := adapter_of(name)) is not None:
        yield adapter
        if frozen != "fp32" and (base := AdapterFile.of(adapter).base):
            yield Path(resolve(base))


def _digest(file: Path) -> str:
    """SHA-256 of a file's size and content; of pieces of it where it is large: training moves every weight."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        if size <= _WHOLE or file.suffix not in (".safetensors", ".bin", ".gguf"):
            while block := content.read(_WHOLE):
                found.update(block)
        else:
            for piece in range(_PIECES):
                content.seek(piece * (size - _PIECE) // (_PIECES - 1))
                found.update(content.read(_PIECE))
    return found.hexdigest()
