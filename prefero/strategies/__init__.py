"""Where models live: one process now; the same program on more."""

from prefero.strategies.base import Strategy
from prefero.strategies.naive import NaiveStrategy
from prefero.strategies.sampler import DistributedSampler

__all__ = ["DistributedSampler", "NaiveStrategy", "Strategy"]
