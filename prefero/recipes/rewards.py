"""From the names in a config to reward objects."""

from __future__ import annotations

import functools
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefero.config import ConfigError, RewardPart
from prefero.data.sources import nearest
from prefero.models.base import Actor, RewardModel
from prefero.models.loading import load_config, load_token_classifier, load_tokenizer, resolve
from prefero.models.shared import NotSharedError, reward_on
from prefero.recipes.limits import Limits
from prefero.recipes.start import adapter_of
from prefero.rewards.base import Checks, Reward
from prefero.rewards.combined import WeightedSum
from prefero.rewards.functions import FunctionReward, load_function
from prefero.rewards.model import ModelReward
from prefero.rewards.process import StepFunction, StepModel, StepReward
from prefero.rewards.rules import (
    Contains,
    EndsWithEOS,
    Exact,
    Format,
    LengthPenalty,
    MaxWords,
    NoRepetition,
    SoftLimit,
    Vader,
)
from prefero.rewards.verified import CodeTests, MathAnswer, ReasoningGym
from prefero.strategies import NaiveStrategy, Strategy
from prefero.types import Prompt


@dataclass(frozen=True)
class Judging:
    """How reward models are used: texts of at most `max_length` tokens, `batch_size` at once, placed by `strategy`.

    trained: the folder of the reward model that `trained` means, if there is one. backbone: a policy whose frozen
    weights a reward model uses where it was trained as adapters on them. tokenizer: the policy's, which rewards of
    steps need.
    """

    strategy: Strategy
    trained: Path | None
    max_length: int = 512
    batch_size: int = 32
    backbone: Actor | None = None
    say: Callable[[str], None] = print
    tokenizer: Any = None

    def decode(self, token_ids: Sequence[int]) -> str:
        """What the policy's tokens say."""
        if self.tokenizer is None:
            raise ConfigError("a reward of steps was given where no policy answers; use it in ppo.rewards")
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


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
        return build_rule(key, rest, part.options)
    if kind == "process":
        check_step_judge(rest)
        return _steps(name, load_step_model(rest, how), part, how, key)
    if part.use == "vader":
        return Vader()
    if rest:
        with _users_code(f"{key}: loading {part.use}", ValueError):
            function = load_function(part.use)
        if part.options:
            return _steps(name, StepFunction(_guarded(function, name), name), part, how, key)
        return FunctionReward(_guarded(function, name), name=name)
    raise ConfigError(
        f"{key} is {part.use!r}; write trained, model:FOLDER, process:FOLDER, module:function, file.py:function, "
        "rule:NAME or vader"
    )


def _untrained(key: str) -> str:
    return (
        f"{key} is `trained`, but no reward model was trained before this stage; "
        f"name one, e.g. --{key.removeprefix('--')} model:runs/my-run/checkpoints/reward/model "
        "(`prefero evaluate` takes it as --reward-model)"
    )


def check_part(name: str, part: RewardPart, prompts: Sequence[Prompt], *, trained: bool, key: str = "") -> None:
    """Raises what `build_part`, or the reward at one of these prompts, would; reads no reward model's weights.

    trained: whether there will be what `trained` means. key: as in `build_part`.
    """
    if part.use.startswith("model:"):
        check_judge(part.use.removeprefix("model:"))
    elif part.use.startswith("process:"):
        check_step_judge(part.use.removeprefix("process:"))
    elif part.use != "trained":
        reward = build_part(name, part, Judging(NaiveStrategy("cpu"), None), key)
        if isinstance(reward, Checks):
            reward.check(*prompts)
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


@dataclass(frozen=True)
class _Rule:
    """How a rule is built: from options by name, of which one may also stand behind the rule's own name."""

    build: Callable[..., Reward]
    first: str = ""
    read: Callable[[str], Any] = str
    needed: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"it needs a whole number after its name, not {text!r}") from None


_RULES: dict[str, _Rule] = {
    "code": _Rule(CodeTests, "column"),
    "contains": _Rule(Contains, "words", _words, needed=True),
    "ends_with_eos": _Rule(EndsWithEOS),
    "exact": _Rule(Exact, "column"),
    "format": _Rule(Format, "pattern"),
    "length_penalty": _Rule(LengthPenalty, "free", _whole),
    "math": _Rule(MathAnswer, "column"),
    "max_words": _Rule(MaxWords, "limit", _whole, needed=True),
    "no_repetition": _Rule(NoRepetition, "size", _whole),
    "reasoning-gym": _Rule(ReasoningGym),
    "soft_limit": _Rule(SoftLimit, "limit", _whole),
}


def build_rule(key: str, text: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A rule as NAME or NAME:ARGUMENT, e.g. max_words:30, no_repetition:3, contains:please,thanks, with its options.

    key: who uses it. Raises ConfigError naming the key and the rule for one that is unknown or cannot be.
    """
    name, _, argument = text.partition(":")
    if name not in _RULES:
        raise ConfigError(f"{key} names the rule {name!r}; the rules are {', '.join(_RULES)}")
    rule, given = _RULES[name], dict(options or {})
    try:
        if argument and not rule.first:
            raise ValueError(f"this rule takes nothing after its name, not {argument!r}")
        if argument or (rule.needed and rule.first not in given):
            given = {rule.first: rule.read(argument), **given}
        _check_options(rule.build, given)
        return rule.build(**given)
    except ValueError as error:
        example = "; e.g. rule:max_words:30" if rule.needed else ""
        raise ConfigError(f"{key} is 'rule:{text}': {error}{example}") from None


def _check_options(build: Callable[..., Any], given: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raises ValueError for an option that is unknown, or one that is needed and missing."""
    takes = {name: p for name, p in inspect.signature(build).parameters.items() if name != "name"}
    known = known or list(takes)
    for option in given:
        if option not in known:
            raise ValueError(
                f"unknown option {option!r}{nearest(option, known)}; it takes {', '.join(known) or 'none'}"
            )
    for option in known:
        if takes[option].default is inspect.Parameter.empty and option not in given:
            raise ValueError(f"it needs the option {option!r}")


def _steps(name: str, score_steps: StepFunction | StepModel, part: RewardPart, how: Judging, key: str) -> StepReward:
    try:
        _check_options(StepReward, part.options, ("separator", "average"))
        return StepReward(score_steps, how.decode, name=name, **part.options)
    except ValueError as error:
        raise ConfigError(f"{key.removesuffix('.use')}.options: {error}") from None


def check_step_judge(name: str) -> None:
    """Raises ValueError unless the named model exists and was saved as a judge of steps."""
    config = load_config(name)
    kinds = config.architectures or []
    if not any(kind.endswith("ForTokenClassification") for kind in kinds) or config.num_labels not in (1, 2):
        raise ConfigError(
            f"{name} is no process reward model: it was saved as {', '.join(kinds) or 'an unknown kind'} with "
            f"{config.num_labels} outputs; it must be a token classification with one (a score) or two (wrong, right)"
        )


def load_step_model(name: str, how: Judging) -> StepModel:
    """A process reward model with its own tokenizer; whole in every process."""
    model = load_token_classifier(name).requires_grad_(False).to(how.strategy.device)
    context = Limits.of(model.config).context
    return StepModel(model, load_tokenizer(name), how.batch_size, *(() if context is None else (context,)))


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
