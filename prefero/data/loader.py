"""Batches in an order that depends on nothing but the seed and the epoch, and that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
B = TypeVar("B")

_LOOKAHEAD = 256  # waiting groups tried for the rest of a batch; bounds the work, not the result's validity
_POOL = 50  # batches among which rows are sorted by length


class Loader(Generic[T, B]):
    """Iterates over `collate`d batches of `items`; iterating again goes on with the next epoch.

    shuffle: a fresh permutation each epoch, drawn from (seed, epoch). drop_last: leave out a last batch that is short.
    group_by: rows with an equal key stand together, so that comparisons of one prompt share their forwards; a group is
    split only where no waiting group fits the rest of a batch. length: batch rows of like length, to pad less
    (not together with group_by). Every batch but the last has `batch_size` rows whatever the options.

    A broken-off epoch is taken up where it stopped: `state_dict` counts batches already handed out.
    """

    def __init__(
        self,
        items: Sequence[T],
        batch_size: int,
        collate: Callable[[list[T]], B],
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        group_by: Callable[[T], Hashable] | None = None,
        length: Callable[[T], int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed = {seed}: must be 0 or more")
        if not len(items):
            raise ValueError("there are no rows to load; give a data set with at least one row")
        if drop_last and len(items) < batch_size:
            raise ValueError(
                f"drop_last with batch_size = {batch_size} leaves nothing of {len(items)} rows; use a smaller batch"
            )
        if group_by is not None and length is not None:
            raise ValueError("group_by and length each decide which rows meet in a batch; give one of them")
        self.items, self.batch_size, self.collate = items, batch_size, collate
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.group_by, self.length = group_by, length
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.items) // self.batch_size if self.drop_last else -(-len(self.items) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch."""
        self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[B]:
        batches = self.indices(self.epoch)
        while self.position < len(batches):
            batch = batches[self.position]
            self.position += 1  # before handing out: whoever saves the state while holding a batch has seen it
            yield self.collate([self.items[i] for i in batch])
        self.set_epoch(self.epoch + 1)

    def forever(self) -> Iterator[B]:
        """Epoch after epoch without end."""
        while True:
            yield from self

    def indices(self, epoch: int) -> list[list[int]]:
        """The row numbers of every batch of an epoch, in order."""
        # a bit generator's raw stream is the same in every NumPy version; its permutation() need not be
        random = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        order = _permutation(random, len(self.items)) if self.shuffle else list(range(len(self.items)))
        if self.drop_last:  # before sorting, or it would always be the shortest rows that are left out
            order = order[: len(self) * self.batch_size]
        if self.group_by is not None:
            order = self._grouped(order)
        if self.length is not None:
            order = self._by_length(order)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.length is not None and self.shuffle:
            short = [batches.pop()] if len(batches[-1]) < self.batch_size else []
            batches = [batches[i] for i in _permutation(random, len(batches))] + short
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what must be the same for that to mean anything; plain numbers."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state; ValueError when the data or the settings are not those it was saved with."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"the saved loader state has {key} = {state.get(key)}, this loader has {value}; resume with the "
                    "same data and settings, or start a new run"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "num_items": len(self.items),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "order": "group" if self.group_by else "length" if self.length else "plain",
        }

    def _grouped(self, order: list[int]) -> list[int]:
        """Groups in order of their first row, each put where it fits into what is left of a batch."""
        assert self.group_by is not None
        groups: dict[Hashable, list[int]] = {}
        for index in order:
            groups.setdefault(self.group_by(self.items[index]), []).append(index)
        waiting = list(groups.values())[::-1]  # the front at the end, where taking one away moves little
        result: list[int] = []
        while waiting:
            room = self.batch_size - len(result) % self.batch_size
            fitting = (i for i in range(1, min(_LOOKAHEAD, len(waiting)) + 1) if len(waiting[-i]) <= room)
            # nothing fits: fill up with the front group, whose rest goes on in the next batch
            result += waiting.pop(-next(fitting, 1))
        return result

    def _by_length(self, order: list[int]) -> list[int]:
        """Sorted by length within pools of batches: like lengths meet, yet epochs differ."""
        assert self.length is not None
        measure = self.length
        pool = self.batch_size * _POOL if self.shuffle else len(order)
        pools = (order[i : i + pool] for i in range(0, len(order), pool))
        return [i for part in pools for i in sorted(part, key=lambda index: measure(self.items[index]), reverse=True)]


def _permutation(random: np.random.Philox, size: int) -> list[int]:
    return [int(i) for i in np.argsort(random.random_raw(size), kind="stable")]
