"""The seed system's loss modules, on top of `prefero.functional`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefero.functional import masked, policy, reward, supervised, value
from prefero.functional.logprobs import token_logprobs

IGNORED = -100  # the label of a token that is not to be learned, as in torch's cross-entropy


class GPTLMLoss(nn.Module):
    """Mean cross-entropy of logits [B, T, V] against labels [B, T]; shifted by one inside, -100 is skipped."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        counts = labels != IGNORED
        counts[:, 0] = False
        logprobs = token_logprobs(logits, labels.clamp(min=0))
        return supervised.cross_entropy(logprobs, counts, total=counts.sum().clamp(min=1))


class PolicyLoss(nn.Module):
    """PPO's clipped surrogate (arXiv 1707.06347), the mean over rows of each row's own mean over its actions."""

    def __init__(self, clip_eps: float = 0.2) -> None:
        super().__init__()
        self.clip_eps = clip_eps

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None
    ) -> Tensor:
        """log_probs, old_log_probs, action_mask: [B, A]; advantages: [B, A], or one a row ([B] or [B, 1])."""
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(-1)
        advantages = advantages.expand_as(log_probs)
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask
        losses = policy.ppo_clip(log_probs, old_log_probs, advantages, self.clip_eps, self.clip_eps)
        return masked.aggregate(losses, mask, how="sequence_mean")


class ValueLoss(nn.Module):
    """Half the larger of the clipped and the plain squared error, averaged.

    The seed's first release left the half out; its later ones, and everyone else, have it.
    """

    def __init__(self, clip_eps: float = 0.4) -> None:
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, values: Tensor, old_values: Tensor, reward: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """values, old_values, reward (the target): one shape, [B] or [B, A]; action_mask: that shape."""
        losses = value.clipped(values, old_values, reward, self.clip_eps)
        return losses.mean() if action_mask is None else masked.mean(losses, action_mask)


class PPOPtxActorLoss(nn.Module):
    """PPO with pretraining mixed in (InstructGPT, arXiv 2203.02155): policy loss + pretrain_coef x LM loss."""

    def __init__(
        self, policy_clip_eps: float = 0.2, pretrain_coef: float = 0.0, pretrain_loss_fn: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.pretrain_coef = pretrain_coef
        self.policy_loss_fn = PolicyLoss(clip_eps=policy_clip_eps)
        self.pretrain_loss_fn = GPTLMLoss() if pretrain_loss_fn is None else pretrain_loss_fn

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        lm_logits: Tensor,
        lm_input_ids: Tensor,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """lm_logits [B', T, V] and lm_input_ids [B', T] are of the pretraining text, the rest as in `PolicyLoss`."""
        loss: Tensor = self.policy_loss_fn(log_probs, old_log_probs, advantages, action_mask)
        pretrain: Tensor = self.pretrain_loss_fn(lm_logits, lm_input_ids)
        return loss + self.pretrain_coef * pretrain


class PairWiseLoss(nn.Module):
    """Bradley-Terry: the mean of -log sigmoid(chosen - rejected) over pairs [N]."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
        return reward.bradley_terry(chosen_reward, reject_reward)


class LogSigLoss(PairWiseLoss):
    """The same loss under the seed's later name."""


class LogExpLoss(nn.Module):
    """The mean of log(1 + exp(rejected - chosen)) (arXiv 2204.05862): the same function, written otherwise."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor) -> Tensor:
        return reward.log_exp(chosen_reward, reject_reward)
