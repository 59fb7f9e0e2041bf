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

from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefero.models.base import Actor, Critic, RewardModel, zero_head
from prefero.models.loading import keep_layers
from prefero.models.lora import below, plain_name
from prefero.models.packed import hidden_states
from prefero.models.trunk import device_of, score_hidden, trunk_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_HEAD, _BACKBONE = "reward_head.safetensors", "backbone.json"
_SAMPLE = 256


def sharing(model: ModuleT) -> ModuleT:
    """A copy of a model that holds the original's own tensors where they are frozen, and copies of all others."""
    tensors = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors if not tensor.requires_grad})


def backbone_of(actor: Actor, num_layers: int | None = None) -> Any:
    """The actor's trunk for another role: without its adapters, sharing what is frozen.

    num_layers: its first layers only. Raises ValueError when it has fewer.
    """
    trunk = sharing(trunk_of(actor.model))
    for parent in list(trunk.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.get_base_layer())
    vars(trunk).pop("peft_config", None)
    if num_layers is not None:
        keep_layers(trunk.config, num_layers)
        parent, name, layers = _layers(trunk)
        setattr(parent, name, layers[:num_layers])
    return trunk


def _layers(trunk: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """A trunk's list of layers, with the module and the name it stands under."""
    for parent in trunk.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                return parent, name, child
    raise ValueError(f"{type(trunk).__name__} has no list of layers, so none can be told apart: use all of them")


def freeze_lower(model: Any, num_layers_unfrozen: int) -> None:
    """Freezes a causal model in place but for its last layers, what stands above them, and its head if that is its own.

    Raises ValueError when it has not more layers than that.
    """
    trunk = trunk_of(model)
    parent, name, layers = _layers(trunk)
    if not 0 < num_layers_unfrozen < len(layers):
        raise ValueError(
            f"num_layers_unfrozen={num_layers_unfrozen}: the model has {len(layers)} layers; choose 1 to "
            f"{len(layers) - 1}, or 0 to train all"
        )
    learns = list(layers[-num_layers_unfrozen:])
    names = [child for child, _ in parent.named_children()]
    # Families register what stands above the layers (a last norm) behind them.
    learns += [getattr(parent, child) for child in names[names.index(name) + 1 :]]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        learns.append(head)
    model.requires_grad_(False)
    for part in learns:
        part.requires_grad_(True)


def critic_on(
    actor: Actor,
    lora_rank: int = 0,
    num_layers: int | None = None,
    level: Literal["token", "sequence"] = "token",
) -> Critic:
    """A critic on the actor's frozen weights, with adapters of its own (`lora_rank`), or its own unfrozen layers."""
    return Critic(backbone_of(actor, num_layers), lora_rank=lora_rank, level=level)


class HydraActor(Actor):
    """A policy with a value head on its own last hidden states: one forward pass gives log-probabilities and values.

    What learns below is moved by both losses (the hydra heads of trlX, Havrilla et al., EMNLP 2023).
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
        logprobs, entropy, hidden = self.read(
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


def fingerprint(own: Mapping[str, Tensor]) -> str:
    """Tells a trunk's weights from others', adapters apart, by numbers from all over each tensor.

    own: the trunk's state.
    """
    digest = hashlib.sha256()
    plain = {name: tensor for key, tensor in own.items() if (name := plain_name(key)) is not None}
    for name in sorted(plain):
        flat = plain[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu().contiguous()
        digest.update(f"{name} {list(plain[name].shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_reward_adapter(model: RewardModel, directory: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a reward model's adapter and head alone, with the fingerprint of the weights they belong to.

    state: its whole state. Raises ValueError when it has no adapter, or no head of its own.
    """
    if model.value_head is None:
        raise ValueError(f"{type(model.model).__name__} scores by a head of its own: save the whole model")
    folder = Path(directory)
    model.save_adapter(folder, state)
    head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in below("value_head.", state).items()}
    save_file(head, folder / _HEAD)
    known = {"fingerprint": fingerprint(below("model.", state)), "pooling": model.pooling}
    (folder / _BACKBONE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def reward_on(actor: Actor, directory: str | Path) -> RewardModel | None:
    """The reward model that `save_reward_adapter` wrote, on the actor's frozen weights; None where it is none of them.

    None too where the actor's weights are not frozen, or not there yet (`deferral`).
    """
    folder = Path(directory)
    if not (folder / _BACKBONE).is_file():
        return None
    trunk = trunk_of(actor.model)
    state = trunk.state_dict()
    shares = all(not p.requires_grad for name, p in trunk.named_parameters() if ".lora_" not in name)
    known = json.loads((folder / _BACKBONE).read_text(encoding="utf-8"))
    if not shares or any(t.is_meta for t in state.values()) or known["fingerprint"] != fingerprint(state):
        return None
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    stored = load_file(folder / _HEAD)
    weight = stored["weight"]
    head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in stored)
    head.load_state_dict(stored)
    model = RewardModel(
        backbone_of(actor), head, adapter["r"], pooling=known["pooling"], lora_alpha=adapter["lora_alpha"]
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    told = set_peft_model_state_dict(model.model, own, adapter_name="default")
    if told.unexpected_keys:
        raise ValueError(f"{folder}: the adapter is for other layers: {', '.join(told.unexpected_keys[:3])}")
    return model.to(device_of(actor))
