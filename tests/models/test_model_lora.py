"""Adapters: nothing at first, the reference for free, merged without being harmed."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.lora import apply_lora, lora_layers, merged
from prefero.models.trunk import freeze
from tests.models.families import FAMILIES, Family, loud, stir_adapters, tokens
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_new_adapter_changes_nothing_bitwise_and_covers_every_linear_layer(family: Family) -> None:
    plain = loud(family.actor(config=family.config()))
    adapted = Actor(deepcopy(plain.model), lora_rank=2)
    assert torch.equal(adapted(tokens(), 5), plain(tokens(), 5))
    kinds = {"Linear", "Conv1D"}
    head = plain.model.get_output_embeddings()
    linear = [m for m in plain.model.modules() if type(m).__name__ in kinds and m is not head]
    assert len(list(lora_layers(adapted))) == len(linear) >= 8
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_reference_is_the_model_before_its_adapters_learned(family: Family) -> None:
    plain = loud(family.actor(config=family.config()))
    adapted = stir_adapters(Actor(deepcopy(plain.model), lora_rank=2))
    with adapted.reference(), torch.no_grad():
        assert torch.equal(adapted(tokens(), 5), plain(tokens(), 5))
    assert not torch.allclose(adapted(tokens(), 5), plain(tokens(), 5), atol=1e-2)
    adapted(tokens(), 5).sum().backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if ".lora_" in name)


def test_the_reference_restores_what_was_frozen_also_after_an_error() -> None:
    actor = freeze(stir_adapters(Actor(tiny_llama(), lora_rank=2)))
    with pytest.raises(KeyError), actor.reference():
        raise KeyError
    assert not any(p.requires_grad for p in actor.parameters())
    assert not any(layer.disable_adapters for layer in lora_layers(actor))


def test_a_reference_that_would_be_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="there are none"), Actor(tiny_llama()).reference():
        pass
    with pytest.raises(ValueError, match="lora_train_bias='all'"), Actor(tiny_llama(), 2, "all").reference():
        pass


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_weights_are_the_adapted_model_and_the_adapters_live_on(family: Family, bias: str) -> None:
    adapted = stir_adapters(loud(family.actor(config=family.config(), lora_rank=2, lora_train_bias=bias)))
    before, weights = adapted(tokens(), 5).detach(), {n: p.clone() for n, p in adapted.named_parameters()}
    state = adapted.to_checkpoint(adapted.state_dict())
    assert all(torch.equal(p, weights[n]) for n, p in adapted.named_parameters())
    plain = family.actor(config=family.config())
    plain.model.load_state_dict(state)
    torch.testing.assert_close(plain(tokens(), 5), before, atol=2e-6, rtol=2e-6)
    assert torch.equal(adapted(tokens(), 5), before)


def test_bias_modes_train_what_they_say() -> None:
    from transformers import GPT2LMHeadModel

    from tests.tiny import gpt2_config

    trainable = {
        mode: {n for n, p in apply_lora(GPT2LMHeadModel(gpt2_config()), 2, mode).named_parameters() if p.requires_grad}
        for mode in ("none", "all", "lora_only")
    }
    assert not any("bias" in name for name in trainable["none"])
    biases = {name for name in trainable["lora_only"] if "bias" in name}
    assert biases
    assert all("base_layer" in name for name in biases)
    assert any("ln_1.bias" in name for name in trainable["all"])


@pytest.mark.parametrize("rank", [0, 2])
def test_export_loads_in_transformers_with_equal_logits(tmp_path: Path, rank: int) -> None:
    for family in FAMILIES:
        actor = stir_adapters(loud(family.actor(config=family.config(), lora_rank=rank)))
        expected = actor.model(tokens()).logits.detach()
        folder = tmp_path / family.name
        actor.save_pretrained(folder, tiny_tokenizer())
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
        tied = loaded.config.tie_word_embeddings
        assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
        assert torch.equal(actor.model(tokens()).logits, expected)
        assert (folder / "tokenizer.json").is_file()
        assert not list(folder.glob("adapter*"))


def test_export_in_bf16_is_read_back_in_bf16(tmp_path: Path) -> None:
    actor = stir_adapters(loud(Actor(tiny_llama(), lora_rank=2)))
    actor.save_pretrained(tmp_path, dtype="bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    state = merged(actor.model, actor.model.state_dict(), torch.bfloat16)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert actor.model.dtype == torch.float32


def test_adapter_folder_is_read_by_peft(tmp_path: Path) -> None:
    base = loud(tiny_llama())
    actor = stir_adapters(Actor(deepcopy(base), lora_rank=2))
    actor.save_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(tokens()).logits, actor.model(tokens()).logits, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="no adapter to save"):
        Actor(tiny_llama()).save_adapter(tmp_path)


@pytest.mark.parametrize("kind", [Critic, RewardModel])
def test_heads_learn_fully_beside_adapters_and_states_merge(kind: type[Critic] | type[RewardModel]) -> None:
    model = stir_adapters(loud(kind(tiny_llama(), lora_rank=2)))
    assert all(p.requires_grad for p in model.value_head.parameters())
    plain = kind(tiny_llama())
    plain.load_state_dict(plain.from_checkpoint(plain.state_dict(), model.to_checkpoint(model.state_dict())))
    arguments = (tokens(), 4) if kind is Critic else (tokens(),)
    torch.testing.assert_close(plain(*arguments), model(*arguments), atol=1e-5, rtol=1e-5)


def test_alpha_scales_the_update() -> None:
    base = loud(tiny_llama())
    ids = tokens()
    plain = Actor(base)(ids, 5)
    one, two = (stir_adapters(Actor(deepcopy(base), lora_rank=2, lora_alpha=a)) for a in (None, 4.0))
    assert next(lora_layers(one)).scaling["default"] == 1.0
    assert next(lora_layers(two)).scaling["default"] == 2.0
    assert not torch.allclose(one(ids, 5), two(ids, 5))
    assert not torch.allclose(one(ids, 5), plain)


def test_lora_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match="lora_rank=-1"):
        apply_lora(tiny_llama(), -1)
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(apply_lora(tiny_llama(), 2), 2)
