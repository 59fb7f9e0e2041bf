"""Contrastive preference optimisation (Xu et al., arXiv:2401.08417): DPO without a reference, beside imitation."""

from __future__ import annotations

from collections.abc import Iterator

from prefero.algorithms.completions import PairAlgorithm
from prefero.functional import preference
from prefero.models.base import Actor
from prefero.types import Loss, PairBatch


class CPO(PairAlgorithm):
    """Chosen completions are to be likelier than rejected ones, and likely in themselves.

    nll_coef: weight of the chosen completion's negative log-likelihood, in nats a token.
    """

    name = "cpo"

    def __init__(self, actor: Actor, beta: float = 0.1, nll_coef: float = 1.0) -> None:
        super().__init__(actor, beta)
        if not nll_coef >= 0.0:
            raise ValueError(f"nll_coef={nll_coef} must be 0 or more")
        self.nll_coef = nll_coef

    def losses(self, batch: PairBatch, total: float) -> Iterator[Loss]:
        """One loss: the pairs' losses, summed, divided by `total`."""
        chosen, rejected = self.read(batch)
        nll = -chosen.means
        losses = preference.cpo(chosen.sums, rejected.sums, self.beta) + self.nll_coef * nll
        rewards = self.beta * chosen.sums, self.beta * rejected.sums
        yield self.reported(losses, rewards, (chosen, rejected), batch, total, {"nll": nll})
