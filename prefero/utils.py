"""The seed system's helpers for giving a tokenizer new special tokens and a model rows for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

DEFAULT_PAD_TOKEN = "[PAD]"  # noqa: S105 - a vocabulary entry, not a secret
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def smart_tokenizer_and_embedding_resize(special_tokens_dict: Mapping[str, str], tokenizer: Any, model: Any) -> None:
    """Adds special tokens to the tokenizer and a row for each to the model's embeddings, set to the mean of the others.

    model: a Hugging Face model or one of our models around one. Call it before the optimizer is made: the embedding is
    a new parameter afterwards. Mean rows keep a new token's probability ordinary; random ones would disturb the rest.
    """
    num_new = tokenizer.add_special_tokens(dict(special_tokens_dict))
    network = model
    while not hasattr(network, "resize_token_embeddings"):
        if not hasattr(network, "model"):
            raise ValueError(f"{type(model).__name__} has no token embeddings to resize; give a language model")
        network = network.model
    num_old = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_old:
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if num_new == 0:
        return
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    first_new = len(tokenizer) - num_new
    with torch.no_grad():
        weights = {id(layer.weight): layer.weight for layer in (inputs, outputs) if layer is not None}
        for weight in weights.values():  # one, where input and output are tied
            weight[first_new:] = weight[:first_new].mean(dim=0, keepdim=True)


def prepare_llama_tokenizer_and_embedding(
    tokenizer: Any, model: Any, special_tokens_dict: Mapping[str, str] | None = None
) -> Any:
    """Gives a LLaMA tokenizer a padding token of its own (with its embedding row) and its missing BOS, EOS and UNK.

    Returns the tokenizer, changed in place. Tokens that are set stay: the seed put "</s>" in place of all three.
    """
    vocabulary = tokenizer.get_vocab()
    missing = {k: t for k, t in _LLAMA_TOKENS.items() if getattr(tokenizer, k, None) is None and t in vocabulary}
    if missing:
        tokenizer.add_special_tokens(missing)
    if tokenizer.pad_token is None:
        smart_tokenizer_and_embedding_resize(special_tokens_dict or {"pad_token": DEFAULT_PAD_TOKEN}, tokenizer, model)
    return tokenizer
