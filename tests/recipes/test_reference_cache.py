"""What is kept of the reference is believed only where it is of this model, these texts, this precision, and whole."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import llama_config

from prefero.data import Example
from prefero.models.llama import LlamaActor
from prefero.recipes import reference_cache
from prefero.recipes.reference_cache import cached_references
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer.reference import reference_logprobs
from prefero.trainer.split import MicroBatchLimit

TEXTS = [Example((3, 4, 5 + i, 6 + i), (0, 0, 1, 1)) for i in range(6)]


class Cache:
    """One file, the passes that were made over the texts, and what was said."""

    def __init__(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.passes, self.said = file, 0, list[str]()
        monkeypatch.setattr(reference_cache, "reference_logprobs", self._counted)

    def _counted(self, *given: object) -> dict[Example, float]:
        self.passes += 1
        return reference_logprobs(*given)  # type: ignore[arg-type]

    def __call__(
        self, actor: LlamaActor, texts: list[Example] = TEXTS, precision: str = "fp32"
    ) -> dict[Example, float]:
        strategy = NaiveStrategy("cpu", precision)  # type: ignore[arg-type]
        return cached_references(self.file, actor, texts, strategy, MicroBatchLimit(4), self.said.append)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(tmp_path / "reference.safetensors", monkeypatch)


def actor(seed: int = 0, lora_rank: int = 0) -> LlamaActor:
    torch.manual_seed(seed)
    return LlamaActor(config=llama_config(23), lora_rank=lora_rank)


def test_the_reference_is_asked_once(cache: Cache) -> None:
    first = cache(actor())
    assert set(first) == set(TEXTS) and cache.passes == 1
    assert cache(actor(), TEXTS[::-1] + TEXTS[:2]) == first
    assert cache.passes == 1 and cache.said == []


def test_another_model_other_texts_and_another_precision_ask_anew(cache: Cache) -> None:
    first = cache(actor())
    moved = actor()
    moved.model.lm_head.weight.data += 0.01
    assert cache(moved) != first and cache.passes == 2 and "another model" in cache.said[-1]
    fewer = cache(actor(), TEXTS[1:])
    assert cache.passes == 3 and "another model and other texts" in cache.said[-1]
    assert fewer == pytest.approx({text: first[text] for text in TEXTS[1:]}, abs=1e-5)
    marked = [Example(text.token_ids, (0, 1, 1, 1)) for text in TEXTS[1:]]
    assert cache(actor(), marked) != fewer and cache.passes == 4
    cache(actor(), marked, "bf16")
    assert cache.passes == 5 and "another precision" in cache.said[-1]


def test_a_damaged_file_is_not_believed(cache: Cache) -> None:
    first = cache(actor())
    content = cache.file.read_bytes()
    with safe_open(cache.file, "pt") as stored:
        assert stored.metadata().keys() == {"model", "texts", "precision", "sha256"}
    cache.file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cache(actor()) == first and "is damaged" in cache.said[-1]
    cache.file.write_bytes(content[:40])
    assert cache(actor()) == first and "cannot be read" in cache.said[-1]
    assert cache.passes == 3 and cache(actor()) == first and cache.passes == 3


def test_adapters_that_have_learned_change_nothing(cache: Cache) -> None:
    model = actor(lora_rank=2)
    first = cache(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.1
    cache.file.unlink()
    assert cache(model) == first and cache.passes == 2
    assert cache(model) == first and cache.passes == 2


def test_adapters_that_had_learned_before_belong_to_the_reference(cache: Cache) -> None:
    model, other = actor(lora_rank=2), actor(lora_rank=2)
    plain = cache(model)
    for name, parameter in other.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.1
    other.learned_before = True
    assert cache(other) != plain and "another model" in cache.said[-1]
    assert cache(other) == cache(other) and cache.passes == 2
    next(p for name, p in other.named_parameters() if ".lora_B." in name).data[0] += 0.1
    cache(other)
    assert cache.passes == 3
