"""The largest model whose PPO fits under a cap of memory, and how fast it is: prints tables of docs/capacity.md.

python benchmarks/capacity.py [--caps GIB ...] [--ways WAY ...] [--upto SHAPE] [--device cpu|cuda] [--json FILE]

The recipe of the older system's claims: policy, critic, reward model and reference of one size, random weights of
GPT-2's shapes, one prompt of 400 tokens and 112 answered, then one update of policy and critic. "plain" is what one
writes first in PyTorch: four float32 networks, transformers' generate, whole tables of logits, Adam. The others are
`PPOTrainer`, recomputing activations and sampling without copies of weights.

Every try is a process of its own. It fits if the highest resident set of the whole process, imports and all, stayed
below the cap (on a GPU: what torch has reserved); one that goes above is ended at once. For every cap and way the
ladder of shapes is halved until one shape fits and the next does not. Seconds are of one whole iteration: the second,
below 10⁹ parameters. The second table compares the ways at equal sizes: GPT-2 small, and what plain PyTorch could do.
Needs as much memory as the largest cap, nothing beside it, and hours for the largest shapes. --quick takes shapes
that end in seconds, to see it work.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
QUICK = {"tiny": (32, 2, 2), "small": (64, 3, 2)}
TEXT, QUICK_TEXT, RANK = (400, 112), (24, 8), 4
FROZEN = {"LoRA": "fp32", "LoRA, bf16": "bf16", "one backbone": "fp32", "one backbone, bf16": "bf16",
          "one backbone, int8": "int8"}  # fmt: skip
WAYS = ("plain", "all weights", *FROZEN)
TOO_LARGE, KILLED = 3, (-9, 137)
GIB = 1 << 30


@dataclass(frozen=True)
class Try:
    """What one process took; nothing of it where it did not fit. taken, above_imports: GiB."""

    way: str
    shape: str
    cap: float
    fits: bool
    parameters: float = 0.0
    seconds: float = 0.0
    taken: float = 0.0
    above_imports: float = 0.0


def config_of(shape: str) -> Any:
    """The configuration of a rung."""
    from transformers import GPT2Config

    width, layers, heads = {**SHAPES, **QUICK}[shape]
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, eos_token_id=None, pad_token_id=0)


def plain(config: Any, device: str, text: tuple[int, int]) -> Callable[[Any], None]:
    """An iteration of four networks in plain PyTorch."""
    import torch
    from torch import nn
    from transformers import AutoModel, AutoModelForCausalLM

    start, length = text

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
        logits = model(ids).logits[:, start - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[:, start:, None]).squeeze(-1)

    def experience(prompt: Any) -> tuple[Any, Any, Any, Any]:
        ids = actor.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=True, top_k=0
        )
        old, base = logprobs(actor, ids), logprobs(reference, ids)
        values, reward = critic(ids)[:, start - 1 : -1], judge(ids)[:, -1]
        rewards = 0.1 * (base - old)
        rewards[:, -1] += reward
        advantages, following = torch.zeros_like(values), 0.0
        for t in reversed(range(length)):
            after = values[:, t + 1] if t + 1 < length else 0.0
            following = rewards[:, t] + after - values[:, t] + 0.95 * following
            advantages[:, t] = following
        return ids, old, advantages, advantages + values

    def iteration(prompt: Any) -> None:
        with torch.no_grad():
            ids, old, advantages, returns = experience(prompt)
        ratio = (logprobs(actor, ids) - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        (-torch.minimum(ratio * advantages, clipped * advantages).mean()).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        (critic(ids)[:, start - 1 : -1] - returns).square().mean().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    return iteration


def ours(config: Any, device: str, text: tuple[int, int], way: str) -> Callable[[Any], None]:
    """An iteration of ours: `PPOTrainer` as a recipe sets it up."""
    from prefero.algorithms.ppo import PPOSettings
    from prefero.optimizer import HybridAdam
    from prefero.recipes.session import num_parameters, set_up_machine
    from prefero.rollout.engine import SamplingParams
    from prefero.rollout.native.engine import Bounds, NativeEngine
    from prefero.strategies import NaiveStrategy
    from prefero.strategies.cpu import release_memory
    from prefero.trainer import PPOTrainer
    from prefero.types import Prompt

    strategy = NaiveStrategy(device, precision="auto")
    actor, critic, judge, reference = roles(config, way)
    set_up_machine(num_parameters(actor))
    release_memory()  # of layers that were float32 for a moment
    judge.requires_grad_(False)
    learners = [actor] if critic is actor else [actor, critic]
    optimizers = [HybridAdam([p for p in model.parameters() if p.requires_grad], lr=5e-6) for model in learners]
    strategy.prepare(*zip(learners, optimizers, strict=True), judge, *([reference] if reference else []))
    trainer = PPOTrainer(
        strategy, actor, critic, judge, reference, optimizers[0], optimizers[-1], train_batch_size=1,
        experience_batch_size=1, settings=PPOSettings(kl_coef=0.1), sampling=SamplingParams(text[1]),
        engine=NativeEngine(actor, _NoWords(), Bounds(slots=1, copies=False), ()),
    )  # fmt: skip
    count = iter(range(100))

    def iteration(prompt: Any) -> None:
        trainer.step([Prompt(f"{next(count)}", tuple(prompt[0].tolist()), "")])

    return iteration


def roles(config: Any, way: str) -> tuple[Any, Any, Any, Any]:
    """Actor, critic, reward model and reference; no reference where the actor's adapters are switched off for it."""
    from transformers import AutoModelForCausalLM

    from prefero.models.auto import AutoActor, AutoCritic, AutoRM
    from prefero.models.base import RewardModel
    from prefero.models.frozen import keep_frozen
    from prefero.models.loading import LoadOptions, build, enable_checkpointing
    from prefero.models.shared import HydraActor, backbone_of, sharing

    if way.startswith("one backbone"):
        network = build(AutoModelForCausalLM, None, config, LoadOptions(frozen=FROZEN[way]))
        actor = HydraActor(enable_checkpointing(network), RANK)
        keep_frozen(actor, FROZEN[way])
        return actor, actor, RewardModel(backbone_of(actor), lora_rank=RANK), None
    options: dict[str, Any] = {"config": config, "checkpoint": True}
    if way in FROZEN:
        options |= {"lora_rank": RANK, "frozen": FROZEN[way]}
    policy = AutoActor(**options)
    reference = None if way in FROZEN else sharing(policy).requires_grad_(False)
    return policy, AutoCritic(**options), AutoRM(**options), reference


class _NoWords:
    """Nothing is read: a tokenizer is asked for by name alone."""

    eos_token_id = None

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)


def worker(way: str, shape: str, cap: float, device: str) -> None:
    """One try: prints what it took, or ends with `TOO_LARGE`."""
    import torch

    import prefero.trainer  # noqa: F401 - imported before the memory of imports is read
    from prefero.models.trunk import out_of_memory
    from prefero.recipes import run as _imports  # noqa: F401

    imports, limit, ended = highest(), cap * GIB, threading.Event()
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    else:
        threading.Thread(target=_guard, args=(limit, ended), daemon=True).start()
    torch.manual_seed(0)
    config, text = config_of(shape), QUICK_TEXT if shape in QUICK else TEXT
    size = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    try:
        make = plain(config, device, text) if way == "plain" else ours(config, device, text, way)
        for prompt in torch.randint(config.vocab_size, (2, 1, text[0]), device=device)[: 2 if size < 1e9 else 1]:
            began = time.perf_counter()
            make(prompt)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    except (MemoryError, RuntimeError, ValueError) as error:
        ours_said = isinstance(error, ValueError) and "there is not enough memory" in str(error)
        if not (isinstance(error, MemoryError) or ours_said or out_of_memory(error)):  # type: ignore[arg-type]
            raise
        sys.exit(TOO_LARGE)
    ended.set()
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


def _guard(limit: float, ended: threading.Event) -> None:
    """Ends a process that holds too much, before the machine does.

    By what is resident: a limit on address space would also count what is reserved and never touched.
    """
    while not ended.wait(0.02):
        if highest() > limit:
            os._exit(TOO_LARGE)


def attempt(way: str, shape: str, cap: float, device: str) -> Try:
    """A try in a process of its own. Raises SystemExit where it ended in another way than for want of memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", way, shape, str(cap), device]
    done = subprocess.run(  # noqa: S603
        command, check=False, capture_output=True, text=True, timeout=6 * 3600, env={**ENVIRONMENT, **os.environ}
    )
    if done.returncode == TOO_LARGE or done.returncode in KILLED:
        return Try(way, shape, cap, fits=False)
    if done.returncode:
        raise SystemExit(f"{way}, {shape} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return Try(way, shape, cap, fits=True, **json.loads(done.stdout.strip().splitlines()[-1]))


class Ladder:
    """Shapes from small to large, and what is known of them."""

    def __init__(self, shapes: list[str], device: str) -> None:
        self.shapes, self.device = shapes, device
        self.tries: list[Try] = []

    def at(self, way: str, shape: str, cap: float) -> Try:
        """A try under a cap, made unless an earlier one answers it."""
        for known in self.tries:
            if (known.way, known.shape) == (way, shape):
                if known.fits and known.cap <= cap:
                    return known
                if not known.fits and known.cap >= cap:
                    return Try(way, shape, cap, fits=False)
        self.tries.append(attempt(way, shape, cap, self.device))
        return self.tries[-1]

    def largest(self, way: str, cap: float) -> Try | None:
        """The largest shape that fits; the next one was tried and does not, if there is one."""
        best, low, high = None, -1, len(self.shapes)
        while high - low > 1:
            middle = (low + high) // 2
            found = self.at(way, self.shapes[middle], cap)
            best, low, high = (found, middle, high) if found.fits else (best, low, middle)
        return best


def capacity(ladder: Ladder, caps: list[float], ways: list[str]) -> Iterator[str]:
    """The lines of the first table."""
    yield "| cap, GiB | way | largest shape | parameters | of plain's | taken, GiB | above imports, GiB | seconds |"
    yield f"|{'---|' * 8}"
    for cap in sorted(caps):
        base = 0.0
        for way in ways:
            best = ladder.largest(way, cap)
            if best is None:
                yield f"| {cap:g} | {way} | none | | | | | |"
                continue
            base = best.parameters if way == "plain" else base
            ratio = f"{best.parameters / base:.1f}" if base else "-"
            yield (
                f"| {cap:g} | {way} | {best.shape} | {best.parameters / 1e9:.3g}e9 | {ratio} | {best.taken:.2f} | "
                f"{best.above_imports:.2f} | {best.seconds:.3g} |"
            )


def equal_sizes(ladder: Ladder, caps: list[float], ways: list[str]) -> Iterator[str]:
    """The lines of the second table: the smallest shape, and the largest of plain PyTorch's under each cap."""
    shapes = {ladder.shapes[0]: max(caps)}
    for cap in caps:
        if "plain" in ways and (best := ladder.largest("plain", cap)) is not None:
            shapes[best.shape] = max(caps)
    yield "| shape | way | above imports, GiB | seconds | of plain's speed |"
    yield f"|{'---|' * 5}"
    for shape, cap in shapes.items():
        base = 0.0
        for way in ways:
            found = ladder.at(way, shape, cap)
            if not found.fits:
                yield f"| {shape} | {way} | more than {cap:g} | | |"
                continue
            base = found.seconds if way == "plain" else base
            speed = f"{base / found.seconds:.2f}" if base else "-"
            yield f"| {shape} | {way} | {found.above_imports:.2f} | {found.seconds:.3g} | {speed} |"


def can(ways: list[str], device: str) -> list[str]:
    """The ways that this machine has numbers for: bfloat16 wants hardware that multiplies it."""
    import torch

    from prefero.strategies.cpu import has_native_bf16

    return [way for way in ways if not way.endswith("bf16") or has_native_bf16(torch.device(device))]


def main() -> None:
    """Prints the tables."""
    if sys.argv[1:2] == ["--worker"]:
        way, shape, cap, device = sys.argv[2:]
        worker(way, shape, float(cap), device)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", nargs="+", type=float, default=[4.0, 8.0, 16.0], metavar="GIB")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--upto", choices=list(SHAPES), default="24b", help="try no larger shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes, to see it work")
    parser.add_argument("--json", type=Path, help="write all tries there as well")
    args = parser.parse_args()
    shapes = list(QUICK) if args.quick else list(SHAPES)[: list(SHAPES).index(args.upto) + 1]
    ladder, ways = Ladder(shapes, args.device), can(args.ways, args.device)
    for table in (capacity, equal_sizes):
        for line in table(ladder, args.caps, ways):
            print(line, flush=True)
        print()
    print(this_machine())
    if args.json:
        args.json.write_text(json.dumps([asdict(found) for found in ladder.tries], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
