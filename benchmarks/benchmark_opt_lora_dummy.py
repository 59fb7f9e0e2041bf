"""How fast PPO with LoRA runs, and in how much memory: four OPTs of one size, random weights, random prompts.

python benchmarks/benchmark_opt_lora_dummy.py --model 125m --strategy naive --lora_rank 4
torchrun --standalone --nproc_per_node 2 benchmarks/benchmark_opt_lora_dummy.py --model 1.3b --cuda_mem_frac 0.5
python benchmarks/benchmark_opt_lora_dummy.py --model tiny --strategy naive --prompt_length 20 --max_length 32

The recipe and the numbers of benchmark_gpt_dummy.py, with adapters on actor and critic (`--lora_rank 0` trains all
weights) and, on a GPU, a part of its memory only (`--cuda_mem_frac`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import OPTConfig

from dummy import arguments, measure
from prefero.models.opt import OPTActor, OPTCritic

# width, layers, heads
SIZES = {
    "125m": (768, 12, 12), "tiny": (64, 2, 4), "350m": (1024, 24, 16), "700m": (1280, 36, 20), "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32), "3.5b": (3072, 32, 32), "5.5b": (3840, 32, 32), "6.7b": (4096, 32, 32),
    "10b": (5120, 32, 32), "13b": (5120, 40, 40),
}  # fmt: skip


def config(model: str) -> OPTConfig:
    """An OPT of that size."""
    width, layers, heads = SIZES[model]
    return OPTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width,
        word_embed_proj_dim=width, vocab_size=512 if model == "tiny" else 50272,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe and returns its numbers."""
    args = arguments(__doc__ or "", list(SIZES), argv, lora_rank=4)
    return measure(args, OPTActor, OPTCritic, config(args.model))


if __name__ == "__main__":
    main()
