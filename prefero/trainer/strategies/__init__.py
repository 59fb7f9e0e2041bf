"""The strategies under the seed system's path."""

from prefero.strategies import (
    ColossalAIStrategy,
    DDPStrategy,
    DistributedSampler,
    FSDPStrategy,
    NaiveStrategy,
    Strategy,
)

__all__ = ["ColossalAIStrategy", "DDPStrategy", "DistributedSampler", "FSDPStrategy", "NaiveStrategy", "Strategy"]
