"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290) and the losses that vary it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from prefero.algorithms.completions import PairAlgorithm, read_reference, texts_of
from prefero.functional import preference
from prefero.models.base import Actor
from prefero.types import Loss, PairBatch, ReferencedPairBatch


class DPO(PairAlgorithm):
    """The policy as its own reward model: beta log(policy / reference) is to be higher for the chosen completion.

    reference: asked for what batches do not bring (`ReferencedPairBatch`); without one, an actor with LoRA is its own
    with its adapters off. kind, label_smoothing: as in `functional.preference.dpo`. Raises ValueError as that does.
    """

    name = "dpo"

    def __init__(
        self,
        actor: Actor,
        reference: Actor | None = None,
        beta: float = 0.1,
        kind: str = "sigmoid",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(actor, beta)
        preference.check_dpo(beta, kind, label_smoothing)
        self.reference = reference
        self.kind, self.label_smoothing = kind, label_smoothing

    def losses(self, batch: PairBatch, total: float) -> Iterator[Loss]:
        """One loss: the pairs' losses, summed, divided by `total`."""
        theirs = self.ref_logprobs(batch)
        chosen, rejected = self.read(batch)
        theirs = theirs.to(chosen.sums)
        ref_chosen, ref_rejected = theirs[batch.chosen], theirs[batch.rejected]
        losses = preference.dpo(
            chosen.sums, rejected.sums, ref_chosen, ref_rejected, self.beta, self.kind, self.label_smoothing,
            chosen.lengths, rejected.lengths,
        )  # fmt: skip
        rewards = self.beta * (chosen.sums - ref_chosen), self.beta * (rejected.sums - ref_rejected)
        yield self.reported(losses, rewards, (chosen, rejected), batch, total)

    def ref_logprobs(self, batch: PairBatch) -> Tensor:
        """What the reference makes of the batch's texts, [M]."""
        if isinstance(batch, ReferencedPairBatch):
            return batch.ref_logprobs
        return read_reference(self.actor, self.reference, texts_of(batch))
