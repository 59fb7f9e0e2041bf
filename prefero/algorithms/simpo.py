"""Simple preference optimisation (Meng et al., arXiv:2405.14734): the mean log-probability as reward, and a margin."""

from __future__ import annotations

from collections.abc import Iterator

from prefero.algorithms.completions import PairAlgorithm
from prefero.functional import preference
from prefero.models.base import Actor
from prefero.types import Loss, PairBatch


class SimPO(PairAlgorithm):
    """Chosen completions are to be likelier by the token than rejected ones, by a margin; there is no reference.

    gamma: the margin, in the same unit as beta times nats a token.
    """

    name = "simpo"

    def __init__(self, actor: Actor, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__(actor, beta)
        if not gamma >= 0.0:
            raise ValueError(f"gamma={gamma} must be 0 or more")
        self.gamma = gamma

    def losses(self, batch: PairBatch, total: float) -> Iterator[Loss]:
        """One loss: the pairs' losses, summed, divided by `total`."""
        chosen, rejected = self.read(batch)
        losses = preference.simpo(chosen.means, rejected.means, self.beta, self.gamma)
        rewards = self.beta * chosen.means, self.beta * rejected.means
        yield self.reported(losses, rewards, (chosen, rejected), batch, total)
