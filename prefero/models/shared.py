"""One backbone for several roles: networks that share the weights which are frozen in them.

Policy, critic, reference and reward model begin as the same weights. Where those are frozen (below adapters, or in the
lower layers), a role's network is a copy of the policy's that holds the very same tensors and has only what it learns
of its own: adapters, upper layers, a head. So nothing has to be switched between roles, and every strategy, checkpoint
and engine treats such a network as any other; those that shard models give each its own share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefero.models import footprint
from prefero.models.base import Actor, Critic, RewardModel, zero_head
from prefero.models.loading import keep_layers
from prefero.models.lora import AdapterFile, below, plain_name
from prefero.models.packed import hidden_states
from prefero.models.trunk import device_of, evaluating, model_inputs, score_hidden, trunk_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_HEAD, _BACKBONE = "reward_head.safetensors", "backbone.json"
_SAMPLE = 997  # a prime: no stride that is a row's length, which would see one column only
_NOT_WEIGHED = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id",
    "num_labels", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "return_dict",
)  # fmt: skip
"""Keys of a configuration that do not change what a trunk computes."""


class NotSharedError(ValueError):
    """A reward model that cannot stand on a policy's weights; says why."""


def sharing(model: ModuleT) -> ModuleT:
    """A copy of a model that holds the original's own tensors where they are frozen, and copies of all others.

    What is shared is marked: strategies load no other values into it.
    """
    frozen = [tensor for tensor in chain(model.parameters(), model.buffers()) if not tensor.requires_grad]
    for tensor in frozen:
        tensor.shared_by_roles = True  # type: ignore[attr-defined]
    return deepcopy(model, {id(tensor): tensor for tensor in frozen})


def backbone_of(actor: Actor, num_layers: int | None = None, *, with_adapters: bool = False) -> Any:
    """The actor's trunk for another role: without its adapters, sharing what is frozen.

    num_layers: its first layers only. with_adapters: it begins with copies of the actor's. Raises ValueError when it
    has fewer layers.
    """
    trunk = sharing(trunk_of(actor.model))
    if with_adapters:
        trunk.peft_config = deepcopy(actor.model.peft_config)
    for parent in list(trunk.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer) and not with_adapters:
                setattr(parent, name, child.get_base_layer())
    if num_layers is not None:
        parent, name, layers = _layers(trunk)
        keep_layers(trunk.config, num_layers)
        setattr(parent, name, layers[:num_layers])
    return trunk


def _layers(trunk: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """A trunk's list of layers, with the module and the name it stands under."""
    count = trunk.config.get_text_config().num_hidden_layers
    for parent in trunk.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count and "vision" not in name:
                return parent, name, child
    raise ValueError(f"{type(trunk).__name__} has no list of {count} layers that could be told apart: use all of them")


def freeze_lower(model: Any, num_layers_unfrozen: int) -> None:
    """Freezes a causal model in place but for its last layers, what stands above them, and its head if that is its own.

    Raises ValueError when it has not more layers than that.
    """
    _, _, layers = _layers(trunk_of(model))
    if not 0 < num_layers_unfrozen < len(layers):
        raise ValueError(
            f"num_layers_unfrozen={num_layers_unfrozen}: the model has {len(layers)} layers; choose 1 to "
            f"{len(layers) - 1}, or 0 to train all"
        )
    above = _called_after(layers[-1], model)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    model.requires_grad_(False)
    for part in (*layers[-num_layers_unfrozen:], *above):
        for parameter in part.parameters():
            parameter.requires_grad_(id(parameter) not in embeddings)  # a head that is tied stays what is read by


@torch.no_grad()
def _called_after(layer: nn.Module, model: Any) -> list[nn.Module]:
    """The modules with weights that a model calls after this layer: a last norm, a projection, the head.

    Found out by trial on a three-token text: the order in which they are registered is each family's own.
    """
    called: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda *_: called.clear())]
    for part in model.modules():
        if any(True for _ in part.parameters(recurse=False)):
            hooks.append(part.register_forward_pre_hook(lambda module, _: called.append(module)))
    try:
        with evaluating(model):
            model(**model_inputs(model, torch.tensor([[0, 1, 0]], device=device_of(model)), None))
    finally:
        for hook in hooks:
            hook.remove()
    return called


def critic_on(
    actor: Actor,
    lora_rank: int = 0,
    num_layers: int | None = None,
    level: Literal["token", "sequence"] = "token",
) -> Critic:
    """A critic on the actor's frozen weights, with adapters of its own (`lora_rank`), or as many layers unfrozen.

    num_layers: the actor's first layers only; of these the last ones learn. Where the actor began with adapters that
    had learned before, the critic begins with copies of them, whatever `lora_rank`.
    """
    if actor.learned_before:
        return Critic(backbone_of(actor, num_layers, with_adapters=True), level=level)
    trunk = backbone_of(actor, num_layers)
    if not lora_rank:
        _, _, whole = _layers(trunk_of(actor.model))
        unfrozen = sum(any(p.requires_grad for p in layer.parameters()) for layer in whole)
        _, _, layers = _layers(trunk)
        for place in range(max(0, len(layers) - unfrozen), len(layers)):
            # All layers read one configuration, through which texts without padding are set apart.
            layers[place] = deepcopy(layers[place], {id(trunk.config): trunk.config}).requires_grad_(True)
    return Critic(trunk, lora_rank=lora_rank, level=level)


class HydraActor(Actor):
    """A policy with a value head on its own last hidden states: one forward pass gives log-probabilities and values.

    What learns below is moved by both losses. Its exports are plain policies, without the head.
    """

    forward_methods = (*Actor.forward_methods, "values")
    level = "token"

    def __init__(
        self, model: Any, lora_rank: int = 0, lora_train_bias: str = "none", lora_alpha: float | None = None
    ) -> None:
        super().__init__(model, lora_rank, lora_train_bias, lora_alpha)
        self.value_head = zero_head(trunk_of(model).config)

    def forward(
        self,
        sequences: Tensor,
        num_actions: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        action_mask: Tensor | None = None,
        return_values: bool = False,
    ) -> Any:
        """As an actor's; with return_values the values [B, A] of the states the tokens are chosen in come last."""
        logprobs, entropy, hidden = self._read(
            sequences, num_actions, attention_mask, temperature, return_entropy, action_mask
        )
        answers = [logprobs, *([entropy] if return_entropy else [])]
        if return_values:
            answers.append(score_hidden(self.value_head, hidden))
        return tuple(answers) if len(answers) > 1 else logprobs

    def values(self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The values [B, A] alone, without the output head."""
        hidden = hidden_states(trunk_of(self.model), sequences, attention_mask)
        return score_hidden(self.value_head, hidden[:, -action_mask.shape[1] - 1 : -1])

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As an actor's, and the value head."""
        return super().to_checkpoint(own) | {k: tensor for k, tensor in own.items() if k.startswith("value_head.")}

    def from_checkpoint(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As an actor's; the value head stays what it is where the file is a plain policy's."""
        head = {name: saved.get(name, tensor) for name, tensor in own.items() if name.startswith("value_head.")}
        return super().from_checkpoint(own, {k: t for k, t in saved.items() if k not in head}) | head


def fingerprint(config: Any, own: Mapping[str, Tensor]) -> str:
    """Tells a trunk from others, adapters apart: by its configuration, and numbers from all over each tensor.

    own: the trunk's whole state.
    """
    shape = {key: value for key, value in config.to_dict().items() if key not in _NOT_WEIGHED}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    plain = {name: tensor for key, tensor in own.items() if (name := plain_name(key)) is not None}
    for name in sorted(plain):
        flat = plain[name].detach().flatten()
        places = torch.arange(_SAMPLE, device=flat.device) * flat.numel() // _SAMPLE
        sample = flat[places].float().cpu() if flat.numel() else flat
        digest.update(f"{name} {list(plain[name].shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_reward_adapter(model: RewardModel, directory: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a reward model's adapter and head alone, with the fingerprint of the weights they belong to.

    state: its whole state. Raises ValueError when it has no adapter, or its head is not one linear layer.
    """
    if not isinstance(model.value_head, nn.Linear):
        raise ValueError(f"{type(model.model).__name__} scores by a head of its own kind: save the whole model")
    folder = Path(directory)
    model.save_adapter(folder, state)
    head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in below("value_head.", state).items()}
    save_file(head, folder / _HEAD)
    known = {"fingerprint": fingerprint(model.model.config, below("model.", state)), "pooling": model.pooling}
    (folder / _BACKBONE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def reward_on(actor: Actor, directory: str | Path) -> RewardModel:
    """The reward model that `save_reward_adapter` wrote, on the actor's frozen weights.

    Raises NotSharedError where it was trained on others, or the actor's move, or are not there or not whole yet.
    """
    folder = Path(directory)
    if not (folder / _BACKBONE).is_file():
        raise NotSharedError("it was not trained as adapters")
    trunk = trunk_of(actor.model)
    state = trunk.state_dict()
    if any(parameter.requires_grad for name, parameter in trunk.named_parameters() if ".lora_" not in name):
        raise NotSharedError("the policy's weights learn, and would move below it")
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in state.values()):
        raise NotSharedError("the policy's weights are shared out over processes")
    known = json.loads((folder / _BACKBONE).read_text(encoding="utf-8"))
    # Short networks are drawn, each for itself: what matters of them is that they would be shared.
    if footprint.current() is None and known["fingerprint"] != fingerprint(trunk.config, state):
        raise NotSharedError("it was trained on other weights than the policy's")
    adapter = AdapterFile.of(folder)
    stored = load_file(folder / _HEAD)
    weight = stored["weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in stored)
    head.load_state_dict(stored)
    model = RewardModel(backbone_of(actor), head, adapter.rank, pooling=known["pooling"], lora_alpha=adapter.alpha)
    model.load_adapter(folder)
    return model.to(device_of(actor))
