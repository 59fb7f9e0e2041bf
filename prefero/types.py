"""The words the layers speak: what was asked, what was answered, what was scored, what is learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Metrics: TypeAlias = dict[str, float]
Message: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked: exact token ids, their readable text, and the data row's further columns.

    first_sample: the number of its first sample, above 0 where it is asked again and must not draw the same.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    first_sample: int = 0


@dataclass(frozen=True)
class Completion:
    """What a policy answered; `token_ids` end with the EOS token when `finish_reason` is "stop".

    `logprobs` holds log p(token | everything before it) under the sampling temperature, one entry a token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Rollout:
    """A prompt and one completion of it: what happened, plain and replayable."""

    prompt: Prompt
    completion: Completion


@dataclass(frozen=True)
class Score:
    """A reward and the named parts it was made of (before weights).

    steps: what of the value was earned before the end, as (index of the completion's token, points); the rest of the
    value is earned by the last token. So the points of all tokens are the value.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout with its reward."""

    score: Score


@dataclass
class Experience:
    """What one update needs; complete at birth.

    B rows of S tokens, of which the last A columns are actions (prompts are padded on the left, completions on
    the right). Per-token tensors are [B, A] and speak of the token *at* that position.

    sequences: [B, S] token ids. attention_mask: [B, S], 1 on real tokens. action_mask: [B, A], 1 on the policy's
    own tokens up to and including the first EOS. action_log_probs: [B, A] under the policy that sampled.
    values: [B, A], the critic's value of the state in which that token was chosen. reward: [B], the score.
    advantages: [B, A], not yet whitened, so that returns = advantages + values. In the sequence mode values and
    advantages are [B]. info: per-row numbers [B] that are only reported (score, KL, length, ...).
    """

    sequences: Tensor
    action_log_probs: Tensor
    values: Tensor
    reward: Tensor
    advantages: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    info: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.sequences.shape[0])

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.shape[1])

    def map(self, function: Callable[[Tensor], Tensor]) -> Experience:
        """A new experience with `function` applied to every tensor."""
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "info"}
        return Experience(**tensors, info={name: function(value) for name, value in self.info.items()})

    def to_device(self, device: torch.device | str | int) -> Experience:
        """Moves every tensor in place and returns the experience itself."""
        self.__dict__.update(self.map(lambda tensor: tensor.to(device)).__dict__)
        return self

    def pin_memory(self) -> Experience:
        """Pins every tensor's memory in place (a no-op without an accelerator) and returns the experience itself."""
        if torch.cuda.is_available():
            self.__dict__.update(self.map(lambda tensor: tensor.pin_memory()).__dict__)
        return self


@dataclass(frozen=True)
class TokenBatch:
    """Rows to imitate: [B, T] ids (padded on the right), 1 on real tokens, 1 on the tokens whose loss counts."""

    token_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True)
class TrajectoryBatch(TokenBatch):
    """Rows to learn values from: the tokens of the loss mask are actions, rewards [B, T] come after the tokens."""

    rewards: Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """N comparisons over M distinct texts, each text forwarded once.

    token_ids, attention_mask: [M, T], padded on the right. chosen, rejected: [N] row indices. margin: [N]. counted:
    [N], false for pairs whose texts are only forwarded to keep processes in step.
    """

    token_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    rejected: Tensor
    margin: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return int(self.chosen.shape[0])


@dataclass(frozen=True)
class PairBatch:
    """N pairs of completions over M distinct texts (prompt and completion), each text forwarded once.

    token_ids, attention_mask: [M, T], padded on the right. loss_mask: [M, T], 1 on the completion's tokens. chosen,
    rejected: [N] row indices. counted: [N], false for pairs whose texts are only forwarded to keep processes in step.
    """

    token_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    chosen: Tensor
    rejected: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return int(self.chosen.shape[0])


@dataclass(frozen=True)
class ReferencedPairBatch(PairBatch):
    """Pairs that know what the reference makes of them: `ref_logprobs` [M], summed over each completion's tokens."""

    ref_logprobs: Tensor


@dataclass(frozen=True)
class LabelledBatch:
    """N texts (prompt and completion) with a verdict each, and beside each one its prompt with another's completion.

    token_ids, attention_mask, loss_mask: [N, T], as in `PairBatch`. unrelated_ids, unrelated_attention_mask,
    unrelated_loss_mask: [N, U], likewise. desirable: [N], whether the completion is one to be had. counted: [N].
    """

    token_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    unrelated_ids: Tensor
    unrelated_attention_mask: Tensor
    unrelated_loss_mask: Tensor
    desirable: Tensor
    counted: Tensor

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True)
class ReferencedLabelledBatch(LabelledBatch):
    """Labelled texts that know what the reference makes of them, summed over each completion's tokens: [N] both."""

    ref_logprobs: Tensor
    ref_unrelated_logprobs: Tensor


@dataclass(frozen=True)
class Loss:
    """A scalar to descend on, whose model it belongs to, and numbers to report (sums, already divided)."""

    role: str
    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
