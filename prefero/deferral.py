"""Whether models are built without weights, which are then read or drawn part by part as they are shared out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_deferred = ContextVar("deferred", default=False)


def weights_deferred() -> bool:
    """Whether this is inside `defer_weights`."""
    return _deferred.get()


@contextmanager
def defer_weights() -> Iterator[None]:
    """Models built inside have shapes only; a strategy that shares weights out fills them in as it goes."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)
