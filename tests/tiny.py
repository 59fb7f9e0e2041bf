"""Random tiny models and a word-level tokenizer: what the tests train instead of downloads."""
# ruff: noqa: S106 - tokens of a vocabulary, not secrets

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

WORDS = "the a movie hotel was is good bad great awful how tell me about and but . ? !".split()  # noqa: SIM905


def tiny_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token a word; <pad>, <bos>, <eos> and <unk> are four different tokens."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *(words or WORDS)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def llama_config(vocab_size: int = 32, **changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_llama(vocab_size: int = 32, **changes: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(vocab_size, **changes)).float().eval()


def gpt2_config(vocab_size: int = 32) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def opt_config(vocab_size: int = 32) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def bloom_config(vocab_size: int = 32) -> BloomConfig:
    return BloomConfig(
        vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
