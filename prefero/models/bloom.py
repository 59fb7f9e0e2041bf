"""BLOOM models."""

from transformers import BloomConfig

from prefero.models.auto import AutoActor, AutoCritic, AutoLM, AutoRM


class BLOOMActor(AutoActor):
    """A BLOOM actor."""

    default_config = BloomConfig


class BLOOMCritic(AutoCritic):
    """A BLOOM critic."""

    default_config = BloomConfig


class BLOOMRM(AutoRM):
    """A BLOOM reward model."""

    default_config = BloomConfig


class BLOOMLM(AutoLM):
    """A BLOOM language model."""

    default_config = BloomConfig
