"""The seed's path to the sampler of prompts."""

from prefero.strategies.sampler import DistributedSampler

__all__ = ["DistributedSampler"]
