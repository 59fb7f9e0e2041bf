"""The policy of the random walks: small enough to train in seconds, and taught to walk before it is improved."""

from __future__ import annotations

import torch
from transformers import GPT2LMHeadModel

from prefero.data.collate import collate_examples
from prefero.data.loader import Loader
from prefero.data.randomwalks import RandomWalks
from prefero.models.base import Actor
from prefero.optimizer import HybridAdam
from prefero.strategies import NaiveStrategy, Strategy
from prefero.trainer.sft import SFTTrainer


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
