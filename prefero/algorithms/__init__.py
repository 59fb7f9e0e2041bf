"""What is learned: one page an algorithm."""

from prefero.algorithms.base import Algorithm, OnlineAlgorithm
from prefero.algorithms.ilql import ILQL, ILQLSettings
from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.algorithms.reward_modeling import RewardModeling
from prefero.algorithms.sft import SFT

__all__ = ["ILQL", "PPO", "SFT", "Algorithm", "ILQLSettings", "OnlineAlgorithm", "PPOSettings", "RewardModeling"]
