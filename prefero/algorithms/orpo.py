"""Odds-ratio preference optimisation (Hong et al., arXiv:2403.07691): imitation that keeps away from the rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from prefero.algorithms.completions import Completions, PairAlgorithm, token_logprobs
from prefero.functional import masked, preference
from prefero.models.base import Actor
from prefero.types import Loss, PairBatch, TokenBatch


class ORPO(PairAlgorithm):
    """The chosen completion is imitated, and its odds are to be better than the rejected one's; there is no reference.

    nll: what is imitated. "completion" is the paper's; "text" is the prompt as well, as the authors' own code does it.
    Raises ValueError for another.
    """

    name = "orpo"

    def __init__(self, actor: Actor, beta: float = 0.1, nll: Literal["completion", "text"] = "completion") -> None:
        super().__init__(actor, beta)
        if nll not in ("completion", "text"):
            raise ValueError(f"nll={nll!r} is unknown: use 'completion' or 'text'")
        self.nll = nll

    def losses(self, batch: PairBatch, total: float) -> Iterator[Loss]:
        """One loss: the pairs' losses, summed, divided by `total`."""
        imitated = self._imitated(batch)
        logprobs = token_logprobs(self.actor, TokenBatch(batch.token_ids, batch.attention_mask, imitated))
        of_completions, imitated = batch.loss_mask[:, 1:].bool(), imitated[:, 1:].bool()
        found = Completions(masked.sum(logprobs, of_completions, dim=1), of_completions.sum(1))
        chosen, rejected = found[batch.chosen], found[batch.rejected]
        nll = -masked.mean(logprobs, imitated, dim=1)[batch.chosen]
        odds = preference.orpo(chosen.means, rejected.means, self.beta)
        rewards = self.beta * chosen.means, self.beta * rejected.means
        ratio = preference.log_odds(chosen.means.detach()) - preference.log_odds(rejected.means.detach())
        yield self.reported(
            nll + odds, rewards, (chosen, rejected), batch, total, {"nll": nll, "log_odds_ratio": ratio}
        )

    def _imitated(self, batch: PairBatch) -> Tensor:
        """[M, T]: the tokens whose log-probabilities are needed."""
        if self.nll == "completion":
            return batch.loss_mask
        mask = batch.loss_mask.clone()
        mask[batch.chosen] = batch.attention_mask[batch.chosen].to(mask.dtype)
        return mask
