"""What a network begins as: the weights it is read from, and an adapter that has learned on them already."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from prefero.config import ConfigError
from prefero.models.loading import resolve
from prefero.models.lora import AdapterFile


class Start(NamedTuple):
    """A folder or name to read weights from, and the folder of the adapter that goes on, if any."""

    base: str
    adapter: Path | None = None


def start_of(name: str, frozen: str, lora_rank: int, key: str) -> Start:
    """What a network that is read from `name`, with adapters of `lora_rank` over weights kept as `frozen`, begins as.

    A run's export has its adapter merged, and rounding that would lose most of what the adapter has learned: so the
    network begins with the weights below the adapter, and the adapter itself. key: the config's, for the rank. Raises
    ConfigError where that cannot be: the adapter has another rank, or nobody knows what it stands on.
    """
    adapter = adapter_of(name) if frozen != "fp32" and lora_rank else None
    if adapter is None:
        return Start(name)
    stored = AdapterFile.of(adapter)
    if stored.base is None:
        raise ConfigError(
            f"{adapter} stands on weights that were drawn for its run alone, and model.frozen {frozen} would round "
            "what it has learned; set model.frozen fp32"
        )
    if stored.rank != lora_rank:
        raise ConfigError(
            f"{adapter} has rank {stored.rank}, and goes on learning with model.frozen {frozen}; set {key} to "
            f"{stored.rank}"
        )
    try:
        merged = adapter_of(stored.base)
    except ValueError as error:
        raise ConfigError(f"{adapter} stands on weights that are not there: {error}") from None
    if merged is not None:
        raise ConfigError(
            f"{adapter} was trained on {stored.base}, which has an adapter merged that model.frozen {frozen} would "
            "round; set model.frozen fp32, or train it anew with the same model.frozen"
        )
    return Start(stored.base, adapter)


def adapter_of(name: str) -> Path | None:
    """The adapter alone of a model that is the export of a run; None where there is none."""
    folder = Path(resolve(name))
    adapter = folder.parent / "checkpoints" / "adapter"
    return adapter if folder.name == "model" and adapter.is_dir() else None


def lasting(name: str) -> str:
    """The name of a model that means the same from any folder."""
    source = Path(resolve(name))
    return str(source.absolute()) if source.exists() else str(source)
