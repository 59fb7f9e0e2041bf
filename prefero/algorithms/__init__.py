"""What is learned: one page an algorithm."""

from prefero.algorithms.base import Algorithm, OnlineAlgorithm
from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.algorithms.reward_modeling import RewardModeling
from prefero.algorithms.sft import SFT

__all__ = ["PPO", "SFT", "Algorithm", "OnlineAlgorithm", "PPOSettings", "RewardModeling"]
