"""A trained reward model as a reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefero.data.collate import right_pad
from prefero.data.spelling import frame, pad_id
from prefero.data.tokenize import encode_conversation, encode_example, encode_prompt, keep_end
from prefero.models.trunk import device_of, evaluating
from prefero.types import Prompt, Rollout, Score


class ModelReward:
    """Scores rollouts with a reward model that reads them as text, with its own tokenizer.

    Policy and reward model may have different tokenizers. What is read is the prompt's text, the completion's text
    and the end token, tokenised exactly as comparisons are for training; the end token is always there, because the
    model has never seen a text without it (an unfinished completion is for a rule to punish). An empty completion
    reads as the prompt and the end token. A text too long loses its beginning: the completion is what is judged.

    reward_model: maps (token_ids [B, T], attention_mask [B, T]), padded on the right, to scores [B]. batch_size:
    texts per forward, longest first. max_length: tokens a text may have. shift, scale: the score is
    (output - shift) / scale. clamp: then limited to -clamp ... clamp. A prompt that was messages
    (columns["messages"]) is read with the completion through the tokenizer's own chat template, if it has one.
    `num_truncated` counts the texts cut so far; `in_step` is true of a model that was shared out over processes, which
    all of them must call equally often. Raises ValueError for settings that mean nothing.
    """

    def __init__(
        self,
        reward_model: Any,
        tokenizer: Any,
        batch_size: int = 32,
        max_length: int = 512,
        *,
        shift: float = 0.0,
        scale: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        self._prefix, _ = frame(tokenizer)
        _at_least("batch_size", batch_size, 1)
        _at_least("max_length", max_length, len(self._prefix) + 2)
        _finite("shift", shift)
        _finite("scale", scale, above=0.0)
        if clamp is not None:
            _finite("clamp", clamp, above=0.0)
        self.reward_model = reward_model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.shift, self.scale, self.clamp = shift, scale, clamp
        self.name = "reward_model"
        parameters = reward_model.parameters() if isinstance(reward_model, nn.Module) else ()
        self.in_step = any(isinstance(parameter, DTensor) for parameter in parameters)
        self.num_truncated = 0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout; with shift, scale or clamp the model's own output is reported as the part "raw"."""
        prompts: dict[str, Prompt] = {}
        texts = [self._encode(rollout, prompts) for rollout in rollouts]
        raw = self._outputs(texts)
        if self.shift == 0.0 and self.scale == 1.0 and self.clamp is None:
            return [Score(value) for value in raw]
        limit = math.inf if self.clamp is None else self.clamp
        # min and max would turn NaN into the limit: a broken model must stay visible.
        return [
            Score(
                value if math.isnan(value) else min(limit, max(-limit, (value - self.shift) / self.scale)),
                {"raw": value},
            )
            for value in raw
        ]

    def _encode(self, rollout: Rollout, prompts: dict[str, Prompt]) -> list[int]:
        text, completion = rollout.prompt.text, rollout.completion.text
        messages = rollout.prompt.columns.get("messages")
        if messages and self.tokenizer.chat_template:
            spoken = [*messages, {"role": "assistant", "content": completion}]
            ids = encode_conversation(self.tokenizer, spoken, rollout.prompt.id).token_ids
        else:
            if text not in prompts:
                empty = Prompt(rollout.prompt.id, self._prefix, "")
                prompts[text] = encode_prompt(self.tokenizer, text, rollout.prompt.id) if text else empty
            ids = encode_example(self.tokenizer, prompts[text], completion).token_ids
        if len(ids) > self.max_length:
            if not self.num_truncated:
                warnings.warn(f"a reward model reads the last {self.max_length} tokens of longer texts", stacklevel=3)
            self.num_truncated += 1
        return list(keep_end(self.tokenizer, ids, self.max_length))

    def _outputs(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The reward model's outputs in the texts' order."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        results = [math.nan] * len(texts)
        device = device_of(self.reward_model)
        with torch.no_grad(), evaluating(self.reward_model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                token_ids, mask = right_pad([texts[i] for i in rows], pad_id(self.tokenizer))
                output: Tensor = self.reward_model(token_ids.to(device), mask.to(device))
                if output.shape != (len(rows),):
                    raise ValueError(
                        f"reward model gave a tensor of shape {list(output.shape)} for {len(rows)} texts: it must give "
                        f"one score a text, [{len(rows)}]"
                    )
                for row, value in zip(rows, output.float().tolist(), strict=True):
                    results[row] = value
        return results


def _at_least(key: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"reward model {key} is {value!r}: give a whole number, {least} or more")


def _finite(key: str, value: object, above: float = -math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(float(value)) or float(value) <= above:  # type: ignore[arg-type]
        bound = f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"reward model {key} is {value!r}: give a finite number{bound}")
