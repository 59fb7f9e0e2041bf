"""What is learned: one page an algorithm."""

from prefero.algorithms.base import Algorithm, OnlineAlgorithm
from prefero.algorithms.cpo import CPO
from prefero.algorithms.dpo import DPO
from prefero.algorithms.ilql import ILQL, ILQLSettings
from prefero.algorithms.kto import KTO
from prefero.algorithms.orpo import ORPO
from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.algorithms.reward_modeling import RewardModeling
from prefero.algorithms.sft import SFT
from prefero.algorithms.simpo import SimPO

__all__ = [
    "CPO", "DPO", "ILQL", "KTO", "ORPO", "PPO", "SFT", "Algorithm", "ILQLSettings", "OnlineAlgorithm", "PPOSettings",
    "RewardModeling", "SimPO",
]  # fmt: skip
