"""What every stage of a run shares: its folder, where numbers go, the data, the machine."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from prefero.config import Config, ConfigError, to_dict
from prefero.data.loader import Loader
from prefero.faults import fault
from prefero.models.base import Actor, RewardModel
from prefero.models.frozen import keep_frozen
from prefero.models.loading import LoadOptions, build, enable_checkpointing, load_tokenizer
from prefero.models.lora import has_lora
from prefero.models.shared import freeze_lower, save_reward_adapter
from prefero.optimizer import HybridAdam
from prefero.recipes.keeper import Keeper, Stop
from prefero.recipes.origin import origin
from prefero.recipes.sources import Sources, open_sources
from prefero.recipes.start import lasting, start_of
from prefero.strategies import DDPStrategy, FSDPStrategy, NaiveStrategy, Strategy
from prefero.strategies.checkpoint import Checkpoints, DamagedCheckpointError
from prefero.strategies.cpu import prefer_onednn_fp32, release_memory, set_threads
from prefero.tracking.base import Tracker, Trackers
from prefero.tracking.console import ConsoleTracker
from prefero.tracking.jsonl import JsonlTracker
from prefero.tracking.report import write_report
from prefero.tracking.run_folder import RunFolder
from prefero.tracking.text import for_terminal

BatchT = TypeVar("BatchT")
_STATE = Path("checkpoints") / "state"


@dataclass(frozen=True)
class Session:
    """One run (or stage of one) being made.

    logs: the files its numbers go to, in rank 0; its own first, then the whole run's. stop: whether it was asked to
    end. command: what makes it, "pipeline" or a stage. resume: it goes on with what lies in its folder.
    """

    config: Config
    run: RunFolder
    tracker: Trackers
    sources: Sources
    strategy: Strategy
    logs: tuple[JsonlTracker, ...]
    stop: Stop
    command: str
    resume: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock time since the run began, or was resumed."""
        return time.monotonic() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[Session]:
        """A run folder of its own below checkpoints/, its numbers also going into this run's logs."""
        folder = self.run.checkpoints / name
        # What a stage draws does not hang on those before it, which a resumed run does not make again.
        seed_everything(self.config.seed)
        with ExitStack() as stack:
            # Without a first checkpoint nothing was done yet, and the folder may be half made.
            begun = (folder / _STATE).is_dir()
            if self.resume and not begun:
                _check_nothing_done(folder, self.run)
            run, logs = _open_folder(
                stack, self.strategy, folder, self.config, name, resume=self.resume and begun, overwrite=self.resume
            )
            tracker = Trackers([*logs, self.tracker])
            yield replace(self, run=run, tracker=tracker, logs=(*logs, *self.logs), command=name,
                          started=time.monotonic())  # fmt: skip
        self.report(run)
        release_memory()  # a stage's models, before the next one's

    def done(self, name: str) -> dict[str, Any] | None:
        """The summary of a stage that has ended already, where the run is being resumed."""
        folder = RunFolder(self.run.checkpoints / name)
        if not self.resume or not folder.summary_file.is_file():
            return None
        summary = folder.summary()
        return summary if "seconds" in summary else None

    def keeper(self) -> Keeper:
        """The checkpoints of this stage: begun, or found where the run is being resumed."""
        settings = self.config.checkpoint
        checkpoints = Checkpoints(self.run.path / _STATE, self.strategy.group, settings.keep)
        keeper = Keeper(checkpoints, self.strategy, self.logs, settings, self.stop, self.say, origin(self.config))
        if self.resume and keeper.find():
            return keeper
        if self.resume:
            _check_nothing_done(self.run.path)
        keeper.begin()
        return keeper

    def say(self, text: str) -> None:
        """A line on the error output, once for all processes."""
        if self.strategy.is_rank_0:
            print(for_terminal(text), file=sys.stderr)

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary with the duration."""
        if self.strategy.is_rank_0:
            skipped = {"skipped_steps": self.strategy.skipped_steps} if self.strategy.skipped_steps else {}
            summary = {"command": self.command, **summary, **skipped, "seconds": round(self.seconds, 1)}
            self.run.write_summary(summary)

    def report(self, run: RunFolder) -> None:
        """Writes a run's report.html."""
        if self.strategy.is_rank_0:
            write_report(run.path)

    def export(self, model: Actor | RewardModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a Hugging Face folder, complete for every process when this returns.

        Beside the run's own model, which has its adapters merged, they are written alone into checkpoints/adapter.
        Raises BrokenRunError when processes that should hold the same weights do not.
        """
        fault("export")
        self.strategy.verify(model)
        state = self.strategy.whole_state(model, only_rank0=True)
        if self.strategy.is_rank_0:
            model.save_pretrained(folder, tokenizer, state=state)
            adapter = self.run.checkpoints / "adapter"
            if folder == self.run.model and has_lora(model.model):
                if isinstance(model, Actor):
                    model.save_adapter(adapter, state)
                elif isinstance(model.value_head, nn.Linear):
                    save_reward_adapter(model, adapter, state)
        self.strategy.group.wait()


def _check_nothing_done(folder: Path, pipeline: RunFolder | None = None) -> None:
    """The first checkpoint is written before the first number: numbers without one mean that it was lost.

    pipeline: the run that the stage in `folder` belongs to, which has its numbers too.
    """
    file = RunFolder(folder).metrics_file
    found = file.is_file() and file.stat().st_size > 0
    if not found and pipeline is not None:
        file = pipeline.metrics_file
        found = any(row is not None and row.get("stage") == folder.name for row in pipeline.metrics())
    if found:
        raise DamagedCheckpointError(
            f"{file} holds numbers, but {folder / _STATE} no checkpoint to go on from. Bring it back from a backup, or "
            "begin again with --overwrite"
        )


@contextmanager
def open_session(
    config: Config,
    folder: Path,
    strategy: Strategy,
    *,
    overwrite: bool = False,
    resume: bool = False,
    stage: str = "",
    sources: Sources | None = None,
    stoppable: bool = True,
) -> Iterator[Session]:
    """Makes the run folder, seeds everything, opens the logs; what was written stays readable whatever happens.

    sources: where rows come from, where they were opened before. resume: the folder is there already, and the run goes
    on from its checkpoints. stoppable: SIGTERM and SIGINT are heard, and the run's keeper ends it at the next step;
    where nothing keeps checkpoints they end it at once. Only rank 0 writes anything.
    """
    # Bars of a second or two break into the lines of the run's own display.
    transformers_logging.disable_progress_bar()
    seed_everything(config.seed)
    if sources is None:
        sources = open_sources(config.data, config.seed)
    stop = Stop() if strategy.group.pulse is None else Stop(strategy.group.pulse.hurry)
    with ExitStack() as stack:
        run, logs = _open_folder(stack, strategy, folder, config, stage, overwrite=overwrite, resume=resume)
        trackers: list[Tracker] = list(logs)
        if strategy.is_rank_0:
            console = ConsoleTracker()
            stack.callback(console.close)
            trackers.append(console)
        if stoppable:
            stack.enter_context(stop.listening())
        yield Session(config, run, Trackers(trackers), sources, strategy, logs, stop, stage, resume)


def _open_folder(
    stack: ExitStack,
    strategy: Strategy,
    folder: Path,
    config: Config,
    stage: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> tuple[RunFolder, tuple[JsonlTracker, ...]]:
    """The run folder and its log, closed with the stack; the other processes know where it is and write nothing."""
    if not strategy.is_rank_0:
        strategy.group.wait()
        return RunFolder(folder), ()
    if resume:
        run = RunFolder.open(folder, writing=True)
    else:
        run = RunFolder.create(folder, to_dict(config), overwrite=overwrite)
        run.write_summary({"command": stage})
    stack.enter_context(run)
    log = run.tracker(stage)
    stack.callback(log.close)
    strategy.group.wait()
    return run, (log,)


def seed_everything(seed: int) -> None:
    """The same seed for Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    set_seed(seed)


def make_strategy(config: Config) -> Strategy:
    """The strategy the config names. Raises ConfigError when torchrun started several processes for a single one's."""
    s, processes = config.strategy, int(os.environ.get("WORLD_SIZE", "1"))
    if s.kind == "naive" and processes > 1:
        raise ConfigError(
            f"{processes} processes were started, but strategy.kind is naive, which is for one; add "
            "--strategy.kind fsdp or --strategy.kind ddp"
        )
    common: dict[str, Any] = {"precision": s.precision, "max_norm": s.max_grad_norm}
    strategy: Strategy
    if s.kind == "naive":
        strategy = NaiveStrategy(s.device or None, **common)
    elif s.kind == "ddp":
        strategy = DDPStrategy(config.seed, **common, timeout=s.timeout)
    else:
        strategy = FSDPStrategy(
            s.stage, s.offload, **common, seed=config.seed, timeout=s.timeout, shard_init=s.shard_init
        )
    strategy.max_skipped = s.max_skipped
    return strategy


def set_up_machine(num_parameters: int, threads: int = 0) -> None:
    """Threads for a model of this size and the processes beside this one, and the faster exact float32 product."""
    set_threads(num_parameters, threads or None, sharers=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    prefer_onednn_fp32()


def load_policy(
    config: Config, path: str, sources: Sources, lora_rank: int, kind: type[Actor] = Actor
) -> tuple[Actor, PreTrainedTokenizerBase]:
    """The actor, of the class `kind`, and its tokenizer from a folder or name; no path: the world's fresh model.

    Where weights below adapters are kept in few bytes, an adapter beside the folder goes on (`start_of`).
    """
    fault("load")
    frozen, adapter = config.model.frozen if lora_rank else "fp32", None
    if not path:
        fresh = sources.scratch()
        if fresh is None:
            raise ValueError(
                "model.path is empty and the data brings no model of its own; "
                "give a folder, a hub name or a fetched name, e.g. --model.path smollm2"
            )
        model, tokenizer = fresh
    else:
        trust = config.model.trust_remote_code
        tokenizer = load_tokenizer(config.model.tokenizer or path, trust_remote_code=trust)
        base, adapter = start_of(path, frozen, lora_rank, "model.lora_rank")
        options = LoadOptions(trust_remote_code=trust, frozen=frozen)
        model = build(AutoModelForCausalLM, base, None, options)
        model.name_or_path = lasting(base)  # what the adapter's file says it stands on
    if config.model.gradient_checkpointing:
        enable_checkpointing(model)
    if config.model.num_layers_unfrozen and not lora_rank:
        freeze_lower(model, config.model.num_layers_unfrozen)
    actor = kind(model, lora_rank)
    keep_frozen(actor, frozen)
    if frozen != "fp32":
        release_memory()  # of layers that were float32 for a moment
    if adapter is not None:
        actor.load_adapter(adapter)
    return actor, tokenizer


def adamw(
    config: Config, model: nn.Module, learning_rate: float, weight_decay: float = 0.0, head_rate: float | None = None
) -> Optimizer:
    """Fused AdamW over the weights that train; norms and biases are not decayed, adapters learn faster if told to.

    head_rate: the learning rate of value heads beside the network; without one, it is that of all weights.
    """
    rate = learning_rate * (config.model.lora_learning_rate_factor if has_lora(model) else 1.0)
    head = getattr(model, "value_head", getattr(model, "heads", None)) if has_lora(model) or head_rate else None
    of_head = [parameter for parameter in head.parameters() if parameter.requires_grad] if head is not None else []
    apart = {id(parameter) for parameter in of_head}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in apart]
    groups = [
        {
            "params": [p for p in of_head if p.dim() >= 2],
            "weight_decay": weight_decay,
            "lr": head_rate or learning_rate,
        },
        {"params": [p for p in of_head if p.dim() < 2], "weight_decay": 0.0, "lr": head_rate or learning_rate},
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return HybridAdam(used, lr=rate, betas=(0.9, 0.95))


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
    """Just so many batches of a loader, going through its epochs again as needed; it can be taken up anywhere."""

    def __init__(self, loader: Loader[Any, BatchT], steps: int) -> None:
        self.loader, self.steps, self.done = loader, steps, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[BatchT]:
        for batch in islice(self.loader.forever(), self.steps - self.done):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the drawing stands."""
        return {"done": self.done, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave. Raises ValueError for other data or settings."""
        self.loader.load_state_dict(state["loader"])
        self.done = int(state["done"])
