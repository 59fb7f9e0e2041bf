"""One backbone: roles share what is frozen, compute what networks of their own would, and never meet in training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.lora import lora_layers
from prefero.models.shared import (
    HydraActor,
    backbone_of,
    critic_on,
    fingerprint,
    freeze_lower,
    reward_on,
    save_reward_adapter,
    sharing,
)
from prefero.models.trunk import trunk_of
from tests.models.families import FAMILIES, Family, loud, stir_adapters, tokens
from tests.tiny import llama_config, tiny_llama


def addresses(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def learnable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def answers(critic: Any, num_actions: int = 5) -> torch.Tensor:
    nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(7))
    values: torch.Tensor = critic(tokens(), num_actions)
    return values


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("num_layers", [None, 1])
def test_a_critic_on_the_actors_weights_is_one_of_its_own(family: Family, num_layers: int | None) -> None:
    plain = loud(family.actor(config=family.config()))
    actor = stir_adapters(Actor(deepcopy(plain.model), lora_rank=2))
    critic = critic_on(actor, lora_rank=3, num_layers=num_layers)
    own = Critic(backbone_of(plain, num_layers), lora_rank=3)
    assert torch.equal(answers(critic), answers(own))
    base = {id(p) for name, p in actor.named_parameters() if ".lora_" not in name}
    frozen = [p for p in critic.parameters() if not p.requires_grad]
    assert frozen and all(id(p) in base for p in frozen)
    assert not {id(p) for p in learnable(critic)} & {id(p) for p in actor.parameters()}
    assert {layer.r["default"] for layer in lora_layers(critic)} == {3}
    assert critic.model.config.num_hidden_layers == (num_layers or actor.model.config.num_hidden_layers)


def test_what_one_role_learns_no_other_notices() -> None:
    actor = stir_adapters(Actor(loud(tiny_llama()), lora_rank=2))
    critic = critic_on(actor, lora_rank=2)
    before = actor(tokens(), 5).detach(), answers(critic).detach()
    with actor.reference():
        reference = actor(tokens(), 5).detach()
    for role, others in ((critic, 0), (actor, 1)):
        stir_adapters(role, seed=9)
        now = actor(tokens(), 5).detach(), answers(critic).detach()
        assert torch.equal(now[0], before[0]) is (others == 0)
    with actor.reference():
        assert torch.equal(actor(tokens(), 5), reference)


def test_checkpointing_recomputes_the_role_that_was_asked() -> None:
    """Both losses are backpropagated after both forwards: nothing that was switched in between may matter."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = loud(tiny_llama())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        actor = stir_adapters(Actor(model, lora_rank=2))
        critic = stir_adapters(critic_on(actor, lora_rank=2), seed=4)
        for module in (actor, critic):
            module.train()
        losses = actor(tokens(), 5).sum(), answers(critic).sum()
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for module in (actor, critic) for p in learnable(module)])
    assert len(gradients[0]) > 20
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_lower_layers_are_frozen_and_a_reference_shares_them(family: Family) -> None:
    actor = family.actor(config=family.config())
    freeze_lower(actor.model, 1)
    trained = {name for name, p in actor.named_parameters() if p.requires_grad}
    assert any(".1." in name for name in trained) and not any(".0." in name for name in trained)
    assert not any("emb" in name or "wte" in name or "wpe" in name for name in trained)
    reference = sharing(actor)
    shared = addresses(actor) & addresses(reference)
    assert shared == {p.data_ptr() for p in actor.parameters() if not p.requires_grad}
    before = reference(tokens(), 5).detach()
    with torch.no_grad():
        for parameter in learnable(actor):
            parameter.add_(0.5)
    assert torch.equal(reference(tokens(), 5), before) and not torch.equal(actor(tokens(), 5), before)


def test_a_head_of_its_own_and_the_last_norm_learn_with_the_upper_layers() -> None:
    model = tiny_llama()
    freeze_lower(model, 1)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and ".1." not in name}
    assert trained == {"norm", "lm_head"}
    with pytest.raises(ValueError, match="num_layers_unfrozen=2: the model has 2 layers; choose 1 to 1"):
        freeze_lower(tiny_llama(), 2)


def gemma() -> Gemma2ForCausalLM:
    """A family whose logits are more than its head on its last hidden states."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=3.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("model", [lambda: loud(tiny_llama()), gemma], ids=["plain head", "capped logits"])
def test_a_hydra_is_an_actor_and_a_critic_in_one_forward(model: Any) -> None:
    hydra = stir_adapters(HydraActor(model(), lora_rank=2))
    actor = Actor(deepcopy(hydra.model))
    critic = Critic(trunk_of(deepcopy(hydra.model)))
    nn.init.normal_(hydra.value_head.weight)
    critic.value_head = hydra.value_head
    mask = torch.ones(3, 5, dtype=torch.bool)
    logprobs, entropy, values = hydra(tokens(), 5, return_entropy=True, return_values=True)
    expected = actor(tokens(), 5, return_entropy=True)
    assert torch.equal(logprobs, expected[0]) and torch.equal(entropy, expected[1])
    torch.testing.assert_close(values, critic(tokens(), 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(hydra.values(tokens(), mask), values, rtol=0, atol=1e-6)
    assert torch.equal(hydra(tokens(), 5), logprobs)


@pytest.mark.parametrize("rank", [2, 5])
def test_a_reward_model_on_the_actors_weights_scores_as_it_did(tmp_path: Path, rank: int) -> None:
    model = loud(tiny_llama())
    judge = stir_adapters(RewardModel(deepcopy(model), lora_rank=rank, lora_alpha=3.0), seed=3)
    save_reward_adapter(judge, tmp_path, judge.state_dict())
    actor = stir_adapters(Actor(deepcopy(model), lora_rank=2))
    found = reward_on(actor, tmp_path)
    assert found is not None
    with torch.no_grad():
        assert torch.equal(found(tokens()), judge(tokens()))
    assert {id(p) for p in found.parameters() if not p.requires_grad} <= {id(p) for p in actor.parameters()}


def test_a_reward_model_of_other_weights_is_not_put_on_these(tmp_path: Path) -> None:
    model = loud(tiny_llama())
    judge = RewardModel(deepcopy(model), lora_rank=2)
    save_reward_adapter(judge, tmp_path, judge.state_dict())
    assert reward_on(Actor(loud(tiny_llama(), seed=1), lora_rank=2), tmp_path) is None
    assert reward_on(Actor(deepcopy(model)), tmp_path) is None  # its weights would move under the reward model
    assert reward_on(Actor(deepcopy(model), lora_rank=2), tmp_path / "nothing here") is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert reward_on(Actor(model, lora_rank=2), tmp_path) is None


def test_a_fingerprint_is_of_the_weights_below_adapters() -> None:
    model = loud(tiny_llama())
    plain = fingerprint(model.model.state_dict())
    adapted = stir_adapters(Actor(deepcopy(model), lora_rank=2))
    assert fingerprint(trunk_of(adapted.model).state_dict()) == plain
    assert fingerprint(loud(tiny_llama(), seed=1).model.state_dict()) != plain


def test_a_critic_wants_no_more_layers_than_there_are() -> None:
    with pytest.raises(ValueError, match="num_layers=3: the model has 2"):
        critic_on(Actor(tiny_llama(), lora_rank=2), 2, num_layers=3)
    assert llama_config().num_hidden_layers == 2
