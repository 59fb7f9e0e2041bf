"""Which engine answers: our own, or where a model cannot be read packed, the one that takes any."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from prefero.config import EngineConfig
from prefero.rollout.hf import HFEngine
from prefero.rollout.native.engine import Bounds, NativeEngine, UnpackableError


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def make_engine(
    actor: Any, tokenizer: Any, settings: EngineConfig | None = None, say: Callable[[str], None] = _say
) -> NativeEngine | HFEngine:
    """The engine that the settings name; `native` where the model allows it, else `hf` with one line that says so."""
    settings = settings or EngineConfig()
    if settings.kind == "native":
        try:
            return NativeEngine(actor, tokenizer, Bounds(settings.slots, settings.memory, settings.copies))
        except UnpackableError as error:
            say(f"{error}: sampling with engine.kind hf")
    return HFEngine(actor, tokenizer, settings.slots)
