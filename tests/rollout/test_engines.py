"""Both engines: a sample depends on its key only, and its log-probabilities are the trainer's."""

import dataclasses
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomForCausalLM,
    GPT2LMHeadModel,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
)

from prefero.functional.logprobs import token_logprobs
from prefero.models.base import Actor
from prefero.rollout.engine import Engine, SamplingParams, TruncatedCompletion, sampling_logprobs
from prefero.rollout.hf import HFEngine
from prefero.rollout.native.engine import Bounds, NativeEngine
from prefero.rollout.rows import Row, advance, texts_of
from prefero.types import Prompt
from tests.tiny import bloom_config, gpt2_config, opt_config, tiny_llama, tiny_tokenizer

FAMILIES = {
    "llama": tiny_llama,
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "opt": lambda: OPTForCausalLM(opt_config()),
    "bloom": lambda: BloomForCausalLM(bloom_config()),
}


def peaked(model):
    """Logits several nats apart, as a trained model's are: a new model's are nearly flat and hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        if not model.config.tie_word_embeddings:  # a tied model would only repeat its last token
            model.get_output_embeddings().weight.mul_(5)
        size = float(model.float().eval()(torch.arange(20)[None]).logits.std())
        if size > 6:  # more than a trained model's, whose rounding would be larger too
            model.get_output_embeddings().weight.mul_(6 / size)
    return model


def prompts(lengths=(1, 3, 7, 2, 5, 4)):
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(5)
    rows = [torch.randint(4, 24, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(f"p{i}", tuple(ids), tokenizer.decode(ids)) for i, ids in enumerate(rows)]


KINDS = {
    "hf": lambda model, tokenizer, size, eos: HFEngine(model, tokenizer, batch_size=size, eos_token_ids=eos),
    "native": lambda model, tokenizer, size, eos: NativeEngine(model, tokenizer, Bounds(slots=size), eos),
}


@pytest.fixture(autouse=True, params=sorted(KINDS))
def kind(request):
    """Which engine `engine` makes in this test."""
    engine.kind = request.param
    return request.param


def engine(model, batch_size=8, eos=None, tokenizer=None):
    return KINDS[engine.kind](model, tokenizer or tiny_tokenizer(), batch_size, eos)


hf_only = pytest.mark.parametrize("kind", ["hf"], indirect=True)
"""For what is how this engine goes about it, not what comes out."""


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return peaked(FAMILIES[request.param]())


@pytest.fixture
def llama():
    return peaked(tiny_llama())


def test_logits_are_full_precision_under_autocast_as_the_trainers(llama):
    """bf16 logits between 16 and 32 are 0.125 apart: what is learned from would not be what was sampled."""
    llama.get_output_embeddings().weight.data.mul_(8)
    for layer in llama.model.layers:  # engines round attention in ways of their own; this is about what follows
        layer.self_attn.o_proj.weight.data.zero_()
    actor, params = Actor(llama), SamplingParams(max_new_tokens=6, temperature=1.0, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = engine(actor, eos=()).generate(prompts((4, 4, 4, 4)), params)
        rows = zip(prompts((4, 4, 4, 4)), done, strict=True)
        sequences = torch.tensor([(*prompt.token_ids, *completion.token_ids) for prompt, completion in rows])
        with torch.no_grad():
            theirs, logits = actor(sequences, 6), llama(sequences).logits
    ours = torch.tensor([c.logprobs for c in done])
    assert float(logits.abs().max()) > 16
    torch.testing.assert_close(ours.float(), theirs, atol=1e-4, rtol=0)


def same(first, second):
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert [(c.text, c.finish_reason) for c in first] == [(c.text, c.finish_reason) for c in second]
    for one, other in zip(first, second, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4)


def test_it_is_an_engine(llama):
    assert isinstance(engine(llama), Engine)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
def test_logprobs_are_those_of_a_full_forward(model, temperature):
    params = SamplingParams(12, temperature=temperature, seed=3)
    for prompt, completion in zip(prompts(), engine(model).generate(prompts(), params), strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        expected = token_logprobs(model(ids).logits, ids, temperature)[0, len(prompt.token_ids) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected.detach(), atol=1e-4, rtol=0)


def test_truncated_completions_name_both_logprobs(llama):
    params = SamplingParams(6, temperature=0.9, top_k=5, top_p=0.8, min_new_tokens=2, seed=1)
    for prompt, completion in zip(prompts(), engine(llama).generate(prompts(), params), strict=True):
        assert isinstance(completion, TruncatedCompletion)
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        start = len(prompt.token_ids)
        logits = llama(ids).logits[0, start - 1 : -1].detach().double() / 0.9
        for step, (row, token) in enumerate(zip(logits, completion.token_ids, strict=True)):
            assert completion.logprobs[step] == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-4)
            if step < 2:
                row[2] = -torch.inf
            probs, order = row.softmax(-1).sort(descending=True)
            probs = probs[:5] / probs[:5].sum()
            kept = probs[probs.cumsum(0) - probs < 0.8]
            chance = float((kept / kept.sum()).log()[order.tolist().index(token)])
            assert sampling_logprobs(completion)[step] == pytest.approx(chance, abs=1e-4)
    plain = engine(llama).generate(prompts(), SamplingParams(3))[0]
    assert not isinstance(plain, TruncatedCompletion)
    assert sampling_logprobs(plain) == plain.logprobs


def test_penalised_completions_name_the_chance_they_were_drawn_with(llama):
    added = {7: 3.0, 9: -50.0}
    params = SamplingParams(8, temperature=0.8, min_p=0.01, repetition_penalty=1.5, logit_bias=added, seed=2)
    bias = torch.tensor([added.get(token, 0.0) for token in range(llama.config.vocab_size)], dtype=torch.float64)
    for prompt, completion in zip(prompts(), engine(llama).generate(prompts(), params), strict=True):
        assert isinstance(completion, TruncatedCompletion) and 9 not in completion.token_ids
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        start = len(prompt.token_ids)
        logits = llama(ids).logits[0, start - 1 : -1].detach()
        for step, (row, token) in enumerate(zip(logits, completion.token_ids, strict=True)):
            own = (row.double() / 0.8).log_softmax(-1)
            assert completion.logprobs[step] == pytest.approx(float(own[token]), abs=1e-4)
            punished = RepetitionPenaltyLogitsProcessor(1.5)(ids[:, : start + step], row[None])[0]
            probs = ((punished.double() + bias) / 0.8).softmax(-1)
            probs = torch.where(probs < 0.01 * probs.max(), 0.0, probs)
            chance = float((probs / probs.sum()).log()[token])
            assert sampling_logprobs(completion)[step] == pytest.approx(chance, abs=1e-4)


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (("a", "\n\n\n\n"), ("\n\n",), "a"),
        (("a", "###\n\n"), ("\n\n", "###"), "a"),
        (("a", "#", "b##"), ("##",), "a#b"),
        (("a", "#", "#b"), ("##",), "a"),
        (("a", "b"), ("c",), "ab"),
    ],
)
def test_the_first_of_all_stop_texts_ends_an_answer(pieces, stops, text):
    class Words:
        eos_token_id = None

        def decode(self, ids, **_):
            return "".join((*pieces, "?")[token] for token in ids)

    row = Row(0, Prompt("p", (len(pieces),), "?"), 0)
    for token in range(len(pieces)):
        logits = torch.full((1, len(pieces)), -50.0).index_fill(1, torch.tensor([token]), 50.0)
        advance([row], logits, SamplingParams(len(pieces), stop=stops), frozenset(), Words())
    assert texts_of([row], Words()) == [text]
    assert row.finish_reason == ("stop" if stops != ("c",) else "length")


def test_streams_may_take_turns_and_leave_the_model_as_it_was():
    actor = Actor(peaked(tiny_llama()), lora_rank=2).train()
    subject, params = engine(actor, eos=()), SamplingParams(6, seed=1)
    expected = [subject.generate([prompt], params)[0].text for prompt in prompts()[:2]]
    streams = [subject.stream(prompt, params) for prompt in prompts()[:2]]
    texts = ["", ""]
    for _ in range(7):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
            assert actor.model.training and not any("forward" in vars(module) for module in actor.modules())
    assert texts == expected


def test_parameters_can_be_keys():
    assert len({SamplingParams(4), SamplingParams(4), SamplingParams(4, logit_bias={1: 2.0})}) == 2


def test_a_bias_for_a_token_that_is_not_there_is_refused(llama):
    with pytest.raises(ValueError, match=r"logit_bias names token id 99, outside the model's vocabulary of 32"):
        engine(llama).generate(prompts(), SamplingParams(4, logit_bias={99: 1.0}))


def test_a_stop_text_ends_a_completion_and_is_no_part_of_its_text(llama):
    [free] = engine(llama).generate(prompts((3,)), SamplingParams(30, seed=4))
    words = free.text.split()
    stop = " ".join(words[3:5])  # of two tokens at least
    before = free.text[: free.text.index(stop)]
    params = SamplingParams(30, seed=4, stop=("never written", stop))
    [ended] = engine(llama).generate(prompts((3,)), params)
    assert ended.finish_reason == "stop" and ended.text == before
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]
    decode = tiny_tokenizer().decode
    assert stop in decode(ended.token_ids) and stop not in decode(ended.token_ids[:-1])
    assert "".join(engine(llama).stream(prompts((3,))[0], params)) == before
    later = SamplingParams(30, seed=4, stop=(stop,), min_new_tokens=len(ended.token_ids) + 1)
    [longer] = engine(llama).generate(prompts((3,)), later)
    assert len(longer.token_ids) > len(ended.token_ids)


def test_a_sample_is_the_same_in_any_batch_order_and_company(model):
    params = SamplingParams(16, temperature=1.1, seed=7)
    asked = prompts()
    together = engine(model, batch_size=6).generate(asked, params)
    assert len({c.token_ids for c in together}) == len(together)
    for batch_size in (1, 4):
        same(engine(model, batch_size).generate(asked, params), together)
    same(engine(model).generate(asked[::-1], params)[::-1], together)
    long = Prompt("long", (5, 6) * 30, "the a")
    same(engine(model).generate([*asked, long], params)[:-1], together)


def test_samples_of_one_prompt_differ_and_keep_their_numbers(llama):
    params, [one, two] = SamplingParams(8, seed=2), prompts((3, 4))
    four = engine(llama).generate([one] * 4, params)
    assert len({c.token_ids for c in four}) == 4
    mixed = engine(llama).generate([one, two, one, one, two, one], params)
    same([mixed[0], mixed[2], mixed[3], mixed[5]], four)
    for change in ({"seed": 3}, {"step": 1}):
        assert engine(llama).generate([one], dataclasses.replace(params, **change)) != four[:1]


class Spy(torch.nn.Module):
    """Counts the rows each forward is given."""

    def __init__(self, model):
        super().__init__()
        self.rows = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: self.rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
        )


@hf_only
def test_finished_rows_are_not_computed_any_more(model):
    ends = list(range(6))
    params = SamplingParams(20, temperature=1.5, seed=12)
    alone = [engine(model, eos=ends).generate([prompt], params)[0] for prompt in prompts()]
    lengths = [len(c.token_ids) for c in alone]
    assert len(set(lengths)) > 2
    spy = Spy(model)
    same(engine(model, batch_size=6, eos=ends).generate(prompts(), params), alone)
    assert spy.rows == [sum(length > step for length in lengths) for step in range(max(lengths))]


@hf_only
def test_large_batches_drop_rows_in_lots_and_give_the_same(llama):
    asked = prompts(tuple(1 + i % 5 for i in range(40)))
    ends, params = list(range(8)), SamplingParams(15, temperature=2.0, seed=4)
    single = engine(llama, batch_size=1, eos=ends).generate(asked, params)
    spy = Spy(llama)
    same(engine(llama, batch_size=40, eos=ends).generate(asked, params), single)
    lengths = [len(c.token_ids) for c in single]
    for step, rows in enumerate(spy.rows):
        alive = sum(length > step for length in lengths)
        assert alive <= rows <= max(1, alive * 8 / 7)
    assert len(set(spy.rows)) > 3


def test_eos_ends_a_completion_and_belongs_to_it(llama):
    everything = list(range(llama.config.vocab_size))
    first = engine(llama, eos=everything).generate(prompts(), SamplingParams(5))
    assert all(len(c.token_ids) == 1 and c.finish_reason == "stop" for c in first)
    never = engine(llama, eos=()).generate(prompts(), SamplingParams(5))
    assert all(len(c.token_ids) == 5 and c.finish_reason == "length" for c in never)
    assert all(len(c.logprobs) == len(c.token_ids) for c in first + never)


def test_an_answer_of_eos_alone_has_empty_text():
    model = peaked(tiny_llama())
    model.lm_head.weight.data[:] = 0
    model.lm_head.bias = torch.nn.Parameter(torch.full((32,), -50.0))
    model.lm_head.bias.data[2] = 50.0
    completion = engine(model).generate(prompts(), SamplingParams(5))[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ((2,), "", "stop")
    assert completion.logprobs == pytest.approx((0.0,), abs=1e-6)
    held_back = engine(model).generate(prompts(), SamplingParams(5, min_new_tokens=3))
    assert all(len(c.token_ids) == 4 and c.token_ids.index(2) == 3 for c in held_back)


def test_several_eos_tokens_each_end_a_completion(llama):
    ends = [2, 9, 14, 21]
    completions = engine(llama, eos=ends).generate(prompts((2,) * 40), SamplingParams(30, temperature=2.0))
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(ends)
        assert (completion.token_ids[-1] in ends) == (completion.finish_reason == "stop")
    assert len({c.token_ids[-1] for c in completions if c.finish_reason == "stop"}) > 1


def test_the_models_own_end_tokens_count_beside_the_tokenizers(llama):
    llama.generation_config.eos_token_id = [9, 14]
    assert engine(llama).eos_token_ids == {tiny_tokenizer().eos_token_id, 9, 14}
    llama.generation_config.eos_token_id = 21
    assert engine(llama).eos_token_ids == {tiny_tokenizer().eos_token_id, 21}
    assert engine(llama, eos=[5]).eos_token_ids == {5}
    assert engine(llama, eos=[]).eos_token_ids == frozenset()


def test_min_new_tokens_holds_eos_back(llama):
    ends = list(range(2, 30))
    completions = engine(llama, eos=ends).generate(prompts(), SamplingParams(9, min_new_tokens=4, seed=1))
    assert all(len(c.token_ids) >= 5 and not set(c.token_ids[:4]) & set(ends) for c in completions)
    assert min(len(c.token_ids) for c in completions) == 5


def test_greedy_is_transformers_greedy(model):
    completions = engine(model).generate(prompts(), SamplingParams(12, greedy=True))
    for prompt, completion in zip(prompts(), completions, strict=True):
        ids = torch.tensor([prompt.token_ids])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=2
        )
        assert list(completion.token_ids) == theirs[0, len(prompt.token_ids) :].tolist()
        assert set(completion.sampling_logprobs) == {0.0}


def test_an_actor_with_an_adapter_generates_with_the_adapter():
    params = SamplingParams(10, seed=5)
    plain = peaked(tiny_llama())
    before = engine(plain).generate(prompts(), params)
    actor = Actor(plain, lora_rank=4)
    same(engine(actor).generate(prompts(), params), before)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    after = engine(actor).generate(prompts(), params)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    for prompt, completion in zip(prompts(), after, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), actor(ids, len(completion.token_ids))[0].detach(), atol=1e-4, rtol=0
        )


def test_weights_are_the_trainers_own_and_can_be_swapped(llama):
    sampler, params = engine(llama), SamplingParams(8, seed=1)
    before = sampler.generate(prompts(), params)
    with torch.no_grad():
        llama.lm_head.weight.copy_(llama.lm_head.weight.flip(0))
    changed = sampler.generate(prompts(), params)
    assert [c.token_ids for c in changed] != [c.token_ids for c in before]
    other = peaked(tiny_llama())
    sampler.update_weights(Actor(other))
    same(sampler.generate(prompts(), params), engine(other).generate(prompts(), params))


def test_modes_gradients_and_hooks_are_left_as_they_were():
    model = GPT2LMHeadModel(gpt2_config())  # has dropout
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    first = engine(model).generate(prompts(), SamplingParams(8))
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks
    assert torch.is_grad_enabled()
    stream = engine(model).stream(prompts()[0], SamplingParams(8))
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="not finite"):
        model.lm_head.weight.data[3] = torch.nan
        engine(model).generate(prompts(), SamplingParams(8))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert len(first) == len(prompts())


def test_no_graph_is_built_while_generating(llama):
    grad = []
    llama.register_forward_pre_hook(lambda module, args: grad.append(torch.is_grad_enabled()))
    engine(llama).generate(prompts(), SamplingParams(3))
    list(engine(llama).stream(prompts()[0], SamplingParams(3)))
    assert grad
    assert not any(grad)


def test_dropout_is_off_while_generating():
    model = peaked(GPT2LMHeadModel(gpt2_config()))
    evaluated = engine(model).generate(prompts(), SamplingParams(8))
    model.train()
    same(engine(model).generate(prompts(), SamplingParams(8)), evaluated)


def test_the_text_joins_the_prompts_text(llama):
    tokenizer = tiny_tokenizer()
    for prompt, completion in zip(prompts(), engine(llama).generate(prompts(), SamplingParams(6, seed=9)), strict=True):
        whole = tokenizer.decode([*prompt.token_ids, *completion.token_ids], skip_special_tokens=True)
        assert prompt.text + completion.text == whole
        assert "<" not in completion.text


def byte_tokenizer():
    """One token a byte, as the worst byte-level BPE splits characters."""
    vocab = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # noqa: S106


class Parrot:
    """A decode loop that says a given list of tokens."""

    def __init__(self, tokenizer, token_ids):
        self.engine = HFEngine(tiny_llama(vocab_size=300), tokenizer)
        self.token_ids = token_ids

    def stream(self):
        def decode(rows, params):
            for token in self.token_ids:
                rows[0].token_ids.append(token)
                yield

        self.engine._decode = decode
        return list(self.engine.stream(Prompt("p", (1,), "x"), SamplingParams(50)))


@hf_only
@pytest.mark.parametrize("text", ["naïve café", "日本語 and 🙂🙃!", "e\u0301 � stays", "🙂"])
def test_a_stream_never_breaks_a_character(text):
    tokenizer = byte_tokenizer()
    pieces = Parrot(tokenizer, tokenizer(text).input_ids).stream()
    assert "".join(pieces) == text
    assert all(piece and ("\ufffd" not in piece or "\ufffd" in text) for piece in pieces)
    assert len(pieces) > 1 or len(text) == 1


@hf_only
def test_a_stream_cut_inside_a_character_still_ends():
    tokenizer = byte_tokenizer()
    pieces = Parrot(tokenizer, tokenizer("ab🙂").input_ids[:-1]).stream()
    assert "".join(pieces).startswith("ab")
    assert pieces[:2] == ["a", "b"]


def test_the_stream_is_the_completion(model):
    params = SamplingParams(15, temperature=0.8, seed=6)
    for prompt, completion in zip(prompts(), engine(model).generate(prompts(), params), strict=True):
        assert "".join(engine(model).stream(prompt, params)) == completion.text


def test_no_prompts_no_completions(llama):
    assert engine(llama).generate([], SamplingParams(3)) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("q7", (), ""), r"'q7' has no tokens.*BOS"),
        (
            Prompt("q7", (5,) * 120, "x"),
            r"'q7' has 120 tokens.*max_new_tokens 9 .*context of 128.*lower max_new_tokens",
        ),
        (Prompt("q7", (5, 99), "x"), r"'q7' holds token id 99.*vocabulary of 32.*tokenizer"),
        (Prompt("q7", (5, -1), "x"), r"'q7' holds token id -1"),
        (Prompt("p0", (5, 6), "other"), r"'p0' names two different prompts.*own id"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(llama, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine(llama).generate([*prompts(), prompt], SamplingParams(9))
    if prompt.id == "q7":
        with pytest.raises(ValueError, match=message):
            engine(llama).stream(prompt, SamplingParams(9))


def test_the_context_may_be_used_to_its_end(llama):
    [completion] = engine(llama, eos=()).generate([Prompt("q", (5,) * 119, "x")], SamplingParams(9))
    assert len(completion.token_ids) == 9


def test_a_model_without_a_context_limit_has_none():
    model = BloomForCausalLM(bloom_config())
    [completion] = engine(model, eos=()).generate([Prompt("q", (5,) * 140, "x")], SamplingParams(2))
    assert len(completion.token_ids) == 2


def test_what_is_no_language_model_is_refused(llama):
    with pytest.raises(ValueError, match=r"Linear.*Actor or a transformers model"):
        engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(batch_size|slots) is 0"):
        engine(llama, batch_size=0)
    with pytest.raises(ValueError, match="not all inside"):
        engine(llama, eos=[2, 32])
    nameless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert engine(llama, tokenizer=nameless).eos_token_ids == {2}  # the model's own
    llama.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_ids is None"):
        engine(llama, tokenizer=nameless)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0.*1 or more"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"temperature": 0.0}, "temperature is 0.0.*greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_k": -1}, "top_k is -1.*0 keeps"),
        ({"top_p": 0.0}, r"top_p is 0.0.*\(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_new_tokens": 9}, r"min_new_tokens is 9.*max_new_tokens \(8\)"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"step": 2**63}, "step is 9223372036854775808"),
        ({"greedy": 1}, "greedy is 1.*true or false"),
        ({"min_p": 1.0}, r"min_p is 1.0.*\[0, 1\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is {-1: 1.0}"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias is {3: inf}"),
        ({"stop": ("",)}, "stop is.*none of them empty"),
        ({"stop": "."}, "stop is '.': give a tuple"),
    ],
)
def test_sampling_parameters_check_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 8, **change})


def test_samples_follow_the_models_distribution(llama):
    """First tokens of 4000 samples of one prompt against the softmax, through the whole engine."""
    [prompt] = prompts((3,))
    samples = engine(llama, batch_size=2000).generate([prompt] * 4000, SamplingParams(1, temperature=1.3))
    logits = llama(torch.tensor([prompt.token_ids])).logits[0, -1].detach().double() / 1.3
    expected = logits.softmax(-1) * 4000
    counts = Counter(c.token_ids[0] for c in samples)
    observed = torch.tensor([counts[i] for i in range(len(expected))]).double()
    likely = expected >= 5
    terms = (observed - expected)[likely] ** 2 / expected[likely]
    assert float(terms.sum()) < int(likely.sum()) + 6 * (2 * int(likely.sum())) ** 0.5
