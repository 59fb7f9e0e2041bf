"""The policy of the random walks: small enough to train in seconds, and taught to walk before it is improved."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel

from prefero.algorithms.ilql import ILQLSettings
from prefero.data.collate import collate_examples
from prefero.data.loader import Loader
from prefero.data.randomwalks import RandomWalks
from prefero.data.trajectories import collate_trajectories, scale_of, standardised
from prefero.models.base import Actor
from prefero.models.ilql import ILQLActor
from prefero.optimizer import HybridAdam
from prefero.strategies import NaiveStrategy, Strategy
from prefero.trainer.ilql import ILQLTrainer
from prefero.trainer.sft import SFTTrainer

_WARMUP = 10


def fresh_walker(task: RandomWalks, seed: int = 0) -> Actor:
    """The tiny GPT-2 of a task, its weights drawn from the seed; torch's own random numbers stay where they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Actor(GPT2LMHeadModel(task.model_config()))


def walker(
    task: RandomWalks,
    seed: int = 0,
    *,
    epochs: int = 10,
    batch_size: int = 100,
    learning_rate: float = 3e-4,
    strategy: Strategy | None = None,
) -> Actor:
    """A policy that walks as the task's walks do: a fresh one, supervised on them for so many passes.

    strategy: where it is trained (None: on the CPU). Raises ValueError as `SFTTrainer` does.
    """
    actor = fresh_walker(task, seed)
    pad = int(task.tokenizer.pad_token_id)
    batches = Loader(task.examples(), batch_size, lambda rows: collate_examples(rows, pad), seed=seed)
    optimizer = HybridAdam(actor.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    SFTTrainer(
        actor, strategy or NaiveStrategy("cpu"), optimizer, batches, max_epochs=epochs, scheduler="constant"
    ).fit()
    return actor


def ilql_walker(
    task: RandomWalks,
    seed: int = 0,
    *,
    steps: int = 200,
    batch_size: int = 100,
    learning_rate: float = 2e-4,
    head_learning_rate: float = 3e-3,
    settings: ILQLSettings | None = None,
    strategy: Strategy | None = None,
) -> ILQLTrainer:
    """A trainer that teaches a fresh policy the task's walks and their values in so many steps, once `fit` is called.

    `trainer.model` is the `ILQLActor`; set its `beta` (100 is nearly the best by value) before it walks. settings: None
    is trlX's for this task (discount, scales, sync_rate) but for tau 0.95, and slow copies that move at every step. The
    trunk's learning rate and GPT-2's dropout are trlX's too; what differs is that the heads learn faster than what they
    stand on, and that the rates fall. The rest as for `walker`. Raises ValueError for steps that are no whole number of
    passes over the walks.
    """
    rows = task.trajectories()
    worth = scale_of(rows)
    pad = int(task.tokenizer.pad_token_id)
    made = [standardised(row, *worth) for row in rows]
    batches = Loader(made, batch_size, lambda batch: collate_trajectories(batch, pad), seed=seed)
    if steps < 1 or steps % len(batches):
        raise ValueError(f"steps={steps} is no whole number of passes of {len(batches)} batches; give a multiple of it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor = ILQLActor(fresh_walker(task, seed).model)
    heads = [parameter for parameter in actor.heads.parameters() if parameter.requires_grad]
    groups = [{"params": list(actor.model.parameters())}, {"params": heads, "lr": head_learning_rate}]
    optimizer = HybridAdam(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=1e-6)

    def course(step: int) -> float:
        return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))

    return ILQLTrainer(
        actor,
        strategy or NaiveStrategy("cpu"),
        optimizer,
        batches,
        max_epochs=steps // len(batches),
        settings=settings or ILQLSettings(tau=0.95),
        max_norm=1.0,
        dropout=True,
        scheduler=LambdaLR(optimizer, course),
    )
