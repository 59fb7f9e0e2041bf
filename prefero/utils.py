"""The seed's path to the helpers that give a tokenizer new special tokens and a model rows for them."""

from prefero.models.vocabulary import (
    DEFAULT_PAD_TOKEN,
    prepare_llama_tokenizer_and_embedding,
    smart_tokenizer_and_embedding_resize,
)

__all__ = ["DEFAULT_PAD_TOKEN", "prepare_llama_tokenizer_and_embedding", "smart_tokenizer_and_embedding_resize"]
