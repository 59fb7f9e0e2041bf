"""DPO in the real trainer reaches the policy that its objective is known to have, by enumeration of all completions."""

import itertools
from copy import deepcopy

import pytest
import torch
from tiny import llama_config
from torch import Tensor

from prefero.data import Example
from prefero.models.llama import LlamaActor
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import DPOTrainer
from prefero.trainer.reference import reference_logprobs
from prefero.types import PairBatch, ReferencedPairBatch

BETA, LABELS = 0.5, 100_000
PROMPT = (0, 1)
COMPLETIONS = list(itertools.product(range(3), repeat=2))
TEXTS = [Example((*PROMPT, *completion), (0, 0, 1, 1)) for completion in COMPLETIONS]


def probabilities(actor: LlamaActor) -> Tensor:
    with torch.no_grad():
        logprobs: Tensor = actor(torch.tensor([text.token_ids for text in TEXTS]), 2)
    return logprobs.sum(1).exp().double()


def labelled_pairs(drawn: Tensor, wins: Tensor) -> PairBatch:
    """Every pair of different completions as often as it is drawn and so labelled, of `LABELS` in all."""
    often = (LABELS * drawn[:, None] * drawn[None] * wins).round().long().fill_diagonal_(0)
    chosen, rejected = torch.meshgrid(*[torch.arange(len(TEXTS))] * 2, indexing="ij")
    ids = torch.tensor([text.token_ids for text in TEXTS])
    chosen, rejected = (side.flatten().repeat_interleave(often.flatten()) for side in (chosen, rejected))
    mask = torch.tensor([text.loss_mask for text in TEXTS])
    return PairBatch(ids, torch.ones_like(ids), mask, chosen, rejected, torch.ones_like(chosen, dtype=torch.bool))


def distance(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@pytest.mark.parametrize(("kind", "lora_rank"), [("sigmoid", 0), ("ipo", 0), ("sigmoid", 8)])
def test_all_pairs_with_known_labels_lead_to_the_known_policy(kind: str, lora_rank: int) -> None:
    """pi_ref exp(r / beta) for DPO; pi_ref exp(E[p(y wins)] / beta) for IPO (arXiv:2310.12036, section 4).

    The pairs are drawn evenly, and so is the other completion in IPO's expectation.
    """
    torch.manual_seed(0)
    config = llama_config(3, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    actor = LlamaActor(config=config, lora_rank=lora_rank)
    actor.model.lm_head.weight.data *= 6.0  # which adapters do not move: as drawn, it could not say so much
    reference = probabilities(actor)
    reward = torch.randn(len(TEXTS)).double()
    wins = torch.sigmoid(reward[:, None] - reward[None])
    boltzmann = torch.softmax(reference.log() + reward / BETA, 0)
    preferred = torch.softmax(reference.log() + wins.mean(1) / BETA, 0)
    target, other = (preferred, boltzmann) if kind == "ipo" else (boltzmann, preferred)
    batch = labelled_pairs(torch.full_like(reward, 1 / len(TEXTS)), wins)
    if not lora_rank:
        table = reference_logprobs(deepcopy(actor), TEXTS, NaiveStrategy("cpu"))
        known = torch.tensor([table[text] for text in TEXTS])
        batch = ReferencedPairBatch(**vars(batch), ref_logprobs=known)
    optimizer = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], lr=5e-3 if lora_rank else 1e-2)
    trainer = DPOTrainer(actor, NaiveStrategy("cpu"), optimizer, [batch] * 400, beta=BETA, kind=kind)
    trainer.fit()
    found = probabilities(actor)
    assert distance(reference, target) > 0.1 and distance(target, other) > 0.1
    assert distance(found, target) < 1e-3
