"""What benchmark_gpt_dummy.py and benchmark_opt_lora_dummy.py share: PPO of random weights, measured."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from prefero.models.base import Actor, Critic, RewardModel
from prefero.optimizer import HybridAdam
from prefero.strategies import ColossalAIStrategy, DDPStrategy, NaiveStrategy, Strategy
from prefero.trainer import PPOTrainer
from prefero.trainer.callbacks import PerformanceEvaluator


def sharded(stage: Any, placement_policy: Any) -> Callable[[], Strategy]:
    """The older system's strategy of a stage, models filled in a layer at a time."""
    return lambda: ColossalAIStrategy(stage, shard_init=True, placement_policy=placement_policy, initial_scale=2**5)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "naive": NaiveStrategy,
    "ddp": DDPStrategy,
    "colossalai_gemini": sharded(3, "cuda"),
    "colossalai_gemini_cpu": sharded(3, "cpu"),
    "colossalai_zero2": sharded(2, "cuda"),
    "colossalai_zero2_cpu": sharded(2, "cpu"),
    "colossalai_zero1": sharded(1, "cuda"),
    "colossalai_zero1_cpu": sharded(1, "cpu"),
}


def arguments(description: str, models: Sequence[str], argv: Sequence[str] | None, lora_rank: int | None = None) -> Any:
    """The command line of both scripts; lora_rank: the default where adapters are trained."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(models), default=models[0])
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="ddp")
    parser.add_argument("--num_episodes", type=int, default=3, help="the first is not measured")
    parser.add_argument("--max_timesteps", type=int, default=8)
    parser.add_argument("--update_timesteps", type=int, default=8)
    parser.add_argument("--max_epochs", type=int, default=3)
    parser.add_argument("--train_batch_size", type=int, default=8, help="rows of an optimizer step, all processes")
    parser.add_argument("--experience_batch_size", type=int, default=8, help="prompts of a timestep, all processes")
    parser.add_argument("--prompt_length", type=int, default=400)
    parser.add_argument("--max_length", type=int, default=512, help="of prompt and completion; nothing ends earlier")
    if lora_rank is not None:
        parser.add_argument("--lora_rank", type=int, default=lora_rank)
        parser.add_argument("--cuda_mem_frac", type=float, default=1.0, help="play a GPU with this part of its memory")
    return parser.parse_args(argv)


def measure(args: Any, actor_class: Any, critic_class: Any, config: Any) -> dict[str, Any]:
    """One run of the recipe: four models of one size; rank 0 prints, every process gets the numbers."""
    torch.manual_seed(0)
    config.eos_token_id = None  # every completion is as long as it may be
    options = {"config": config, "lora_rank": getattr(args, "lora_rank", 0)}
    strategy = STRATEGIES[args.strategy]()
    if getattr(args, "cuda_mem_frac", 1.0) < 1.0:
        torch.cuda.set_per_process_memory_fraction(args.cuda_mem_frac, strategy.device)
    with strategy.model_init_context():
        actor: Actor = actor_class(**options)
        critic: Critic = critic_class(**options)
        reference = deepcopy(actor)
        judge = RewardModel(deepcopy(critic.model))
    sizes = {"actor": actor, "critic": critic, "initial_model": reference, "reward_model": judge}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in sizes.items()}
    actor_optim, critic_optim = (HybridAdam(trained(model), lr=5e-6) for model in (actor, critic))
    (actor, actor_optim), (critic, critic_optim), judge, reference = strategy.prepare(
        (actor, actor_optim), (critic, critic_optim), judge, reference
    )
    meter = PerformanceEvaluator(*counts.values(), ignore_episodes=1)
    trainer = PPOTrainer(
        strategy, actor, critic, judge, reference, actor_optim, critic_optim, max_epochs=args.max_epochs,
        train_batch_size=args.train_batch_size, experience_batch_size=args.experience_batch_size,
        callbacks=[meter], max_length=args.max_length, do_sample=True, temperature=1.0, top_k=50,
    )  # fmt: skip
    prompts = torch.randint(config.vocab_size, (1000, args.prompt_length), device=strategy.device)
    if strategy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(
        prompts, num_episodes=args.num_episodes, max_timesteps=args.max_timesteps,
        update_timesteps=args.update_timesteps,
    )  # fmt: skip
    making, learning = meter.making_experience.rates(), meter.learning.rates()
    processes = strategy.group.world_size
    peak = strategy.group.max(torch.tensor(float(peak_memory(strategy.device))))
    found = {
        "model": args.model, "strategy": args.strategy, "processes": processes, "parameters": counts,
        "experience_samples_per_second": making[0], "experience_tflops_per_process": making[1] / processes,
        "learning_samples_per_second": learning[0], "learning_tflops_per_process": learning[1] / processes,
        "peak_memory_gib": float(peak) / 2**30,
    }  # fmt: skip
    if strategy.is_rank_0:
        print(json.dumps(rounded(found)), flush=True)
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What learns of a model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to four digits."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes: what the GPU gave out at most, or what this process held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
