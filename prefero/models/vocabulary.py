"""New tokens for an existing model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

DEFAULT_PAD_TOKEN = "[PAD]"  # noqa: S105 - a vocabulary entry, not a secret
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: Mapping[str, str | list[str]], tokenizer: Any, model: Any
) -> int:
    """Adds special tokens to the tokenizer and rows for them to the embeddings; returns how many were new.

    model: a Hugging Face model, or one of our models around one. A new row is the mean of the old ones: a random row
    would make every old prediction worse at once. Tied embeddings stay tied; rows that a padded embedding already has
    for the new ids are overwritten. Call it before the optimizer is made: the embedding is a new parameter afterwards.
    Raises ValueError for a model without token embeddings.
    """
    network = _network(model)
    known = len(tokenizer)
    added = int(tokenizer.add_special_tokens(dict(special_tokens_dict)))
    if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if added:
        layers = (network.get_input_embeddings(), network.get_output_embeddings())
        tables = {id(layer.weight): layer.weight for layer in layers if layer is not None}
        with torch.no_grad():
            for table in tables.values():
                table[known : len(tokenizer)] = table[:known].mean(dim=0, keepdim=True)
    return added


def _network(model: Any) -> Any:
    """The Hugging Face model itself."""
    network = model
    while not hasattr(network, "resize_token_embeddings"):
        if not hasattr(network, "model"):
            raise ValueError(f"{type(model).__name__} has no token embeddings to resize: give a language model")
        network = network.model
    return network


def prepare_llama_tokenizer_and_embedding(
    tokenizer: Any, model: Any, special_tokens_dict: Mapping[str, str] | None = None
) -> Any:
    """Gives a LLaMA tokenizer its missing BOS, EOS and UNK, and a padding token of its own with a row in the model.

    special_tokens_dict: the padding token, "[PAD]" by default. Returns the tokenizer, changed in place. Tokens that
    are set stay: the seed put "</s>" in place of all three.
    """
    vocabulary = tokenizer.get_vocab()
    missing = {k: t for k, t in _LLAMA_TOKENS.items() if getattr(tokenizer, k, None) is None and t in vocabulary}
    if missing:
        tokenizer.add_special_tokens(missing)
    if tokenizer.pad_token is None:
        smart_tokenizer_and_embedding_resize(special_tokens_dict or {"pad_token": DEFAULT_PAD_TOKEN}, tokenizer, model)
        _network(model).config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
