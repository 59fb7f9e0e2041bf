"""The engine that samples by the modules and the weights that train: one forward, one numerics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefero.models.at_hand import at_hand
from prefero.models.base import Actor
from prefero.models.packed import kept_per_token, logits, packs
from prefero.models.packing import Texts
from prefero.models.trunk import Forwards, evaluating, full_precision_head, replaced, trunk_of
from prefero.rollout.engine import SamplingParams
from prefero.rollout.native.batch import Batch
from prefero.rollout.native.fused import fused
from prefero.rollout.native.slots import Slots
from prefero.rollout.rows import (
    Row,
    advance,
    base_of,
    causal_lm,
    completion_from,
    end_tokens,
    pieces,
    rows_of,
    texts_of,
)
from prefero.types import Completion, Prompt


@dataclass(frozen=True)
class Bounds:
    """What the engine may use: answers in the making at once, bytes for their keys and values, copies of weights."""

    slots: int = 128
    memory: int = 2 << 30
    copies: bool = True

    def __post_init__(self) -> None:
        for name, number in {"slots": self.slots, "memory": self.memory}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"engine {name} is {number!r}: give a whole number, 1 or more")


class UnpackableError(ValueError):
    """A model that the native engine cannot run."""


class NativeEngine:
    """Generates by continuous batching over the actor's own modules.

    actor: an `Actor`, or a transformers or PEFT model. tokenizer: decodes text and names EOS. bounds: see `Bounds`.
    eos_token_ids: as for `HFEngine`. It computes in whatever precision the model, or an autocast around the call, has.
    """

    def __init__(
        self, actor: Any, tokenizer: Any, bounds: Bounds | None = None, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.bounds = bounds or Bounds()
        self.update_weights(actor)
        self.eos_token_ids = end_tokens(eos_token_ids, self.model, tokenizer)

    def update_weights(self, actor: Any) -> None:
        """Points at this actor; nothing is copied, generation always runs the very weights that train."""
        self.model: Any = causal_lm(actor)
        inner = base_of(self.model)
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnpackableError("prompts that were learned (PEFT) cannot be read packed, as the native engine does")
        if not (actor.can_pack() if isinstance(actor, Actor) else packs(trunk_of(inner))):
            raise UnpackableError(f"{type(inner).__name__} cannot read packed texts, as the native engine does")
        self._logits: Any = actor.decode if isinstance(actor, Actor) else partial(logits, inner)
        self._inner: Any = inner
        self._config: Any = inner.config.get_text_config()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order asked; see `Engine` and `rows_of` for what is refused."""
        rows = rows_of(prompts, params, self._config)
        if not rows:
            return []
        batch, ready = self._batch(rows, params)
        with self._at_work(ready):
            for _ in batch:
                pass
        texts = texts_of(rows, self.tokenizer)
        return [completion_from(row, text, params) for row, text in zip(rows, texts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The completion's text in pieces as it comes; a piece never ends inside a character."""
        row = rows_of([prompt], params, self._config)[0]
        return pieces(row, self.tokenizer, params, self._steps(*self._batch([row], params)))

    def _steps(self, batch: Batch, ready: Forwards) -> Iterator[list[Row]]:
        """A batch's steps; the model is as it was whenever it is somebody else's turn."""
        steps, ended = iter(batch), None
        while ended is None or batch.waiting or batch.active:
            with self._at_work(ready):
                ended = next(steps)
            yield ended

    @contextmanager
    def _at_work(self, ready: Forwards) -> Iterator[None]:
        # no_grad, not inference_mode: buffers a model makes on the way (rotary tables) must stay usable for training.
        with torch.no_grad(), evaluating(self.model), replaced(ready):
            yield

    def _batch(self, rows: Sequence[Row], params: SamplingParams) -> tuple[Batch, Forwards]:
        """Longest prompts first, all samples of one together; and the forwards with which it is quick."""
        room = max(len(row.prompt.token_ids) for row in rows) + params.max_new_tokens
        self._check_rotary(room)
        count = min(len(rows), self.bounds.slots, self.bounds.memory // self._bytes(room))
        if not count:
            raise ValueError(
                f"one answer of {room} tokens needs {self._bytes(room)} bytes for keys and values, more than "
                f"engine.memory {self.bounds.memory}: raise it, or shorten prompts or max_new_tokens"
            )
        ordered = sorted(rows, key=lambda row: (-len(row.prompt.token_ids), row.prompt.token_ids))

        def drawn(found: Tensor, some: Sequence[Row]) -> None:
            advance(some, found, params, self.eos_token_ids, self.tokenizer)

        # Logits as the trainer computes them, and layers that have their weights at hand and decode in few steps.
        trunk = trunk_of(self._inner)
        copies = at_hand(trunk) if self.bounds.copies else []
        ready = [*full_precision_head(self._inner), *copies, *fused(trunk)]
        return Batch(ordered, Slots(count, room), self._forward, drawn, self._device()), ready

    def _check_rotary(self, room: int) -> None:
        c = self._config
        rotary = getattr(c, "rope_parameters", None) or {}
        for part in [part for part in rotary.values() if isinstance(part, dict)] or [rotary]:
            if part.get("rope_type") not in ("dynamic", "longrope"):
                continue
            usual = part.get("original_max_position_embeddings") or getattr(c, "original_max_position_embeddings", None)
            if room > (usual or c.max_position_embeddings):
                raise ValueError(
                    f"a prompt and its answer of {room} tokens are beyond {usual or c.max_position_embeddings}, from "
                    "where on this model reads earlier tokens differently (rotary embeddings that depend on the "
                    "length): what was kept of them would be wrong. Use shorter prompts or max_new_tokens"
                )

    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def _bytes(self, room: int) -> int:
        """Of one slot: keys and values of every layer."""
        size = 2 if torch.is_autocast_enabled(self._device().type) else int(self.model.dtype.itemsize)
        return kept_per_token(trunk_of(self._inner)) * room * size

    def _forward(self, ids: Tensor, positions: Tensor, texts: Texts, places: Tensor) -> Tensor:
        found: Tensor = self._logits(ids=ids, positions=positions, texts=texts, places=places)
        return found
