"""What a trainer must remember to go on as if it had never stopped: plain values and tensors, by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prefero.strategies.base import Strategy
from prefero.strategies.checkpoint import Checkpoint
from prefero.trainer.update import Learner


@dataclass
class Snapshot:
    """Named tensors (whole or sharded) and plain JSON values; what a checkpoint holds."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Saved:
    """A snapshot as it comes back; `tensor` may be told what the tensor must be laid out like."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.values = checkpoint.state
        self.names = frozenset(checkpoint.names())
        self.tensor = checkpoint.tensor


def keep_learner(snapshot: Snapshot, learner: Learner, strategy: Strategy) -> None:
    """A model's own parameters and buffers (adapters apart), and its optimizer's states under the same names.

    Raises BrokenRunError when processes that should hold the same weights do not.
    """
    strategy.verify(learner.model)
    name, model, optimizer = learner.role, learner.model, learner.optimizer
    snapshot.tensors |= {f"{name}/{key}": tensor for key, tensor in model.state_dict().items()}
    for parameter, key in _held(optimizer, model):
        for kind, value in optimizer.state.get(parameter, {}).items():
            snapshot.tensors[f"{name}_optimizer/{key}/{kind}"] = torch.as_tensor(value)
    snapshot.values[f"{name}_optimizer"] = {
        "kinds": sorted({kind for state in optimizer.state.values() for kind in state}),
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "steps": vars(learner.steps).copy(),
    }


@torch.no_grad()
def restore_learner(saved: Saved, learner: Learner) -> None:
    """What `keep_learner` kept, into the live ones. Raises ValueError when the optimizer has other groups."""
    name, model, optimizer = learner.role, learner.model, learner.optimizer
    for key, tensor in model.state_dict().items():
        tensor.copy_(saved.tensor(f"{name}/{key}", like=tensor))
    kept = saved.values[f"{name}_optimizer"]
    if len(kept["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint's {name} has {len(kept['groups'])} groups of weights, this run's has "
            f"{len(optimizer.param_groups)}: resume with the config it was begun with"
        )
    learner.steps.asked, learner.steps.skipped_in_a_row = kept["steps"]["asked"], kept["steps"]["skipped_in_a_row"]
    for group, numbers in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in numbers.items()})
    fused = {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
    for parameter, key in _held(optimizer, model):
        state: dict[str, Any] = {}
        for kind in kept["kinds"]:
            place = f"{name}_optimizer/{key}/{kind}"
            if place in saved.names:  # a parameter that never had a gradient has no state
                # A fused kernel wants the count of steps where the weights are, the others in main memory.
                scalar = kind == "step"
                tensor = saved.tensor(place, like=None if scalar else parameter)
                state[kind] = tensor if scalar and parameter not in fused else tensor.to(parameter.device)
        if state:
            optimizer.state[parameter] = state


def _held(optimizer: Optimizer, model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """The parameters an optimizer steps, with their names in the model."""
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, names[id(parameter)]


def keep_strategy(snapshot: Snapshot, strategy: Strategy) -> None:
    """Where every process's random numbers stand (Python's, numpy's, torch's), and the loss scale."""
    version, numbers, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    own = {
        "python": [version, list(numbers), gauss],
        "numpy": [algorithm, [int(key) for key in np.asarray(keys)], position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
    }
    if strategy.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(strategy.device).tolist()
    snapshot.values["strategy"] = {
        "random": strategy.group.gather_json([own]),
        "precision": strategy.precision,
        "skipped_steps": strategy.skipped_steps,
        "loss_scale": None if strategy.loss_scale is None else strategy.loss_scale.state_dict(),
    }


def restore_strategy(saved: Saved, strategy: Strategy) -> None:
    """What `keep_strategy` kept; a process that was not there then takes one of the others'.

    Raises ValueError when this strategy computes in another precision.
    """
    values = saved.values["strategy"]
    if values["precision"] != strategy.precision:
        raise ValueError(
            f"the run was begun in {values['precision']} and would go on in {strategy.precision}: resume it with "
            f"--strategy.precision {values['precision']}"
        )
    strategy.skipped_steps = values["skipped_steps"]
    if strategy.loss_scale is not None and values["loss_scale"] is not None:
        strategy.loss_scale.load_state_dict(values["loss_scale"])
    everyone = values["random"]
    own = everyone[strategy.group.rank % len(everyone)]
    version, numbers, gauss = own["python"]
    random.setstate((version, tuple(numbers), gauss))
    algorithm, keys, position, has_gauss, cached = own["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(own["torch"], dtype=torch.uint8))
    if "cuda" in own and strategy.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(own["cuda"], dtype=torch.uint8), strategy.device)
