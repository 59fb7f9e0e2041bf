"""Parameters, gradients and optimizer states shared out over processes (ZeRO, arXiv 1910.02054): torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from prefero.deferral import defer_weights
from prefero.strategies import files
from prefero.strategies.base import HALF, FillsIn, Precision, first_lines
from prefero.strategies.cpu import return_freed_memory
from prefero.strategies.ddp import DDPStrategy, unprepared
from prefero.strategies.scaling import LossScale

Stage = Literal[1, 2, 3]


class FSDPStrategy(DDPStrategy):
    """Every process of a torchrun launch keeps its part of each model; without torchrun, one process keeps all.

    stage: what is gathered only while it is needed. 3: a layer's parameters, for its own forward and backward. 2: a
    model's parameters, from its forward to the end of its backward; gradients are shared out after every micro-batch.
    1: the same, and whole gradients are kept until the last micro-batch of a step, which costs memory and saves
    traffic. Optimizer states are shared out in all of them. offload: parameters, gradients and optimizer states live in
    main memory and visit the accelerator (ValueError without one). reshard_after_forward: overrides what the stage
    means for it. shard_init: models built in `model_init_context` get their weights in `prepare`, a layer at a time, so
    that no process ever holds a whole one; read from safetensors files where they are pretrained. pin_memory:
    page-locked main memory for `offload`. output_fp32: layers give float32 to the next one. The rest: `DDPStrategy`.

    Models stay the objects they were; an optimizer built before `prepare` is pointed at the sharded parameters.
    """

    def __init__(
        self,
        stage: Stage = 3,
        offload: bool = False,
        precision: Precision = "fp32",
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        loss_scale: LossScale | None = None,
        reshard_after_forward: bool | None = None,
        pin_memory: bool = True,
        output_fp32: bool = False,
        seed: int = 42,
        timeout: float = 600.0,
        shard_init: bool = False,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"stage={stage!r}: choose 1, 2 or 3")
        self.stage = stage
        self.shard_init = shard_init
        self.output_fp32 = output_fp32
        self.reshard_after_forward = stage == 3 if reshard_after_forward is None else reshard_after_forward
        super().__init__(seed, precision, max_norm, norm_type, loss_scale, timeout=timeout)
        if offload and self.device.type == "cpu":
            raise ValueError(
                "offload=True moves weights from an accelerator to main memory, and there is none: leave it out"
            )
        self.offload: OffloadPolicy = CPUOffloadPolicy(pin_memory) if offload else OffloadPolicy()
        if self.device.type == "cpu":
            return_freed_memory()
        self.mesh = init_device_mesh(self.device.type, (self.group.world_size,))
        self._names: dict[int, str] = {}

    def setup_model(self, model: nn.Module) -> nn.Module:
        if isinstance(model, FSDPModule):
            self.settle(model)
            return model
        # The optimizer that may come with the model holds the parameters of today; it is told of tomorrow's by name.
        self._names.update({id(parameter): name for name, parameter in model.named_parameters()})
        self._start_alike([*model.parameters(), *model.buffers()])
        dtype = HALF.get(self.precision)
        half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None,
                                    output_dtype=torch.float32 if self.output_fp32 else None)  # fmt: skip
        for block in blocks(model):
            self._fill(model, block)
            self._shard(block, half)
        # What is left are embeddings and heads, which compute in full precision everywhere.
        self._fill(model, model)
        self._shard(model, MixedPrecisionPolicy())
        for name in getattr(model, "forward_methods", ()):
            register_fsdp_forward_method(model, name)
        return model

    def settle(self, model: nn.Module) -> None:
        """Shares out again what passes without gradients leave gathered at stages 1 and 2."""
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _fill(self, model: nn.Module, part: nn.Module) -> None:
        """The weights of a part that was built without them: whole for as long as it takes to share them out."""
        if any(parameter.is_meta for parameter in part.parameters()):
            if not isinstance(model, FillsIn):
                raise ValueError(f"the {type(model).__name__} has parameters without values (on torch's meta device)")
            self._start_alike(model.fill(part))

    def _start_alike(self, tensors: Sequence[Tensor]) -> None:
        self.group.broadcast(tensor for tensor in tensors if not tensor.is_meta and not isinstance(tensor, DTensor))

    def model_init_context(self) -> AbstractContextManager[Any]:
        """With shard_init, models are built without weights; `prepare` reads or draws a layer at a time."""
        return defer_weights() if self.shard_init else nullcontext()

    def _shard(self, module: nn.Module, policy: MixedPrecisionPolicy) -> None:
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=self.reshard_after_forward,
            mp_policy=policy,
            offload_policy=self.offload,
        )

    def verify(self, model: nn.Module) -> None:
        """Every process has its own part: there is nothing to compare."""

    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        live = dict(model.named_parameters())
        known = {id(parameter) for parameter in live.values()}
        for group in optimizer.param_groups:
            if all(id(parameter) in known for parameter in group["params"]):
                continue
            if optimizer.state:
                raise ValueError(
                    "the optimizer has stepped before prepare(): prepare first, then train or load_optimizer"
                )
            names = [self._names.get(id(parameter)) for parameter in group["params"]]
            if any(name not in live for name in names):
                raise ValueError(
                    f"the optimizer holds parameters that the {type(model).__name__} does not have: build it from the "
                    "parameters of the model it is prepared with"
                )
            group["params"] = [live[str(name)] for name in names]
        return optimizer

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """At stage 1 gradients are shared out after the last one only."""
        if not isinstance(model, FSDPModule):
            raise ValueError(unprepared(model))
        model.set_requires_gradient_sync(last or self.stage > 1)
        model.set_is_last_backward(last)
        yield

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """All parameters gathered, once; each process needs room for a whole model in the precision it computes in."""
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(self._gathered(model))
            yield

    @contextmanager
    def _gathered(self, model: nn.Module) -> Iterator[None]:
        if not isinstance(model, FSDPModule):
            yield
            return
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        model.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
            model.set_reshard_after_forward(self.reshard_after_forward)

    def whole_state(self, model: nn.Module, only_rank0: bool = False) -> dict[str, Tensor]:
        """Gathered tensor by tensor into main memory; see `Strategy.whole_state`."""
        keep = self.is_rank_0 or not only_rank0
        whole: dict[str, Tensor] = {}
        # Tied ones are gathered once, known by the parameter, not its memory: some processes may hold none of it.
        tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        gathered: dict[int, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if not isinstance(tensor, DTensor):
                whole[name] = tensor
                continue
            if tied[name] not in gathered:
                full = tensor.full_tensor()
                gathered[tied[name]] = full.cpu() if keep else torch.empty_like(full, device="meta")
            whole[name] = gathered[tied[name]]
        return whole

    def load_whole_state(self, model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Every process takes its own part of each tensor."""
        own = model.state_dict()
        parts = {name: _like(tensor, own.get(name)) for name, tensor in state.items()}
        model.load_state_dict(parts, strict=strict)

    def save_optimizer(self, optimizer: Optimizer, path: str | Path, only_rank0: bool = False) -> None:
        """Writes this process's part: `optim.pt` becomes `optim.rank0-of-2.pt`, and so on, where there are several.

        A path that ends in this process's own number (`optim-rank-0.pt`) is taken as it is. Raises ValueError for
        only_rank0=True with several processes: rank 0 holds a part, not the whole.
        """
        if only_rank0 and self.group.world_size > 1:
            raise ValueError(
                "only_rank0=True would lose the optimizer states that the other processes hold: use only_rank0=False"
            )
        state = optimizer.state_dict()
        state["state"] = {
            index: {key: value.to_local() if isinstance(value, DTensor) else value for key, value in entry.items()}
            for index, entry in state["state"].items()
        }
        if self.group.world_size > 1:
            state["sharded"] = self._place()
        files.write_object(state, self._own(Path(path)))
        self.group.wait()

    def load_optimizer(self, optimizer: Optimizer, path: str | Path, map_location: Any = None) -> None:
        """Reads this process's part. Raises ValueError naming the file when it is missing or does not fit."""
        file = self._own(Path(path))
        if not file.is_file():
            raise ValueError(self._missing(Path(path), file))
        state = files.read_object(file, map_location)
        place = state.pop("sharded", None) if isinstance(state, dict) else None
        if place != (self._place() if self.group.world_size > 1 else None):
            raise ValueError(self._misplaced(file, place))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        try:
            for index, entry in state["state"].items():
                state["state"][index] = {key: _part_like(value, parameters[index]) for key, value in entry.items()}
            optimizer.load_state_dict(state)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} does not fit the optimizer: {first_lines(error)}") from error

    def _place(self) -> dict[str, int]:
        return {"rank": self.group.rank, "world_size": self.group.world_size}

    def _own(self, path: Path) -> Path:
        size = self.group.world_size
        if size == 1 or path.stem.endswith(f"rank-{self.group.rank}"):
            return path
        return path.with_name(f"{path.stem}.rank{self.group.rank}-of-{size}{path.suffix}")

    def _misplaced(self, file: Path, place: dict[str, int] | None) -> str:
        held = "an unsharded optimizer" if place is None else f"part {place['rank']} of {place['world_size']}"
        return (
            f"{file} holds {held}, and this process is part {self.group.rank} of {self.group.world_size}: load it "
            "with the strategy and the number of processes it was saved with"
        )

    def _missing(self, path: Path, file: Path) -> str:
        others = sorted(found.name for found in path.parent.glob(f"{path.stem}.rank*-of-*{path.suffix}"))
        if path.is_file():
            others.insert(0, f"{path.name} (of one process)")
        if not others:
            return f"{file} does not exist: give the path of a saved optimizer"
        return (
            f"{file} does not exist, but {', '.join(others[:3])} does: optimizer files load with as many processes as "
            f"they were saved with, and this run has {self.group.world_size}. A run's own checkpoints know any number"
        )


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers of a network: the members of its outermost lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def _like(tensor: Tensor, own: Tensor | None) -> Tensor:
    """A whole tensor laid out as the model's own one is."""
    if not isinstance(own, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if tensor.shape != own.shape:
        return tensor  # load_state_dict has the words for that
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _part_like(value: Any, parameter: Tensor) -> Any:
    """An optimizer's tensor as the part of a sharded one; numbers and whole tensors as they are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    local = parameter.to_local()
    if value.shape != local.shape:
        raise ValueError(f"a state of shape {tuple(value.shape)} for a part of shape {tuple(local.shape)}")
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
