"""What the reference makes of every text, found out once, before anything is learned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from prefero.algorithms.completions import read_completions
from prefero.data.collate import collate_examples
from prefero.data.tokenize import Example
from prefero.models.base import Actor
from prefero.models.lora import has_lora
from prefero.models.trunk import device_of, evaluating
from prefero.strategies.base import Strategy
from prefero.trainer.split import NO_LIMIT, MicroBatchLimit


@torch.no_grad()
def reference_logprobs(
    reference: Actor, texts: Sequence[Example], strategy: Strategy, limit: MicroBatchLimit = NO_LIMIT
) -> dict[Example, float]:
    """The log-probability of each text's completion, summed over its tokens, in the precision of the run.

    reference: as the strategy has placed it; one with LoRA is asked with its adapters off, unless these had learned
    before: then as it is now. limit: what is forwarded at
    once. The processes share the texts out, and each gets the numbers of all. Raises ValueError for a text whose
    completion has no token, and for no texts.
    """
    # In this order texts of one prompt stand together, and it is read once.
    different = sorted(set(texts))
    for text in different:
        if not any(text.loss_mask[1:]):
            raise ValueError(f"a text of {len(text.token_ids)} tokens has no completion token: leave such rows out")
    share = strategy.group.share(len(different))
    own = [different[row] for row in share.rows]
    found, device = [], device_of(reference)
    lengths = torch.tensor([len(text.token_ids) for text in own])
    without_adapters = has_lora(reference.model) and not reference.learned_before
    as_before = reference.reference() if without_adapters else nullcontext()
    with evaluating(reference), as_before, strategy.autocast():
        for rows in limit.slices(lengths, group=strategy.group):
            batch = collate_examples(own[rows], 0)
            texts_there = type(batch)(*(tensor.to(device) for tensor in vars(batch).values()))
            found.append(read_completions(reference, texts_there).sums.float().cpu())
    numbers = strategy.group.gather(torch.cat(found)[: share.num_real])
    return dict(zip(different, numbers.tolist(), strict=True))
