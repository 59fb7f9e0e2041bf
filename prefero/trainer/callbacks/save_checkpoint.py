"""Checkpoints at the end of episodes."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from prefero.strategies.base import Strategy
from prefero.trainer.callbacks.base import Callback


class SaveCheckpoint(Callback):
    """Saves every `interval` episodes under `path`/checkpoint/episode_{i}/.

    Models go to actor.pt and critic.pt (written by the first process), optimizers to actor-optim-rank-{r}.pt and
    critic-optim-rank-{r}.pt; what is None is left out. Call it with models and optimizers that were prepared.
    """

    def __init__(
        self,
        path: str | Path,
        interval: int,
        strategy: Strategy,
        actor: nn.Module | None = None,
        critic: nn.Module | None = None,
        actor_optim: Optimizer | None = None,
        critic_optim: Optimizer | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be 1 or more episodes")
        self.path = Path(path) / "checkpoint"
        self.interval = interval
        self.strategy = strategy
        self.models = {"actor": actor, "critic": critic}
        self.optimizers = {"actor": actor_optim, "critic": critic_optim}

    def on_episode_end(self, episode: int) -> None:
        if (episode + 1) % self.interval:
            return
        folder = self.path / f"episode_{episode}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, model in self.models.items():
            if model is not None:
                self.strategy.save_model(model, str(folder / f"{name}.pt"), only_rank0=True)
        rank = int(os.environ.get("RANK", "0"))
        for name, optimizer in self.optimizers.items():
            if optimizer is not None:
                file = folder / f"{name}-optim-rank-{rank}.pt"
                self.strategy.save_optimizer(optimizer, str(file), only_rank0=False)
