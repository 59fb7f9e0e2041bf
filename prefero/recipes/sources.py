"""Where a run's rows come from: a built-in world or the user's files, behind one set of questions."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prefero.config import ConfigError, DataConfig
from prefero.data import movies
from prefero.data.formats import (
    Comparison,
    Conversation,
    Demonstration,
    Labelled,
    PromptRow,
    SFTRow,
    Table,
    Trajectory,
    to_labelled,
    to_preferences,
    to_prompts,
    to_sft,
    to_trajectories,
)
from prefero.data.grammar import GrammarWorld
from prefero.data.sources import Rows, read_rows
from prefero.recipes.evaluation import Yardsticks
from prefero.rewards.functions import FunctionReward
from prefero.tracking.text import for_terminal

Split = Literal["train", "heldout"]
RowT = TypeVar("RowT", PromptRow, Comparison, Labelled, SFTRow, Trajectory)
ItemT = TypeVar("ItemT")


class Sources(ABC):
    """Rows for every stage, in a training and a held-out split that share no prompt."""

    group_by: str = "prompt"
    """The column whose rows should meet in one batch of comparisons, so that shared texts are read once."""

    @abstractmethod
    def sft(self, split: Split) -> Sequence[SFTRow]:
        """Rows to imitate."""

    @abstractmethod
    def preferences(self, split: Split) -> Sequence[Comparison]:
        """Comparisons: prompt, chosen, rejected."""

    def labelled(self, split: Split) -> Sequence[Labelled]:
        """Single answers, to be had or not: two of each comparison."""
        return [
            Labelled(f"{row.id}/{side}", row.prompt, getattr(row, side), side == "chosen", row.columns)
            for row in self.preferences(split)
            for side in ("chosen", "rejected")
        ]

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[PromptRow]:
        """Prompts to practise on or to be examined with."""

    @abstractmethod
    def trajectories(self, split: Split) -> Sequence[Trajectory]:
        """Texts with what they were worth."""

    def questions(self, split: Split) -> Sequence[PromptRow]:
        """Prompts to examine with whoever learned from `trajectories`."""
        return self.prompts(split)

    def yardsticks(self) -> Yardsticks:
        """What the world itself measures answers by, besides the reward."""
        return Yardsticks()

    def scratch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        """A fresh model with its tokenizer, where the world brings one."""
        return None


class GrammarSources(Sources):
    """The generated world of the quickstart."""

    def __init__(self, seed: int) -> None:
        self.world = GrammarWorld(seed)

    def sft(self, split: Split) -> Sequence[SFTRow]:
        # Held-out rows come from the training questions too: what stage 1 learns is how people answer.
        rows = self.world.sft_rows(13_000)
        return to_sft(Rows(rows[:12_000] if split == "train" else rows[12_000:], "grammar"))

    def preferences(self, split: Split) -> Sequence[Comparison]:
        rows = self.world.preference_rows(4_000 if split == "train" else 1_000, split)
        return to_preferences(Rows(rows, "grammar"))

    def prompts(self, split: Split) -> Sequence[PromptRow]:
        return to_prompts(Rows([{"prompt": text} for text in self.world.prompts(split)], "grammar"))

    def trajectories(self, split: Split) -> Sequence[Trajectory]:
        rows = self.world.rated_rows(6_000 if split == "train" else 500, split)
        return to_trajectories(Rows(rows, "grammar"))

    def yardsticks(self) -> Yardsticks:
        def gold(prompt: str, completion: str, **columns: Any) -> float:
            return self.world.gold(prompt, completion)

        return Yardsticks(FunctionReward(gold), "hidden taste", self.world.on_topic)

    def scratch(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        return LlamaForCausalLM(self.world.model_config()), self.world.tokenizer()


_MOVIE_SPLIT: dict[Split, movies.Split] = {"train": "train", "heldout": "test"}


class MovieSources(Sources):
    """Human-labelled film reviews, split by film (`prefero fetch rotten-tomatoes`)."""

    group_by = "movie"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sft(self, split: Split) -> Sequence[SFTRow]:
        return to_sft(Rows(movies.sft_rows(_MOVIE_SPLIT[split]), "rotten-tomatoes"))

    def preferences(self, split: Split) -> Sequence[Comparison]:
        rows = movies.preference_rows("train", seed=self.seed) if split == "train" else movies.held_out_pairs()
        return to_preferences(Rows(rows, "rotten-tomatoes"))

    def prompts(self, split: Split) -> Sequence[PromptRow]:
        texts = movies.prompts(_MOVIE_SPLIT[split], 4_000 if split == "train" else 500, seed=self.seed)
        return to_prompts(Rows([{"prompt": text} for text in texts], "rotten-tomatoes"))

    def trajectories(self, split: Split) -> Sequence[Trajectory]:
        return to_trajectories(Rows(movies.rated_rows(_MOVIE_SPLIT[split]), "rotten-tomatoes"))


class FileSources(Sources):
    """The user's own rows; what has no held-out file is split by prompt."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._known: dict[tuple[str, Callable[..., Any]], Sequence[Any]] = {}

    def sft(self, split: Split) -> Sequence[SFTRow]:
        return self._rows("sft", to_sft, split)

    def preferences(self, split: Split) -> Sequence[Comparison]:
        return self._rows("preferences", to_preferences, split)

    def labelled(self, split: Split) -> Sequence[Labelled]:
        return self._rows("preferences", to_labelled, split)

    def prompts(self, split: Split) -> Sequence[PromptRow]:
        return self._rows("prompts", to_prompts, split)

    def trajectories(self, split: Split) -> Sequence[Trajectory]:
        return self._rows("trajectories", to_trajectories, split)

    def questions(self, split: Split) -> Sequence[PromptRow]:
        """Those of `data.prompts`, where it is given; else the different ones of the rewarded texts."""
        if self.config.prompts:
            return self.prompts(split)
        asked: dict[str, PromptRow] = {}
        for found in self.trajectories(split):
            row = found.row
            prompt = row.messages[:-1] if isinstance(row, Conversation) else row.prompt
            if prompt:
                asked.setdefault(repr(prompt), PromptRow(row.id, prompt, found.columns))
        return list(asked.values())

    def _rows(self, name: str, convert: Callable[..., Table[RowT]], split: Split) -> Sequence[RowT]:
        if getattr(self.config, f"{name}_heldout"):
            return self._read(name if split == "train" else f"{name}_heldout", convert)
        return self._split(self._read(name, convert), split)

    def _read(self, key: str, convert: Callable[..., Table[RowT]]) -> Sequence[RowT]:
        path = getattr(self.config, key)
        if not path:
            raise ConfigError(
                f"data.{key} is empty but this stage needs it; give a file or hub name with "
                f"--data.{key.replace('_', '-')}, skip the stage, or choose a built-in world (--data.world grammar)"
            )
        if (key, convert) not in self._known:  # both splits of every stage ask for them
            table = convert(read_rows(path, max_bad_rows=self.config.max_bad_rows))
            _say_what_is_missing(table)
            self._known[key, convert] = table
        return self._known[key, convert]

    def _split(self, rows: Sequence[RowT], split: Split) -> Sequence[RowT]:
        fraction = self.config.heldout_fraction
        whole = len({_question(row) for row in rows}) == 1  # many answers to one prompt are split as they are
        shares = (_share(repr(row) if whole else _question(row)) for row in rows)
        kept = [row for row, share in zip(rows, shares, strict=True) if (share < fraction) == (split == "heldout")]
        if not kept:
            raise ConfigError(
                f"{rows!r}: no row falls into the {split} split at data.heldout_fraction {fraction}; "
                "give more rows, another fraction, or a held-out file"
            )
        return kept


def tell_dropped(count: int, rows: str, limit: str) -> None:
    """Says how many rows were left out for being too long: never in silence."""
    if count:
        print(f"{rows}: {count} rows left out, longer than {limit} tokens", file=sys.stderr)


def _say_what_is_missing(table: Table[Any]) -> None:
    for line, why in table.bad[:5]:
        print(f"{table.source}:{line}: left out: {for_terminal(why, 200)}", file=sys.stderr)
    if table.bad:
        print(f"{table.source}: {len(table.bad)} bad rows left out, {len(table)} kept", file=sys.stderr)
    for why, count in table.dropped.items():
        if count:
            print(f"{table.source}: {count} rows left out ({why})", file=sys.stderr)


def _question(row: PromptRow | Comparison | Labelled | SFTRow | Trajectory) -> str:
    """What decides a row's split: its prompt, so that one prompt never lands in both."""
    if isinstance(row, Trajectory):
        return _question(row.row)
    prompt = row.messages[:-1] if isinstance(row, Conversation) else row.prompt
    # Plain texts have no prompt: each is its own.
    return repr(prompt or (row.completion if isinstance(row, Demonstration) else row))


def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def open_sources(config: DataConfig, seed: int) -> Sources:
    """The sources that `data.world` names."""
    if config.world == "grammar":
        return GrammarSources(seed)
    if config.world == "movies":
        return MovieSources(seed)
    return FileSources(config)


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """`count` items at even distances, so that a small examination still covers the whole split."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
