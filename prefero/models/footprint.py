"""What tensors take: networks of a few layers in the place of whole ones, and the bytes that are alive while they run.

A network is a stack of equal layers, so what a run with it takes is a straight line in their number. It is run with one
layer and with two, weights drawn instead of read, and the line is followed to the whole depth.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WHOLE = "num_layers_of_the_whole"
"""The key of a shortened network's configuration that tells its real depth; its exports keep it."""


@dataclass
class Shortened:
    """Networks built inside `shortened` have so many layers, by how many they really have (`whole`: all that were met).

    Where nothing is said they have `least`. Networks of one depth stay alike, so that roles can share them.
    """

    depths: Mapping[int, int]
    least: int = 1
    whole: set[int] = field(default_factory=set)

    def shorten(self, config: Any, num_layers: int | None) -> Any:
        """A network's configuration, changed to the depth it is given here; num_layers: how many of it are wanted."""
        whole = min(getattr(config, _WHOLE, config.num_hidden_layers), num_layers or config.num_hidden_layers * 10**6)
        self.whole.add(whole)
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = min(whole, self.depths.get(whole, self.least))
        if kinds is not None:
            config.layer_types = [kinds[layer % len(kinds)] for layer in range(config.num_hidden_layers)]
        setattr(config, _WHOLE, whole)
        return config


_shortened: ContextVar[Shortened | None] = ContextVar("shortened", default=None)


def current() -> Shortened | None:
    """What networks are shortened to, inside `shortened`."""
    return _shortened.get()


@contextmanager
def shortened(to: Shortened) -> Iterator[Shortened]:
    """Inside, networks with pretrained weights are built with fewer layers, and the weights are drawn."""
    token = _shortened.set(to)
    try:
        yield to
    finally:
        _shortened.reset(token)


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the bytes of the tensors that are made and still alive: `now`, and `peak` since `mark` was called.

    What kernels take for themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.counting = True
        self._known: set[int] = set()

    def mark(self) -> int:
        """The peak so far; the next one begins with what is alive now."""
        found, self.peak = self.peak, self.now
        return found

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self.counting:
            given = {_address(tensor) for tensor in _tensors((args, kwargs))}
            for tensor in _tensors(made):
                if _address(tensor) not in given:  # a view of what was there before is nothing new
                    self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._known or tensor.is_meta:
            return
        holder: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()
        size = tensor.numel() * tensor.itemsize if tensor.is_mkldnn else holder.nbytes()
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(holder, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    # What oneDNN has laid out in its own way has no storage to share.
    return id(tensor) if tensor.is_mkldnn else int(tensor.untyped_storage()._cdata)
