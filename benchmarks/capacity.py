"""The largest model whose PPO fits under a cap of memory: prints tables of docs/capacity.md.

python benchmarks/capacity.py [--caps GIB ...] [--ways WAY ...] [--upto SHAPE] [--device cpu|cuda]

The recipe of the older system's claims: policy, critic, reward model and reference of one size, random weights of
GPT-2's shapes, one prompt of 400 tokens and 112 answered, then one update of policy and critic. For every cap and way
the ladder is climbed until a shape does not end under the cap; each try is a process of its own, and fits if the
highest resident set of the whole process (on a GPU: what torch has reserved) stayed below. "plain" is what one writes
first in PyTorch: four float32 networks, transformers' generate, whole tables of logits, Adam. Seconds are of one whole
iteration, after another one below 10⁹ parameters. Needs as much memory as the largest cap, and hours for the largest
shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefero.cli import ENVIRONMENT
from runs import this_machine

SHAPES = {
    "s": (768, 12, 12), "m": (1024, 24, 16), "l": (1280, 36, 20), "xl": (1600, 48, 25), "2b": (2048, 40, 16),
    "4b": (2304, 64, 16), "6b": (4096, 30, 16), "8b": (4096, 40, 16), "10b": (4096, 50, 16), "12b": (4096, 60, 16),
    "15b": (4096, 78, 16), "18b": (4096, 90, 16), "20b": (8192, 25, 16), "24b": (8192, 30, 16),
}  # fmt: skip
"""Width, layers and heads, as the older system's ladder has them."""
PROMPT, ANSWER, RANK = 400, 112, 4
TOO_LARGE = 3
GIB = 1 << 30


def config_of(shape: str) -> Any:
    """The configuration of a rung."""
    from transformers import GPT2Config

    width, layers, heads = SHAPES[shape]
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, eos_token_id=None, pad_token_id=0)


def plain(config: Any, device: str) -> Callable[[Any], None]:
    """An iteration of four networks in plain PyTorch."""
    import torch
    from torch import nn
    from transformers import AutoModel, AutoModelForCausalLM

    class Valued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = AutoModel.from_config(config), nn.Linear(config.n_embd, 1)

        def forward(self, ids: Any) -> Any:
            return self.head(self.trunk(ids).last_hidden_state).squeeze(-1)

    actor, reference = (AutoModelForCausalLM.from_config(config).to(device) for _ in range(2))
    critic, judge = (Valued().to(device) for _ in range(2))
    optimizers = [torch.optim.Adam(model.parameters(), lr=5e-6) for model in (actor, critic)]

    def logprobs(model: Any, ids: Any) -> Any:
        logits = model(ids).logits[:, PROMPT - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None]).squeeze(-1)

    def iteration(prompt: Any) -> None:
        with torch.no_grad():
            ids = actor.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=True, top_k=0
            )
            old, base = logprobs(actor, ids), logprobs(reference, ids)
            values, reward = critic(ids)[:, PROMPT - 1 : -1], judge(ids)[:, -1]
            rewards = 0.1 * (base - old)
            rewards[:, -1] += reward
            advantages, following = torch.zeros_like(values), 0.0
            for t in reversed(range(ANSWER)):
                after = values[:, t + 1] if t + 1 < ANSWER else 0.0
                following = rewards[:, t] + after - values[:, t] + 0.95 * following
                advantages[:, t] = following
            returns = advantages + values
        ratio = (logprobs(actor, ids) - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        (-torch.minimum(ratio * advantages, clipped * advantages).mean()).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        (critic(ids)[:, PROMPT - 1 : -1] - returns).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    return iteration


def ours(config: Any, device: str, way: str) -> Callable[[Any], None]:
    """An iteration of ours: `PPOTrainer` as a recipe sets it up."""
    from transformers import AutoModelForCausalLM

    from prefero.algorithms.ppo import PPOSettings
    from prefero.models.auto import AutoActor, AutoCritic, AutoRM
    from prefero.models.base import RewardModel
    from prefero.models.frozen import keep_frozen
    from prefero.models.loading import LoadOptions, build, enable_checkpointing
    from prefero.models.shared import HydraActor, backbone_of, sharing
    from prefero.optimizer import HybridAdam
    from prefero.recipes.session import num_parameters, set_up_machine
    from prefero.rollout.engine import SamplingParams
    from prefero.rollout.native.engine import Bounds, NativeEngine
    from prefero.strategies import NaiveStrategy
    from prefero.trainer import PPOTrainer
    from prefero.types import Prompt

    strategy = NaiveStrategy(device, precision="auto")
    rank = 0 if way == "all weights" else RANK
    actor: Any
    critic: Any
    if way.startswith("one backbone"):
        kind = {"one backbone": "fp32", "one backbone, bf16": "bf16", "one backbone, int8": "int8"}[way]
        network = build(AutoModelForCausalLM, None, config, LoadOptions(frozen=kind))
        actor = critic = HydraActor(enable_checkpointing(network), RANK)
        keep_frozen(actor, kind)
        judge, reference = RewardModel(backbone_of(actor), lora_rank=RANK), None
    else:
        options: dict[str, Any] = {"config": config, "lora_rank": rank, "checkpoint": True}
        actor, critic, judge = AutoActor(**options), AutoCritic(**options), AutoRM(config=config)
        reference = None if rank else sharing(actor).requires_grad_(False)
    set_up_machine(num_parameters(actor))
    judge.requires_grad_(False)
    optimizers = [
        HybridAdam([p for p in model.parameters() if p.requires_grad], lr=5e-6)
        for model in ([actor] if critic is actor else [actor, critic])
    ]
    pairs = zip([actor] if critic is actor else [actor, critic], optimizers, strict=True)
    strategy.prepare(*pairs, judge, *([reference] if reference else []))
    trainer = PPOTrainer(
        strategy, actor, critic, judge, reference, optimizers[0], optimizers[-1], train_batch_size=1,
        experience_batch_size=1, settings=PPOSettings(kl_coef=0.1), sampling=SamplingParams(ANSWER),
        engine=NativeEngine(actor, _NoWords(), Bounds(slots=1, copies=False), ()),
    )  # fmt: skip
    count = iter(range(100))
    return lambda prompt: trainer.step([Prompt(f"{next(count)}", tuple(prompt[0].tolist()), "")]) and None


class _NoWords:
    """Nothing is read: a tokenizer is asked for by name alone."""

    eos_token_id = None

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)


WAYS = ("plain", "all weights", "LoRA", "one backbone", "one backbone, bf16", "one backbone, int8")


def worker(way: str, shape: str, cap: float, device: str) -> None:
    """One try: prints what it took, or ends with `TOO_LARGE`."""
    import torch

    import prefero.trainer  # noqa: F401 - imported before the memory of imports is read
    from prefero.recipes import run as _imports  # noqa: F401

    imports, limit = highest(), cap * GIB
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    else:
        threading.Thread(target=_guard, args=(limit,), daemon=True).start()
    torch.manual_seed(0)
    config = config_of(shape)
    try:
        iteration = plain(config, device) if way == "plain" else ours(config, device, way)
        prompts = torch.randint(config.vocab_size, (2, 1, PROMPT), device=device)
        size = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
        for prompt in prompts[: 2 if size < 1e9 else 1]:
            began = time.perf_counter()
            iteration(prompt)
            seconds = time.perf_counter() - began
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit(TOO_LARGE)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        sys.exit(TOO_LARGE)
    if device == "cuda":
        taken, above = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    else:
        taken, above = highest(), highest() - imports
    if taken > limit:
        sys.exit(TOO_LARGE)
    print(json.dumps({"parameters": size, "seconds": seconds, "taken": taken / GIB, "above_imports": above / GIB}))


def highest() -> int:
    """The highest resident set of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _guard(limit: float) -> None:
    """Ends a process that holds too much, before the machine does."""
    while highest() <= limit:
        time.sleep(0.02)
    os._exit(TOO_LARGE)


def attempt(way: str, shape: str, cap: float, device: str) -> dict[str, Any] | None:
    """What a process took for this; None where the cap was too low."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", way, shape, str(cap), device]
    done = subprocess.run(  # noqa: S603
        command, check=False, capture_output=True, text=True, timeout=7200, env={**ENVIRONMENT, **os.environ}
    )
    if done.returncode == TOO_LARGE:
        return None
    if done.returncode:
        raise SystemExit(f"{way}, {shape} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["--worker"]:
        way, shape, cap, device = sys.argv[2:]
        worker(way, shape, float(cap), device)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", nargs="+", type=float, default=[4.0, 8.0, 16.0], metavar="GIB")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--upto", choices=list(SHAPES), default="24b", help="try no larger shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    ladder = list(SHAPES)[: list(SHAPES).index(args.upto) + 1]
    print("| cap, GiB | way | largest shape | parameters | of plain's | taken, GiB | above imports, GiB | seconds |")
    print(f"|{'---|' * 8}", flush=True)
    place: dict[str, int] = {}
    for cap in sorted(args.caps):
        base = 0
        for way in args.ways:
            # Whatever fits under a lower cap fits under this one.
            rung, best = place.get(way, 0), None
            while rung < len(ladder) and (found := attempt(way, ladder[rung], cap, args.device)) is not None:
                best, rung = (ladder[rung], found), rung + 1
            place[way] = max(0, rung - 1)
            if best is None:
                print(f"| {cap:g} | {way} | none | | | | | |", flush=True)
                continue
            shape, found = best
            base = found["parameters"] if way == "plain" else base
            ratio = f"{found['parameters'] / base:.1f}" if base else "-"
            print(
                f"| {cap:g} | {way} | {shape} | {found['parameters'] / 1e9:.2f}e9 | {ratio} | {found['taken']:.2f} | "
                f"{found['above_imports']:.2f} | {found['seconds']:.0f} |",
                flush=True,
            )
    print(f"\n{this_machine()}")


if __name__ == "__main__":
    main()
