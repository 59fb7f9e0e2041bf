"""PPO for language models in one file: torch and transformers, no prefero in the algorithm.

The formulas and their order are those of `prefero.trainer.PPOTrainer` (a test holds the two together), without its
checks, micro-batches, engines and strategies. Run it: a random little Llama learns to say one word as often as it can.

    python examples/ppo_in_one_file.py --steps 40
"""

import argparse
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Numbers:
    """The numbers of PPO; see `prefero.algorithms.ppo.PPOSettings`."""

    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    temperature: float = 1.0
    epochs: int = 4


def inputs(ids, mask):
    """Positions count real tokens, so padding on the left does not shift them."""
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def log_probs(policy, ids, mask, num_actions, temperature):
    """log p of the last `num_actions` tokens; the logits that predict token t stand at t - 1."""
    logits = policy(**inputs(ids, mask)).logits[:, -num_actions - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(2, ids[:, -num_actions:, None]).squeeze(2)


class Critic(nn.Module):
    """The value of the state in which each token is chosen."""

    def __init__(self, trunk, width):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, mask, num_actions):
        return self.head(self.trunk(**inputs(ids, mask)).last_hidden_state[:, -num_actions - 1 : -1]).squeeze(2)


def gae(rewards, values, mask, gamma, lam):
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; nothing comes after the last token."""
    advantages, after, value_after = torch.zeros_like(values), 0 * values[:, 0], 0 * values[:, 0]
    for t in reversed(range(values.shape[1])):
        here = rewards[:, t] + gamma * value_after - values[:, t] + gamma * lam * after
        after = torch.where(mask[:, t], here, after)
        value_after = torch.where(mask[:, t], values[:, t], value_after)
        advantages[:, t] = torch.where(mask[:, t], here, 0.0)
    return advantages


@torch.no_grad()
def estimate(policy, critic, reference, ids, mask, actions, scores, numbers):
    """Old log-probabilities, values, advantages and returns: everything the update needs."""
    count = actions.shape[1]
    old = torch.where(actions, log_probs(policy, ids, mask, count, numbers.temperature), 0.0)
    before = torch.where(actions, log_probs(reference, ids, mask, count, numbers.temperature), 0.0)
    values = torch.where(actions, critic(ids, mask, count), 0.0)
    rewards = -numbers.kl_coef * (old - before)
    rewards[torch.arange(len(ids)), actions.sum(1) - 1] += scores  # the score is paid for the last token, the EOS
    advantages = gae(rewards, values, actions, numbers.gamma, numbers.lam)
    return old, values, advantages, advantages + values, ((old - before) * actions).sum(1)


def whiten(x, mask):
    """Mean 0 and variance 1 over the tokens that count."""
    mean = x[mask].mean()
    return (x - mean) / (x[mask].var(unbiased=False) + 1e-8).sqrt()


def learn(policy, critic, policy_optimizer, critic_optimizer, rollouts, estimates, numbers):
    """Epochs over all rollouts at once; returns the two losses of each epoch."""
    ids, mask, actions = rollouts
    old, old_values, advantages, returns, _ = estimates
    advantages, count, losses = whiten(advantages, actions), actions.shape[1], []
    for _ in range(numbers.epochs):
        ratio = (log_probs(policy, ids, mask, count, numbers.temperature) - old).exp()
        clipped = ratio.clamp(1 - numbers.clip, 1 + numbers.clip)
        policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped)[actions].sum() / actions.sum()
        policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_optimizer.step()

        values = critic(ids, mask, count)
        near = old_values + (values - old_values).clamp(-numbers.value_clip, numbers.value_clip)
        squares = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        critic_loss = 0.5 * squares[actions].sum() / actions.sum()
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        losses.append((policy_loss.item(), critic_loss.item()))
    return losses


@torch.no_grad()
def sample(policy, prompts, mask, num_actions, temperature, eos):
    """Answers to left-padded prompts; actions count up to and including the first EOS."""
    ids, alive, actions = prompts, torch.ones(len(prompts), dtype=torch.bool), []
    for _ in range(num_actions):
        probabilities = torch.softmax(policy(**inputs(ids, mask)).logits[:, -1] / temperature, -1)
        token = torch.where(alive, torch.multinomial(probabilities, 1).squeeze(1), 0)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, alive[:, None].long()], 1)
        actions.append(alive)
        alive = alive & (token != eos)
    return ids, mask, torch.stack(actions, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    vocabulary, word, eos, numbers = 16, 7, 1, Numbers()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    reference, critic = deepcopy(policy), Critic(deepcopy(policy.model), 32)
    policy_optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(arguments.steps):
        prompts = torch.randint(2, vocabulary, (32, 4))
        rollouts = sample(policy, prompts, torch.ones_like(prompts), 8, numbers.temperature, eos)
        scores = ((rollouts[0][:, 4:] == word) & rollouts[2]).sum(1).float()
        estimates = estimate(policy, critic, reference, *rollouts, scores, numbers)
        losses = learn(policy, critic, policy_optimizer, critic_optimizer, rollouts, estimates, numbers)
        print(f"step {step:3d}  score {scores.mean():.2f}  KL {estimates[4].mean():.2f}  "
              f"policy loss {losses[-1][0]:+.4f}  critic loss {losses[-1][1]:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
