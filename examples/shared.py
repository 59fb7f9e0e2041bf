"""What the example scripts share: strategies, models by family name, tokenizers."""
# ruff: noqa: S106 (an end-of-sequence token is no password)

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BloomConfig, DebertaV2Config, GPT2Config, LlamaConfig, OPTConfig, PreTrainedTokenizerFast

from prefero.models.bloom import BLOOMLM, BLOOMRM, BLOOMActor, BLOOMCritic
from prefero.models.deberta import DebertaRM
from prefero.models.gpt import GPTLM, GPTRM, GPTActor, GPTCritic
from prefero.models.llama import LlamaActor, LlamaCritic, LlamaLM, LlamaRM
from prefero.models.loading import load_tokenizer
from prefero.models.opt import OPTLM, OPTRM, OPTActor, OPTCritic
from prefero.strategies import ColossalAIStrategy, DDPStrategy, NaiveStrategy, Strategy

ROLES = {
    "actor": {"gpt2": GPTActor, "bloom": BLOOMActor, "opt": OPTActor, "llama": LlamaActor},
    "critic": {"gpt2": GPTCritic, "bloom": BLOOMCritic, "opt": OPTCritic, "llama": LlamaCritic},
    "lm": {"gpt2": GPTLM, "bloom": BLOOMLM, "opt": OPTLM, "llama": LlamaLM},
    "rm": {"gpt2": GPTRM, "bloom": BLOOMRM, "opt": OPTRM, "llama": LlamaRM, "deberta": DebertaRM},
}
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "naive": NaiveStrategy,
    "ddp": DDPStrategy,
    "colossalai_gemini": lambda: ColossalAIStrategy(3, shard_init=True),
    "colossalai_zero2": lambda: ColossalAIStrategy(2, shard_init=True),
}
PAD, BOS, EOS = 0, 1, 2  # of the tiny tokenizer


def add_model_flags(parser: argparse.ArgumentParser, families: list[str], default: str) -> None:
    """The flags every script has."""
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="naive",
                        help="naive: one device; the others are started by torchrun")  # fmt: skip
    parser.add_argument("--model", choices=families, default=default)
    parser.add_argument("--pretrain", default=None, help="a Hugging Face name or folder; without it weights are random")
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--need_optim_ckpt", action="store_true", help="also save the optimizer")
    parser.add_argument("--tiny", action="store_true", help="a very small random model that spells: no download at all")
    parser.add_argument("--device", default=None, help="with naive: cpu, cuda or mps; by default the best there is")


def strategy(arguments: argparse.Namespace) -> Strategy:
    """The strategy of that name; raises ValueError for a device that it does not choose by."""
    if arguments.strategy == "naive":
        return NaiveStrategy(arguments.device)
    if arguments.device is not None:
        raise ValueError(f"--device {arguments.device} goes with --strategy naive: torchrun's processes know theirs")
    return STRATEGIES[arguments.strategy]()


def tiny_config(family: str) -> Any:
    """A configuration of a few thousand weights."""
    shared = {"vocab_size": len(tiny_tokenizer()), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if family == "gpt2":
        return GPT2Config(n_positions=512, n_embd=32, n_layer=2, n_head=4, **shared)
    if family == "bloom":
        return BloomConfig(hidden_size=32, n_layer=2, n_head=4, **shared)
    if family == "opt":
        return OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=512, word_embed_proj_dim=32, **shared)  # fmt: skip
    if family == "deberta":
        return DebertaV2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                               max_position_embeddings=512, **shared)  # fmt: skip
    return LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=512, **shared)  # fmt: skip


def build(role: str, arguments: argparse.Namespace, pretrain: str | None = None) -> Any:
    """A model of the family for a role ("actor", "critic", "rm", "lm")."""
    pretrain = pretrain or arguments.pretrain
    config = tiny_config(arguments.model) if arguments.tiny and pretrain is None else None
    return ROLES[role][arguments.model](pretrained=pretrain, config=config, lora_rank=arguments.lora_rank)


def tiny_tokenizer() -> Any:
    """One token a printable ASCII character."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )  # fmt: skip


def tokenizer(arguments: argparse.Namespace) -> Any:
    """The tokenizer of --pretrain, or the tiny one; raises ValueError when there is none."""
    if arguments.pretrain is not None:
        return load_tokenizer(arguments.pretrain)
    if arguments.tiny:
        return tiny_tokenizer()
    raise ValueError("text needs a tokenizer: give --pretrain NAME_OR_FOLDER, or --tiny for a model that spells")
