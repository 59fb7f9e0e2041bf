"""The one folder of the user's in which fetched models and data live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$PREFERO_CACHE`, or `~/.cache/prefero`."""
    return Path(os.environ.get("PREFERO_CACHE") or "~/.cache/prefero").expanduser()
