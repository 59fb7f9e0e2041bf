"""The loop of online training: episodes of timesteps that make experience, and learn phases in between."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prefero.faults import fault
from prefero.models.trunk import device_of
from prefero.rollout.buffer import BufferItem, ReplayBuffer
from prefero.rollout.sampling import stream_key
from prefero.strategies.base import Strategy
from prefero.strategies.cpu import trim_memory
from prefero.strategies.sampler import DistributedSampler
from prefero.trainer.callbacks.base import Callback
from prefero.trainer.experience import ExperienceMaker
from prefero.trainer.progress import Progress
from prefero.trainer.state import Saved, Snapshot
from prefero.types import Experience, Metrics

_ROW = [f.name for f in fields(BufferItem) if f.name != "info"]


@dataclass
class Cursor:
    """Where a loop stands: what it will do next.

    timestep: of the episode; learning: its experience is in the buffer and is being learned from. phase: learn phases
    finished; epoch: of the phase; batch: optimiser steps of the epoch taken.
    """

    started: bool = False
    episode: int = 0
    timestep: int = 0
    learning: bool = False
    phase: int = 0
    epoch: int = 0
    batch: int = 0


class Trainer(ABC):
    """Makes experience from prompts, keeps it in a buffer, learns from the buffer.

    experience_batch_size: prompts of one timestep. max_epochs: passes over the buffer in a learn phase, or random
    batches drawn in it with sample_replay_buffer. tokenizer: turns a list of drawn prompts into the arguments of
    `make_experience`, a dict or a tensor; prompts that are tensors of one length need none. generate_kwargs are
    handed to `make_experience`.
    """

    def __init__(
        self,
        strategy: Strategy,
        experience_maker: ExperienceMaker,
        replay_buffer: ReplayBuffer,
        experience_batch_size: int = 8,
        max_epochs: int = 1,
        tokenizer: Callable[[Any], Any] | None = None,
        sample_replay_buffer: bool = False,
        dataloader_pin_memory: bool = True,
        callbacks: Sequence[Callback] = (),
        **generate_kwargs: Any,
    ) -> None:
        for name, number in (("experience_batch_size", experience_batch_size), ("max_epochs", max_epochs)):
            if number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        self.strategy = strategy
        self.experience_maker = experience_maker
        self.replay_buffer = replay_buffer
        self.experience_batch_size = experience_batch_size
        self.max_epochs = max_epochs
        self.tokenizer = tokenizer
        self.sample_replay_buffer = sample_replay_buffer
        self.dataloader_pin_memory = dataloader_pin_memory
        self.callbacks = list(callbacks)
        self.generate_kwargs = generate_kwargs
        # Every process must cut the same batches, whatever else has drawn from its random numbers.
        self.seed = strategy.group.agreed(torch.initial_seed() % 2**63)
        self.cursor = Cursor()
        self.phase_metrics: list[Metrics] = []
        """Of the optimiser steps of the learn phase so far."""
        self.sampler: DistributedSampler | None = None
        self._resumed: dict[str, int] | None = None
        self.should_stop = False
        """A callback that sets this once experience was made ends `fit`, without learning from that experience."""
        self.shows_progress = True
        """Whether `fit` draws a bar on a terminal; a run with a display of its own switches it off."""

    @abstractmethod
    def training_step(self, experience: Experience) -> Metrics:
        """One optimiser step on one batch."""

    def fit(
        self, prompts: Any, num_episodes: int = 50000, max_timesteps: int = 500, update_timesteps: int = 5000
    ) -> None:
        """Trains on prompts (anything with a length and items, or [N, P] token ids).

        An episode is max_timesteps timesteps; a timestep answers experience_batch_size prompts drawn without
        replacement; after every update_timesteps timesteps, counted over episodes, and after the very last one,
        the trainer learns from the buffer and empties it.
        """
        # Every process draws the same prompts and answers its share of them.
        self.sampler = sampler = DistributedSampler(prompts, seed=self.seed)
        if self._resumed is not None:
            sampler.load_state_dict(self._resumed)
        at, last = self.cursor, num_episodes * max_timesteps
        if not at.started:
            self._call("on_fit_start")
            at.started = True
        with Progress("fit", last, enabled=self.shows_progress and self.strategy.is_rank_0) as progress:
            while at.episode < num_episodes and not self.should_stop:
                if at.timestep == 0 and not at.learning:
                    self._call("on_episode_start", at.episode)
                while at.timestep < max_timesteps:
                    if not at.learning:
                        self.collect(sampler.sample(self.experience_batch_size))
                        if self.should_stop:
                            break
                        time = at.episode * max_timesteps + at.timestep + 1
                        at.learning = time % update_timesteps == 0 or time == last
                    if at.learning:
                        progress.note(self.learn())
                        self.replay_buffer.clear()
                        at.learning = False
                    at.timestep += 1
                    progress.advance()
                else:
                    at.episode, at.timestep = at.episode + 1, 0
                    self._call("on_episode_end", at.episode - 1)
        self.replay_buffer.clear()
        self._call("on_fit_end")
        self.cursor, self._resumed, self.should_stop = Cursor(phase=at.phase), None, False

    def collect(self, prompts: Any) -> Experience:
        """Makes experience from these prompts and puts it into the buffer."""
        self._call("on_make_experience_start")
        with self.strategy.whole(self.experience_maker.actor), self.strategy.autocast():
            experience = self._make_experience(self._inputs(prompts))
        self._call("on_make_experience_end", experience)
        self.replay_buffer.append(experience)
        trim_memory()
        return experience

    def learn(self) -> Metrics:
        """A learn phase over what the buffer holds; the mean of its steps' metrics (`*_max`: the greatest)."""
        metrics = self._learn()
        trim_memory()
        return metrics

    def _inputs(self, prompts: Any) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer(prompts)
        if isinstance(prompts, (list, tuple)) and prompts and all(isinstance(prompt, Tensor) for prompt in prompts):
            if len({len(prompt) for prompt in prompts}) > 1:
                lengths = sorted({len(prompt) for prompt in prompts})
                raise ValueError(
                    f"prompts have {lengths[0]} to {lengths[-1]} tokens and there is no tokenizer: give tokenizer=..., "
                    "a function that pads them on the left and returns input_ids and attention_mask"
                )
            return torch.stack(list(prompts))
        return prompts

    def _make_experience(self, inputs: Any) -> Experience:
        if isinstance(inputs, Mapping):
            return self.experience_maker.make_experience(**inputs, **self.generate_kwargs)
        return self.experience_maker.make_experience(inputs, **self.generate_kwargs)

    def _learn(self) -> Metrics:
        at = self.cursor
        pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        while at.epoch < self.max_epochs:
            if at.batch == 0:
                self._call("on_learn_epoch_start", at.epoch)
            # The order depends on seed, learn phase and epoch alone, so it can be taken up anywhere, by any process.
            order = stream_key(self.seed, at.phase, "learn", at.epoch)
            for experience in islice(self._batches(pin_memory, order), at.batch, None):
                at.batch += 1
                self._learn_batch(experience.to_device(self.device))
            at.epoch, at.batch = at.epoch + 1, 0
            self._call("on_learn_epoch_end", at.epoch - 1)
        at.phase, at.epoch = at.phase + 1, 0
        steps, self.phase_metrics = self.phase_metrics, []
        return mean_metrics(steps)

    def _batches(self, pin_memory: bool, order: int) -> Iterable[Experience]:
        """One epoch over the buffer, or a single random batch of it, drawn from the seed `order`."""
        if self.sample_replay_buffer:
            return [self.replay_buffer.sample(random.Random(order))]
        return self.strategy.setup_dataloader(self.replay_buffer, pin_memory, torch.Generator().manual_seed(order))

    @property
    def device(self) -> torch.device:
        """Where learning happens."""
        return device_of(self.experience_maker.actor)

    def _learn_batch(self, experience: Experience) -> Metrics:
        fault("learn")
        self._call("on_learn_batch_start")
        metrics = self.training_step(experience)
        self.phase_metrics.append(metrics)
        self._call("on_learn_batch_end", metrics, experience)
        return metrics

    def keep(self, snapshot: Snapshot) -> None:
        """Puts into a snapshot what the loop must remember, the buffer in use included."""
        values: dict[str, Any] = {"cursor": vars(self.cursor).copy(), "seed": self.seed, "metrics": self.phase_metrics}
        values["sampler"] = None if self.sampler is None else self.sampler.state_dict()
        items = [self.replay_buffer[row] for row in range(len(self.replay_buffer))]
        values["buffer"] = [list(item.info) for item in items]
        snapshot.values["loop"] = values
        for row, item in enumerate(items):
            tensors = {name: getattr(item, name) for name in _ROW}
            tensors |= {f"info/{name}": number for name, number in item.info.items()}
            snapshot.tensors |= {f"buffer/{row}/{name}": tensor for name, tensor in tensors.items()}

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept; `fit` with the same arguments then ends as it would have ended."""
        values = saved.values["loop"]
        self.cursor = Cursor(**values["cursor"])
        self.seed, self.phase_metrics, self._resumed = values["seed"], values["metrics"], values["sampler"]
        for row, names in enumerate(values["buffer"]):
            tensors = {name: saved.tensor(f"buffer/{row}/{name}") for name in _ROW}
            info = {name: saved.tensor(f"buffer/{row}/info/{name}") for name in names}
            self.replay_buffer.put(BufferItem(**tensors, info=info))

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)


def mean_metrics(steps: Sequence[Mapping[str, float]]) -> Metrics:
    """The mean of every metric over steps, the greatest for names that end in `_max`."""
    metrics: Metrics = {}
    for name in {name: None for step in steps for name in step}:
        values = [step[name] for step in steps if name in step]
        metrics[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return metrics
