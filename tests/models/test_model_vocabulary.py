"""New tokens get the mean of the old rows, and nothing else changes."""

import pytest
import torch

from prefero.models.vocabulary import prepare_llama_tokenizer_and_embedding, smart_tokenizer_and_embedding_resize
from tests.models.families import loud, tokens
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 8])
def test_new_rows_are_the_mean_and_old_predictions_stay(tied: bool, spare: int) -> None:
    tokenizer = tiny_tokenizer()
    known = len(tokenizer)
    model = loud(tiny_llama(known + spare, tie_word_embeddings=tied))
    ids = tokens() % known
    before = model(ids).logits[..., :known].detach()
    old = model.get_input_embeddings().weight[:known].detach().clone()
    assert smart_tokenizer_and_embedding_resize({"additional_special_tokens": ["<user>"]}, tokenizer, model) == 1
    assert len(tokenizer) == known + 1 <= model.get_input_embeddings().weight.shape[0]
    new = model.get_input_embeddings().weight
    torch.testing.assert_close(new[known], old.mean(0))
    assert torch.equal(new[:known], old)
    assert (model.get_output_embeddings().weight is new) == tied
    torch.testing.assert_close(model(ids).logits[..., :known], before)
    expected = model(ids).logits[..., :known].mean(-1)
    torch.testing.assert_close(model(ids).logits[..., known], expected, atol=1e-4, rtol=1e-4)


def test_a_llama_without_a_pad_token_gets_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    known = len(tokenizer)
    model = tiny_llama(known)
    assert prepare_llama_tokenizer_and_embedding(tokenizer, model) is tokenizer
    assert tokenizer.pad_token_id == known == model.config.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == known + 1
    assert smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model) == 0
