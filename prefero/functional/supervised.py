"""The loss of imitation: cross-entropy over the tokens to be learned."""

from __future__ import annotations

from torch import Tensor

from prefero.functional import _checks, masked


def cross_entropy(logprobs: Tensor, mask: Tensor, total: float | Tensor) -> Tensor:
    """Minus the sum of the log-probabilities in the mask, divided by `total`.

    logprobs, mask: [B, T]; total: the number of tokens to learn from over *all* micro-batches and processes of this
    update, so that the gradients of the parts add up to the gradient of the whole. Returns a scalar in nats per
    token; 0 when there are no tokens at all. ValueError for a total that is not positive or shapes that differ.
    """
    if isinstance(total, int | float):
        _checks.above("total", total, 0)
    return -masked.aggregate(logprobs, mask, how="token_mean", norm=total)
