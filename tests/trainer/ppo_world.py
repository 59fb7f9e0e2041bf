"""A tiny float64 world for the trainers: models, prompts, rewards, and rollouts of different lengths."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from tiny import llama_config
from torch import Tensor, nn

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.models.llama import LlamaActor, LlamaCritic
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer
from prefero.types import Experience, Prompt, Rollout, Score

EOS = 2


def actor(seed: int = 0, dtype: torch.dtype = torch.float64, vocab_size: int = 12, **options: Any) -> LlamaActor:
    torch.manual_seed(seed)
    return LlamaActor(config=llama_config(vocab_size), **options).to(dtype)


def critic(seed: int = 1, dtype: torch.dtype = torch.float64, vocab_size: int = 12, **options: Any) -> LlamaCritic:
    torch.manual_seed(seed)
    model = LlamaCritic(config=llama_config(vocab_size), **options).to(dtype)
    # A head of zeros would hide mistakes in values.
    nn.init.normal_(model.value_head.weight, std=0.3)
    return model


def rows(num_rows: int = 6, left: int = 0, right: int = 0, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences, attention mask and action mask of rows with 1-3 prompt and 1-5 completion tokens.

    left, right: padding more than needed. Padding slots hold token 7, not 0.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = [1 + row % 3 for row in range(num_rows)]
    lengths = [1 + (row * 2) % 5 for row in range(num_rows)]
    width, num_actions = max(prompt_lengths) + left, max(lengths) + right
    ids = torch.randint(3, 12, (num_rows, 9), generator=generator)
    sequences = torch.full((num_rows, width + num_actions), 7)
    mask = torch.zeros_like(sequences)
    for row, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        sequences[row, width - prompt : width + length] = ids[row, : prompt + length]
        mask[row, width - prompt : width + length] = 1
        if row % 2 == 0:
            sequences[row, width + length - 1] = EOS
    return sequences, mask, mask[:, width:].bool()


def scores(num_rows: int = 6) -> Tensor:
    return torch.linspace(-1.0, 2.0, num_rows, dtype=torch.float64)


def algorithm(**settings: Any) -> PPO:
    return PPO(actor(0), critic(1), actor(5), PPOSettings(**{"kl_coef": 0.3, "lam": 0.9, **settings}))


def experience(ppo: PPO, num_rows: int = 6, left: int = 0, right: int = 0) -> Experience:
    """Experience made by `ppo`, whose old policy and values then move a little, so that ratios are not 1."""
    made = ppo.experience(*rows(num_rows, left, right), scores(num_rows))
    noise = torch.Generator().manual_seed(9)
    shape = made.action_log_probs.shape
    made.action_log_probs = made.action_log_probs + 0.3 * torch.randn(shape, generator=noise).double()
    made.values = made.values + 0.3 * torch.randn(shape, generator=noise).double()
    return made


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-6) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=1e-12, msg=name)


def trainer(ppo: PPO | None = None, lr: float = 1.0, reward_model: Any = None, **changes: Any) -> PPOTrainer:
    """A trainer with plain SGD, whose step of size 1 is the gradient."""
    ppo = ppo or algorithm()
    learn = [torch.optim.SGD(model.parameters(), lr=lr) for model in dict.fromkeys((ppo.actor, ppo.critic))]
    return PPOTrainer(
        NaiveStrategy("cpu"), ppo.actor, ppo.critic, reward_model or CountsToken(5), ppo.reference, learn[0], learn[-1],
        settings=ppo.settings, **changes,
    )  # fmt: skip


class CountsToken(nn.Module):
    """A reward model that counts one token among the real ones, minus what is usual."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        return ((sequences == self.token) & attention_mask.bool()).sum(1).double()


def counts_token(token: int) -> Any:
    """The same as a reward over rollouts, completion only."""

    def reward(rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(float(rollout.completion.token_ids.count(token))) for rollout in rollouts]

    return reward


def prompts(count: int = 4, vocab_size: int = 12) -> list[Prompt]:
    return [
        Prompt(str(index), tuple(3 + (index + place) % (vocab_size - 3) for place in range(1 + index % 3)), f"p{index}")
        for index in range(count)
    ]


def clone(ppo: PPO) -> PPO:
    return PPO(deepcopy(ppo.actor), deepcopy(ppo.critic), deepcopy(ppo.reference), ppo.settings)
