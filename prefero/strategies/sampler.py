"""Prompts in random order, shared out over processes, none twice before all were seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class DistributedSampler:
    """Draws from this rank's share of a data set without replacement, reshuffling when the share is used up.

    All ranks shuffle alike (seed and round) and take every `num_replicas`-th item, so shares never overlap; what does
    not divide is left out of this round and free again in the next. Raises ValueError for an empty share.
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} must be between 0 and num_replicas - 1 = {num_replicas - 1}")
        if len(dataset) < num_replicas:
            raise ValueError(f"the data set holds {len(dataset)} items, fewer than the {num_replicas} processes")
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.round = 0
        self.position = 0
        self.share = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.round)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return order[: len(order) - len(order) % self.num_replicas][self.rank :: self.num_replicas]

    def indices(self, num: int) -> list[int]:
        """The next `num` positions in the data set."""
        drawn: list[int] = []
        while len(drawn) < num:
            if self.position == len(self.share):
                self.round, self.position = self.round + 1, 0
                self.share = self._shuffled()
            taken = self.share[self.position : self.position + num - len(drawn)]
            self.position += len(taken)
            drawn += taken
        return drawn

    def sample(self, num: int) -> list[Any]:
        """The next `num` items."""
        return [self.dataset[index] for index in self.indices(num)]

    def state_dict(self) -> dict[str, int]:
        """Where the drawing stands, to go on from there later."""
        return {"round": self.round, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from what `state_dict` gave."""
        self.round, self.position = state["round"], state["position"]
        self.share = self._shuffled()
