"""The four decoder families as tiny random models with outputs far from uniform."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefero.models.auto import AutoActor, AutoCritic, AutoLM, AutoRM
from prefero.models.bloom import BLOOMLM, BLOOMRM, BLOOMActor, BLOOMCritic
from prefero.models.gpt import GPTLM, GPTRM, GPTActor, GPTCritic
from prefero.models.llama import LlamaActor, LlamaCritic, LlamaLM, LlamaRM
from prefero.models.opt import OPTLM, OPTRM, OPTActor, OPTCritic
from tests.tiny import bloom_config, gpt2_config, llama_config, opt_config


@dataclass(frozen=True)
class Family:
    name: str
    config: Callable[[], Any]
    actor: type[AutoActor]
    critic: type[AutoCritic]
    reward_model: type[AutoRM]
    lm: type[AutoLM]


FAMILIES = [
    Family("gpt", gpt2_config, GPTActor, GPTCritic, GPTRM, GPTLM),
    Family("opt", opt_config, OPTActor, OPTCritic, OPTRM, OPTLM),
    Family("bloom", bloom_config, BLOOMActor, BLOOMCritic, BLOOMRM, BLOOMLM),
    Family("llama", llama_config, LlamaActor, LlamaCritic, LlamaRM, LlamaLM),
]


def loud(module: nn.Module, seed: int = 0) -> Any:
    """Weights so large that every token matters (a fresh model is close to uniform, and would hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2 and ".lora_" not in name:
                parameter.normal_(0.0, 0.25, generator=generator)
    return module


def stir_adapters(module: nn.Module, seed: int = 1) -> Any:
    """Adapters that do something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return module


def tokens(rows: int = 3, length: int = 9, seed: int = 2) -> Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, left: int, right: int, pad: int) -> tuple[Tensor, Tensor]:
    """Rows with `pad` put around them, and their mask."""
    mask = nn.functional.pad(torch.ones_like(ids), (left, right), value=0)
    return nn.functional.pad(ids, (left, right), value=pad), mask
