"""The networks: actor, critic and reward model on Hugging Face transformers."""

from prefero.models.base import LM, Actor, Critic, RewardModel
from prefero.models.loss import LogExpLoss, LogSigLoss, PairWiseLoss, PolicyLoss, PPOPtxActorLoss, ValueLoss

__all__ = [
    "LM",
    "Actor",
    "Critic",
    "LogExpLoss",
    "LogSigLoss",
    "PPOPtxActorLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "RewardModel",
    "ValueLoss",
]
