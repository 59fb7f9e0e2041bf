"""How fast PPO runs, and in how much memory, on random weights and random prompts.

python benchmarks/ppo_dummy.py --sizes tiny --batch_sizes 4 8
python benchmarks/ppo_dummy.py --sizes s m --lora_rank 4 --batch_sizes 8 16 --memory_fraction 0.5
python benchmarks/ppo_dummy.py --sizes s m l xl 2b 4b 6b 8b 10b 13b 20b 66b 175b --plan

One line of JSON a size and batch size: samples and floating-point operations a second when making experience and when
learning, and the peak memory. --plan builds nothing: it names the parameters and the memory of weights, gradients and
Adam's states in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import GPT2Config, OPTConfig

from prefero.models.auto import AutoActor, AutoCritic
from prefero.models.base import RewardModel
from prefero.optimizer import HybridAdam
from prefero.strategies import NaiveStrategy
from prefero.trainer import PPOTrainer
from prefero.trainer.callbacks import PerformanceEvaluator

# width, layers, heads
SIZES = {
    "tiny": (64, 2, 4), "s": (768, 12, 12), "m": (1024, 24, 16), "l": (1280, 36, 20), "xl": (1600, 48, 25),
    "2b": (2048, 40, 16), "4b": (2304, 64, 16), "6b": (4096, 30, 16), "8b": (4096, 40, 16), "10b": (4096, 50, 16),
    "13b": (5120, 40, 40), "20b": (8192, 24, 16), "66b": (9216, 64, 72), "175b": (12288, 96, 96),
}  # fmt: skip


def model_config(family: str, size: str, length: int) -> Any:
    """The configuration of a GPT-2 or OPT of that size."""
    width, layers, heads = SIZES[size]
    small = {"vocab_size": 512} if size == "tiny" else {}
    if family == "gpt":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=max(length, 1024), **small)
    return OPTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width,
                     word_embed_proj_dim=width, max_position_embeddings=max(length, 2048), **small)  # fmt: skip


def num_parameters(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def build(arguments: argparse.Namespace, size: str) -> tuple[AutoActor, AutoCritic]:
    options = {"config": model_config(arguments.family, size, arguments.max_length), "lora_rank": arguments.lora_rank,
               "checkpoint": arguments.grad_checkpoint}  # fmt: skip
    return AutoActor(**options), AutoCritic(**options)


def plan(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    """Parameters, and gibibytes of the four models with the trained ones' gradients and Adam states."""
    with torch.device("meta"):
        actor, critic = build(arguments, size)
    trained = num_parameters(actor, trained=True) + num_parameters(critic, trained=True)
    reference = 0 if arguments.lora_rank else num_parameters(actor)
    weights = num_parameters(actor) + reference + 2 * num_parameters(critic)
    return {"size": size, "parameters": num_parameters(actor), "trained": trained,
            "weights_gib": round(4 * weights / 2**30, 2),
            "gradients_and_adam_gib": round(3 * 4 * trained / 2**30, 2)}  # fmt: skip


def measure(arguments: argparse.Namespace, size: str, batch_size: int) -> dict[str, Any]:
    """One short run."""
    torch.manual_seed(0)
    strategy = NaiveStrategy(arguments.device)
    actor, critic = build(arguments, size)
    reference = None if arguments.lora_rank else deepcopy(actor)
    judge = RewardModel(deepcopy(critic.model))
    actor_optim, critic_optim = HybridAdam(actor.parameters(), lr=5e-6), HybridAdam(critic.parameters(), lr=5e-6)
    (actor, actor_optim), (critic, critic_optim), judge = strategy.prepare(
        (actor, actor_optim), (critic, critic_optim), judge
    )
    reference = strategy.prepare(reference) if reference is not None else None
    meter = PerformanceEvaluator(
        num_parameters(actor), num_parameters(critic), num_parameters(actor), num_parameters(judge),
        arguments.grad_checkpoint, ignore_episodes=1,
    )  # fmt: skip
    trainer = PPOTrainer(
        strategy, actor, critic, judge, reference, actor_optim, critic_optim, train_batch_size=batch_size,
        experience_batch_size=batch_size, callbacks=[meter], max_length=arguments.max_length,
    )  # fmt: skip
    vocabulary = actor.model.config.vocab_size
    prompts = torch.randint(vocabulary, (8 * batch_size, arguments.prompt_length), device=strategy.device)
    if strategy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(prompts, num_episodes=1 + arguments.num_episodes, max_timesteps=1, update_timesteps=1)
    making, learning = meter.making_experience.rates(), meter.learning.rates()
    return {"size": size, "batch_size": batch_size, "parameters": num_parameters(actor),
            "experience_samples_per_second": round(making[0], 3), "experience_tflops": round(making[1], 4),
            "learning_samples_per_second": round(learning[0], 3), "learning_tflops": round(learning[1], 4),
            "peak_memory_gib": round(peak_memory(strategy.device) / 2**30, 3)}  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Bytes: what the GPU gave out at most, or what this process held at most (all runs so far)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["s"])
    parser.add_argument("--family", choices=["gpt", "opt"], default="gpt")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--lora_rank", type=int, default=0, help="with adapters the actor is its own reference")
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=128, help="of prompt and completion together")
    parser.add_argument("--num_episodes", type=int, default=3, help="measured ones, after one to warm up")
    parser.add_argument("--grad_checkpoint", action="store_true")
    parser.add_argument("--memory_fraction", type=float, default=1.0, help="play a GPU of this part of the memory")
    parser.add_argument("--device", default=None, help="cpu, cuda or mps; by default the best there is")
    parser.add_argument("--plan", action="store_true", help="only say what it would take")
    arguments = parser.parse_args(argv)
    if arguments.memory_fraction < 1.0:
        torch.cuda.set_per_process_memory_fraction(arguments.memory_fraction)
    for size in arguments.sizes:
        if arguments.plan:
            print(json.dumps(plan(arguments, size)), flush=True)
            continue
        for batch_size in arguments.batch_sizes:
            print(json.dumps(measure(arguments, size, batch_size)), flush=True)


if __name__ == "__main__":
    main()
