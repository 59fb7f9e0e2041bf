"""The loop of online training: episodes of timesteps that make experience, and learn phases in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefero.rollout.buffer import ReplayBuffer
from prefero.strategies.base import Strategy
from prefero.trainer.callbacks.base import Callback
from prefero.trainer.experience import ExperienceMaker
from prefero.trainer.progress import Progress
from prefero.types import Experience, Metrics


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
        sampler = self.strategy.setup_sampler(prompts)
        last = num_episodes * max_timesteps
        time = 0
        self._call("on_fit_start")
        with Progress("fit", last, enabled=self.shows_progress and self.strategy.is_rank_0) as progress:
            for episode in range(num_episodes):
                self._call("on_episode_start", episode)
                for _ in range(max_timesteps):
                    time += 1
                    self.collect(sampler.sample(self.experience_batch_size))
                    if time % update_timesteps == 0 or time == last:
                        progress.note(self.learn())
                        self.replay_buffer.clear()
                    progress.advance()
                self._call("on_episode_end", episode)
        self._call("on_fit_end")

    def collect(self, prompts: Any) -> Experience:
        """Makes experience from these prompts and puts it into the buffer."""
        self._call("on_make_experience_start")
        with self.strategy.autocast():
            experience = self._make_experience(self._inputs(prompts))
        self._call("on_make_experience_end", experience)
        self.replay_buffer.append(experience)
        return experience

    def learn(self) -> Metrics:
        """A learn phase over what the buffer holds; the mean of its steps' metrics (`*_max`: the greatest)."""
        return self._learn()

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
        steps: list[Metrics] = []
        if self.sample_replay_buffer:
            for epoch in range(self.max_epochs):
                self._call("on_learn_epoch_start", epoch)
                steps.append(self._learn_batch(self.replay_buffer.sample()))
                self._call("on_learn_epoch_end", epoch)
            return mean_metrics(steps)
        pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        loader = self.strategy.setup_dataloader(self.replay_buffer, pin_memory)
        for epoch in range(self.max_epochs):
            self._call("on_learn_epoch_start", epoch)
            for experience in loader:
                steps.append(self._learn_batch(experience.to_device(self.device)))
            self._call("on_learn_epoch_end", epoch)
        return mean_metrics(steps)

    @property
    def device(self) -> torch.device:
        """Where learning happens."""
        return next(self.experience_maker.actor.parameters()).device

    def _learn_batch(self, experience: Experience) -> Metrics:
        self._call("on_learn_batch_start")
        metrics = self.training_step(experience)
        self._call("on_learn_batch_end", metrics, experience)
        return metrics

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
