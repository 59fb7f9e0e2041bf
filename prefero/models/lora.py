"""Low-rank adapters (LoRA, arXiv 2106.09685) by PEFT, put inside a Hugging Face model that stays what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from prefero.models import footprint
from prefero.models.frozen import SCALE, FrozenLinear, whole
from prefero.models.later import drawn, fill
from prefero.models.trunk import trunk_of

TrainBias = Literal["none", "all", "lora_only"]
ADAPTER = "default"


def apply_lora(model: Any, rank: int, train_bias: str = "none", alpha: float | None = None) -> Any:
    """Adds an adapter of `rank` to every linear layer below the output head, in place; rank 0 changes nothing.

    GPT-2's `Conv1D` counts as linear. The output head stays plain: it is often tied to the embedding, and merging an
    adapter would untie it. The base is frozen, the adapters are float32 and start at zero effect (B = 0). The update
    is scaled by alpha / rank; alpha defaults to the rank. train_bias: "none", "all" or "lora_only" (the seed's words).
    Raises ValueError on a negative rank, an unknown train_bias, or a model that has adapters already.
    """
    if rank == 0:
        return model
    if rank < 0:
        raise ValueError(f"lora_rank={rank}: give 0 (no adapters) or a positive rank")
    if train_bias not in get_args(TrainBias):
        raise ValueError(f"lora_train_bias={train_bias!r}: choose one of {', '.join(get_args(TrainBias))}")
    if has_lora(model):
        raise ValueError(f"lora_rank={rank}, but the model has adapters already: pass lora_rank=0 to keep those")
    names, convolutional = _linear_names(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        bias=train_bias,
        target_modules=names,
        fan_in_fan_out=convolutional,
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for layer in lora_layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        if layer.weight.is_meta:
            drawn(layer.lora_A[ADAPTER], type(layer.lora_A[ADAPTER]).reset_parameters)
            drawn(layer.lora_B[ADAPTER], lambda linear: nn.init.zeros_(linear.weight))
    return model


def _linear_names(model: Any) -> tuple[list[str], bool]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: part for name, part in trunk_of(model).named_modules() if isinstance(part, nn.Linear | Conv1D)}
    found = {name: part for name, part in linear.items() if part is not head}
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt: use lora_rank=0")
    convolutional = all(isinstance(part, Conv1D) for part in found.values())
    return sorted({name.rsplit(".", 1)[-1] for name in found}), convolutional


def lora_layers(module: nn.Module) -> Iterator[Any]:
    """The adapted layers of a module."""
    return (part for part in module.modules() if isinstance(part, LoraLayer))


def has_lora(module: nn.Module) -> bool:
    return any(True for _ in lora_layers(module))


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """The model without its adapters inside. What learns does not change, not even inside: PEFT would say that nothing
    does, which strategies that set themselves up in the first forward pass would believe."""
    layers = list(lora_layers(module))
    trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}

    def switch(on: bool) -> None:
        for layer in layers:
            layer.enable_adapters(on)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)

    switch(False)
    try:
        yield
    finally:
        switch(True)


@torch.no_grad()
def merged(module: nn.Module, own: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A module's state `own` under the names of the model without adapters, each update added in float32.

    Nothing live is touched. Floating tensors are given `dtype`; tied weights share one tensor; tensors that need no
    change share `own`'s memory.
    """
    layers = {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}
    kept = {name: part for name, part in module.named_modules() if isinstance(part, FrozenLinear)}
    plain_state: dict[str, Tensor] = {}
    shared: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in own.items():
        plain = plain_name(name)
        if plain is None:
            continue
        place = (_address(tensor), tensor.shape)
        few = kept.get(name.removesuffix(".weight"))
        if plain != name and name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            turned = layers[layer].fan_in_fan_out if few is None else False
            weight = whole(own, name).float() + _turned(_update(layers[layer], layer, own), turned)
            plain_state[plain] = _turned(weight, few is not None and few.turned).to(dtype).contiguous()
        elif few is not None:
            plain_state[plain] = _turned(whole(own, name), few.turned).to(dtype).contiguous()
        elif place in shared and tensor.numel():
            plain_state[plain] = shared[place]
        else:
            plain_state[plain] = shared[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return plain_state


def _update(layer: Any, name: str, own: Mapping[str, Tensor]) -> Tensor:
    """What the adapter adds to its layer's weight [out, in], in float32 whatever the adapter is kept in."""
    left, right = (own[f"{name}.lora_{part}.{ADAPTER}.weight"].float() for part in "BA")
    update: Tensor = left @ right * layer.scaling[ADAPTER]
    return update


def _turned(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.t() if turned else matrix


def update_of(layer: Any) -> Tensor:
    """What the adapter of a layer adds to its weight [out, in], in float32."""
    own = {f".lora_{part}.{ADAPTER}.weight": getattr(layer, f"lora_{part}")[ADAPTER].weight for part in "AB"}
    return _update(layer, "", own)


def _address(tensor: Tensor) -> int:
    """Where a tensor lies; tied weights lie in one place."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def plain_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None for the adapter's own, and for scales of int8 matrices."""
    if ".lora_" in name or name.endswith(SCALE):
        return None
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def unmerged(module: nn.Module, own: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights under the names of a module whose state is `own`, with or without adapters.

    With adapters the weights become the base and the adapters start again from zero effect (B = 0), so the function is
    that of the plain weights. One of two tied names is enough. Raises ValueError for weights of something else, and
    where weights are kept in few bytes: rounding what was merged would lose what adapters have learned.
    """
    if any(isinstance(part, FrozenLinear) for part in module.modules()):
        raise ValueError(
            "the model keeps frozen weights in few bytes, and rounding these would lose what adapters have learned; "
            "use save_adapter and load_adapter, or read them into a model with frozen='fp32'"
        )
    places = {name: of for of in own if (name := plain_name(of)) is not None}
    state = {places.get(name, name): tensor for name, tensor in plain.items()}
    if not state.keys() & own.keys():
        raise ValueError("it has none of the model's weights")
    for name, tensor in own.items():
        if ".lora_" in name:
            state[name] = torch.zeros_like(tensor) if ".lora_B." in name else tensor
    # By the parameters themselves, not where they lie: of a sharded one a process may hold nothing.
    tied = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    known = {tied[name]: tensor for name, tensor in state.items() if name in tied}
    for name in own:
        if name not in state and tied.get(name) in known:
            state[name] = known[tied[name]]
    return state


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def save_adapter(model: Any, directory: str | Path, own: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapter alone as PEFT's folder: `PeftModel.from_pretrained(base, directory)` reads it.

    own: the model's whole state where the live one is sharded. Raises ValueError when the model has no adapters.
    """
    if not has_lora(model):
        raise ValueError("the model has no adapter to save: build it with lora_rank > 0, or use save_pretrained")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state_dict=own, adapter_name=ADAPTER)
    save_file(
        {f"base_model.model.{name}": tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    config.save_pretrained(str(folder))


def load_adapter(model: Any, directory: str | Path) -> None:
    """Gives a model's adapter the values that `save_adapter` (or PEFT) wrote, of it or of a network around its trunk.

    Raises ValueError where there is none, or it is for other layers, of another rank or scale.
    """
    folder = Path(directory)
    if not has_lora(model):
        raise ValueError(f"{folder}: the model has no adapter to give these values to: build it with lora_rank > 0")
    stored, own = AdapterFile.of(folder), model.peft_config[ADAPTER]
    if (stored.rank, stored.alpha) != (own.r, own.lora_alpha):
        raise ValueError(
            f"{folder}: the adapter has rank {stored.rank} and alpha {stored.alpha:g}, the model's {own.r} and "
            f"{own.lora_alpha:g}: use lora_rank={stored.rank} and lora_alpha={stored.alpha:g}"
        )
    tensors = {name.removeprefix("base_model.model."): t for name, t in stored.tensors().items()}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in get_peft_model_state_dict(model, adapter_name=ADAPTER):
        # A trunk's own file lacks the prefix that a model around it adds, and the other way round.
        key = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in tensors), None)
        if key is not None:
            found[name] = tensors.pop(key)
    told = set_peft_model_state_dict(model, found, adapter_name=ADAPTER)
    missing = [name for name in told.missing_keys if ".lora_" in name]
    short = footprint.current() is not None  # the adapter is of the whole network's layers
    if missing or (tensors and not short):
        raise ValueError(f"{folder}: the adapter is for other layers ({', '.join([*missing, *tensors][:3])})")


class AdapterFile(NamedTuple):
    """What a folder says of its adapter. base: the folder or name of the weights it stands on, where that is known."""

    folder: Path
    rank: int
    alpha: float
    base: str | None

    @staticmethod
    def of(directory: str | Path) -> AdapterFile:
        """Reads `adapter_config.json`. Raises ValueError when it is missing or says nothing of an adapter."""
        file = Path(directory) / "adapter_config.json"
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            return AdapterFile(
                Path(directory), int(told["r"]), float(told["lora_alpha"]), told["base_model_name_or_path"] or None
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not describe an adapter ({error}): give a folder with one") from error

    def tensors(self) -> dict[str, Tensor]:
        """Its values, by the names of the file."""
        file = self.folder / "adapter_model.safetensors"
        if not file.is_file():
            raise ValueError(f"{file} is missing: give a folder with an adapter's safetensors")
        return load_file(file)


class LoRAModule(nn.Module):
    """What actor, critic and reward model share: `.model`, its adapters, and checkpoints that know of them.

    learned_before: its adapters had learned before it began: without them it is not what it began as.
    """

    model: Any
    learned_before = False

    def __init__(
        self, model: Any, lora_rank: int = 0, lora_train_bias: str = "none", lora_alpha: float | None = None
    ) -> None:
        super().__init__()
        self.model = apply_lora(model, lora_rank, lora_train_bias, lora_alpha)

    def fill(self, part: nn.Module) -> list[nn.Parameter]:
        """Gives the parameters below `part` that were left without values theirs; returns those that were drawn."""
        return fill(self.model, part)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model as it was before its adapters learned: a reference that costs no memory.

        Raises ValueError without adapters, when these had learned before, or when biases of the base are trained too.
        """
        if not has_lora(self.model):
            raise ValueError("reference() switches adapters off, and there are none: use deepcopy(actor), or lora_rank")
        if self.learned_before:
            raise ValueError("the adapters had learned before, so the model began with them: use shared.sharing(actor)")
        bias = self.model.peft_config["default"].bias
        if bias != "none":
            raise ValueError(f"lora_train_bias={bias!r} changes the base itself: use deepcopy(actor) as the reference")
        with adapters_disabled(self.model):
            yield

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Float32 weights with adapters merged, under the names of the model without them; memory may be shared.

        own: this module's state dict, no tensor of it sharded.
        """
        return merged(self, own)

    def from_checkpoint(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `to_checkpoint` gave, under this module's names; adapters start again from zero effect on top of it."""
        return unmerged(self, own, saved)

    def save_adapter(self, directory: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter alone, in PEFT's format. Raises ValueError when there is none.

        state: the module's whole state (`Strategy.whole_state`) where the live one is sharded.
        """
        save_adapter(self.model, directory, None if state is None else below("model.", state))

    def load_adapter(self, directory: str | Path) -> None:
        """Goes on from an adapter that `save_adapter` wrote. Raises ValueError where it is for another model."""
        load_adapter(self.model, directory)
        self.learned_before = True
