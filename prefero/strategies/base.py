"""Where models live: the seam between a training loop and the device, precision or sharding underneath."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from prefero.strategies import files
from prefero.strategies.sampler import DistributedSampler


@runtime_checkable
class HasCheckpointState(Protocol):
    """A model that knows how it wants to be stored (adapters merged, plain names)."""

    def checkpoint_state(self) -> dict[str, Tensor]: ...

    def load_checkpoint_state(self, state: dict[str, Tensor], strict: bool = True) -> None: ...


class Strategy(ABC):
    """Places models and optimizers, runs backward and step, and reads and writes checkpoints.

    `skipped_steps` counts the optimizer steps that were not taken because a gradient was not finite.
    """

    device: torch.device

    def __init__(self) -> None:
        self.skipped_steps = 0
        self.setup_distributed()

    @abstractmethod
    def setup_distributed(self) -> None:
        """Joins the process group, if there is one."""

    @abstractmethod
    def setup_model(self, model: nn.Module) -> nn.Module:
        """Places one model."""

    @abstractmethod
    def setup_optimizer(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Points an optimizer at a placed model."""

    @abstractmethod
    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer) -> None:
        """Adds the gradients of `loss` to the model's parameters."""

    @abstractmethod
    def optimizer_step(self, optimizer: Optimizer, max_norm: float | None = None) -> float:
        """Clips, steps and clears the gradients; returns their norm before clipping.

        max_norm: None is the strategy's own, 0 does not clip. A norm that is not finite means that the step was
        skipped and counted in `skipped_steps`: one NaN would poison every parameter.
        """

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return tensor

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes: the strategy's precision."""
        return nullcontext()

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

    def setup_dataloader(self, replay_buffer: Any, pin_memory: bool = False) -> DataLoader[Any]:
        """Shuffled batches of a replay buffer; the last one may be smaller: no row is left unlearned."""
        size = replay_buffer.sample_batch_size
        return DataLoader(
            replay_buffer,
            batch_size=size,
            shuffle=True,
            drop_last=False,
            pin_memory=pin_memory,
            collate_fn=replay_buffer.collate_fn,
        )

    def setup_sampler(self, dataset: Any) -> DistributedSampler:
        """Draws from this process's share of a data set, without repeats until all was drawn."""
        return DistributedSampler(dataset, 1, 0)

    @property
    def is_rank_0(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return int(os.environ.get("RANK", "0")) == 0

    @staticmethod
    def _unwrap_model(model: nn.Module) -> nn.Module:
        """The user's module under whatever the strategy put around it."""
        return model

    @staticmethod
    def _unwrap_actor(actor: nn.Module) -> nn.Module:
        """The Hugging Face model of an actor."""
        inner = getattr(actor, "model", actor)
        assert isinstance(inner, nn.Module)
        return inner

    def save_model(self, model: nn.Module, path: str | Path, only_rank0: bool = False) -> None:
        """Writes the float32 weights, adapters merged into a copy: safetensors for that suffix, else torch's format.

        An actor's file holds the names of its plain Hugging Face model. The file is complete or not there at all.
        """
        if only_rank0 and not self.is_rank_0:
            return
        module = self._unwrap_model(model)
        files.write_tensors(files.state_of(module), Path(path))

    def load_model(self, model: nn.Module, path: str | Path, map_location: Any = None, strict: bool = True) -> None:
        """Reads weights into a model; with adapters, these start again from zero effect on top.

        Nothing but tensors is read: a file that wants to run code is refused. One name of two tied weights is enough.
        Raises ValueError naming the file when it is missing, unreadable or does not fit.
        """
        module = self._unwrap_model(model)
        state = files.read_tensors(Path(path), map_location)
        try:
            if isinstance(module, HasCheckpointState):
                module.load_checkpoint_state(state, strict)
            else:
                module.load_state_dict(state, strict=strict)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the {type(module).__name__}: {_first_lines(error)}") from error

    def save_optimizer(self, optimizer: Optimizer, path: str | Path, only_rank0: bool = False) -> None:
        """Writes an optimizer's state (torch's format, tensors and numbers only)."""
        if only_rank0 and not self.is_rank_0:
            return
        files.write_object(optimizer.state_dict(), Path(path))

    def load_optimizer(self, optimizer: Optimizer, path: str | Path, map_location: Any = None) -> None:
        """Reads what `save_optimizer` wrote. Raises ValueError naming the file when it does not fit."""
        try:
            optimizer.load_state_dict(files.read_object(Path(path), map_location))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} does not fit the optimizer: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:4])[:600]
