"""Beginnings that texts have in common are computed once, and nothing else changes."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, MistralConfig, Qwen3Config

from prefero.models import packed
from prefero.models.base import Actor
from prefero.models.packing import Packing
from prefero.models.trunk import drops_out
from tests.rollout.test_native_batch import SIZES
from tests.tiny import bloom_config, gpt2_config, llama_config, tiny_llama

FAMILIES = {
    "llama": lambda: llama_config(32),
    "gpt2": gpt2_config,
    "bloom": bloom_config,
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=3),
    "qwen3": lambda: Qwen3Config(**SIZES),
}
TEXTS: list[list[int]] = [
    [5, 6, 7, 8, 9],
    [5, 6, 7, 8],
    [4, 3],
    [5, 6, 7, 1, 2, 3],
    [5, 6, 7, 8, 9],
    [4, 3, 5, 6, 7, 8],
]
DISTINCT = 5 + 3 + 6  # what is new beside the first text, once each


def padded(texts: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, texts))
    rows = [([0] * (longest - len(t)), t) if left else (t, [0] * (longest - len(t))) for t in texts]
    ids = torch.tensor([[*first, *last] for first, last in rows])
    marks = [
        ([0] * (longest - len(t)) + [1] * len(t)) if left else ([1] * len(t) + [0] * (longest - len(t))) for t in texts
    ]
    return ids, torch.tensor(marks)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_every_beginning_stands_once(left: bool) -> None:
    ids, mask = padded(TEXTS, left)
    whole = Packing.of(mask)
    packing = whole.deduplicated(ids)
    assert packing.shared and len(packing.source) == DISTINCT
    numbers = ids.flatten()[packing.source]
    for text, row in zip(TEXTS, packing.index, strict=True):
        assert numbers[row[: len(text)]].tolist() == text
        assert packing.positions[row[: len(text)]].tolist() == list(range(len(text)))
    assert packing.index.flatten()[packing.place].tolist() == list(range(DISTINCT))
    assert packing.spread(numbers[:, None]).squeeze(1).tolist() == [token for text in TEXTS for token in text]


def test_a_row_without_tokens_does_no_harm() -> None:
    model = tiny_llama()
    ids, mask = padded([*TEXTS, []], left=False)
    found = packed.hidden_states(model.model, ids, mask)
    torch.testing.assert_close(found[:-1], packed.hidden_states(model.model, *padded(TEXTS, left=False)))
    assert not found[-1].any()


def test_where_it_would_spare_little_nothing_is_looked_up() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (4, 40))
    ids[:, 0] = 1  # a token that all begin with
    packing = Packing.of(torch.ones_like(ids))
    assert packing.deduplicated(ids) is packing
    ids[3] = ids[2]
    assert packing.deduplicated(ids).shared
    assert not Packing.of(torch.ones_like(ids), causal=False).deduplicated(ids).shared, "each text is read as a whole"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_log_probabilities_and_gradients_are_those_of_texts_apart(family: str, left: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    actor = Actor(AutoModelForCausalLM.from_config(FAMILIES[family]()).double())
    actor.eval()
    ids, mask = padded(TEXTS, left)
    read: list[int] = []
    run = packed.run
    monkeypatch.setattr(packed, "run", lambda trunk, *given: read.append(len(given[0])) or run(trunk, *given))
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(Packing, "deduplicated", lambda self, _: self)
        actor.zero_grad()
        logprobs = actor(ids, ids.shape[1] - 1, mask)
        (logprobs * mask[:, 1:] * torch.linspace(0.5, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
        found.append((logprobs * mask[:, 1:], {n: p.grad.clone() for n, p in actor.named_parameters()}))
    assert read[-2:] == [DISTINCT, sum(map(len, TEXTS))]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    for name, gradient in found[0][1].items():
        # Norms compute in float32 whatever the weights are.
        assert (gradient - found[1][1][name]).norm() <= 1e-6 * found[1][1][name].norm(), name


def test_texts_of_one_length_share_too(monkeypatch) -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 1], [5, 6, 7, 2], [5, 6, 7, 3]])
    shared = packed.hidden_states(model.model, ids, torch.ones_like(ids))
    with monkeypatch.context() as changed:
        changed.setattr(packed, "padded_hidden_states", lambda *_: pytest.fail("nothing was shared"))
        packed.hidden_states(model.model, ids, torch.ones_like(ids))
    torch.testing.assert_close(shared, model.model(ids).last_hidden_state, rtol=1e-5, atol=1e-6)


def test_where_tokens_are_dropped_out_each_text_has_its_own() -> None:
    torch.manual_seed(0)
    config = gpt2_config()
    model = AutoModel.from_config(config)
    assert drops_out(model) and not drops_out(tiny_llama())
    ids, mask = padded([[5, 6, 7, 1], [5, 6, 7, 1], [5, 6, 7]], left=False)
    packed.packs(model)
    hidden = packed.hidden_states(model.train(), ids, mask)
    assert not torch.allclose(hidden[0, :3], hidden[1, :3])
    hidden = packed.hidden_states(model.eval(), ids, mask)
    assert torch.equal(hidden[0, :3], hidden[1, :3])


def test_an_encoder_reads_each_text_as_a_whole() -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(
        BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()
    ids, mask = padded([[5, 6, 7, 1], [5, 6, 7, 2], [5, 6, 7]], left=False)
    other = packed.hidden_states(deepcopy(model), ids, mask)
    wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    torch.testing.assert_close(other * mask[..., None], wanted, rtol=1e-4, atol=1e-5)
