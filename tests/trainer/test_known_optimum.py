"""Real trainers on problems whose answer is known exactly."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
from ppo_world import CountsToken
from tiny import llama_config
from torch import Tensor, nn

from prefero.algorithms.ppo import PPOSettings
from prefero.models.base import RewardModel
from prefero.models.llama import LlamaActor, LlamaCritic, LlamaRM
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer, RewardModelTrainer, SFTTrainer
from prefero.types import PreferenceBatch, TokenBatch


def probabilities(actor: LlamaActor, ids: Tensor, num_actions: int) -> Tensor:
    with torch.no_grad():
        logprobs: Tensor = actor(ids, num_actions)
    return logprobs.sum(1).exp()


def test_ppo_finds_the_better_arm_of_a_bandit() -> None:
    torch.manual_seed(0)
    config = llama_config(2, num_hidden_layers=1, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    actor, critic = LlamaActor(config=config), LlamaCritic(config=config)
    trainer = PPOTrainer(
        NaiveStrategy("cpu"), actor, critic, CountsToken(1), None,
        torch.optim.Adam(actor.parameters(), lr=3e-3), torch.optim.Adam(critic.parameters(), lr=3e-3),
        train_batch_size=16, settings=PPOSettings(kl_coef=0.0),
        max_new_tokens=1, pad_token_id=0,
    )  # fmt: skip
    prompt, arms = torch.zeros(16, 1, dtype=torch.long), torch.tensor([[0, 0], [0, 1]])
    assert float(probabilities(actor, arms, 1)[1]) < 0.7
    for _ in range(200):
        trainer.step(list(prompt))
        if float(probabilities(actor, arms, 1)[1]) > 0.99:
            break
    found = probabilities(actor, arms, 1)
    assert float(found[1]) > 0.99 and float(found.sum()) == pytest.approx(1.0, abs=1e-5)


class TableReward(nn.Module):
    """The score of each of the nine completions of two tokens in three."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        first, second = sequences[:, -2:].unbind(1)
        return self.table[first, second]


@pytest.mark.slow
def test_token_level_ppo_with_kl_reaches_the_sequence_optimum() -> None:
    """The optimum of E[score] - beta KL over whole sequences is known: beta log sum pi_ref exp(score / beta)."""
    torch.manual_seed(0)
    config = llama_config(3, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    actor, critic = LlamaActor(config=config), LlamaCritic(config=config)
    reference, beta, num_updates, rate = deepcopy(actor), 1.0, 150, 3e-3
    table = torch.randn(3, 3)
    # Two different prompt tokens: after "0" and "0 0" alike a Llama sees nothing but zeros, and must answer alike.
    ids = torch.tensor([(0, 1, *answer) for answer in itertools.product(range(3), repeat=2)])
    start, scores = probabilities(reference, ids, 2), table.flatten()
    best = beta * float((start.log() + scores / beta).logsumexp(0))

    def objective() -> float:
        now = probabilities(actor, ids, 2)
        return float((now * (scores - beta * (now.log() - start.log()))).sum())

    optimizers = [torch.optim.Adam(model.parameters(), lr=rate) for model in (actor, critic)]
    trainer = PPOTrainer(
        NaiveStrategy("cpu"), actor, critic, TableReward(table), reference, *optimizers,
        train_batch_size=128, max_new_tokens=2,
        settings=PPOSettings(kl_coef=beta, lam=1.0, value_clip=None),
        schedulers=[torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates) for optimizer in optimizers],
    )  # fmt: skip
    before = objective()
    for _ in range(num_updates):
        trainer.step([torch.tensor([0, 1])] * 128)
    after = objective()
    assert before < best - 0.1
    assert after <= best + 1e-5
    assert after > best - 0.02 * (best - before)
    target = start * (scores / beta).exp()
    assert float((probabilities(actor, ids, 2) - target / target.sum()).abs().sum() / 2) < 0.05


def markov_source(generator: torch.Generator) -> tuple[Tensor, float]:
    """Transition matrix over 4 tokens, and the entropy of what follows a token, in nats."""
    transitions = torch.softmax(1.5 * torch.randn(4, 4, generator=generator), 1)
    stationary = torch.linalg.matrix_power(transitions, 200)[0]
    entropy = -(stationary[:, None] * transitions * transitions.log()).sum()
    return transitions, float(entropy)


def walks(transitions: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    stationary = torch.linalg.matrix_power(transitions, 200)[0]
    tokens = [torch.multinomial(stationary.expand(count, 4), 1, generator=generator)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(transitions[tokens[-1].squeeze(1)], 1, generator=generator))
    return torch.cat(tokens, 1)


def test_sft_reaches_the_entropy_of_a_markov_source() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    transitions, entropy = markov_source(generator)
    config = llama_config(4, num_hidden_layers=1, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    actor = LlamaActor(config=config)

    def batches(count: int) -> list[TokenBatch]:
        ones = torch.ones(32, 24, dtype=torch.long)
        return [TokenBatch(walks(transitions, 32, 24, generator), ones, ones) for _ in range(count)]

    trainer = SFTTrainer(actor, NaiveStrategy("cpu"), torch.optim.Adam(actor.parameters(), lr=2e-2), batches(100),
                         max_epochs=1)  # fmt: skip
    trainer.fit()
    # Cross-entropy minus entropy is the KL between source and model: exact on the pairs, no sampling noise.
    held_out = walks(transitions, 256, 24, generator)
    with torch.no_grad():
        logprobs = actor(held_out, 23)
    gap = float((transitions[held_out[:, :-1], held_out[:, 1:]].log() - logprobs).mean())
    assert 0.0 <= gap < 0.01
    assert entropy < math.log(4) - 0.1


def test_a_reward_model_reaches_the_bayes_accuracy() -> None:
    """Labels are drawn from Bradley-Terry on a known utility; no model can beat the better text's own probability."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    utility = torch.tensor([-1.5, -0.5, 0.0, 0.4, 0.9, 1.6])
    texts = torch.randint(0, 6, (6000, 2, 5), generator=generator)
    worth = utility[texts].sum(2)
    gap = worth[:, 0] - worth[:, 1]
    first_wins = torch.rand(6000, generator=generator) < torch.sigmoid(gap)
    chosen = torch.where(first_wins[:, None], texts[:, 0], texts[:, 1])
    rejected = torch.where(first_wins[:, None], texts[:, 1], texts[:, 0])

    def batches(rows: range, size: int) -> list[PreferenceBatch]:
        made = []
        for start in rows[::size]:
            ids = torch.cat([chosen[start : start + size], rejected[start : start + size]])
            index, margin = torch.arange(size), torch.zeros(size)
            made.append(PreferenceBatch(ids, torch.ones_like(ids), index, index + size, margin, margin == 0))
        return made

    model = LlamaRM(config=llama_config(6, num_hidden_layers=1, pad_token_id=None, bos_token_id=None,
                                        eos_token_id=None))  # fmt: skip
    assert isinstance(model, RewardModel)
    trainer = RewardModelTrainer(model, NaiveStrategy("cpu"), torch.optim.Adam(model.parameters(), lr=3e-3),
                                 batches(range(4000), 50), batches(range(4000, 6000), 200), max_epochs=2)  # fmt: skip
    metrics = trainer.fit()
    bayes = float((first_wins == (gap > 0))[4000:].float().mean())  # the best any model can do on these very labels
    assert metrics["reward/eval_accuracy"] >= bayes - 0.01
    with torch.no_grad():
        learned = model(texts[4000:].flatten(0, 1)).view(-1, 2)
    difference = learned[:, 0] - learned[:, 1]
    assert float(torch.corrcoef(torch.stack([difference, gap[4000:]]))[0, 1]) > 0.98
