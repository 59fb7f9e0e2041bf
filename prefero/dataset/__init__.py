"""The seed system's data sets: tensors for a torch DataLoader, over `prefero.data`."""

from prefero.dataset.reward_dataset import HhRlhfDataset, RewardDataset, RmStaticDataset
from prefero.dataset.sft_dataset import AlpacaDataCollator, AlpacaDataset, SFTDataset
from prefero.dataset.utils import is_rank_0

__all__ = [
    "AlpacaDataCollator",
    "AlpacaDataset",
    "HhRlhfDataset",
    "RewardDataset",
    "RmStaticDataset",
    "SFTDataset",
    "is_rank_0",
]
