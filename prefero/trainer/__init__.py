"""The loops, and the public classes that run them."""

from prefero.trainer.base import Trainer
from prefero.trainer.ilql import ILQLTrainer
from prefero.trainer.ppo import PPOTrainer
from prefero.trainer.preference import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer, SimPOTrainer
from prefero.trainer.reward_model import RewardModelTrainer
from prefero.trainer.sft import SFTTrainer

__all__ = [
    "CPOTrainer", "DPOTrainer", "ILQLTrainer", "KTOTrainer", "ORPOTrainer", "PPOTrainer", "RewardModelTrainer",
    "SFTTrainer", "SimPOTrainer", "Trainer",
]  # fmt: skip
