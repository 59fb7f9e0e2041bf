"""DeBERTa (v2 and v3) models: encoders, so they judge whole texts only."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import DebertaV2Config

from prefero.models.auto import AutoCritic, AutoRM


class DebertaRM(AutoRM):
    """A DeBERTa reward model."""

    default_config = DebertaV2Config


class DebertaCritic(AutoCritic):
    """A DeBERTa critic: one value a text, of the prompt alone (an encoder's positions see the answer too)."""

    default_config = DebertaV2Config

    def __init__(
        self,
        pretrained: str | Path | None = None,
        config: Any = None,
        checkpoint: bool = False,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        value_head: nn.Module | None = None,
        use_action_mask: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            pretrained,
            config,
            checkpoint,
            lora_rank,
            lora_train_bias,
            value_head,
            use_action_mask,
            "sequence",
            **options,
        )
