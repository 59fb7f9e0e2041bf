"""Rewards that are rules: length, ending, repetition, words, and word-list sentiment."""

from __future__ import annotations

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefero.rewards.base import column_of
from prefero.types import Prompt, Rollout, Score


def _whole(rule: str, key: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{rule} {key} is {value!r}: give a whole number, {least} or more")


class _Rule(ABC):
    """A reward that looks at one rollout at a time."""

    name: str

    @abstractmethod
    def score(self, rollout: Rollout) -> float:
        """The rule's number for one rollout."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout."""
        return [Score(self.score(rollout)) for rollout in rollouts]


@dataclass(frozen=True)
class EndsWithEOS(_Rule):
    """1 for a completion that ended by itself, 0 for one cut off at max_new_tokens."""

    name: str = "ends_with_eos"

    def score(self, rollout: Rollout) -> float:
        """1 or 0."""
        return float(rollout.completion.finish_reason == "stop")


@dataclass(frozen=True)
class MaxWords(_Rule):
    """1 for a completion of at most `limit` words (split at white space), 0 for a longer one."""

    limit: int = 50
    name: str = "max_words"

    def __post_init__(self) -> None:
        _whole(self.name, "limit", self.limit, 0)

    def score(self, rollout: Rollout) -> float:
        """1 or 0."""
        return float(len(rollout.completion.text.split()) <= self.limit)


@dataclass(frozen=True)
class NoRepetition(_Rule):
    """The share of a completion's word n-grams that are different: 1 without repetition, near 0 for a loop.

    size: words in an n-gram. A completion with fewer words than that has nothing to repeat: 1.
    """

    size: int = 3
    name: str = "no_repetition"

    def __post_init__(self) -> None:
        _whole(self.name, "size", self.size, 1)

    def score(self, rollout: Rollout) -> float:
        """Between 0 (exclusive) and 1."""
        words = rollout.completion.text.lower().split()
        grams = [tuple(words[i : i + self.size]) for i in range(len(words) - self.size + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0


@dataclass(frozen=True)
class LengthPenalty(_Rule):
    """0 up to `free` tokens, then minus one for every `scale` tokens more (EOS counts as a token)."""

    free: int = 0
    scale: float = 1.0
    name: str = "length_penalty"

    def __post_init__(self) -> None:
        _whole(self.name, "free", self.free, 0)
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueError(f"{self.name} scale is {self.scale!r}: give the number of tokens that costs 1, above 0")

    def score(self, rollout: Rollout) -> float:
        """0 or less."""
        return -max(0, len(rollout.completion.token_ids) - self.free) / self.scale


@dataclass(frozen=True)
class Contains(_Rule):
    """The share of `words` that occur in the completion as whole words, whatever their case and punctuation."""

    words: tuple[str, ...]
    name: str = "contains"

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words:
            raise ValueError(f"{self.name} words is {self.words!r}: give a list of one or more words")

    def score(self, rollout: Rollout) -> float:
        """Between 0 and 1."""
        present = {word.strip(".,;:!?\"'()[]") for word in rollout.completion.text.lower().split()}
        return sum(word.lower() in present for word in self.words) / len(self.words)


@dataclass(frozen=True)
class Exact(_Rule):
    """1 where the completion's answer is the text in a column of the row, else 0; white space is not compared.

    pattern: where the answer is found, its last occurrence (of its first group, if it has one); without one, the whole
    completion is the answer. ignore_case: capitals are not compared either.
    """

    column: str = "answer"
    pattern: str = ""
    ignore_case: bool = False
    name: str = "exact"

    def __post_init__(self) -> None:
        _pattern(self.name, self.pattern)

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a row has no such column."""
        for prompt in prompts:
            column_of(prompt, self.column, self.name)

    def score(self, rollout: Rollout) -> float:
        """1 or 0."""
        answer: str | None = rollout.completion.text
        if self.pattern:
            found = list(re.finditer(self.pattern, rollout.completion.text, re.DOTALL))
            answer = found[-1][found[-1].re.groups and 1] if found else None
        true = str(column_of(rollout.prompt, self.column, self.name))
        return float(answer is not None and self._plain(answer) == self._plain(true))

    def _plain(self, text: str) -> str:
        words = " ".join(text.split())
        return words.casefold() if self.ignore_case else words


@dataclass(frozen=True)
class Format(_Rule):
    """1 where the whole completion, white space at its ends apart, has the form of `pattern`, else 0.

    pattern: a regular expression in which a full stop also stands for line breaks.
    """

    pattern: str
    name: str = "format"

    def __post_init__(self) -> None:
        _pattern(self.name, self.pattern)
        if not self.pattern:
            raise ValueError(f"{self.name} pattern is empty: give a regular expression")

    def score(self, rollout: Rollout) -> float:
        """1 or 0."""
        return float(re.fullmatch(self.pattern, rollout.completion.text.strip(), re.DOTALL) is not None)


@dataclass(frozen=True)
class SoftLimit(_Rule):
    """0 up to `limit` - `buffer` tokens, from there falling in a line to -1 at `limit`, and -1 beyond.

    Source: DAPO (arXiv:2503.14476, eq. 13), whose limit is 20480 with a buffer of 4096. EOS counts as a token.
    """

    limit: int
    buffer: int
    name: str = "soft_limit"

    def __post_init__(self) -> None:
        _whole(self.name, "limit", self.limit, 1)
        _whole(self.name, "buffer", self.buffer, 1)
        if self.buffer > self.limit:
            raise ValueError(f"{self.name} buffer is {self.buffer}: give no more than the limit, {self.limit}")

    def score(self, rollout: Rollout) -> float:
        """Between -1 and 0."""
        over = len(rollout.completion.token_ids) - (self.limit - self.buffer)
        return -min(1.0, max(0.0, over / self.buffer))


def _pattern(rule: str, pattern: object) -> None:
    try:
        if not isinstance(pattern, str):
            raise TypeError("it is no text")
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{rule} pattern is {pattern!r}, no regular expression ({error}): correct it") from None


class Vader(_Rule):
    """VADER's compound sentiment, -1 to 1: a word list with rules (Hutto and Gilbert, 2014).

    of: what is read, the "completion" alone or "all", prompt and completion. Raises ValueError naming the extra when
    the package is not installed.
    """

    def __init__(self, of: Literal["completion", "all"] = "completion", name: str = "vader") -> None:
        if of not in ("completion", "all"):
            raise ValueError(f'{name} of is {of!r}: give "completion" or "all"')
        if importlib.util.find_spec("vaderSentiment") is None:
            raise ValueError('reward vader needs the package vaderSentiment: pip install "prefero[eval]"')
        module = importlib.import_module("vaderSentiment.vaderSentiment")
        self.of = of
        self.name = name
        self._analyser: Any = module.SentimentIntensityAnalyzer()

    def score(self, rollout: Rollout) -> float:
        """Between -1 and 1."""
        text = rollout.completion.text if self.of == "completion" else rollout.prompt.text + rollout.completion.text
        return float(self._analyser.polarity_scores(text)["compound"])
