"""A language model with value heads: what it reads, what moves its slow copies, how it answers and where it is kept."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from prefero.functional import ilql
from prefero.models.base import Actor
from prefero.models.ilql import HEADS_FILE, ILQLActor, has_value_heads
from prefero.models.lora import lora_layers
from prefero.recipes.use import load_for_use
from prefero.rollout.engine import Engine, SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.rollout.native.engine import Bounds, NativeEngine
from prefero.types import Prompt
from tests.models.families import FAMILIES, Family, loud, padded, stir_adapters, tokens
from tests.tiny import tiny_llama, tiny_tokenizer


def with_heads(model: Any, lora_rank: int = 0, seed: int = 3) -> ILQLActor:
    """Heads as different from one another as after training, copies and all."""
    torch.manual_seed(seed)
    actor = ILQLActor(model, lora_rank)
    for parameter in actor.heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return actor


def gemma() -> Any:
    """Its logits are capped after its head."""
    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager",
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).float().eval()


def tables(actor: ILQLActor, ids: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Log-probabilities, both Q, both slow ones and V after every token, as whole tables from plain modules."""
    output = actor.model(ids, output_hidden_states=True)
    hidden, heads = output.hidden_states[-1], actor.heads

    def apply(head: Any) -> Tensor:
        return nn.functional.linear(
            nn.functional.linear(hidden, head.inner.weight, head.inner.bias).clamp_min(0), head.outer.weight,
            head.outer.bias,
        )  # fmt: skip

    every = [apply(head) for head in (heads.q1, heads.q2, heads.target_q1, heads.target_q2)]
    return output.logits, every, apply(heads.v)[..., 0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_readings_are_those_of_whole_tables(family: Family) -> None:
    actor, ids = with_heads(loud(family.actor(config=family.config())).model), tokens()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 3:5] = False  # what somebody else said
    read = actor(ids, 8, action_mask=mask, return_readings=True)
    logits, every, values = tables(actor, ids)

    def at(table: Tensor) -> Tensor:
        return table[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].masked_fill(~mask, 0.0)

    torch.testing.assert_close(read.logprobs, at(logits.log_softmax(-1)), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip((*read.qs, *read.target_qs), every, strict=True):
        torch.testing.assert_close(ours, at(theirs), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(read.q_logprobs, every[:2], strict=True):
        torch.testing.assert_close(ours, at(theirs.log_softmax(-1)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.values, values[:, :-1].masked_fill(~mask, 0.0), atol=1e-4, rtol=1e-4)


def test_log_probabilities_asked_for_are_the_imitating_policys() -> None:
    actor = with_heads(loud(tiny_llama()))
    assert torch.equal(actor(tokens(), 4), Actor(actor.model)(tokens(), 4))


@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing(left: int) -> None:
    actor, ids = with_heads(loud(tiny_llama())), tokens()
    wide, attention = padded(ids, left, 2, pad=7)
    mask = torch.cat([torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    found = actor(wide, 7, attention, action_mask=mask, return_readings=True)
    plain = actor(ids, 5, return_readings=True)
    for ours, theirs in ((found.values, plain.values), (found.qs[0], plain.qs[0]), (found.logprobs, plain.logprobs)):
        torch.testing.assert_close(ours[:, :5], theirs, atol=1e-5, rtol=1e-5)
        assert not ours[:, 5:].any()


def test_slow_copies_learn_by_moving_and_by_nothing_else() -> None:
    actor = ILQLActor(tiny_llama())
    slow = [*actor.heads.target_q1.parameters(), *actor.heads.target_q2.parameters()]
    fast = [*actor.heads.q1.parameters(), *actor.heads.q2.parameters()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(slow, fast, strict=True))  # they begin as copies
    read = actor(tokens(), 5, return_readings=True)
    sum(part.sum() for part in (*read.qs, *read.target_qs, read.values, read.logprobs)).backward()
    assert not any(p.requires_grad for p in slow) and all(p.grad is None for p in slow)
    assert all(p.grad is not None for p in fast)
    with torch.no_grad():
        for parameter in fast:
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in slow]
    actor.heads.sync(0.25)
    for now, was in zip(slow, before, strict=True):
        torch.testing.assert_close(now, was + 0.25)
    actor.heads.sync(1.0)
    assert all(torch.allclose(a, b) for a, b in zip(slow, fast, strict=True))


def engines(actor: ILQLActor) -> dict[str, Engine]:
    tokenizer = tiny_tokenizer()
    return {"hf": HFEngine(actor, tokenizer, 3, ()), "native": NativeEngine(actor, tokenizer, Bounds(slots=3), ())}


def by_hand(actor: ILQLActor, prompt: Prompt, beta: float, count: int) -> list[int]:
    """The likeliest tokens by a plain loop over whole texts, without a cache."""
    ids = list(prompt.token_ids)
    for _ in range(count):
        with torch.no_grad():
            logits, every, values = tables(actor, torch.tensor([ids]))
        advantage = torch.minimum(every[2], every[3])[0, -1] - values[0, -1]
        ids.append(int((logits[0, -1].log_softmax(-1) + beta * advantage).argmax()))
    return ids[len(prompt.token_ids) :]


PROMPTS = [Prompt(f"p{i}", tuple(range(3, 5 + i)), "") for i in range(4)]


@pytest.mark.parametrize("beta", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_engines_answer_as_a_plain_loop_does(family: Family, beta: float) -> None:
    actor = with_heads(loud(family.actor(config=family.config())).model)
    actor.beta = beta
    wanted = [by_hand(actor, prompt, beta, 6) for prompt in PROMPTS]
    for name, engine in engines(actor).items():
        done = engine.generate(PROMPTS, SamplingParams(6, greedy=True))
        assert [list(found.token_ids) for found in done] == wanted, name
    sequences, _ = actor.generate(
        torch.tensor([PROMPTS[3].token_ids]), return_action_mask=False, max_new_tokens=6, do_sample=False,
        eos_token_id=[31], pad_token_id=0,
    )  # fmt: skip
    assert 31 in wanted[3] or sequences[0, 5:].tolist() == wanted[3]


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_samples_are_drawn_from_the_guided_policy(beta: float) -> None:
    actor = with_heads(loud(tiny_llama()))
    actor.beta = beta
    params = SamplingParams(5, temperature=0.7, top_k=10, seed=4)
    found = {name: engine.generate(PROMPTS, params) for name, engine in engines(actor).items()}
    for prompt, ours, theirs in zip(PROMPTS, found["hf"], found["native"], strict=True):
        assert ours.token_ids == theirs.token_ids
        ids = torch.tensor([[*prompt.token_ids, *ours.token_ids]])
        with torch.no_grad():
            logits, every, values = tables(actor, ids)
        guided = ilql.guided(logits, every[2:], values, beta)[0, len(prompt.token_ids) - 1 : -1] / 0.7
        wanted = guided.log_softmax(-1).gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]
        for done in (ours, theirs):
            torch.testing.assert_close(torch.tensor(done.logprobs).float(), wanted, atol=2e-3, rtol=2e-3)


def test_caps_on_logits_do_not_cap_the_advantages() -> None:
    actor = with_heads(loud(gemma()))
    actor.beta = 50.0
    wanted = [by_hand(actor, prompt, 50.0, 4) for prompt in PROMPTS]
    plain = [by_hand(actor, prompt, 0.0, 4) for prompt in PROMPTS]
    for engine in engines(actor).values():
        # One by one: eager attention gives NaN where a row is padded.
        done = [engine.generate([prompt], SamplingParams(4, greedy=True))[0] for prompt in PROMPTS]
        assert [list(found.token_ids) for found in done] == wanted != plain


def test_half_precision_leaves_the_values_whole() -> None:
    actor = with_heads(loud(tiny_llama()))
    actor.beta = 100.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = actor(tokens(), 5, return_readings=True)
        done = [engine.generate(PROMPTS, SamplingParams(4, greedy=True)) for engine in engines(actor).values()]
    assert read.qs[0].dtype == read.values.dtype == torch.float32
    assert all(math.isfinite(number) for found in done for one in found for number in one.logprobs)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_exports_come_back_with_their_heads(tmp_path: Path, lora_rank: int) -> None:
    actor = with_heads(loud(tiny_llama(24)), lora_rank)
    stir_adapters(actor)
    actor.beta = 7.5
    actor.save_pretrained(tmp_path, tiny_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens() % 24
    torch.testing.assert_close(plain(ids).logits, actor.model(ids).logits, atol=1e-5, rtol=1e-4)
    again, _ = load_for_use(str(tmp_path), "cpu")
    assert isinstance(again, ILQLActor) and again.beta == 7.5 and not list(lora_layers(again))
    params = SamplingParams(5, seed=2)
    answers = [HFEngine(one, tiny_tokenizer(), 3, ()).generate(PROMPTS, params) for one in (actor, again)]
    assert [done.token_ids for done in answers[0]] == [done.token_ids for done in answers[1]]
    assert load_for_use(str(tmp_path), "cpu", beta=0.0)[0].beta == 0.0


def test_folders_without_heads_or_with_others_are_refused(tmp_path: Path) -> None:
    Actor(tiny_llama(24)).save_pretrained(tmp_path / "plain", tiny_tokenizer())
    assert not has_value_heads(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=f"holds no {HEADS_FILE}: give"):
        ILQLActor.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no value heads that could guide it; leave it out"):
        load_for_use(str(tmp_path / "plain"), "cpu", beta=1.0)
    ILQLActor(tiny_llama(24)).save_pretrained(tmp_path / "one")
    ILQLActor(tiny_llama(24, hidden_size=16)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / HEADS_FILE).replace(tmp_path / "one" / HEADS_FILE)
    with pytest.raises(ValueError, match="does not fit the model beside it"):
        ILQLActor.from_pretrained(tmp_path / "one")
