"""LLaMA models."""

from transformers import LlamaConfig

from prefero.models.auto import AutoActor, AutoCritic, AutoLM, AutoRM


class LlamaActor(AutoActor):
    """A LLaMA actor."""

    default_config = LlamaConfig


class LlamaCritic(AutoCritic):
    """A LLaMA critic."""

    default_config = LlamaConfig


class LlamaRM(AutoRM):
    """A LLaMA reward model."""

    default_config = LlamaConfig


class LlamaLM(AutoLM):
    """A LLaMA language model."""

    default_config = LlamaConfig
