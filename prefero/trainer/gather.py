"""The rows of experience that several processes made, joined, so that each of them holds all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefero.strategies.group import Group
from prefero.types import Experience


def gather_experience(group: Group, experience: Experience, num_real: int) -> Experience:
    """Every process's first `num_real` rows in rank order, on every process, padded to the widest of them.

    Experience is small beside the models that learn from it, and with all of it everywhere a learn phase cuts the same
    batches however many processes share it.
    """
    if group.world_size == 1:
        return experience
    num_actions = experience.num_actions
    num_prompt = experience.sequences.shape[1] - num_actions
    widest = group.max(torch.tensor([num_prompt, num_actions]))
    left, right = (widest - torch.tensor([num_prompt, num_actions])).tolist()

    def joined(tensor: Tensor) -> Tensor:
        # [B, S] has both sides, [B, A] only the right one, [B] none.
        if tensor.dim() == 2:
            tensor = pad(tensor, (left if tensor.shape[1] == num_prompt + num_actions else 0, right))
        return group.gather(tensor[:num_real])

    return experience.map(joined)
