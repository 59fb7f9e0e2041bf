"""From the names in a config to reward objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from prefero.config import ConfigError, RewardPart
from prefero.models.base import RewardModel
from prefero.models.loading import load_tokenizer
from prefero.rewards.base import Reward
from prefero.rewards.combined import WeightedSum
from prefero.rewards.functions import FunctionReward, load_function
from prefero.rewards.model import ModelReward
from prefero.rewards.rules import Contains, EndsWithEOS, LengthPenalty, MaxWords, NoRepetition, Vader


def build_reward(parts: Mapping[str, RewardPart], trained: Path | None, max_length: int, batch_size: int) -> Reward:
    """The weighted sum of the named parts; no parts: the reward model at `trained`.

    Raises ConfigError naming the part that cannot be built and the forms `use` may take.
    """
    if not parts:
        parts = {"reward_model": RewardPart(use="trained")}
    terms = {
        name: (build_part(name, part, trained, max_length, batch_size), part.weight) for name, part in parts.items()
    }
    return WeightedSum(terms)


def build_part(name: str, part: RewardPart, trained: Path | None, max_length: int, batch_size: int) -> Reward:
    """One term of a reward."""
    kind, _, rest = part.use.partition(":")
    if part.use == "trained":
        if trained is None:
            raise ConfigError(
                f"ppo.rewards.{name}.use is `trained`, but no reward model was trained before this stage; "
                f"name one, e.g. --ppo.rewards.{name}.use model:runs/my-run/checkpoints/reward/model"
            )
        return load_model_reward(trained, max_length, batch_size, part.clamp)
    if kind == "model":
        return load_model_reward(Path(rest), max_length, batch_size, part.clamp)
    if kind == "rule":
        return build_rule(name, rest)
    if part.use == "vader":
        return Vader()
    if rest:
        return FunctionReward(load_function(part.use), name=name)
    raise ConfigError(
        f"ppo.rewards.{name}.use is {part.use!r}; write trained, model:FOLDER, module:function, file.py:function, "
        "rule:NAME or vader"
    )


_RULES: dict[str, Callable[[str], Reward]] = {
    "contains": lambda words: Contains(tuple(words.split(","))),
    "ends_with_eos": lambda _: EndsWithEOS(),
    "length_penalty": lambda free: LengthPenalty(int(free or 0)),
    "max_words": lambda limit: MaxWords(int(limit)),
    "no_repetition": lambda size: NoRepetition(int(size or 3)),
}


def build_rule(part: str, text: str) -> Reward:
    """A rule as NAME or NAME:ARGUMENT, e.g. max_words:30, no_repetition:3, contains:please,thanks."""
    name, _, argument = text.partition(":")
    if name not in _RULES:
        raise ConfigError(f"ppo.rewards.{part}.use names the rule {name!r}; the rules are {', '.join(_RULES)}")
    try:
        return _RULES[name](argument)
    except ValueError as error:
        raise ConfigError(f"ppo.rewards.{part}.use is 'rule:{text}': {error}; e.g. rule:max_words:30") from None


def load_model_reward(folder: Path, max_length: int, batch_size: int, clamp: float = 0.0) -> ModelReward:
    """A reward model with its own tokenizer, from the folder that the reward stage exported."""
    model = RewardModel.from_pretrained(str(folder))
    model.requires_grad_(False)
    tokenizer = load_tokenizer(str(folder))
    return ModelReward(model, tokenizer, batch_size=batch_size, max_length=max_length, clamp=clamp or None)
