"""Process rewards: a score for every step of a completion, by a function or by a trained process reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefero.data.collate import right_pad
from prefero.data.spelling import encode_continuation, frame, pad_id
from prefero.data.tokenize import encode_prompt
from prefero.models.trunk import device_of, evaluating
from prefero.rewards.base import as_number, reward_name
from prefero.rewards.functions import FunctionReward
from prefero.types import Prompt, Rollout, Score


def split_steps(text: str, separator: str = "\n\n") -> list[str]:
    """The steps of a text, each with the separator that ends it; put together they are the text again.

    White space alone is no step: it belongs to the one before (or, at the beginning, after). A text without anything
    in it is one step. Raises ValueError for an empty separator.
    """
    if not separator:
        raise ValueError("separator is empty: give the text that ends a step, such as a blank line")
    steps: list[str] = []
    begun = ""
    pieces = text.split(separator)
    for number, piece in enumerate(pieces):
        written = begun + piece + (separator if number < len(pieces) - 1 else "")
        begun = ""
        if piece.strip():
            steps.append(written)
        elif steps:
            steps[-1] += written
        else:
            begun = written
    return steps or [begun]


def step_ends(rollout: Rollout, steps: Sequence[str], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The index of the token with which each step of the completion ends; the last step ends with the last token.

    decode: token ids of the policy to text.
    """
    prompt, token_ids = rollout.prompt.token_ids, rollout.completion.token_ids
    before = len(decode(prompt))

    def written(count: int) -> int:
        return len(decode((*prompt, *token_ids[:count]))) - before

    ends: list[int] = []
    reached = 0
    for step in steps[:-1]:
        reached += len(step)
        low, high = ends[-1] if ends else 0, len(token_ids) - 1  # a token may end several steps
        while low < high:  # the first token with which all of the step is there
            middle = (low + high) // 2
            if written(middle + 1) >= reached:
                high = middle
            else:
                low = middle + 1
        ends.append(low)
    return [*ends, len(token_ids) - 1]


class StepReward:
    """Scores the steps of completions; each earns its points with its last token, and the value is their sum.

    score_steps: called once with the rollouts and the steps of each, gives a list of numbers, one a step, for each.
    decode: token ids of the policy to text. separator: what ends a step. average: points are divided by the number of
    steps, so that more of them are not worth more. The part "steps" of a score is their number, "worst" the least
    points of one. Raises ValueError naming reward, prompt and cure for lists of another length and for anything but
    finite numbers.
    """

    def __init__(
        self,
        score_steps: Callable[[Sequence[Rollout], Sequence[Sequence[str]]], Sequence[Sequence[Any]]],
        decode: Callable[[Sequence[int]], str],
        separator: str = "\n\n",
        average: bool = False,
        name: str = "",
    ) -> None:
        if not isinstance(separator, str) or not separator:
            raise ValueError(f"separator is {separator!r}: give the text that ends a step, such as a blank line")
        if not isinstance(average, bool):
            raise ValueError(f"average is {average!r}: give true or false")
        self.score_steps, self.decode = score_steps, decode
        self.separator, self.average = separator, average
        self.name = name or reward_name(score_steps)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout."""
        steps = [split_steps(rollout.completion.text, self.separator) for rollout in rollouts]
        points = self.score_steps(rollouts, steps)
        return [self._score(*row) for row in zip(rollouts, steps, points, strict=True)]

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a prompt's row lacks what the steps are scored by."""
        check = getattr(self.score_steps, "check", None)
        if check is not None:
            check(*prompts)

    def _score(self, rollout: Rollout, steps: Sequence[str], given: Any) -> Score:
        if isinstance(given, Tensor):
            given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(steps):
            raise ValueError(
                f"reward {self.name!r} gave {given!r:.200} for the {len(steps)} steps of a completion of prompt "
                f"{rollout.prompt.id!r} ({rollout.prompt.text[:200]!r}): return a list of {len(steps)} numbers"
            )
        numbers = [as_number(value, self.name, rollout) for value in given]
        parts = {"steps": float(len(steps)), "worst": min(numbers)}
        share = len(steps) if self.average else 1
        ends = step_ends(rollout, steps, self.decode)
        earned = tuple((end, number / share) for end, number in zip(ends, numbers, strict=True))
        return Score(math.fsum(number for _, number in earned), parts, earned)


class StepFunction:
    """A plain function `f(prompt, steps, **columns) -> list of numbers` as what scores steps.

    It gets the prompt's text, the completion's steps as a list of texts and, by name, the columns of the prompt's row.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self._function = FunctionReward(function, name)
        self.name = self._function.name

    def __call__(self, rollouts: Sequence[Rollout], steps: Sequence[Sequence[str]]) -> list[Any]:
        """One list of numbers a rollout."""
        return [self._function.call(r.prompt, list(texts)) for r, texts in zip(rollouts, steps, strict=True)]

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError when a prompt's row lacks a column that the function needs."""
        self._function.check(*prompts)


class StepModel:
    """A process reward model as what scores steps: a token classification, read at the last token of each step.

    model: maps (input_ids [B, T], attention_mask [B, T]), padded on the right, to `logits` [B, T, 1], which are the
    scores, or [B, T, 2], of which the score is the probability of the second class (the step is right). tokenizer: its
    own. batch_size: texts per forward, longest first. max_length: tokens a text may have: the prompt of a longer one
    loses its beginning; ValueError where that does not suffice.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 32, max_length: int = 2048) -> None:
        self._prefix, _ = frame(tokenizer)
        for key, number in (("batch_size", batch_size), ("max_length", max_length)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"process reward model {key} is {number!r}: give a whole number, 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.name = "process_reward_model"

    def __call__(self, rollouts: Sequence[Rollout], steps: Sequence[Sequence[str]]) -> list[list[float]]:
        """One list of scores a rollout."""
        texts = [self._encode(rollout, own) for rollout, own in zip(rollouts, steps, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
        scores: list[list[float]] = [[] for _ in texts]
        device = device_of(self.model)
        with torch.no_grad(), evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                token_ids, mask = right_pad([texts[i][0] for i in rows], pad_id(self.tokenizer))
                logits = self.model(input_ids=token_ids.to(device), attention_mask=mask.to(device)).logits.float()
                read = logits[..., 0] if logits.shape[-1] == 1 else logits.softmax(dim=-1)[..., 1]
                for place, row in enumerate(rows):
                    scores[row] = read[place, texts[row][1]].tolist()
        return scores

    def _encode(self, rollout: Rollout, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """The ids of prompt and steps, and where each step's last token stands."""
        prompt = rollout.prompt
        ids = list(encode_prompt(self.tokenizer, prompt.text, prompt.id).token_ids if prompt.text else self._prefix)
        start, ends = len(ids), []
        for step in steps:
            ids += encode_continuation(self.tokenizer, step)
            ends.append(max(len(ids), 1) - 1)  # a step of no token is scored where the text before it ends
        cut = max(0, len(ids) - self.max_length)
        if not ids or cut > start - len(self._prefix):
            raise ValueError(
                f"the process reward model reads {self.max_length} tokens, but a completion of prompt {prompt.id!r} "
                f"has {len(ids) - start} in its tokens: lower max_new_tokens, or take a model with a longer context"
            )
        kept = [*ids[: len(self._prefix)], *ids[len(self._prefix) + cut :]]
        return kept, [end - cut for end in ends]
