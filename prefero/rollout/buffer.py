"""Where experience waits to be learned from: row by row, without the padding of the batch it came in."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefero.types import Experience


@dataclass
class BufferItem:
    """One row of an experience, its padding cut off.

    sequences, attention_mask: [S]; action_mask, action_log_probs: [A]; values, advantages: [A], or scalars at the
    sequence level; reward: a scalar; info: scalars.
    """

    sequences: Tensor
    action_log_probs: Tensor
    values: Tensor
    reward: Tensor
    advantages: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)


# The tensors that hold one number per action when the algorithm works per token.
_PER_ACTION = ("action_log_probs", "values", "advantages", "action_mask")


def split_experience_batch(experience: Experience) -> list[BufferItem]:
    """The rows of `experience`, each cut to its own real tokens (every tensor is copied, none is a view)."""
    num_prompt = experience.sequences.shape[1] - experience.num_actions
    starts = _leading_zeros(experience.attention_mask[:, :num_prompt])
    stops = [experience.num_actions - num for num in _leading_zeros(experience.action_mask.flip(1))]
    tensors = {f.name: getattr(experience, f.name) for f in fields(Experience) if f.name != "info"}
    items = []
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        cuts = {}
        for name, tensor in tensors.items():
            if name in ("sequences", "attention_mask"):
                cut = tensor[row, start : num_prompt + stop]
            elif name in _PER_ACTION and tensor.dim() > 1:
                cut = tensor[row, :stop]
            else:
                cut = tensor[row]
            cuts[name] = cut.clone()
        items.append(BufferItem(**cuts, info={name: number[row].clone() for name, number in experience.info.items()}))
    return items


def _leading_zeros(mask: Tensor) -> list[int]:
    """How many zeros each row of a mask [B, N] starts with: one look at the whole batch, not one a row."""
    return (mask.bool().cumsum(dim=1) == 0).sum(dim=1).tolist()


def zero_pad_sequences(sequences: Sequence[Tensor], side: Literal["left", "right"] = "left") -> Tensor:
    """Stacks 1-D tensors of different lengths into [B, longest], zeros on `side`."""
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is unknown: use 'left' or 'right'")
    return pad_sequence(list(sequences), batch_first=True, padding_side=side)


def make_experience_batch(items: Sequence[BufferItem]) -> Experience:
    """A batch of rows: prompts padded on the left, completions on the right, to the longest of each."""
    if not items:
        raise ValueError("make_experience_batch got no items: the buffer is empty")
    tensors = {}
    for name in (f.name for f in fields(Experience) if f.name != "info"):
        rows = [getattr(item, name) for item in items]
        if name in ("sequences", "attention_mask"):
            cuts = [len(item.sequences) - len(item.action_mask) for item in items]
            prompts = zero_pad_sequences([row[:cut] for row, cut in zip(rows, cuts, strict=True)], "left")
            completions = zero_pad_sequences([row[cut:] for row, cut in zip(rows, cuts, strict=True)], "right")
            tensors[name] = torch.cat([prompts, completions], dim=1)
        elif name in _PER_ACTION and rows[0].dim():
            tensors[name] = zero_pad_sequences(rows, "right")
        else:
            tensors[name] = torch.stack(rows)
    names = [name for name in items[0].info if all(name in item.info for item in items)]
    return Experience(**tensors, info={name: torch.stack([item.info[name] for item in items]) for name in names})


class ReplayBuffer(ABC):
    """A store of experience.

    sample_batch_size: rows that `sample` draws. limit: rows kept, the oldest leave first; 0 or less keeps all.
    """

    def __init__(self, sample_batch_size: int, limit: int = 0) -> None:
        if sample_batch_size < 1:
            raise ValueError(f"sample_batch_size={sample_batch_size} must be 1 or more")
        self.sample_batch_size = sample_batch_size
        self.limit = limit

    @abstractmethod
    def append(self, experience: Experience) -> None:
        """Adds every row."""

    @abstractmethod
    def put(self, item: BufferItem) -> None:
        """Adds one row as it is."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets every row."""

    @abstractmethod
    def sample(self, order: random.Random | None = None) -> Experience:
        """A random batch of `sample_batch_size` different rows; order: what it is drawn from (None: the global one)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, idx: int) -> BufferItem: ...

    @abstractmethod
    def collate_fn(self, batch: Sequence[BufferItem]) -> Experience:
        """Items to a batch, for a DataLoader."""


class NaiveReplayBuffer(ReplayBuffer):
    """A list of rows in this process.

    cpu_offload: keep the rows in main memory; `sample` brings them back to the device they came from.
    """

    def __init__(self, sample_batch_size: int, limit: int = 0, cpu_offload: bool = True) -> None:
        super().__init__(sample_batch_size, limit)
        self.cpu_offload = cpu_offload
        self.target_device: torch.device | None = None
        self.items: list[BufferItem] = []

    @torch.no_grad()
    def append(self, experience: Experience) -> None:
        self.target_device = experience.sequences.device
        kept = experience.map(lambda tensor: tensor.cpu()) if self.cpu_offload else experience
        self.items.extend(split_experience_batch(kept))
        if self.limit > 0:
            del self.items[: -self.limit]

    def put(self, item: BufferItem) -> None:
        self.items.append(item)

    def clear(self) -> None:
        self.items.clear()

    @torch.no_grad()
    def sample(self, order: random.Random | None = None) -> Experience:
        if self.sample_batch_size > len(self.items):
            raise ValueError(
                f"the buffer holds {len(self.items)} rows, fewer than a batch of {self.sample_batch_size}: collect "
                "more before learning or lower train_batch_size"
            )
        experience = make_experience_batch((order or random).sample(self.items, self.sample_batch_size))
        return experience if self.target_device is None else experience.to_device(self.target_device)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, idx: int) -> BufferItem:
        return self.items[idx]

    def collate_fn(self, batch: Sequence[BufferItem]) -> Experience:
        return make_experience_batch(batch)
