"""How fast PPO runs, and in how much memory: four GPT-2s of one size, random weights, random prompts.

python benchmarks/benchmark_gpt_dummy.py --model s --strategy naive
torchrun --standalone --nproc_per_node 8 benchmarks/benchmark_gpt_dummy.py --model l --strategy colossalai_zero2
python benchmarks/benchmark_gpt_dummy.py --model tiny --strategy naive --prompt_length 20 --max_length 32

The older system's recipe: prompts of 400 tokens, 112 more sampled from the 50 likeliest, three episodes of eight
timesteps of which the first is not measured. Prints the throughput of making experience and of learning (samples a
second over all processes, operations a second per process) and the peak memory of a process, as a line of JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GPT2Config

from dummy import arguments, measure
from prefero.models.gpt import GPTActor, GPTCritic

# width, layers, heads
SIZES = {
    "s": (768, 12, 12), "tiny": (64, 2, 4), "m": (1024, 24, 16), "l": (1280, 36, 20), "xl": (1600, 48, 25),
    "2b": (2048, 40, 16), "4b": (2304, 64, 16), "6b": (4096, 30, 16), "8b": (4096, 40, 16), "10b": (4096, 50, 16),
    "12b": (4096, 60, 16), "15b": (4096, 78, 16), "18b": (4096, 90, 16), "20b": (8192, 25, 16), "24b": (8192, 30, 16),
    "28b": (8192, 35, 16), "32b": (8192, 40, 16), "36b": (8192, 45, 16), "40b": (8192, 50, 16),
    "175b": (12288, 96, 96),
}  # fmt: skip


def config(model: str) -> GPT2Config:
    """A GPT-2 of that size."""
    width, layers, heads = SIZES[model]
    positions = 2048 if model == "175b" else 1024
    return GPT2Config(
        n_embd=width, n_layer=layers, n_head=heads, n_positions=positions,
        vocab_size=512 if model == "tiny" else 50257,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the recipe and returns its numbers."""
    args = arguments(__doc__ or "", list(SIZES), argv)
    return measure(args, GPTActor, GPTCritic, config(args.model))


if __name__ == "__main__":
    main()
