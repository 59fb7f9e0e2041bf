"""What every process of a torchrun launch does for test_distributed.py; rank 0 writes what came out as JSON.

python ranks.py FOLDER KIND [KIND ...]
"""

import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import gpt2_config, tiny_llama, tiny_tokenizer

from prefero.models.auto import AutoActor, AutoCritic, AutoRM
from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.lora import adapters_disabled
from prefero.optimizer import HybridAdam
from prefero.rewards.combined import WeightedSum
from prefero.rewards.model import ModelReward
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.strategies import DDPStrategy, FSDPStrategy, NaiveStrategy, Strategy
from prefero.strategies.checkpoint import Checkpoint, Checkpoints
from prefero.strategies.pulse import BrokenRunError
from prefero.trainer.split import MicroBatches
from prefero.trainer.state import Snapshot, keep_learner
from prefero.trainer.update import Learner, update
from prefero.types import Loss, Prompt

KINDS: dict[str, Callable[[], Strategy]] = {
    "naive": lambda: NaiveStrategy("cpu"),
    "ddp": DDPStrategy,
    "zero1": lambda: FSDPStrategy(1),
    "zero2": lambda: FSDPStrategy(2),
    "zero3": lambda: FSDPStrategy(3),
    "bf16": lambda: FSDPStrategy(3, precision="bf16"),
    "fp16": lambda: FSDPStrategy(3, precision="fp16"),
}


def train(strategy: Strategy, lora_rank: int, steps: int, micro_batches: int = 2) -> tuple[Actor, Any, list[float]]:
    """A few steps on one global batch of eight rows, shared out; the optimizer is built before `prepare`."""
    torch.manual_seed(strategy.group.rank)  # prepare must make the processes start alike
    actor = Actor(tiny_llama(), lora_rank)
    optimizer = HybridAdam((p for p in actor.parameters() if p.requires_grad), lr=1e-3)
    if strategy.group.rank:
        for parameter in actor.parameters():
            parameter.data.add_(1.0)
    actor, optimizer = strategy.prepare((actor, optimizer))
    ids = torch.randint(0, actor.model.config.vocab_size, (8, 10), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor(strategy.group.share(8).rows)
    if lora_rank:  # the very first forward pass is the reference's, as in a PPO run that starts with an examination
        with torch.no_grad(), adapters_disabled(actor):
            actor(ids[rows], 5)
    norms = []
    for _ in range(steps):
        parts = rows.tensor_split(micro_batches)
        for index, part in enumerate(parts):
            with strategy.micro_batch(actor, last=index == len(parts) - 1):
                with strategy.autocast():
                    loss = -actor(ids[part], 5).sum() / 40
                strategy.backward(loss, actor, optimizer)
        norms.append(strategy.optimizer_step(optimizer, max_norm=1.0))
    return actor, optimizer, norms


def built_without_weights(strategy: Strategy, folder: Path, lora_rank: int) -> dict[str, Any]:
    """Models of shapes alone, filled in by `prepare`: what is stored is what comes out, and it trains."""
    plain = {name: tensor.clone() for name, tensor in AutoActor(folder).state_dict().items()}
    torch.manual_seed(strategy.group.rank)  # what is drawn must be rank 0's
    with strategy.model_init_context():
        actor, critic, judge = (kind(folder, lora_rank=lora_rank) for kind in (AutoActor, AutoCritic, AutoRM))
        fresh = AutoActor(config=gpt2_config())
        twin = deepcopy(fresh)
    models = (actor, critic, judge, fresh, twin)
    out = {"empty before": all(any(p.is_meta for p in model.parameters()) for model in models)}
    optimizer = HybridAdam((p for p in actor.parameters() if p.requires_grad), lr=1e-2)
    strategy.prepare((actor, optimizer), critic, judge, fresh, twin)
    out["filled after"] = not any(p.is_meta for model in models for p in model.parameters())
    whole = {name: tensor.clone() for name, tensor in strategy.checkpoint_state(actor).items()}
    out["as stored"] = all(torch.equal(whole[name.removeprefix("model.")], tensor) for name, tensor in plain.items())
    trunk = strategy.checkpoint_state(critic)
    out["trunk as stored"] = all(
        torch.equal(tensor, plain["model." + name])
        for name, tensor in trunk.items()
        if not name.startswith("value_head")
    )
    sizes = [float(tensor.abs().sum()) for model in models for tensor in strategy.whole_state(model).values()]
    out["alike"] = all(strategy.group.same(size) for size in sizes)
    ids = torch.arange(20).reshape(2, 10) % 7
    usual, here, there = AutoActor(config=gpt2_config()).state_dict(), *map(strategy.whole_state, (fresh, twin))
    large = [name for name, tensor in usual.items() if tensor.numel() > 1000]
    out["drawn as usual"] = len(large) > 8 and all(0.8 < here[name].std() / usual[name].std() < 1.25 for name in large)
    out["copies alike"] = all(torch.equal(here[name], there[name]) for name in here)
    out["fresh tied"] = fresh.model.lm_head.weight is fresh.model.transformer.wte.weight
    with strategy.micro_batch(actor, last=True):
        strategy.backward(-actor(ids, 5).sum() / 40, actor, optimizer)
    out["trains"] = strategy.optimizer_step(optimizer) > 0 and bool(optimizer.param_groups[0]["fused"])
    after = strategy.checkpoint_state(actor)
    out["moved"] = any(not torch.equal(after[name], whole[name]) for name in whole)
    with torch.no_grad():
        out["judges"] = bool(judge(ids).isfinite().all()) and critic(ids, 3).shape == (2, 3)
    return out | {"sizes": sizes}


def bad_loss_in_one_process(strategy: Strategy) -> dict[str, Any]:
    """A loss that is not finite in the last process only: what the others made of the step."""
    actor, optimizer, _ = train(strategy, 0, 1)
    before = {name: tensor.clone() for name, tensor in strategy.whole_state(actor).items()}
    factor = float("nan") if strategy.group.rank == strategy.group.world_size - 1 else 1.0

    def losses(batch: torch.Tensor, total: float) -> Iterator[Loss]:
        yield Loss("actor", -actor(batch, 5).sum() / total * factor, {})

    ids, learner = torch.arange(20).reshape(2, 10) % 7, Learner("actor", "loss", actor, optimizer)
    metrics = update(strategy, [learner], MicroBatches(lambda _: [ids]), lambda batch: torch.tensor(1.0), losses)
    after = strategy.whole_state(actor)
    return {"skipped": metrics["actor/skipped_max"], "moved": not all(torch.equal(after[k], before[k]) for k in after)}


def generate(strategy: Strategy, actor: Actor) -> list[list[int]]:
    """Samples of different lengths on every process, so that they stop at different times."""
    engine = HFEngine(actor, tiny_tokenizer(), eos_token_ids=[2])
    prompts = [Prompt(f"p{i}", tuple(range(3, 5 + i)), "") for i in range(5)]
    mine = [prompts[row] for row in strategy.group.share(5).rows]
    with strategy.whole(actor), strategy.autocast():
        done = engine.generate(mine, SamplingParams(max_new_tokens=8, seed=7))
    return strategy.group.gather_json([list(c.token_ids) for c in done][: strategy.group.share(5).num_real])


def frozen_after_prepare(strategy: Strategy) -> bool:
    """As the older system's trainer does with reward and initial model; whether it answers, gradients on or off."""
    model = strategy.prepare(Actor(tiny_llama()))
    model.requires_grad_(False)
    ids = torch.arange(20).reshape(2, 10) % 7
    with torch.no_grad():
        first = model(ids, 5)
    again = model(ids, 5)
    return torch.equal(first, again) and not again.requires_grad


def by_hand(strategy: Strategy) -> list[float]:
    """The norms of steps of a loop of one's own, each process with rows of its own."""
    torch.manual_seed(3)
    model = Actor(tiny_llama())
    model, optimizer = strategy.prepare((model, HybridAdam(model.parameters(), lr=1e-2)))
    norms = []
    for _ in range(2):
        mine = strategy.group.share(4).rows
        ids = (torch.arange(40).reshape(4, 10) % 7)[torch.tensor(mine)]
        strategy.backward(-model(ids, 5).sum() / 40, model, optimizer)
        norms.append(strategy.optimizer_step(optimizer, max_norm=1.0))
    return norms


def judged(strategy: Strategy, actor: Actor) -> list[float]:
    """The scores of a reward model that is shared out like the policy, of prompts that do not divide evenly."""
    torch.manual_seed(5)
    judge = RewardModel(tiny_llama(), nn.Linear(32, 1)).requires_grad_(False)
    reward = WeightedSum({"judge": (ModelReward(strategy.prepare(judge), tiny_tokenizer(), batch_size=2), 1.0)})
    engine = HFEngine(actor, tiny_tokenizer(), eos_token_ids=[2])
    prompts = [Prompt(f"p{i}", tuple(range(3, 5 + i)), f"{i}") for i in range(5)]
    with strategy.whole(actor):
        rollouts = collect(prompts, engine, reward, SamplingParams(max_new_tokens=8, seed=7), group=strategy.group)
    return [rollout.score.value for rollout in rollouts]


def main(kind: str, folder: Path) -> None:
    """Everything of one kind of strategy."""
    torch.set_num_threads(1)
    strategy = KINDS[kind]()
    group, out = strategy.group, {}
    out["frozen after prepare"], out["by hand"] = frozen_after_prepare(strategy), by_hand(strategy)
    out["norms"], out["lora norms"] = {}, {}
    for name, rank in (("norms", 0), ("lora norms", 4)):
        fresh, _, out[name] = train(strategy, rank, 3)
    actor, optimizer, _ = train(strategy, 0, 3)
    out["samples"], out["judged"] = generate(strategy, actor), judged(strategy, actor)
    size = group.world_size
    weights = folder / f"{kind}-{size}.safetensors"
    strategy.save_model(actor, weights, only_rank0=True)
    strategy.save_model(fresh, folder / f"{kind}-{size}-lora.safetensors", only_rank0=True)
    strategy.save_optimizer(optimizer, folder / f"{kind}-{size}-optimizer.pt")

    # What was saved comes back: two more steps from it are two more steps without the detour.
    again, its_optimizer, _ = train(strategy, 0, 0)
    strategy.load_model(again, weights)
    strategy.load_optimizer(its_optimizer, folder / f"{kind}-{size}-optimizer.pt")
    out["same after loading"] = all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(strategy.whole_state(again).values(), strategy.whole_state(actor).values(), strict=True)
    )
    exported = folder / f"{kind}-{size}-export"
    state = strategy.whole_state(actor, only_rank0=True)
    if strategy.is_rank_0:
        actor.save_pretrained(exported, tiny_tokenizer(), state=state)

    # A checkpoint of a run, and one by another number of processes if it is there.
    checkpoints = Checkpoints(folder / f"{kind}-{size}-state", group)
    checkpoints.save(1, {f"m/{name}": tensor for name, tensor in actor.state_dict().items()}, {"hello": [1, 2]})
    checkpoints.wait()
    errors = {}
    for other in sorted(folder.glob("*-state")):
        found = Checkpoint(other / "step-00000001")
        for name, tensor in again.state_dict().items():
            tensor.copy_(found.tensor(f"m/{name}", like=tensor))
        strategy.save_model(again, folder / f"{kind}-{size}-from-{other.name}.safetensors", only_rank0=True)

    for name, act in {
        "only rank 0": lambda: strategy.save_optimizer(optimizer, folder / "x.pt", only_rank0=True),
        "other world": lambda: strategy.load_optimizer(its_optimizer, folder / "zero3-2-optimizer.pt"),
        "foreign optimizer": lambda: strategy.prepare((Actor(tiny_llama()), HybridAdam(tiny_llama().parameters()))),
    }.items():
        try:
            act()
        except ValueError as error:
            errors[name] = str(error)

    # Weights that have drifted apart are noticed, by all processes, before anything is saved.
    snapshot = Snapshot()
    learner = Learner("actor", "loss", again, its_optimizer)
    keep_learner(snapshot, learner, strategy)
    if group.rank == group.world_size - 1 and kind in ("naive", "ddp"):  # of sharded weights there is only one copy
        first = next(again.parameters())
        first.data[0] += 1e-3
    try:
        keep_learner(snapshot, learner, strategy)
    except BrokenRunError as error:
        errors["drifted"] = str(error)
    out["errors"] = errors
    if kind not in ("bf16", "fp16"):
        out["bad loss"] = bad_loss_in_one_process(strategy)
        strategy.skipped_steps = 0

    if kind in ("zero2", "zero3") and (folder / "naive-base").is_dir():
        strategy.shard_init = True
        out["later"] = [built_without_weights(strategy, folder / "naive-base", rank) for rank in (0, 3)]

    # Critic and reward model, frozen and trained, prepared alone.
    critic, reward = Critic(tiny_llama()), RewardModel(tiny_llama()).requires_grad_(False)
    strategy.prepare(critic, reward)
    ids = torch.arange(40).reshape(4, 10) % 7
    with torch.no_grad():
        out["judged"] = [float(critic(ids, 3).sum()), len(reward(ids))]
    out["shares"] = group.gather_json([[n, vars(group.share(n))["rows"], group.share(n).num_real] for n in (1, 5, 8)])
    out["gathered"] = group.gather(torch.full((group.rank + 1, 2), float(group.rank))).tolist()
    out["steps skipped"] = strategy.skipped_steps
    if strategy.is_rank_0:
        (folder / f"{kind}-{size}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    for kind in sys.argv[2:]:
        main(kind, Path(sys.argv[1]))
