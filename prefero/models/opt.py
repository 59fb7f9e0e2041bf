"""OPT models."""

from transformers import OPTConfig

from prefero.models.auto import AutoActor, AutoCritic, AutoLM, AutoRM


class OPTActor(AutoActor):
    """A OPT actor."""

    default_config = OPTConfig


class OPTCritic(AutoCritic):
    """A OPT critic."""

    default_config = OPTConfig


class OPTRM(AutoRM):
    """A OPT reward model."""

    default_config = OPTConfig


class OPTLM(AutoLM):
    """A OPT language model."""

    default_config = OPTConfig
