"""The seed system's data sets and tokenizer helpers, in a torch DataLoader, without the seed's mistakes."""
# ruff: noqa: S105 - tokens of a vocabulary, not secrets

from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from tokenizers_zoo import bert_like, chatml, gpt2_like, llama2_like
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from prefero.data import read_rows
from prefero.dataset import (
    AlpacaDataCollator,
    AlpacaDataset,
    HhRlhfDataset,
    RewardDataset,
    RmStaticDataset,
    SFTDataset,
    is_rank_0,
)
from prefero.utils import prepare_llama_tokenizer_and_embedding, smart_tokenizer_and_embedding_resize

SAMPLES = Path(__file__).parents[2] / "examples" / "data"
PAIR = {"prompt": "the hotel is", "chosen": " good", "rejected": " bad and so on"}


def real(ids: torch.Tensor, mask: torch.Tensor) -> list[int]:
    return [int(token) for token in ids[mask.bool()]]


def test_reward_rows_end_in_one_end_token_that_the_mask_keeps() -> None:
    tokenizer = chatml()  # its padding is its EOS
    dataset = RewardDataset([PAIR], tokenizer, 32)
    chosen, chosen_mask, rejected, rejected_mask = dataset[0]
    assert {tensor.shape for tensor in dataset[0]} == {(32,)} and len(dataset) == 1
    assert tokenizer.decode(real(chosen, chosen_mask)) == "the hotel is good<|im_end|>"
    assert tokenizer.decode(real(rejected, rejected_mask)) == "the hotel is bad and so on<|im_end|>"
    assert chosen_mask.sum() < rejected_mask.sum() <= 32
    batch = next(iter(DataLoader(dataset, batch_size=1)))
    assert batch[0].squeeze(1).shape == (1, 32)  # what a seed training loop does with it


@pytest.mark.parametrize("end", [None, "<|endoftext|>", " The end."])
def test_reward_end_token(end: str | None) -> None:
    tokenizer = chatml()
    chosen, mask, _, _ = RewardDataset([PAIR], tokenizer, 32, special_token=end)[0]
    assert tokenizer.decode(real(chosen, mask)) == "the hotel is good" + (end or "<|im_end|>")


def test_long_reward_rows_keep_the_answer_and_its_end() -> None:
    tokenizer = gpt2_like()
    row = {"prompt": "Question: how is the hotel?" * 5, "chosen": " the hotel is good", "rejected": " bad" * 30}
    dataset = RewardDataset([row], tokenizer, 12)
    chosen, chosen_mask, rejected, rejected_mask = dataset[0]
    assert tokenizer.decode(real(chosen, chosen_mask)).endswith("? the hotel is good<|endoftext|>")
    assert tokenizer.decode(real(rejected, rejected_mask)).startswith(" bad b")
    assert real(rejected, rejected_mask)[-1] == tokenizer.eos_token_id
    assert chosen_mask.sum() == rejected_mask.sum() == 12


def test_the_reward_samples_of_every_shape() -> None:
    for name, kind in (("rm_static", RmStaticDataset), ("hh_rlhf", HhRlhfDataset), ("preferences", RewardDataset)):
        dataset = kind(read_rows(SAMPLES / f"{name}.jsonl"), bert_like(), 256)
        assert len(dataset) == 3
        for chosen, mask, rejected, _ in DataLoader(dataset, batch_size=2):
            assert chosen.shape == rejected.shape == mask.shape and mask.sum() > 0
    with pytest.raises(ValueError, match="no column 'prompt'"):
        RmStaticDataset(read_rows(SAMPLES / "hh_rlhf.jsonl"), gpt2_like(), 64)
    with pytest.warns(UserWarning, match="1 ties"):
        assert len(RewardDataset(read_rows(SAMPLES / "webgpt_comparisons.jsonl"), gpt2_like(), 128)) == 2


def test_few_bad_rows_warn_and_many_stop() -> None:
    bad = {**PAIR, "chosen": ""}
    with pytest.warns(UserWarning, match=r"left out 1 bad rows; first: line 151, column 'chosen' is empty"):
        assert len(RewardDataset([PAIR] * 150 + [bad] + [PAIR] * 49, gpt2_like(), 32)) == 199
    with pytest.raises(ValueError, match=r"rows:5: .*fix the line"):
        RewardDataset([PAIR] * 4 + [bad], gpt2_like(), 32)
    datasets = pytest.importorskip("datasets")
    assert len(RewardDataset(datasets.Dataset.from_list([PAIR] * 3), gpt2_like(), 32)) == 3


def test_sft_rows_learn_the_completion_and_the_eos_though_it_is_the_padding() -> None:
    tokenizer = chatml()
    dataset = SFTDataset([{"prompt": "how is the hotel?", "completion": " good"}], tokenizer, 32)
    batch = next(iter(DataLoader(dataset, batch_size=1)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (1, 32), "labels": (1, 32), "attention_mask": (1, 32)
    }  # fmt: skip
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert tokenizer.decode(learned) == " good<|im_end|>"
    assert (
        tokenizer.decode(real(batch["input_ids"][0], batch["attention_mask"][0])) == "how is the hotel? good<|im_end|>"
    )


def test_long_sft_rows_lose_their_end_and_rows_with_no_answer_left_are_dropped() -> None:
    tokenizer = gpt2_like()
    rows = [{"prompt": "hotel", "completion": " the hotel is good" * 4}, {"prompt": "hotel " * 20, "completion": " a"}]
    dataset = SFTDataset(rows, tokenizer, 10)
    assert len(dataset) == 1
    assert dataset[0]["attention_mask"].sum() == 10 and tokenizer.eos_token_id not in dataset[0]["input_ids"]


def test_alpaca_rows_and_their_collator() -> None:
    tokenizer = chatml()
    dataset = AlpacaDataset(str(SAMPLES / "alpaca.json"), tokenizer)
    batch = AlpacaDataCollator(tokenizer)([dataset[i] for i in range(3)])
    assert len(dataset) == 3 and batch["attention_mask"].dtype == torch.bool
    for i in range(3):
        size = len(dataset[i]["input_ids"])
        assert batch["attention_mask"][i].sum() == size and batch["attention_mask"][i, :size].all()
        assert (batch["labels"][i, size:] == -100).all()
        # the EOS is learned and seen, although every padding token is an EOS too
        assert batch["labels"][i, size - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(batch["labels"][i][batch["labels"][i] != -100]) == (
            ["wide", "A saw, a plane and a chisel.", "Does the train leave at noon?"][i] + "<|im_end|>"
        )
    longest = max(len(row["input_ids"]) for row in dataset)
    assert len(AlpacaDataset(read_rows(SAMPLES / "alpaca.json"), tokenizer, max_length=longest - 1)) == 2
    padded = AlpacaDataCollator(tokenizer)([SFTDataset([{"prompt": "a", "completion": "b"}], tokenizer, 8)[0]])
    assert padded["attention_mask"].sum() == 3


def test_one_process_is_rank_0() -> None:
    assert is_rank_0()


class Wrapper(torch.nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_new_tokens_get_the_mean_row(tied: bool, wrapped: bool) -> None:
    tokenizer = llama2_like()
    old = len(tokenizer)
    model = tiny_llama(old, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, Wrapper(model) if wrapped else model)
    assert tokenizer.pad_token_id == old and len(tokenizer) == old + 1
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] == old + 1
        torch.testing.assert_close(layer.weight[old], layer.weight[:old].mean(dim=0))
    torch.testing.assert_close(model.get_input_embeddings().weight[:old], before, rtol=0, atol=0)
    tied_now = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied_now == tied
    with pytest.raises(ValueError, match="no token embeddings"):
        smart_tokenizer_and_embedding_resize({"pad_token": "[P]"}, tokenizer, torch.nn.Linear(1, 1))


def test_llama_tokens_that_are_set_stay() -> None:
    tokenizer = llama2_like()
    model = tiny_llama(len(tokenizer))
    assert prepare_llama_tokenizer_and_embedding(tokenizer, model) is tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id not in (1, 2)
    size = len(tokenizer)
    prepare_llama_tokenizer_and_embedding(tokenizer, model)
    assert len(tokenizer) == size == model.get_input_embeddings().weight.shape[0]
    bare = llama2_like()
    bare.unk_token = bare.bos_token = None
    prepare_llama_tokenizer_and_embedding(bare, tiny_llama(len(bare)))
    assert (bare.bos_token_id, bare.eos_token_id, bare.unk_token_id) == (1, 2, 0)
