"""Where models live: one process or many, whole or shared out; the same program."""

from prefero.strategies.base import Strategy
from prefero.strategies.colossalai import ColossalAIStrategy
from prefero.strategies.ddp import DDPStrategy
from prefero.strategies.fsdp import FSDPStrategy
from prefero.strategies.naive import NaiveStrategy
from prefero.strategies.sampler import DistributedSampler

__all__ = ["ColossalAIStrategy", "DDPStrategy", "DistributedSampler", "FSDPStrategy", "NaiveStrategy", "Strategy"]
