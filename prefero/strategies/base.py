"""Where models live: the seam between a training loop and the device, precision or sharding underneath."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from prefero.strategies import files
from prefero.strategies.cpu import has_native_bf16
from prefero.strategies.group import Group
from prefero.strategies.sampler import DistributedSampler
from prefero.strategies.scaling import LossScale

Precision = Literal["fp32", "bf16", "fp16", "auto"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@runtime_checkable
class HasCheckpointNames(Protocol):
    """A model whose files hold other names than its own (adapters merged, the plain Hugging Face names)."""

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From its own names to the file's."""

    def from_checkpoint(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the file's names to its own; `own` is what it holds now."""


@runtime_checkable
class FillsIn(Protocol):
    """A model that may have been built without weights (`deferral.defer_weights`)."""

    def fill(self, part: nn.Module) -> list[nn.Parameter]:
        """Gives the parameters below `part` their values, in main memory; returns those that were drawn, not read."""


class Strategy(ABC):
    """Places models and optimizers, runs backward and step, and reads and writes checkpoints.

    precision: "fp32", "bf16" or "fp16" (autocast over float32 weights), or "auto" (bf16 where the hardware multiplies
    it natively). max_norm: gradient clipping of every step, 0 is none; norm_type: its norm. loss_scale: how fp16
    gradients are kept from vanishing. `skipped_steps` counts the optimizer steps that were not taken because a gradient
    was not finite; a trainer stops after `max_skipped` of them in a row. Raises ValueError for an unknown precision.
    """

    device: torch.device
    group: Group

    def __init__(
        self,
        precision: Precision = "fp32",
        max_norm: float = 0.0,
        norm_type: float = 2.0,
        loss_scale: LossScale | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r}: choose {', '.join(map(repr, get_args(Precision)))}")
        self.skipped_steps = 0
        self.max_skipped = 5
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.setup_distributed()
        if precision == "auto":
            precision = "bf16" if has_native_bf16(self.device) else "fp32"
        self.precision = precision
        self.loss_scale = (loss_scale or LossScale()) if precision == "fp16" else None
        self._scaled_by: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        """What the gradients at hand were scaled by: the factor may move before their optimizer steps."""

    @abstractmethod
    def setup_distributed(self) -> None:
        """Joins the process group, if there is one; sets `group` and `device`."""

    @abstractmethod
    def setup_model(self, model: nn.Module) -> nn.Module:
        """Places one model."""

    @abstractmethod
    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Points an optimizer at a placed model."""

    @contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; after the last, gradients must be those of all processes."""
        yield

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """Inside, every process holds all parameters, and may forward as often as it likes without the others."""
        yield

    can_repeat = False
    """Whether forward and backward of a micro-batch that failed may be begun again."""

    def settle(self, model: nn.Module) -> None:  # noqa: B027 most strategies leave a model as it is
        """Makes a model's parameters those its optimizer knows, whatever passes without gradients left behind."""

    def verify(self, model: nn.Module) -> None:  # noqa: B027 most strategies have one copy only
        """Raises BrokenRunError when processes that should hold the same weights do not."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer) -> None:
        """Adds the gradients of `loss`, summed over processes, to the model's parameters."""
        scale = float(self.group.world_size)
        if self.loss_scale is not None:
            scale *= self._scaled_by.setdefault(optimizer, self.loss_scale.scale)
        # Processes average; a sum is wanted, and a factor that is a power of two costs no precision.
        (loss * scale if scale != 1.0 else loss).backward()  # type: ignore[no-untyped-call]

    def optimizer_step(self, optimizer: Optimizer, max_norm: float | None = None) -> float:
        """Clips, steps and clears the gradients; returns their norm before clipping.

        max_norm: None is the strategy's own, 0 does not clip. A norm that is not finite means that the step was
        skipped and counted in `skipped_steps`: one NaN would poison every parameter.
        """
        limit = self.max_norm if max_norm is None else max_norm
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.loss_scale is not None:
            scale = self._scaled_by.pop(optimizer, self.loss_scale.scale)
            for parameter in parameters:
                parameter.grad.div_(scale)
        norm = nn.utils.get_total_norm([p.grad for p in parameters], self.norm_type)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        size = float(norm)
        finite = math.isfinite(size)
        if finite:
            if limit > 0.0:
                nn.utils.clip_grads_with_norm_(parameters, limit, norm)
            optimizer.step()
        else:
            self.skipped_steps += 1
        if self.loss_scale is not None:
            self.loss_scale.update(finite)
        optimizer.zero_grad(set_to_none=True)
        return size

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.group.sum(tensor)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes: the strategy's precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=HALF[self.precision])

    def model_init_context(self) -> AbstractContextManager[Any]:
        """The context in which models are built."""
        return nullcontext()

    def prepare(self, *models_or_pairs: Any) -> Any:
        """Places models and (model, optimizer) pairs and returns them in order, a single argument bare.

        Raises ValueError for a tuple that is not a pair and TypeError for anything that is not a model or optimizer.
        """
        if not models_or_pairs:
            raise ValueError("prepare() needs at least one model or (model, optimizer) pair")
        prepared = [self._prepare_one(argument) for argument in models_or_pairs]
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_one(self, argument: Any) -> Any:
        if isinstance(argument, tuple):
            if len(argument) != 2:
                raise ValueError(
                    f"prepare() takes a model or a (model, optimizer) pair, not a tuple of {len(argument)}"
                )
            model, optimizer = argument
            if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
                kinds = f"({type(model).__name__}, {type(optimizer).__name__})"
                raise TypeError(f"prepare() takes pairs of (nn.Module, Optimizer), not {kinds}")
            placed = self.setup_model(model)
            return placed, self.setup_optimizer(optimizer, placed)
        if not isinstance(argument, nn.Module):
            raise TypeError(
                f"prepare() takes an nn.Module or a (model, optimizer) tuple, not {type(argument).__name__}"
            )
        return self.setup_model(argument)

    def setup_dataloader(
        self, replay_buffer: Any, pin_memory: bool = False, generator: torch.Generator | None = None
    ) -> DataLoader[Any]:
        """Shuffled batches of a replay buffer; the last one may be smaller: no row is left unlearned.

        generator: what the order is drawn from (None: torch's global one).
        """
        return DataLoader(
            replay_buffer,
            batch_size=replay_buffer.sample_batch_size,
            shuffle=True,
            drop_last=False,
            pin_memory=pin_memory,
            collate_fn=replay_buffer.collate_fn,
            generator=generator,
        )

    def setup_sampler(self, dataset: Any) -> DistributedSampler:
        """Draws from this process's share of a data set, without repeats until all was drawn."""
        return DistributedSampler(dataset, self.group.world_size, self.group.rank)

    @property
    def is_rank_0(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return int(os.environ.get("RANK", self.group.rank)) == 0

    @staticmethod
    def _unwrap_model(model: nn.Module) -> nn.Module:
        """The user's module, which every strategy places without putting anything around it."""
        return model

    @staticmethod
    def _unwrap_actor(actor: nn.Module) -> nn.Module:
        """The Hugging Face model of an actor."""
        inner = getattr(actor, "model", actor)
        assert isinstance(inner, nn.Module)
        return inner

    def whole_state(self, model: nn.Module, only_rank0: bool = False) -> dict[str, Tensor]:
        """The model's state under its own names, no tensor sharded; every process must ask for it.

        only_rank0: the others get tensors without values, where gathering costs memory.
        """
        return dict(model.state_dict())

    def load_whole_state(self, model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Gives the model a state of whole tensors under its own names. Raises RuntimeError as torch does."""
        model.load_state_dict(state, strict=strict)

    def checkpoint_state(self, model: nn.Module, only_rank0: bool = False) -> dict[str, Tensor]:
        """The model's float32 weights under the names of a file, adapters merged; see `whole_state`."""
        state = self.whole_state(model, only_rank0)
        named = model.to_checkpoint(state) if isinstance(model, HasCheckpointNames) else state
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named.items()}

    def save_model(self, model: nn.Module, path: str | Path, only_rank0: bool = False) -> None:
        """Writes the float32 weights, adapters merged into a copy: safetensors for that suffix, else torch's format.

        An actor's file holds the names of its plain Hugging Face model. The file is complete or not there at all. Every
        process must call this, and writes the file, or with only_rank0 the first alone.
        """
        state = self.checkpoint_state(model, only_rank0)
        if self.is_rank_0 or not only_rank0:
            files.write_tensors(state, Path(path))
        self.group.wait()

    def load_model(self, model: nn.Module, path: str | Path, map_location: Any = None, strict: bool = True) -> None:
        """Reads weights into a model; with adapters, these start again from zero effect on top.

        Nothing but tensors is read: a file that wants to run code is refused. One name of two tied weights is enough.
        Raises ValueError naming the file when it is missing, unreadable or does not fit.
        """
        state = files.read_tensors(Path(path), map_location)
        own = model.state_dict()
        try:
            if isinstance(model, HasCheckpointNames):
                state = model.from_checkpoint(own, state)
            if not state.keys() & own.keys():
                raise ValueError("it has none of the model's weights")
            self._check_shared(model, state)
            self.load_whole_state(model, state, strict)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit the {type(model).__name__}: {first_lines(error)}") from error

    @staticmethod
    def _check_shared(model: nn.Module, state: Mapping[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            given = state.get(name)
            shared = given is not None and getattr(parameter, "shared_by_roles", False)
            if given is not None and shared and not torch.equal(given.to(parameter), parameter):
                raise ValueError(
                    f"other models share its weights ({name}) and would change with it: load it before they are made, "
                    "or into a model of its own"
                )

    def save_optimizer(self, optimizer: Optimizer, path: str | Path, only_rank0: bool = False) -> None:
        """Writes an optimizer's state (torch's format, tensors and numbers only)."""
        if self.is_rank_0 or not only_rank0:
            files.write_object(optimizer.state_dict(), Path(path))
        self.group.wait()

    def load_optimizer(self, optimizer: Optimizer, path: str | Path, map_location: Any = None) -> None:
        """Reads what `save_optimizer` wrote. Raises ValueError naming the file when it does not fit."""
        state = files.read_object(Path(path), map_location)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        try:
            if place := state.get("sharded"):
                raise ValueError(
                    f"it is part {place['rank']} of {place['world_size']} of a sharded optimizer; load it with the "
                    "strategy and the number of processes it was saved with"
                )
            for index, entry in state["state"].items():
                check_shapes(entry, parameters[index].shape)
            optimizer.load_state_dict(state)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not fit the optimizer: {first_lines(error)}") from error


_ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What Adam and SGD keep for each element of a parameter; other optimizers keep states of shapes of their own."""


def check_shapes(entry: Mapping[str, Any], shape: torch.Size) -> None:
    """Raises ValueError when a parameter's optimizer states are those of a tensor of another shape."""
    for kind in entry.keys() & _ELEMENTWISE:
        value = entry[kind]
        if isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(f"it holds {kind} of shape {list(value.shape)} for a parameter of shape {list(shape)}")


def first_lines(error: Exception) -> str:
    """What an error says, without the pages that torch lists behind."""
    return " ".join(str(error).split("\n")[:4])[:600]
