"""Packed texts: hidden states, gradients and losses are those of the padded batch."""

import pytest
import torch
from transformers import AutoModel, BertConfig, DebertaV2Config, FalconConfig, LlamaModel, Qwen2MoeConfig, RobertaConfig

from prefero.models.base import Actor, Critic
from prefero.models.packed import hidden_states, packs
from prefero.models.packing import Packing
from prefero.models.trunk import padded_hidden_states, trunk_of
from prefero.rollout.engine import SamplingParams
from prefero.rollout.native.engine import NativeEngine
from prefero.types import Prompt
from tests.models.families import FAMILIES, Family, loud
from tests.tiny import llama_config, tiny_llama, tiny_tokenizer

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def batch(left: bool = True):
    ids = torch.randint(3, 32, (5, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 5, 11, 7)):
        mask[row, :count] = 0
    return ids, mask if left else mask.flip(1)


def one_by_one(trunk, ids, mask):
    """Hidden states of texts that never saw padding."""
    out = torch.zeros(*ids.shape, trunk.config.hidden_size, dtype=torch.float64)
    for row, real in enumerate(mask.bool()):
        out[row, real] = trunk(ids[row, real][None]).last_hidden_state[0]
    return out


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_padded_batch(family: Family, left: bool, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = loud(family.actor(config=family.config(), checkpoint=checkpointing)).double().train()
    ids, mask = batch(left)
    trunk = trunk_of(model.model)
    assert packs(trunk)
    weight = torch.randn(5, 12, 1, dtype=torch.float64)
    # Transformers' BLOOM cannot do padding in float64 (its mask becomes infinite), and its softmax is float32.
    bloom = family.name == "bloom"
    found = {}
    for name, function in (("packed", hidden_states), ("padded", one_by_one if bloom else padded_hidden_states)):
        model.zero_grad()
        hidden = function(trunk, ids, mask).masked_fill(mask[..., None] == 0, 0.0)
        (hidden * weight).sum().backward()
        found[name] = (hidden, [p.grad.clone() for p in trunk.parameters() if p.grad is not None])
    torch.testing.assert_close(found["packed"][0], found["padded"][0], atol=1e-6 if bloom else 1e-9, rtol=1e-6)
    for ours, theirs in zip(found["packed"][1], found["padded"][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 if bloom else 1e-6, rtol=1e-6)


def test_padding_is_not_computed() -> None:
    seen = []
    model = FAMILIES[-1].actor(config=FAMILIES[-1].config())
    ids, mask = batch()
    model(ids, 4, mask)  # what must be found out is found out once
    model.model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    model(ids, 4, mask)
    Critic(model.model)(ids, 4, mask)
    assert seen == [(1, int(mask.sum()))] * 2


@pytest.mark.parametrize(
    ("config", "can"),
    [(BertConfig(**SIZES), True), (RobertaConfig(**SIZES), False), (DebertaV2Config(**SIZES), False),
     (FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), False)],
    ids=lambda x: getattr(x, "model_type", x),
)  # fmt: skip
def test_families_that_cannot_are_padded_as_before(config, can: bool) -> None:
    torch.manual_seed(0)
    trunk = AutoModel.from_config(config).eval()
    ids, mask = batch(left=False)
    before = padded_hidden_states(trunk, ids, mask)
    assert packs(trunk) == can
    after = hidden_states(trunk, ids, mask)
    torch.testing.assert_close(after * mask[..., None], before * mask[..., None], atol=1e-5, rtol=1e-5)
    if not can:
        assert torch.equal(padded_hidden_states(trunk, ids, mask), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [False, True])
def test_texts_that_mix_are_noticed_at_every_precision(monkeypatch, dtype: torch.dtype, wrong: bool) -> None:
    """As loud as a trained model's: attention that sees what comes after would be a failure to set texts apart."""
    torch.manual_seed(0)
    trunk = trunk_of(loud(Actor(FAMILIES[-1].actor(config=FAMILIES[-1].config()).model)).model).to(dtype).eval()
    if wrong:
        usual = Packing.of
        monkeypatch.setattr(Packing, "of", lambda mask, causal=True: usual(mask, causal=False))
    before = trunk.config._attn_implementation
    assert packs(trunk) == (not wrong)
    assert wrong == (trunk.config._attn_implementation == before)


def test_a_copy_of_a_model_packs_by_itself() -> None:
    from copy import deepcopy

    actor = Actor(FAMILIES[2].actor(config=FAMILIES[2].config()).model)
    ids, mask = batch()
    first = actor(ids, 4, mask)
    twin = deepcopy(actor)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(ids, 4, mask), first)


def test_a_window_that_only_the_mask_knows_is_not_packed() -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    config = Qwen2MoeConfig(
        **SIZES, **experts, **window, num_key_value_heads=4, shared_expert_intermediate_size=16
    )  # fmt: skip
    assert not packs(AutoModel.from_config(config).eval())


def test_models_may_share_a_config() -> None:
    config = llama_config()
    one, two = LlamaModel(config), LlamaModel(config)
    assert packs(one) and packs(two) and packs(one)


def test_an_attention_that_is_changed_later_is_noticed() -> None:
    model = tiny_llama()
    assert packs(model.model)
    engine = NativeEngine(model, tiny_tokenizer())
    model.set_attn_implementation("eager")
    ids, mask = batch()
    assert not packs(model.model)
    found = hidden_states(model.model, ids, mask)
    torch.testing.assert_close(found, padded_hidden_states(model.model, ids, mask))
    with pytest.raises(ValueError, match="attention of LlamaModel was changed to 'eager'"):
        engine.generate([Prompt("p", (4, 5), "x")], SamplingParams(2))


def test_a_vocabulary_of_two_words() -> None:
    assert packs(LlamaModel(llama_config(2)))
