"""The older system's sharded strategy: its arguments, on FSDP2."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch

from prefero.strategies.base import Precision
from prefero.strategies.fsdp import FSDPStrategy, Stage
from prefero.strategies.scaling import LossScale

# Arguments of machinery that does not exist here: their defaults, and what does the same job.
_REPLACED: dict[str, tuple[Any, str]] = {
    "search_range_mb": (32, "parameters are gathered layer by layer and no chunk size is searched for"),
    "hidden_dim": (None, "parameters are gathered layer by layer and no chunk size is searched for"),
    "min_chunk_size_mb": (32, "parameters are gathered layer by layer and no chunk size is searched for"),
    "gpu_margin_mem_ratio": (
        0.0,
        "use placement_policy='cpu' or 'cuda'; nothing moves optimizer states between the two",
    ),
    "reduce_bucket_size": (12 * 1024**2, "gradients are reduced layer by layer; DDPStrategy has bucket_mb"),
    "overlap_communication": (True, "communication always overlaps with computation"),
}


class ColossalAIStrategy(FSDPStrategy):
    """`FSDPStrategy` under the older system's twenty-one arguments.

    placement_policy: "cuda" keeps everything on the device that computes, "cpu" in main memory (FSDP's offload).
    force_outputs_fp32: layers give their outputs in float32 also where they compute in half precision. The loss-scaling
    numbers: see `LossScale`. precision: None is what the older system did, fp16 at stage 3
    on a GPU and fp32 otherwise. Raises ValueError for arguments of its chunk manager and buckets that differ from their
    defaults, naming what does their job.
    """

    def __init__(
        self,
        stage: Stage = 3,
        seed: int = 42,
        shard_init: bool = False,
        placement_policy: Literal["cuda", "cpu"] = "cuda",
        pin_memory: bool = True,
        force_outputs_fp32: bool = False,
        search_range_mb: int = 32,
        hidden_dim: int | None = None,
        min_chunk_size_mb: float = 32,
        gpu_margin_mem_ratio: float = 0.0,
        reduce_bucket_size: int = 12 * 1024**2,
        overlap_communication: bool = True,
        initial_scale: float = 2**16,
        growth_factor: float = 2,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        min_scale: float = 1,
        max_scale: float = 2**32,
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        precision: Precision | None = None,
    ) -> None:
        if placement_policy not in ("cuda", "cpu"):
            raise ValueError(f"placement_policy={placement_policy!r}: choose 'cuda' or 'cpu'")
        given = locals()
        for name, (default, instead) in _REPLACED.items():
            if given[name] != default:
                raise ValueError(f"{name}={given[name]} is not supported: {instead}; leave it out")
        accelerated = torch.cuda.is_available()
        loss_scale = LossScale(
            initial_scale, growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale
        )
        super().__init__(
            stage=stage,
            # Without an accelerator main memory is where everything lives anyway.
            offload=placement_policy == "cpu" and accelerated,
            precision=precision or ("fp16" if stage == 3 and accelerated else "fp32"),
            max_norm=max_norm,
            norm_type=norm_type,
            loss_scale=loss_scale,
            pin_memory=pin_memory,
            output_fp32=force_outputs_fp32,
            seed=seed,
            shard_init=shard_init,
        )
        if self.precision != "fp16" and vars(loss_scale) != vars(LossScale()):
            warnings.warn(f"the loss is scaled in fp16 only, and this run computes in {self.precision}", stacklevel=2)
