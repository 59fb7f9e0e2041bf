"""Supervised fine-tuning: the likelihood of the tokens to imitate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefero.algorithms.base import Algorithm
from prefero.functional import masked, supervised
from prefero.models.base import LM, Actor
from prefero.types import Loss, TokenBatch


class SFT(Algorithm[TokenBatch]):
    """Cross-entropy in nats a token, over the tokens of the loss mask and no others."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def count(self, batch: TokenBatch) -> Tensor:
        """Tokens to learn from; the first token of a row is predicted by nothing and never counts."""
        return batch.loss_mask[:, 1:].bool().sum().float()

    def losses(self, batch: TokenBatch, total: float) -> Iterator[Loss]:
        """One loss: minus the log-probabilities of the counted tokens, summed, divided by `total`."""
        mask = batch.loss_mask[:, 1:].bool()
        # The head is applied to the counted tokens only; prompts and padding are often the greater part.
        if isinstance(self.actor, LM):
            logprobs = self.actor(batch.token_ids, batch.attention_mask, loss_mask=batch.loss_mask)[:, 1:]
        else:
            logprobs = self.actor(batch.token_ids, mask.shape[1], batch.attention_mask, action_mask=mask)
        loss = supervised.cross_entropy(logprobs, mask, total)
        with torch.no_grad():
            # Probability of the right token: readable where nats are not.
            probability = masked.aggregate(logprobs.exp(), mask, norm=total)
        yield Loss("actor", loss, {"sft/token_probability": probability})
