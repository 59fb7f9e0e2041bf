"""The loops, and the public classes that run them."""

from prefero.trainer.base import Trainer
from prefero.trainer.ilql import ILQLTrainer
from prefero.trainer.ppo import PPOTrainer
from prefero.trainer.reward_model import RewardModelTrainer
from prefero.trainer.sft import SFTTrainer

__all__ = ["ILQLTrainer", "PPOTrainer", "RewardModelTrainer", "SFTTrainer", "Trainer"]
