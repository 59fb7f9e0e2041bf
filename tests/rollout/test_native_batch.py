"""Continuous batching: slots are refilled, prompts are read once, shared beginnings are copied, bounds are kept."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from prefero.models.at_hand import at_hand
from prefero.models.base import Actor
from prefero.models.trunk import replaced, trunk_of
from prefero.recipes.plan import resident
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.rollout.native.engine import Bounds, NativeEngine, UnpackableError
from prefero.rollout.rows import rows_of
from prefero.strategies.cpu import release_memory
from prefero.types import Prompt
from tests.rollout.test_engines import peaked, prompts, same
from tests.tiny import bloom_config, gpt2_config, opt_config, tiny_llama, tiny_tokenizer

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "deepseek": lambda: DeepseekV3Config(  # keys are longer than values
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        first_k_dense_replace=3,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    "gpt2": gpt2_config,
    "opt": opt_config,
    "bloom": bloom_config,
}


class Counted(NativeEngine):
    """Knows how many tokens each forward was given."""

    def _forward(self, ids, positions, texts, places):
        self.given = [*getattr(self, "given", []), len(ids)]
        return super()._forward(ids, positions, texts, places)


def native(model, slots=8, eos=(), memory=1 << 30, make=NativeEngine):
    return make(model, tiny_tokenizer(), Bounds(slots, memory), eos)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_every_family_samples_what_a_full_forward_says(family, temperature):
    torch.manual_seed(3)
    actor = Actor(peaked(AutoModelForCausalLM.from_config(FAMILIES[family]())), lora_rank=2)
    asked = prompts((1, 9, 3, 6, 2))
    params = SamplingParams(12, temperature=temperature, seed=1)
    for _ in range(2):
        done = native(actor, slots=3).generate(asked, params)
        for prompt, completion in zip(asked, done, strict=True):
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
            with torch.no_grad():
                expected = actor(ids, len(completion.token_ids), temperature=temperature)[0]
            torch.testing.assert_close(torch.tensor(completion.logprobs).float(), expected, atol=1e-5, rtol=0)
        with torch.no_grad():  # and after an update
            for name, parameter in actor.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)


def test_slots_are_refilled_and_no_ended_row_is_computed():
    model = peaked(tiny_llama())
    asked, ends = prompts(tuple(1 + i % 4 for i in range(20))), list(range(7))
    params = SamplingParams(16, temperature=1.5, seed=12)
    alone = HFEngine(model, tiny_tokenizer(), 1, ends).generate(asked, params)
    engine = native(model, slots=4, eos=ends, make=Counted)
    same(engine.generate(asked, params), alone)
    lengths = [len(completion.token_ids) for completion in alone]
    prefilled = sum(len(prompt.token_ids) for prompt in asked)
    # Every token but the last of each answer is read once, and every prompt's.
    assert sum(engine.given) == prefilled + sum(lengths) - len(lengths)
    assert len(engine.given) < len(asked) / 4 * max(lengths)


def test_samples_of_one_prompt_read_it_once():
    model, [prompt] = peaked(tiny_llama()), prompts((20,))
    params = SamplingParams(5, seed=2)
    engine = native(model, slots=8, make=Counted)
    same(engine.generate([prompt] * 8, params), HFEngine(model, tiny_tokenizer(), 8, ()).generate([prompt] * 8, params))
    assert engine.given == [20, 8, 8, 8, 8]
    # Those that find no slot at first copy what those before them have read, though these have all ended.
    engine = native(model, slots=3, make=Counted)
    same(engine.generate([prompt] * 8, params), HFEngine(model, tiny_tokenizer(), 8, ()).generate([prompt] * 8, params))
    assert sum(engine.given) == 20 + 1 + 1 + 8 * 4


def test_prompts_that_begin_alike_read_the_beginning_once():
    model, start = peaked(tiny_llama()), tuple(range(4, 24))
    asked = [Prompt(f"p{i}", (*start, 5 + i, 6), "x") for i in range(6)]
    params = SamplingParams(4, seed=2)
    engine = native(model, slots=8, make=Counted)
    same(engine.generate(asked, params), HFEngine(model, tiny_tokenizer(), 8, ()).generate(asked, params))
    assert engine.given == [22, 5 * 2, 6, 6, 6]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("piece", [5, 4096])
def test_what_is_shared_is_what_would_have_been_read(monkeypatch, family, piece):
    """Samples of one prompt, prompts that begin alike, slots that are used again, pieces: all at once."""
    torch.manual_seed(3)
    monkeypatch.setattr("prefero.rollout.native.batch._PREFILL", piece)
    actor = Actor(peaked(AutoModelForCausalLM.from_config(FAMILIES[family]())), lora_rank=2)
    start = tuple(range(4, 18))
    asked = [
        Prompt(f"p{i}", (*start[: 14 - i % 3], *range(5 + i, 9 + 2 * i)), "x")
        for i in range(5)
        for _ in range(1 + i % 3)
    ]
    done = native(actor, slots=3, eos=(0, 1, 2, 3)).generate(asked, SamplingParams(9, temperature=1.1, seed=5))
    assert len({len(completion.token_ids) for completion in done}) > 1
    for prompt, completion in zip(asked, done, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        with torch.no_grad():
            expected = actor(ids, len(completion.token_ids), temperature=1.1)[0]
        torch.testing.assert_close(torch.tensor(completion.logprobs).float(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
@pytest.mark.parametrize("slots", [2, 5])
def test_long_prompts_are_read_in_pieces(monkeypatch, family, slots):
    torch.manual_seed(3)
    model = peaked(AutoModelForCausalLM.from_config(FAMILIES[family]()))
    asked, params = prompts((30, 2, 17, 9, 30, 1)), SamplingParams(6, seed=4)
    expected = native(model, slots=slots).generate(asked, params)
    monkeypatch.setattr("prefero.rollout.native.batch._PREFILL", 7)
    engine = native(model, slots=slots, make=Counted)
    same(engine.generate(asked, params), expected)
    assert max(engine.given) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_is_kept(dtype):
    model = peaked(tiny_llama()).to(dtype)
    engine = native(model, slots=3)
    batch, _ = engine._batch(rows_of(prompts(), SamplingParams(8, seed=3), model.config), SamplingParams(8, seed=3))
    for _ in batch:
        pass
    kept = [pool for pools in (batch.slots.keys, batch.slots.values) for pool in pools.values()]
    assert sum(pool.nbytes for pool in kept) == batch.slots.count * engine._bytes(batch.slots.room)


def test_memory_is_bounded_and_what_does_not_fit_is_named():
    model, params = peaked(tiny_llama()), SamplingParams(8, seed=3)
    expected = native(model).generate(prompts(), params)
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    engine = native(model, memory=2 * a_token * 15, make=Counted)
    same(engine.generate(prompts(), params), expected)
    assert max(engine.given) <= 2 * 7
    with pytest.raises(ValueError, match=r"one answer of 15 tokens needs \d+ bytes.*engine.memory 100"):
        native(model, memory=100).generate(prompts(), params)


def test_a_row_that_is_given_up_frees_its_slot():
    model, params = peaked(tiny_llama()), SamplingParams(30, seed=3)
    stream = native(model, slots=1).stream(prompts()[1], params)
    next(stream)
    stream.close()
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_is_the_same_with_any_number_of_slots(seed):
    model, params = peaked(tiny_llama()), SamplingParams(14, temperature=1.2, seed=seed)
    asked = [prompt for prompt in prompts() for _ in range(3)]
    ends = list(range(4))
    expected = HFEngine(model, tiny_tokenizer(), 6, ends).generate(asked, params)
    for slots in (1, 2, 5, 18):
        same(native(model, slots=slots, eos=ends).generate(asked, params), expected)


@pytest.mark.parametrize("small", [1e-3, 1e-1])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_adapters_are_not_rounded_away(small, autocast):
    torch.manual_seed(0)
    actor = Actor(peaked(tiny_llama()), lora_rank=2)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, small)
    trunk = trunk_of(actor.model)
    layer = trunk.layers[0].self_attn.q_proj
    inputs = torch.randn(64, layer.in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(inputs)
        with replaced(at_hand(trunk)):
            found = layer(inputs)
    torch.testing.assert_close(found, expected, atol=0.0 if autocast else 1e-5, rtol=0.0)


def test_adapters_of_other_kinds_are_left_alone():
    base = tiny_llama()
    for changes, name in (({"use_dora": True}, "default"), ({}, "mine"), ({"lora_bias": True}, "default")):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **changes)
        model = get_peft_model(deepcopy(base), config, adapter_name=name).eval()
        asked, params = prompts((3, 5)), SamplingParams(6, seed=2)
        same(native(model).generate(asked, params), HFEngine(model, tiny_tokenizer(), 2, ()).generate(asked, params))


def test_rotary_embeddings_that_depend_on_the_length_are_refused_beyond_their_usual_one():
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = peaked(tiny_llama(rope_parameters=rotary | factors))
    same(
        native(model).generate(prompts((10,)), SamplingParams(6, seed=2)),
        HFEngine(model, tiny_tokenizer(), 2, ()).generate(prompts((10,)), SamplingParams(6, seed=2)),
    )
    with pytest.raises(ValueError, match="a prompt and its answer of 17 tokens are beyond 16"):
        native(model).generate(prompts((10,)), SamplingParams(7, seed=2))


def test_prompts_that_were_learned_are_for_the_other_engine():
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnpackableError, match="prompts that were learned"):
        native(model)


def test_many_requests_leave_nothing_behind():
    """10,000 of them, in calls of all sizes: what the process holds does not grow."""
    engine, params = native(peaked(tiny_llama()), slots=64), SamplingParams(3, seed=1)
    sizes = [1 + (7 * i) % 5 for i in range(500)]
    held, done = [], 0
    for call in range(20):
        done += len(engine.generate(prompts(tuple(sizes)), params))
        for _ in engine.stream(prompts((3,))[0], params):
            if call % 2:
                break  # whoever reads it goes away
        release_memory()
        held.append(resident())
    assert done == 10_000
    assert held[-1] - held[4] < 512 << 10
    assert not any("forward" in vars(module) for module in engine.model.modules())
