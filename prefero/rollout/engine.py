"""The seam behind which completions are generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from prefero.types import Completion, Prompt

_MOST = 1e6
"""The most that may be added to a logit: it must stay a number in float32."""


def _check(key: str, value: object, ok: bool, cure: str) -> None:
    if not ok:
        raise ValueError(f"sampling.{key} is {value!r}: {cure}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    max_new_tokens: the most tokens a completion may have, EOS included. temperature: logits are divided by it.
    top_k, top_p, min_p: draw only from the top_k likeliest tokens (0: all), then from the smallest set of likeliest
    tokens holding top_p of the probability (1: all), then from those at least min_p times as likely as the likeliest
    (0: all). min_new_tokens: EOS is forbidden, and `stop` not looked for, until that many tokens are there.
    repetition_penalty: divides the positive logits of tokens in prompt and answer and multiplies the negative ones (1:
    off). logit_bias: what is added to a token's logit, by token id. stop: texts that end an answer; its text ends
    before the one that did, its tokens with the one that completed it.
    seed, step: with prompt id, sample index and position the whole key of the randomness; the same key draws the
    same number in any batch, order or engine. greedy: always the likeliest token.
    Raises ValueError for values that mean nothing.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    seed: int = 0
    step: int = 0
    greedy: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        new, least = self.max_new_tokens, self.min_new_tokens
        _check("max_new_tokens", new, _is_int(new) and new >= 1, "give a whole number of tokens, 1 or more")
        _check(
            "temperature",
            self.temperature,
            _is_number(self.temperature) and self.temperature > 0,
            "give a number above 0 (for the likeliest token always, set greedy to true)",
        )
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "give a whole number; 0 keeps every token")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "give a number in (0, 1]; 1 is off")
        _check(
            "min_new_tokens",
            least,
            _is_int(least) and 0 <= least <= new,
            f"give a whole number between 0 and max_new_tokens ({new})",
        )
        for key, value in (("seed", self.seed), ("step", self.step)):
            _check(key, value, _is_int(value) and 0 <= value < 2**63, "give a whole number from 0 to 2^63 - 1")
        _check("greedy", self.greedy, isinstance(self.greedy, bool), "give true or false")
        _check("min_p", self.min_p, _is_number(self.min_p) and 0 <= self.min_p < 1, "give a number in [0, 1); 0 is off")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _is_number(penalty) and penalty > 0, "give a number above 0; 1 is off")
        bias, stop = self.logit_bias, self.stop
        sound = isinstance(bias, Mapping) and all(
            _is_int(token) and token >= 0 and _is_number(added) and abs(added) <= _MOST for token, added in bias.items()
        )
        _check("logit_bias", bias, sound, f"give numbers, at most {_MOST:g} from 0, by token id")
        texts = isinstance(stop, tuple) and all(isinstance(text, str) and text for text in stop)
        _check("stop", stop, texts, "give a tuple of texts, none of them empty")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from something else than the softmax at the temperature."""
        return (
            self.greedy
            or self.top_k > 0
            or self.top_p < 1
            or self.min_new_tokens > 0
            or self.changes_logits
            or (self.min_p > 0)
        )

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are drawn by other logits than the model's."""
        return self.repetition_penalty != 1.0 or bool(self.logit_bias)


@dataclass(frozen=True)
class TruncatedCompletion(Completion):
    """A completion drawn from another distribution than the model's (truncated, penalised, of a minimum length).

    `logprobs` stays log p under the temperature alone, over the whole vocabulary: what trainers recompute.
    `sampling_logprobs` is log p under the distribution that was really drawn from (0 where the choice was forced).
    """

    sampling_logprobs: tuple[float, ...]


def sampling_logprobs(completion: Completion) -> tuple[float, ...]:
    """Log p of each token under the distribution it was really drawn from."""
    return completion.sampling_logprobs if isinstance(completion, TruncatedCompletion) else completion.logprobs


@runtime_checkable
class Engine(Protocol):
    """Answers prompts with the policy's current weights."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order asked; a prompt asked n times gets samples 0 to n-1."""
        ...

    def update_weights(self, actor: Any) -> None:
        """From now on generates with this actor's weights."""
        ...
