"""How fast a run is: samples and floating-point operations a second in both phases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from prefero.trainer.callbacks.base import Callback
from prefero.types import Experience


@dataclass
class _Phase:
    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    started: float = 0.0

    def start(self) -> None:
        _finish_pending_work()
        self.started = perf_counter()

    def stop(self, samples: int, flops: float) -> None:
        _finish_pending_work()
        self.seconds += perf_counter() - self.started
        self.samples += samples
        self.flops += flops

    def rates(self) -> tuple[float, float]:
        seconds = max(self.seconds, 1e-12)
        return self.samples / seconds, self.flops / seconds / 1e12


def _finish_pending_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PerformanceEvaluator(Callback):
    """Prints, when fitting ends, the throughput of making experience and of learning (numbers of this process).

    Floating-point operations with N parameters, B rows, S tokens of which A are generated: generating is
    2 * N_actor * B * (2S - A - 1) * A / 2 (a cache-less forward per token), each scoring forward 2 * N * B * S, and
    learning 2 * N * B * S * 3 (times 4 instead of 3 with gradient checkpointing). ignore_episodes: warm-up
    episodes that are not measured.
    """

    def __init__(
        self,
        actor_num_params: int,
        critic_num_params: int,
        initial_model_num_params: int,
        reward_model_num_params: int,
        enable_grad_checkpoint: bool = False,
        ignore_episodes: int = 0,
    ) -> None:
        self.actor_num_params = actor_num_params
        self.all_num_params = (
            actor_num_params + critic_num_params + initial_model_num_params + reward_model_num_params
        )  # fmt: skip
        self.learned_num_params = actor_num_params + critic_num_params
        self.passes = 4 if enable_grad_checkpoint else 3
        self.ignore_episodes = ignore_episodes
        self.measuring = ignore_episodes == 0
        self.making_experience = _Phase()
        self.learning = _Phase()

    def on_episode_start(self, episode: int) -> None:
        self.measuring = episode >= self.ignore_episodes

    def on_make_experience_start(self) -> None:
        self.making_experience.start()

    def on_make_experience_end(self, experience: Experience) -> None:
        if not self.measuring:
            return
        rows, length = experience.sequences.shape
        actions = experience.num_actions
        generation = 2 * self.actor_num_params * rows * (2 * length - actions - 1) * actions / 2
        self.making_experience.stop(rows, generation + 2 * self.all_num_params * rows * length)

    def on_learn_batch_start(self) -> None:
        self.learning.start()

    def on_learn_batch_end(self, metrics: Mapping[str, float], experience: Experience) -> None:
        if self.measuring:
            rows, length = experience.sequences.shape
            self.learning.stop(rows, 2 * self.learned_num_params * rows * length * self.passes)

    def on_fit_end(self) -> None:
        if int(os.environ.get("RANK", "0")):
            return
        for name, phase in (("Making experience", self.making_experience), ("Learning", self.learning)):
            samples, tera = phase.rates()
            print(f"{name} throughput: {samples:.3f} samples/sec, {tera:.3f} TFLOPS")
