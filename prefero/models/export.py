"""Plain Hugging Face folders out of trained models: what any other program loads."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GenerationConfig

from prefero.models.loading import dtype_of, quiet
from prefero.models.lora import below, merged

BIAS_FILE = "reward_head_bias.safetensors"


def save_folder(
    model: Any,
    own: Mapping[str, Tensor],
    directory: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | str = torch.float32,
) -> None:
    """Writes `model` with its state `own` as transformers itself would, adapters merged in float32 on a copy.

    The tokenizer goes beside it. The live model is not touched. Tied weights stay tied. Raises ValueError for an
    unknown dtype.
    """
    wanted = dtype_of(dtype)
    state = merged(model, own, wanted)
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    _write(copy, state, directory, tokenizer, getattr(model, "generation_config", None))


def save_reward_folder(
    trunk: Any,
    head: nn.Module,
    own: Mapping[str, Tensor],
    directory: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | str = torch.float32,
) -> None:
    """Writes a decoder trunk and its reward head as a `...ForSequenceClassification` folder of one label.

    own: the reward model's state, the trunk's below `model.`, the head's below `value_head.`. These architectures hold
    no bias: one that is not zero goes to a file of its own beside the weights, which `RewardModel.from_pretrained`
    reads; transformers' own class then gives the reward less that constant. Raises ValueError when transformers has no
    such architecture for the trunk, or when the head is not one linear layer.
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the value head is a {type(head).__name__}: only a single nn.Linear can be exported")
    wanted = dtype_of(dtype)
    config = deepcopy(trunk.config)
    config.num_labels = 1
    # transformers finds the last token by `ids != pad`. Where pad is EOS it would read the token before EOS, so that
    # class is left without a pad id: right for single texts, and an error, not a wrong number, for batches.
    pad = None if tokenizer is None or tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    config.pad_token_id = pad
    with torch.device("meta"):
        copy = AutoModelForSequenceClassification.from_config(config)
    if not isinstance(getattr(copy, "score", None), nn.Linear):
        raise ValueError(f"transformers' {type(copy).__name__} has no linear `score` head to hold this reward model")
    state = {f"{copy.base_model_prefix}.{name}": t for name, t in merged(trunk, below("model.", own), wanted).items()}
    head_state = below("value_head.", own)
    state["score.weight"] = head_state["weight"].to(wanted)
    _write(copy, state, directory, tokenizer, None)
    bias = Path(directory) / BIAS_FILE
    bias.unlink(missing_ok=True)
    if "bias" in head_state and bool(head_state["bias"].ne(0).any()):
        save_file({"bias": head_state["bias"].float().cpu().clone()}, bias)


def read_head_bias(directory: str | Path) -> Tensor | None:
    """The head bias [1] that `save_reward_folder` put beside the weights, if any."""
    file = Path(directory) / BIAS_FILE
    return load_file(file)["bias"] if file.is_file() else None


def _write(
    copy: Any,
    state: dict[str, Tensor],
    directory: str | Path,
    tokenizer: Any,
    generation: Any,
) -> None:
    copy.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()}, strict=True, assign=True)
    copy.tie_weights()
    if generation is not None:
        # Ids only: sampling habits that a pretrained folder brought along can be inconsistent, and then forbid saving.
        ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        copy.generation_config = GenerationConfig(**ids)
    with quiet():
        copy.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
