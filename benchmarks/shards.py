"""What one of many processes holds of a very large model: prints a table of docs/strategies-measured.md.

python benchmarks/shards.py

Nothing is trained: models of the named shapes are built of shapes alone (torch's meta device) and shared out by torch's
FSDP2 over a fake process group of that many ranks, as `FSDPStrategy(stage=3)` shares them; then the bytes of rank 0's
parts are counted. "States" are float32 parameters, gradients and Adam's two moments; "at work" adds what is whole for
a moment: the largest layer (or embeddings and head) twice over, its parameters and its gradients. Sampling, which
gathers the whole policy in every process, is not counted.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from prefero.deferral import defer_weights
from prefero.models.base import Actor
from prefero.models.loading import LoadOptions, build
from prefero.strategies import FSDPStrategy
from prefero.strategies.fsdp import blocks
from runs import this_machine

SHAPES: dict[str, Any] = {
    "7B (Llama 2)": LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                                intermediate_size=11008, vocab_size=32000),
    "70B (Llama 2)": LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                                 num_key_value_heads=8, intermediate_size=28672, vocab_size=32000),
    "175B (OPT)": OPTConfig(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152,
                            word_embed_proj_dim=12288, vocab_size=50272),
}  # fmt: skip
RANKS = (8, 64, 1024)


class Counted(FSDPStrategy):
    """Sharing out without values: weights stay on the meta device."""

    def _fill(self, model: nn.Module, part: nn.Module) -> None:
        pass


def held(config: Any, ranks: int) -> tuple[int, int, int]:
    """Parameters, rank 0's bytes of states, and its bytes at work."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        strategy = Counted(stage=3)
        with defer_weights():
            actor = Actor(build(AutoModelForCausalLM, None, config, LoadOptions()))
        total = sum(parameter.numel() for parameter in actor.parameters())
        layers = [sum(p.numel() for p in block.parameters()) for block in blocks(actor)]
        largest = max(*layers, total - sum(layers))
        strategy.prepare(actor)
        own = 0
        for parameter in actor.parameters():
            assert isinstance(parameter, DTensor), "every parameter is shared out"
            own += parameter.to_local().numel()
        return total, 16 * own, 16 * own + 8 * largest
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Prints the table."""
    heads = " | ".join(f"{ranks} ranks: states, GB | at work, GB" for ranks in RANKS)
    print(f"| shape | parameters | {heads} |\n|{'---|' * (2 + 2 * len(RANKS))}")
    for name, config in SHAPES.items():
        rows = [held(config, ranks) for ranks in RANKS]
        cells = " | ".join(f"{states / 1e9:.2f} | {work / 1e9:.2f}" for _, states, work in rows)
        print(f"| {name} | {rows[0][0] / 1e9:.2f}e9 | {cells} |")
    print(f"\n{this_machine()}")


if __name__ == "__main__":
    main()
