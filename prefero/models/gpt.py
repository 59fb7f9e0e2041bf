"""GPT-2 models."""

from transformers import GPT2Config

from prefero.models.auto import AutoActor, AutoCritic, AutoLM, AutoRM


class GPTActor(AutoActor):
    """A GPT-2 actor."""

    default_config = GPT2Config


class GPTCritic(AutoCritic):
    """A GPT-2 critic."""

    default_config = GPT2Config


class GPTRM(AutoRM):
    """A GPT-2 reward model."""

    default_config = GPT2Config


class GPTLM(AutoLM):
    """A GPT-2 language model."""

    default_config = GPT2Config
