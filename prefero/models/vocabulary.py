"""New tokens for an existing model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, str | list[str]], tokenizer: Any, model: Any
) -> int:
    """Adds special tokens to the tokenizer and rows for them to the embeddings; returns how many were new.

    A new row is the mean of the old ones: a random row would make every old prediction worse at once. Tied
    embeddings stay tied; rows that a padded embedding already has for the new ids are overwritten.
    """
    known = len(tokenizer)
    added = int(tokenizer.add_special_tokens(dict(special_tokens_dict)))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = {id(layer.weight): layer.weight for layer in layers if layer is not None}
        with torch.no_grad():
            for table in tables.values():
                table[known : len(tokenizer)] = table[:known].mean(dim=0, keepdim=True)
    return added


def prepare_llama_tokenizer_and_embedding(tokenizer: Any, model: Any) -> Any:
    """Gives a LLaMA tokenizer without a pad token one of its own, and the model a row for it; returns the tokenizer."""
    if tokenizer.pad_token is None:
        smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
