"""The engine that samples with the trainer's own modules and weights, through any Hugging Face causal LM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prefero.models.base import Actor
from prefero.models.trunk import Forwards, evaluating, full_precision_head, replaced
from prefero.rollout.engine import SamplingParams
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

_DROP_AT = 8  # finished rows leave once they are 1/8 of the batch: each leave copies the key/value cache


class HFEngine:
    """Generates with a Hugging Face causal language model: its own decode loop over the model's forward.

    actor: an `Actor`, or a transformers or PEFT model (an active LoRA adapter is used as it stands). tokenizer: only
    decodes text and names EOS. batch_size: completions decoded at once. eos_token_ids: tokens that end a completion;
    by default the tokenizer's and those of the model's generation config; an empty sequence for none. It computes in
    whatever precision the model, or an autocast around the call, has. Raises ValueError where there is no EOS.
    """

    def __init__(
        self, actor: Any, tokenizer: Any, batch_size: int = 32, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"engine batch_size is {batch_size!r}: give a whole number, 1 or more")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.update_weights(actor)
        self.eos_token_ids = end_tokens(eos_token_ids, self.model, tokenizer)

    def update_weights(self, actor: Any) -> None:
        """Points at this actor; nothing is copied, generation always runs the very weights that train."""
        self.model: Any = causal_lm(actor)
        self._forward_of: Callable[..., Any] = actor.decode if isinstance(actor, Actor) else self.model
        inner = base_of(self.model)
        self._accepts = frozenset(inspect.signature(inner.forward).parameters)
        self._config: Any = inner.config.get_text_config()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order asked; a prompt asked n times gets samples 0 to n-1.

        `TruncatedCompletion`s when `params` truncate the distribution. Raises ValueError as `rows_of` does.
        """
        rows = rows_of(prompts, params, self._config)
        longest_first = sorted(rows, key=lambda row: -len(row.prompt.token_ids))
        for start in range(0, len(rows), self.batch_size):
            for _ in self._decode(longest_first[start : start + self.batch_size], params):
                pass
        texts = texts_of(rows, self.tokenizer)
        return [completion_from(row, text, params) for row, text in zip(rows, texts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The completion's text in pieces as it comes; a piece never ends inside a character.

        The pieces joined are the `text` of `generate` for the same prompt and parameters. Between two pieces the model
        is as it was. Raises ValueError, before the first piece, as `generate` does.
        """
        row = rows_of([prompt], params, self._config)[0]
        return pieces(row, self.tokenizer, params, self._decode([row], params))

    def _decode(self, rows: list[Row], params: SamplingParams) -> Iterator[None]:
        """Fills the rows with tokens until each has ended; yields after every token."""
        device = self.model.get_input_embeddings().weight.device
        token_ids, mask = _left_padded([row.prompt.token_ids for row in rows], params.max_new_tokens, device)
        width = token_ids.shape[1]
        position_ids = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
        cache: Any = None
        head = full_precision_head(base_of(self.model))  # logits as the trainer computes them
        for step in range(params.max_new_tokens):
            logits, cache = self._forward(head, token_ids, mask[:, : width + step], position_ids, cache)
            advance(rows, logits, params, self.eos_token_ids, self.tokenizer)
            yield
            alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not alive:
                return
            token_ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
            position_ids = position_ids[:, -1:] + 1
            if (len(rows) - len(alive)) * _DROP_AT >= len(rows):
                rows = [rows[i] for i in alive]
                kept = torch.tensor(alive, device=device)
                token_ids, position_ids, mask = token_ids[kept], position_ids[kept], mask[kept]
                cache.batch_select_indices(kept)

    def _forward(
        self, head: Forwards, token_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Logits [B, V] after the last column, and the key/value cache grown by the columns given."""
        inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": mask, "past_key_values": cache}
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        inputs |= {name: value for name, value in optional.items() if name in self._accepts}
        # no_grad, not inference_mode: buffers a model makes on the way (rotary tables) must stay usable for training.
        with torch.no_grad(), evaluating(self.model), replaced(head):
            output = self._forward_of(**inputs, use_cache=True)
        if output.past_key_values is None:
            raise ValueError(
                f"model {type(self.model).__name__} returned no key/value cache: the engine needs a decoder that "
                "supports use_cache"
            )
        return output.logits[:, -1], output.past_key_values


def _left_padded(sequences: Sequence[Sequence[int]], room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] padded on the left, and their attention mask [B, P + room] with the room for new tokens at 1."""
    width = max(len(sequence) for sequence in sequences)
    token_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width + room, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        token_ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return token_ids.to(device), mask.to(device)
