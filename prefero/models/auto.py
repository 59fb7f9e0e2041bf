"""Any Hugging Face causal model as actor, critic, reward model or language model; the families stand on these."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from prefero.models.base import LM, Actor, Critic, RewardModel
from prefero.models.frozen import keep_frozen
from prefero.models.loading import LoadOptions, build, enable_checkpointing, load_config


class Family:
    """Which architecture a class builds: `default_config` is its transformers configuration class, None means any."""

    default_config: ClassVar[Any] = None

    @classmethod
    def _network(
        cls,
        auto_class: Any,
        pretrained: str | Path | None,
        config: Any,
        checkpoint: bool,
        options: LoadOptions,
        new_head: bool = False,
    ) -> Any:
        """The network of the seed's constructor contract: pretrained before config before the default config."""
        if pretrained is not None:
            config = load_config(pretrained, LoadOptions(trust_remote_code=options.trust_remote_code))
        elif config is None:
            if cls.default_config is None:
                raise ValueError(f"{cls.__name__} needs pretrained= (a folder or a name) or config=")
            config = cls.default_config()
        if cls.default_config is not None and not isinstance(config, cls.default_config):
            raise ValueError(
                f"{cls.__name__} is for {cls.default_config.model_type!r} models, and this is a "
                f"{config.model_type!r}: use the class of that family, or the Auto one"
            )
        model = build(auto_class, pretrained, config, options, new_head)
        return enable_checkpointing(model) if checkpoint else model


class AutoActor(Family, Actor):
    """An actor. options: those of `loading.LoadOptions` (dtype, num_layers, dropout, ...)."""

    def __init__(
        self,
        pretrained: str | Path | None = None,
        config: Any = None,
        checkpoint: bool = False,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        **options: Any,
    ) -> None:
        load = LoadOptions(**options)
        model = self._network(AutoModelForCausalLM, pretrained, config, checkpoint, load)
        super().__init__(model, lora_rank, lora_train_bias, load.lora_alpha)
        keep_frozen(self, load.frozen)


class AutoLM(Family, LM):
    """A language model. options: those of `loading.LoadOptions`."""

    def __init__(
        self,
        pretrained: str | Path | None = None,
        config: Any = None,
        checkpoint: bool = False,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        **options: Any,
    ) -> None:
        load = LoadOptions(**options)
        model = self._network(AutoModelForCausalLM, pretrained, config, checkpoint, load)
        super().__init__(model, lora_rank, lora_train_bias, load.lora_alpha)
        keep_frozen(self, load.frozen)


class AutoCritic(Family, Critic):
    """A critic: the trunk alone, and a head that starts at zero. options: those of `loading.LoadOptions`."""

    def __init__(
        self,
        pretrained: str | Path | None = None,
        config: Any = None,
        checkpoint: bool = False,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        value_head: nn.Module | None = None,
        use_action_mask: bool = False,
        level: Literal["token", "sequence"] = "token",
        **options: Any,
    ) -> None:
        load = LoadOptions(**options)
        model = self._network(AutoModel, pretrained, config, checkpoint, load)
        super().__init__(model, value_head, lora_rank, lora_train_bias, use_action_mask, level, load.lora_alpha)
        keep_frozen(self, load.frozen)


class AutoRM(Family, RewardModel):
    """A reward model, decoder or encoder; a folder that holds one keeps its head. options: `loading.LoadOptions`."""

    def __init__(
        self,
        pretrained: str | Path | None = None,
        config: Any = None,
        checkpoint: bool = False,
        lora_rank: int = 0,
        lora_train_bias: str = "none",
        **options: Any,
    ) -> None:
        load = LoadOptions(**options)
        model = self._network(AutoModelForSequenceClassification, pretrained, config, checkpoint, load, new_head=True)
        super().__init__(model, None, lora_rank, lora_train_bias, lora_alpha=load.lora_alpha)
        keep_frozen(self, load.frozen)
        if pretrained is not None:
            self.restore_bias(pretrained)
