"""Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306): single completions, each to be had or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prefero.algorithms.base import Algorithm
from prefero.algorithms.completions import read_completions, read_reference
from prefero.functional import masked, preference
from prefero.models.base import Actor
from prefero.strategies.group import ALONE, Group
from prefero.types import LabelledBatch, Loss, ReferencedLabelledBatch, TokenBatch


class KTO(Algorithm[LabelledBatch]):
    """Completions to be had are to gain more over the reference than completions do on average, the others less.

    That average, z0, is an estimate of the KL from completions that answer other prompts. It belongs to the whole
    optimizer step: `look_ahead` takes it from all micro-batches and processes before the first loss, so that the
    gradient does not depend on how the step is cut. reference: as for DPO. Raises ValueError for a beta that is not
    positive, or negative weights.
    """

    name = "kto"

    def __init__(
        self,
        actor: Actor,
        reference: Actor | None = None,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        numbers = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, number in numbers.items():
            if not number >= 0.0:
                raise ValueError(f"{name}={number} must be 0 or more")
        if not beta > 0.0:
            raise ValueError(f"beta={beta} must be positive")
        self.actor, self.reference, self.beta = actor, reference, beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.z0 = 0.0

    @torch.no_grad()
    def look_ahead(self, parts: Sequence[LabelledBatch], group: Group = ALONE) -> None:
        """Takes z0 from the unrelated completions of all micro-batches `parts` and all processes of the group."""
        ours, theirs = [], []
        for part in parts:
            texts = TokenBatch(part.unrelated_ids, part.unrelated_attention_mask, part.unrelated_loss_mask)
            if isinstance(part, ReferencedLabelledBatch):
                known = part.ref_unrelated_logprobs
            else:
                known = read_reference(self.actor, self.reference, texts)
            ours.append(read_completions(self.actor, texts).sums[part.counted])
            theirs.append(known[part.counted].to(ours[-1]))
        self.z0 = float(preference.kto_reference_point(group.gather(torch.cat(ours)), group.gather(torch.cat(theirs))))

    def count(self, batch: LabelledBatch) -> Tensor:
        """Completions that count."""
        return batch.counted.sum().float()

    def losses(self, batch: LabelledBatch, total: float) -> Iterator[Loss]:
        """One loss: the completions' losses, summed, divided by `total`."""
        texts = TokenBatch(batch.token_ids, batch.attention_mask, batch.loss_mask)
        if isinstance(batch, ReferencedLabelledBatch):
            theirs = batch.ref_logprobs
        else:
            theirs = read_reference(self.actor, self.reference, texts)
        ours = read_completions(self.actor, texts).sums
        losses = preference.kto(
            ours, theirs.to(ours), batch.desirable, self.z0, self.beta, self.desirable_weight, self.undesirable_weight
        )
        yield Loss(
            "actor", masked.sum(losses, batch.counted) / total, self._metrics(ours.detach(), theirs, batch, total)
        )

    def _metrics(self, ours: Tensor, theirs: Tensor, batch: LabelledBatch, total: float) -> dict[str, Tensor]:
        """Sums over the rows of each kind, divided by all rows; what divides them by their own is `per_kind`."""
        rewards = self.beta * (ours - theirs.to(ours))
        wanted = batch.desirable.bool()
        right = (rewards > self.beta * self.z0) == wanted
        kinds = {"desirable": wanted & batch.counted, "undesirable": ~wanted & batch.counted}
        share = batch.counted.sum().to(ours) / total
        return {
            "kto/accuracy": masked.sum(right.to(ours), batch.counted) / total,
            "kto/z0": self.z0 * share,
            **{f"kto/{kind}": mask.sum().to(ours) / total for kind, mask in kinds.items()},
            **{f"kto/{kind}_reward": masked.sum(rewards, mask) / total for kind, mask in kinds.items()},
        }


def per_kind(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a whole step in which rewards are means over the completions of their kind; of none, left out."""
    found = dict(metrics)
    shares = {kind: found.pop(f"kto/{kind}") for kind in ("desirable", "undesirable")}
    for kind, share in shares.items():
        reward = found.pop(f"kto/{kind}_reward")
        if share > 0.0:
            found[f"kto/{kind}_reward"] = reward / share
    if all(share > 0.0 for share in shares.values()):
        found["kto/margin"] = found["kto/desirable_reward"] - found["kto/undesirable_reward"]
    return found | {"kto/desirable": shares["desirable"]}
