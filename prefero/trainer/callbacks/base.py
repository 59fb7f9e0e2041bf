"""The ten moments at which a callback is called."""

from __future__ import annotations

from collections.abc import Mapping

from prefero.types import Experience


class Callback:
    """Does nothing at every moment; override the ones you want."""

    def on_fit_start(self) -> None:
        """Before anything."""

    def on_fit_end(self) -> None:
        """After everything."""

    def on_episode_start(self, episode: int) -> None:
        """Before the first timestep of an episode."""

    def on_episode_end(self, episode: int) -> None:
        """After the last timestep of an episode."""

    def on_make_experience_start(self) -> None:
        """Before prompts are answered and scored."""

    def on_make_experience_end(self, experience: Experience) -> None:
        """After prompts were answered and scored."""

    def on_learn_epoch_start(self, epoch: int) -> None:
        """Before a pass over the buffer."""

    def on_learn_epoch_end(self, epoch: int) -> None:
        """After a pass over the buffer."""

    def on_learn_batch_start(self) -> None:
        """Before an optimiser step."""

    def on_learn_batch_end(self, metrics: Mapping[str, float], experience: Experience) -> None:
        """After an optimiser step; `metrics` are those of its batch."""
