"""One backbone: roles share what is frozen, compute what networks of their own would, and never meet in training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
)

from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.lora import lora_layers
from prefero.models.shared import (
    HydraActor,
    NotSharedError,
    backbone_of,
    critic_on,
    fingerprint,
    freeze_lower,
    reward_on,
    save_reward_adapter,
    sharing,
)
from prefero.models.trunk import trunk_of
from prefero.strategies.naive import NaiveStrategy
from tests.models.families import FAMILIES, Family, loud, stir_adapters, tokens
from tests.tiny import bloom_config, gpt2_config, llama_config, opt_config, tiny_llama


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


@pytest.mark.parametrize(
    ("model", "above"),
    [
        (tiny_llama, {"norm", "lm_head"}),
        (lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)), {"norm"}),
        (lambda: GPT2LMHeadModel(gpt2_config()), {"ln_f"}),
        # It registers what stands above its layers before them, and the head is tied.
        (lambda: OPTForCausalLM(opt_config()), {"final_layer_norm"}),
        (lambda: BloomForCausalLM(bloom_config()), {"ln_f"}),
        (lambda: GPTNeoXForCausalLM(neox_config()), {"final_layer_norm", "lm_head"}),
    ],
    ids=["llama", "tied llama", "gpt2", "opt", "bloom", "neox"],
)
def test_what_stands_above_the_layers_learns_and_nothing_below(model: Any, above: set[str]) -> None:
    made = model()
    freeze_lower(made, 1)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained if ".1." not in name} == above
    made(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if name in trained)


def neox_config() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip


def test_a_critic_on_the_first_layers_of_a_half_frozen_policy_learns_too() -> None:
    actor = Actor(loud(tiny_llama(num_hidden_layers=4)))
    freeze_lower(actor.model, 1)
    critic = critic_on(actor, num_layers=2)
    nn.init.normal_(critic.value_head.weight)
    critic(tokens(), 5).sum().backward()
    learned = {name for name, p in critic.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(".1." in name for name in learned) and not any(".0." in name for name in learned)
    assert not {id(p) for p in learnable(critic)} & {id(p) for p in actor.parameters()}
    assert {id(p) for p in critic.model.layers[0].parameters()} == {
        id(p) for p in actor.model.model.layers[0].parameters()
    }


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_layers_unfrozen=2: the model has 2 layers; choose 1 to 1"):
        freeze_lower(tiny_llama(), 2)


def test_a_role_s_file_does_not_move_the_weights_of_others(tmp_path: Path) -> None:
    strategy = NaiveStrategy("cpu")
    actor = stir_adapters(Actor(loud(tiny_llama()), lora_rank=2))
    critic = stir_adapters(critic_on(actor, lora_rank=2))
    strategy.prepare(actor, critic)
    assert addresses(actor) & addresses(critic)
    before = actor(tokens(), 5).detach()
    for name, model in (("actor.pt", actor), ("critic.pt", critic)):
        strategy.save_model(model, tmp_path / name)
        with pytest.raises(ValueError, match="other models share its weights"):
            strategy.load_model(model, tmp_path / name)
    assert torch.equal(actor(tokens(), 5), before)
    own = Actor(deepcopy(actor.model))
    strategy.load_model(own, tmp_path / "actor.pt")
    torch.testing.assert_close(own(tokens(), 5), before, rtol=0, atol=1e-5)


def test_a_hydra_s_file_holds_its_head_and_a_plain_policy_s_leaves_it(tmp_path: Path) -> None:
    strategy = NaiveStrategy("cpu")
    hydra = HydraActor(loud(tiny_llama()))
    nn.init.normal_(hydra.value_head.weight)
    strategy.save_model(hydra, tmp_path / "hydra.pt")
    strategy.save_model(Actor(hydra.model), tmp_path / "plain.pt")
    for file, heads_differ in (("hydra.pt", False), ("plain.pt", True)):
        other = HydraActor(loud(tiny_llama(), seed=3))
        strategy.load_model(other, tmp_path / file)
        assert torch.equal(other(tokens(), 5), hydra(tokens(), 5))
        assert bool((other.value_head.weight != hydra.value_head.weight).any()) is heads_differ


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
    with torch.no_grad():
        assert torch.equal(found(tokens()), judge(tokens()))
    assert {id(p) for p in found.parameters() if not p.requires_grad} <= {id(p) for p in actor.parameters()}


def test_a_reward_model_of_other_weights_is_not_put_on_these(tmp_path: Path) -> None:
    model = loud(tiny_llama())
    judge = RewardModel(deepcopy(model), lora_rank=2)
    save_reward_adapter(judge, tmp_path, judge.state_dict())
    with pytest.raises(NotSharedError, match="other weights"):
        reward_on(Actor(loud(tiny_llama(), seed=1), lora_rank=2), tmp_path)
    with pytest.raises(NotSharedError, match="would move below it"):
        reward_on(Actor(deepcopy(model)), tmp_path)
    with pytest.raises(NotSharedError, match="not trained as adapters"):
        reward_on(Actor(deepcopy(model), lora_rank=2), tmp_path / "nothing here")
    other = deepcopy(model)
    other.config.rms_norm_eps *= 2  # the same weights, computed with otherwise
    with pytest.raises(NotSharedError, match="other weights"):
        reward_on(Actor(other, lora_rank=2), tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 5].mul_(1.001)
    with pytest.raises(NotSharedError, match="other weights"):
        reward_on(Actor(model, lora_rank=2), tmp_path)


def test_a_fingerprint_is_of_the_weights_below_adapters() -> None:
    model = loud(tiny_llama())
    plain = fingerprint(model.config, model.model.state_dict())
    adapted = stir_adapters(Actor(deepcopy(model), lora_rank=2))
    assert fingerprint(model.config, trunk_of(adapted.model).state_dict()) == plain
    assert fingerprint(model.config, loud(tiny_llama(), seed=1).model.state_dict()) != plain


def test_a_critic_wants_no_more_layers_than_there_are() -> None:
    with pytest.raises(ValueError, match="num_layers=3: the model has 2"):
        critic_on(Actor(tiny_llama(), lora_rank=2), 2, num_layers=3)
    assert llama_config().num_hidden_layers == 2
