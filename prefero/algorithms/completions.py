"""What DPO and its kin ask of a policy: the log-probabilities of whole completions, and the same of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prefero.algorithms.base import Algorithm
from prefero.functional import masked, reward
from prefero.models.base import LM, Actor
from prefero.models.lora import has_lora
from prefero.models.trunk import evaluating
from prefero.types import Loss, PairBatch, TokenBatch


@dataclass(frozen=True)
class Completions:
    """Of N completions the log-probability, summed over their tokens, and how many tokens they have; both [N]."""

    sums: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Nats a token."""
        return self.sums / self.lengths

    def __getitem__(self, rows: Tensor) -> Completions:
        return Completions(self.sums[rows], self.lengths[rows])


def token_logprobs(actor: Actor, texts: TokenBatch) -> Tensor:
    """The log-probabilities [M, T - 1] of the tokens in the loss mask, each given those before it; 0 elsewhere.

    The first token of a text is predicted by nothing. The output head is applied to the tokens in the mask only.
    """
    if isinstance(actor, LM):
        every: Tensor = actor(texts.token_ids, texts.attention_mask, loss_mask=texts.loss_mask)
        return every[:, 1:]
    mask = texts.loss_mask[:, 1:].bool()
    logprobs: Tensor = actor(texts.token_ids, mask.shape[1], texts.attention_mask, action_mask=mask)
    return logprobs


def read_completions(actor: Actor, texts: TokenBatch) -> Completions:
    """The completions of M texts, as the actor has them now, in one forward pass."""
    mask = texts.loss_mask[:, 1:].bool()
    return Completions(masked.sum(token_logprobs(actor, texts), mask, dim=1), mask.sum(1))


@torch.no_grad()
def read_reference(actor: Actor, reference: Actor | None, texts: TokenBatch) -> Tensor:
    """What the reference makes of M completions: their summed log-probabilities [M], without gradient or dropout.

    reference: None is the actor with its adapters off. Raises ValueError where it has none.
    """
    model = reference or actor
    if reference is None and not has_lora(actor.model):
        raise ValueError(
            "the reference is missing: give a reference model, batches that hold its log-probabilities "
            "(ReferencedPairBatch, ReferencedLabelledBatch), or an actor with LoRA, its own reference with adapters off"
        )
    with evaluating(model), actor.reference() if reference is None else nullcontext():
        return read_completions(model, texts).sums


class PairAlgorithm(Algorithm[PairBatch]):
    """What the losses over pairs of completions share: reading them, counting them, and what is reported.

    A batch's texts are read in one forward pass, in which those of one prompt share it. Raises ValueError for a beta
    that is not positive.
    """

    name: str
    """The section of its metrics."""

    def __init__(self, actor: Actor, beta: float) -> None:
        if not beta > 0.0:
            raise ValueError(f"beta={beta} must be positive")
        self.actor, self.beta = actor, beta

    def count(self, batch: PairBatch) -> Tensor:
        """Pairs that count."""
        return batch.counted.sum().float()

    def read(self, batch: PairBatch) -> tuple[Completions, Completions]:
        """The chosen and the rejected completions, [N] each."""
        found = read_completions(self.actor, texts_of(batch))
        return found[batch.chosen], found[batch.rejected]

    def reported(
        self,
        losses: Tensor,
        rewards: tuple[Tensor, Tensor],
        completions: tuple[Completions, Completions],
        batch: PairBatch,
        total: float,
        further: Mapping[str, Tensor] | None = None,
    ) -> Loss:
        """The pairs' losses [N], summed and divided by `total`, with what there is to report.

        rewards: what the loss takes as the reward of chosen and rejected, [N] each. further: more numbers of each pair.
        """
        counted = batch.counted
        chosen, rejected = (side.detach() for side in rewards)
        numbers = {
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": completions[0].means,
            "rejected_logprob": completions[1].means,
            **(further or {}),
        }
        metrics = {f"{self.name}/{key}": masked.sum(x.detach(), counted) / total for key, x in numbers.items()}
        wins = reward.accuracy(chosen[counted], rejected[counted]) if bool(counted.any()) else chosen.new_zeros(())
        metrics[f"{self.name}/accuracy"] = wins * counted.sum().to(wins) / total
        return Loss("actor", masked.sum(losses, counted) / total, metrics)


def texts_of(batch: PairBatch) -> TokenBatch:
    """The texts that a batch of pairs is about."""
    return TokenBatch(batch.token_ids, batch.attention_mask, batch.loss_mask)
