"""The strategies under the seed system's path."""

from prefero.strategies import DistributedSampler, NaiveStrategy, Strategy

__all__ = ["DistributedSampler", "NaiveStrategy", "Strategy"]
