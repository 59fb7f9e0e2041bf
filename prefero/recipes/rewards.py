"""From the names in a config to reward objects."""

from __future__ import annotations

import functools
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefero.config import ConfigError, RewardPart
from prefero.models.base import Actor, RewardModel
from prefero.models.loading import load_config, load_tokenizer, resolve
from prefero.models.shared import NotSharedError, reward_on
from prefero.recipes.limits import Limits
from prefero.recipes.start import adapter_of
from prefero.rewards.base import Reward
from prefero.rewards.combined import WeightedSum
from prefero.rewards.functions import FunctionReward, load_function
from prefero.rewards.model import ModelReward
from prefero.rewards.rules import Contains, EndsWithEOS, LengthPenalty, MaxWords, NoRepetition, Vader
from prefero.strategies import NaiveStrategy, Strategy
from prefero.types import Prompt


@dataclass(frozen=True)
class Judging:
    """How reward models are used: texts of at most `max_length` tokens, `batch_size` at once, placed by `strategy`.

    trained: the folder of the reward model that `trained` means, if there is one. backbone: a policy whose frozen
    weights a reward model uses where it was trained as adapters on them.
    """

    strategy: Strategy
    trained: Path | None
    max_length: int = 512
    batch_size: int = 32
    backbone: Actor | None = None
    say: Callable[[str], None] = print


def build_reward(parts: Mapping[str, RewardPart], how: Judging) -> Reward:
    """The weighted sum of the named parts; no parts: the reward model just trained.

    Raises ConfigError naming the part that cannot be built and the forms `use` may take.
    """
    chosen = parts_or_default(parts)
    return WeightedSum({name: (build_part(name, part, how), part.weight) for name, part in chosen.items()})


def parts_or_default(parts: Mapping[str, RewardPart]) -> Mapping[str, RewardPart]:
    """The parts of a reward; none named: the reward model just trained."""
    return parts or {"reward_model": RewardPart(use="trained")}


def build_part(name: str, part: RewardPart, how: Judging, key: str = "") -> Reward:
    """One term of a reward. key: where `use` was given, if not among `ppo.rewards`."""
    key = key or f"ppo.rewards.{name}.use"
    kind, _, rest = part.use.partition(":")
    if part.use == "trained":
        if how.trained is None:
            raise ConfigError(_untrained(key))
        return load_model_reward(str(how.trained), how, part.clamp)
    if kind == "model":
        return load_model_reward(rest, how, part.clamp)
    if kind == "rule":
        return build_rule(key, rest)
    if part.use == "vader":
        return Vader()
    if rest:
        with _users_code(f"{key}: loading {part.use}", ValueError):
            function = load_function(part.use)
        return FunctionReward(_guarded(function, name), name=name)
    raise ConfigError(
        f"{key} is {part.use!r}; write trained, model:FOLDER, module:function, file.py:function, rule:NAME or vader"
    )


def _untrained(key: str) -> str:
    return (
        f"{key} is `trained`, but no reward model was trained before this stage; "
        f"name one, e.g. --{key} model:runs/my-run/checkpoints/reward/model "
        "(`prefero evaluate` takes it as --reward-model)"
    )


def check_part(name: str, part: RewardPart, prompts: Sequence[Prompt], *, trained: bool, key: str = "") -> None:
    """Raises what `build_part`, or the reward at one of these prompts, would; reads no reward model's weights.

    trained: whether there will be what `trained` means. key: as in `build_part`.
    """
    if part.use.startswith("model:"):
        check_judge(part.use.removeprefix("model:"))
    elif part.use != "trained":
        reward = build_part(name, part, Judging(NaiveStrategy("cpu"), None), key)
        if isinstance(reward, FunctionReward):
            for prompt in prompts:
                reward.check(prompt)
    elif not trained:
        raise ConfigError(_untrained(key or f"ppo.rewards.{name}.use"))


@contextmanager
def _users_code(doing: str, *as_they_are: type[Exception]) -> Iterator[None]:
    """Says what was being done, and on which line of whose file, when a user's code fails."""
    try:
        yield
    except as_they_are:
        raise
    except Exception as error:  # whatever a user's function may raise: told with its place, its cause kept
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (last.filename, last.lineno)
        raise ConfigError(
            f"{doing} raised {type(error).__name__}: {error} ({file}:{line}); PREFERO_TRACEBACK=1 shows the way there"
        ) from error


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with its own failures told as errors that name the prompt."""

    @functools.wraps(function)
    def score(prompt: str, completion: str, *further: Any, **columns: Any) -> Any:
        with _users_code(f"reward {name!r} on prompt {prompt!r:.200} and completion {completion!r:.200}"):
            return function(prompt, completion, *further, **columns)

    return score


STATISTICS = "score_statistics.json"
"""The file beside an exported reward model that says where its scores' zero and unit lie."""

_RULES: dict[str, Callable[[str], Reward]] = {
    "contains": lambda words: Contains(tuple(words.split(","))),
    "ends_with_eos": lambda text: EndsWithEOS() if not text else _refuse(text),
    "length_penalty": lambda free: LengthPenalty(_whole(free or "0")),
    "max_words": lambda limit: MaxWords(_whole(limit)),
    "no_repetition": lambda size: NoRepetition(_whole(size or "3")),
}


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"it needs a whole number after its name, not {text!r}") from None


def _refuse(text: str) -> Reward:
    raise ValueError(f"this rule takes nothing after its name, not {text!r}")


def build_rule(key: str, text: str) -> Reward:
    """A rule as NAME or NAME:ARGUMENT, e.g. max_words:30, no_repetition:3, contains:please,thanks; key: who uses it."""
    name, _, argument = text.partition(":")
    if name not in _RULES:
        raise ConfigError(f"{key} names the rule {name!r}; the rules are {', '.join(_RULES)}")
    try:
        return _RULES[name](argument)
    except ValueError as error:
        raise ConfigError(f"{key} is 'rule:{text}': {error}; e.g. rule:max_words:30") from None


def check_judge(name: str) -> None:
    """Raises ValueError unless the named model exists and was saved as a judge: a fresh head would score at random."""
    config = load_config(name)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or config.num_labels != 1:
        raise ConfigError(
            f"{name} is no reward model: it was saved as {', '.join(kinds) or 'an unknown kind'} with "
            f"{config.num_labels} outputs, a reward model is a sequence classification with one; train one with "
            "`prefero reward`"
        )


def load_model_reward(name: str, how: Judging, clamp: float = 0.0) -> ModelReward:
    """A reward model with its own tokenizer, from a run of the reward stage or the folder it exported.

    Its scores are shifted and scaled to mean 0 and standard deviation 1 on the comparisons it was examined with.
    """
    check_judge(name)
    model = _on_backbone(name, how)
    if model is None:
        with how.strategy.model_init_context():
            model = RewardModel.from_pretrained(name)
    how.strategy.prepare(model.requires_grad_(False))
    max_length = Limits.of(model.model.config).shorten(how.max_length)
    mean, std = read_statistics(Path(resolve(name)))
    return ModelReward(
        model, load_tokenizer(name), how.batch_size, max_length, shift=mean, scale=std, clamp=clamp or None
    )


def _on_backbone(name: str, how: Judging) -> RewardModel | None:
    """The reward model on the policy's weights, where that is wanted and it was trained so."""
    folder, adapter = Path(resolve(name)), adapter_of(name)
    if how.backbone is None or adapter is None:
        return None
    try:
        return reward_on(how.backbone, adapter)
    except NotSharedError as error:
        how.say(f"{folder}: the reward model keeps a network of its own: {error}")
        return None


def write_statistics(folder: Path, mean: float, std: float) -> None:
    """Keeps the mean and the standard deviation of a reward model's scores beside it."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"the reward model's scores have mean {mean} and standard deviation {std}: it judges every text alike; "
            "train longer, with another learning rate, or on more comparisons"
        )
    (folder / STATISTICS).write_text(json.dumps({"mean": mean, "std": std}, indent=2) + "\n", encoding="utf-8")


def read_statistics(folder: Path) -> tuple[float, float]:
    """What `write_statistics` kept; (0, 1), the model's own scale, where there is nothing."""
    file = folder / STATISTICS
    if not file.is_file():
        return 0.0, 1.0
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
        return float(numbers["mean"]), float(numbers["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must hold the numbers `mean` and `std` ({error}); delete it to use raw scores"
        ) from None
