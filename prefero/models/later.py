"""Networks built without weights: where each weight is stored or how it is drawn, and filling them in part by part.

A network too large for the memory of one process is built of shapes alone (`deferral.defer_weights`). The strategy that
shares it out then takes a layer at a time: fills it in, keeps its own part, and lets go of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

_SOURCES = "_prefero_sources"
_DRAW = "_prefero_draw"


def build_without_weights(auto_class: Any, config: Any, **options: Any) -> Any:
    """The network of a configuration; its parameters have shapes only, its buffers are real."""
    with init_empty_weights(include_buffers=False):
        network = auto_class.from_config(config, **options)
    network.tie_weights()  # in there, every name gets a parameter of its own
    return network


def drawn(module: nn.Module, draw: Callable[[Any], Any]) -> None:
    """Initialises a module in place by `draw`, and again when it has no weights yet and is filled in."""
    draw(module)
    setattr(module, _DRAW, draw)


def store(network: Any, source: str) -> set[str]:
    """Notes where the weights of a network without them lie: a folder or hub name with safetensors files.

    Returns the names of those that it lacks. Raises ValueError when there are no safetensors files.
    """
    files = _safetensors(source)
    prefix = f"{network.base_model_prefix}."
    known: set[int] = set()
    missing: dict[str, nn.Parameter] = {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            # A trunk's own file lacks the prefix that a model around it adds, and the other way round.
            key = next((key for key in (full, prefix + full, full.removeprefix(prefix)) if key in files), None)
            if key is None:
                missing[full] = parameter
            else:
                module.__dict__.setdefault(_SOURCES, {})[name] = (files[key], key)
                known.add(id(parameter))
    return {name for name, parameter in missing.items() if id(parameter) not in known}


def _safetensors(source: str) -> dict[str, str]:
    """The file of every stored tensor."""
    index = _file(source, "model.safetensors.index.json")
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {key: str(_file(source, name)) for key, name in names.items()}
    single = _file(source, "model.safetensors")
    if single is None:
        raise ValueError(
            f"model {source!r} has no safetensors files, so its weights cannot be read part by part: save it with "
            "save_pretrained, or leave shard_init off"
        )
    with safe_open(single, "pt") as stored:
        return dict.fromkeys(stored.keys(), single)


def _file(source: str, name: str) -> str | None:
    if Path(source).is_dir():
        file = Path(source) / name
        return str(file) if file.is_file() else None
    found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return found


@torch.no_grad()
def fill(network: Any, part: nn.Module) -> list[nn.Parameter]:
    """Gives all parameters below `part` that have none their values, in main memory; returns those that were drawn.

    network: the Hugging Face model that `part` belongs to, whose way of drawing is used. Raises ValueError for a stored
    tensor of another shape.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    new: list[nn.Parameter] = []
    for module in part.modules():
        empty = {name: p for name, p in module.named_parameters(recurse=False) if p.is_meta}
        fresh = [name for name, parameter in empty.items() if id(parameter) not in made]
        for name, parameter in empty.items():
            if name in fresh:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        sources = module.__dict__.get(_SOURCES, {})
        if any(name not in sources for name in fresh):
            getattr(module, _DRAW, network._init_weights)(module)
            new += [made[id(empty[name])] for name in fresh if name not in sources]
        for name in fresh:
            if name in sources:
                _read(sources[name], made[id(empty[name])])
    return new


def _read(source: tuple[str, str], into: nn.Parameter) -> None:
    file, key = source
    with safe_open(file, "pt") as stored:
        tensor = stored.get_tensor(key)
    if tensor.shape != into.shape:
        raise ValueError(
            f"{file}: {key} has the shape {tuple(tensor.shape)}, the model wants {tuple(into.shape)}: the "
            "configuration beside it is another model's"
        )
    into.copy_(tensor)
