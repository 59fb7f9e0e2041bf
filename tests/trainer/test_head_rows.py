"""The output head, a fifth of a small model's work, sees only the positions that some loss or penalty needs."""

from typing import Any

import pytest
import torch
from ppo_world import actor, algorithm, experience, rows
from tiny import llama_config

from prefero.algorithms.sft import SFT
from prefero.functional.logprobs import selected
from prefero.models import base
from prefero.models.llama import LlamaLM
from prefero.types import TokenBatch


@pytest.fixture
def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hidden states each application of an output head was given."""
    seen: list[int] = []

    def counting(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(hidden[..., 0].numel())
        return selected(hidden, *arguments, **options)

    monkeypatch.setattr(base.lp, "selected", counting)
    return seen


@pytest.mark.parametrize("model", [actor(), LlamaLM(config=llama_config(12))], ids=["actor", "language model"])
def test_sft_pays_for_the_counted_tokens(model: base.Actor, head_rows: list[int]) -> None:
    token_ids = torch.randint(3, 12, (3, 8))
    loss_mask = torch.zeros(3, 8, dtype=torch.long)
    loss_mask[0, 2:5], loss_mask[1, 6:] = 1, 1  # the third row is all prompt
    batch = TokenBatch(token_ids, torch.ones_like(token_ids), loss_mask)
    next(SFT(model).losses(batch, 5.0)).value.backward()
    assert head_rows == [5]


def test_ppo_pays_for_the_actions(head_rows: list[int]) -> None:
    ppo = algorithm()
    num_actions = int(rows()[2].sum())
    made = experience(ppo, right=4)
    assert head_rows == [num_actions] * 2  # the old log-probabilities and the reference's
    list(ppo.losses(made, float(num_actions)))
    assert head_rows == [num_actions] * 3
