"""What every stage of a run shares: its folder, where numbers go, the data, the machine."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from prefero.config import Config, to_dict
from prefero.data.loader import Loader
from prefero.models.auto import AutoActor
from prefero.models.base import Actor
from prefero.models.loading import enable_checkpointing, load_tokenizer
from prefero.models.lora import has_lora
from prefero.recipes.sources import Sources, open_sources
from prefero.strategies.base import Strategy
from prefero.strategies.cpu import prefer_onednn_fp32, set_threads
from prefero.strategies.naive import NaiveStrategy
from prefero.tracking.base import Tracker, Trackers
from prefero.tracking.console import ConsoleTracker
from prefero.tracking.report import write_report
from prefero.tracking.run_folder import RunFolder

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class Session:
    """One run being made."""

    config: Config
    run: RunFolder
    tracker: Trackers
    sources: Sources
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock time since the run began."""
        return time.monotonic() - self.started

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Session]:
        """A run folder of its own below checkpoints/, its numbers also going into this run's logs."""
        with ExitStack() as stack:
            run = stack.enter_context(RunFolder.create(self.run.checkpoints / name, to_dict(self.config)))
            own = run.tracker(name)
            stack.callback(own.close)
            self.tracker.start(name, total)
            yield replace(self, run=run, tracker=Trackers([own, self.tracker]), started=time.monotonic())
        write_report(run.path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary with the duration."""
        self.run.write_summary({**summary, "seconds": round(self.seconds, 1)})


@contextmanager
def open_session(
    config: Config, folder: Path, *, overwrite: bool = False, stage: str = "", sources: Sources | None = None
) -> Iterator[Session]:
    """Makes the run folder, seeds everything, opens the logs; what was written stays readable whatever happens.

    sources: where rows come from, where they were opened before.
    """
    # Bars of a second or two break into the lines of the run's own display.
    transformers_logging.disable_progress_bar()
    seed_everything(config.seed)
    if sources is None:
        sources = open_sources(config.data, config.seed)
    with RunFolder.create(folder, to_dict(config), overwrite=overwrite) as run:
        logs: list[Tracker] = [run.tracker(stage), ConsoleTracker()]
        with Trackers(logs) as tracker:
            yield Session(config, run, tracker, sources)


def seed_everything(seed: int) -> None:
    """The same seed for Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    set_seed(seed)


def make_strategy(config: Config, num_parameters: int) -> Strategy:
    """The strategy the config names, with the machine set up for a model of this size."""
    settings = config.strategy
    set_up_machine(num_parameters, settings.threads)
    return NaiveStrategy(settings.device or None, precision=settings.precision, max_norm=settings.max_grad_norm)


def set_up_machine(num_parameters: int, threads: int = 0) -> None:
    """Threads that suit a model of this size, and the faster exact float32 product."""
    set_threads(num_parameters, threads or None)
    prefer_onednn_fp32()


def load_policy(config: Config, path: str, sources: Sources, lora_rank: int) -> tuple[Actor, PreTrainedTokenizerBase]:
    """The actor and its tokenizer from a folder or name; with no path, the world's fresh model."""
    if not path:
        fresh = sources.scratch()
        if fresh is None:
            raise ValueError(
                "model.path is empty and the data brings no model of its own; "
                "give a folder, a hub name or a fetched name, e.g. --model.path smollm2"
            )
        if config.model.gradient_checkpointing:
            enable_checkpointing(fresh[0])
        return Actor(fresh[0], lora_rank), fresh[1]
    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(config.model.tokenizer or path, trust_remote_code=trust)
    actor = AutoActor(
        pretrained=path,
        checkpoint=config.model.gradient_checkpointing,
        lora_rank=lora_rank,
        trust_remote_code=trust,
    )
    return actor, tokenizer


def adamw(config: Config, model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> Optimizer:
    """Fused AdamW over the weights that train; norms and biases are not decayed, adapters learn faster if told to."""
    rate = learning_rate * (config.model.lora_learning_rate_factor if has_lora(model) else 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=rate, betas=(0.9, 0.95), fused=True)


def schedule(optimizer: Optimizer, kind: str, steps: int, warmup: float = 0.0, silent: int = 0) -> LambdaLR:
    """The learning rate's course over `steps` updates: nothing for `silent` of them, a rise, then the named fall."""
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < silent:
            return 0.0
        step = step - silent
        if warmup and step < rise:
            return (step + 1) / (rise + 1)
        if kind == "constant":
            return 1.0
        progress = (step - (rise if warmup else 0)) / max(1, steps - silent - (rise if warmup else 0))
        left = max(0.0, 1.0 - progress)
        return left if kind == "linear" else float(0.5 * (1.0 - np.cos(np.pi * left)))

    return LambdaLR(optimizer, factor)


def num_parameters(model: nn.Module) -> int:
    """Weights of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Steps(Generic[BatchT]):
    """Just so many batches of a loader, going through its epochs again as needed."""

    def __init__(self, loader: Loader[Any, BatchT], steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[BatchT]:
        return islice(self.loader.forever(), self.steps)
