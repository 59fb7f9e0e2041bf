"""Networks built without weights: where each weight is stored or how it is drawn, and filling them in part by part.

A network too large for the memory of one process is built of shapes alone (`deferral.defer_weights`). The strategy that
shares it out then takes a layer at a time: fills it in, keeps its own part, and lets go of the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

_SOURCES = "_prefero_sources"  # of a module: its parameters' names to (file, key)
_DRAW = "_prefero_draw"  # of a module: how it is drawn, where that is not its network's way
_SEED = "_prefero_seed"  # of a network: copies of one that is yet to be drawn are drawn alike


def build_without_weights(auto_class: Any, config: Any, **options: Any) -> Any:
    """The network of a configuration; its parameters have shapes only, its buffers are real."""
    with init_empty_weights(include_buffers=False):
        network = auto_class.from_config(config, **options)
    network.tie_weights()  # in there, every name gets a parameter of its own
    setattr(network, _SEED, int(torch.empty((), dtype=torch.int64).random_()))
    return network


def drawn(module: nn.Module, draw: Callable[[Any], Any]) -> None:
    """Initialises a module in place by `draw`, and again when it has no weights yet and is filled in."""
    draw(module)
    setattr(module, _DRAW, draw)


def store(network: Any, source: str) -> set[str]:
    """Notes where the weights of a network without them lie: a folder or hub name with safetensors files.

    Its way of generating is read at once. Returns the names of the weights that it lacks. Raises ValueError when there
    are no safetensors files.
    """
    files = _safetensors(source)
    if network.can_generate() and _file(source, "generation_config.json") is not None:
        network.generation_config = GenerationConfig.from_pretrained(source)
    prefix = f"{network.base_model_prefix}."
    places = [(f"{path}.{name}" if path else name, module, name, parameter)
              for path, module in network.named_modules()
              for name, parameter in module.named_parameters(recurse=False)]  # fmt: skip
    known: dict[int, tuple[str, str]] = {}
    for full, _, _, parameter in places:
        # A trunk's own file lacks the prefix that a model around it adds, and the other way round.
        key = next((key for key in (full, prefix + full, full.removeprefix(prefix)) if key in files), None)
        if key is not None:
            known[id(parameter)] = (files[key], key)
    for _, module, name, parameter in places:
        if id(parameter) in known:  # under each of its names, where weights are tied
            module.__dict__.setdefault(_SOURCES, {})[name] = known[id(parameter)]
    return {full for full, _, _, parameter in places if id(parameter) not in known}


def stored_in_parts(source: str) -> bool:
    """Whether a folder or hub name has safetensors files, from which weights can be read part by part."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return not source.endswith(".gguf") and any(_file(source, name) is not None for name in names)


def _safetensors(source: str) -> dict[str, str]:
    """The file of every stored tensor."""
    gguf = source.endswith(".gguf")
    index = None if gguf else _file(source, "model.safetensors.index.json")
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {key: str(_file(source, name)) for key, name in names.items()}
    single = None if gguf else _file(source, "model.safetensors")
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
    tensor of another shape, and for a parameter that nobody draws.
    """
    made: dict[int, nn.Parameter] = {}
    sources: dict[int, tuple[str, str]] = {}
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:  # tied weights stay tied
                values = torch.full(parameter.shape, math.nan, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            new = made[id(parameter)]
            setattr(module, name, new)
            if name in module.__dict__.get(_SOURCES, {}):
                sources[id(new)] = module.__dict__[_SOURCES][name]
    unread = [parameter for parameter in made.values() if id(parameter) not in sources]
    if unread:
        _draw(network, part, {id(parameter) for parameter in made.values()})
    for parameter in made.values():
        if id(parameter) in sources:
            _read(sources[id(parameter)], parameter)
    if any(bool(parameter.isnan().any()) for parameter in unread):
        raise ValueError(f"{type(network).__name__} has weights that it does not draw itself: leave shard_init off")
    return unread


def _draw(network: Any, part: nn.Module, new: set[int]) -> None:
    """Initialises the modules of a part all of whose weights are new, as transformers does: the innermost first."""
    names = {id(module): name for name, module in network.named_modules()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_hash(getattr(network, _SEED, 0), names.get(id(part), "")))
        whole = [m for m in part.modules() if all(id(p) in new for p in m.parameters())]
        for module in reversed(whole):
            network._init_weights(module)
        for module in whole:  # last: a network may take an adapter for a layer of its own
            if hasattr(module, _DRAW):
                getattr(module, _DRAW)(module)


def _hash(seed: int, name: str) -> int:
    """A number that depends on both, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


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
