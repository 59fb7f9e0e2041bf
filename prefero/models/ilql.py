"""A language model with value heads (ILQL): two Q, their slow copies, and V, all on its last hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from prefero.functional import ilql
from prefero.functional import logprobs as lp
from prefero.models.base import Actor, _at
from prefero.models.loading import load_causal_lm, resolve
from prefero.models.lora import below
from prefero.models.trunk import freeze, head_width, trunk_of

HEADS_FILE = "ilql_heads.safetensors"
"""Beside an exported language model: its value heads, and how much they are heard."""


class Readings(NamedTuple):
    """What `functional.ilql.losses` wants to know of the tokens that were chosen, [B, A] each; zeros elsewhere."""

    logprobs: Tensor
    qs: tuple[Tensor, Tensor]
    q_logprobs: tuple[Tensor, Tensor]
    target_qs: tuple[Tensor, Tensor]
    values: Tensor


class _Head(nn.Module):
    """Two layers from a hidden state to one number for each output, in float32 or better."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, outputs)

    def features(self, hidden: Tensor) -> Tensor:
        """What the outer layer is applied to."""
        found: Tensor = self.inner(hidden.to(self.inner.weight.dtype))
        return found.relu()

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.outer(self.features(hidden))
        return found

    def of(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """The outputs [N] of one token each, without computing those of all the others."""
        weight, bias = self.outer.weight, self.outer.bias
        return (features * weight.index_select(0, token_ids)).sum(-1) + bias.index_select(0, token_ids)


class ILQLHeads(nn.Module):
    """Q twice and their copies, which learn by `sync` alone, as wide as the vocabulary; and V."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.q1, self.q2 = _Head(width, vocabulary), _Head(width, vocabulary)
        self.target_q1, self.target_q2 = freeze(deepcopy(self.q1)), freeze(deepcopy(self.q2))
        self.v = _Head(width, 1)

    def sync(self, rate: float) -> None:
        """Moves the copies towards what they were copied from: see `functional.ilql.polyak_`."""
        for target, source in ((self.target_q1, self.q1), (self.target_q2, self.q2)):
            ilql.polyak_(target.parameters(), source.parameters(), rate)

    def read(self, hidden: Tensor, token_ids: Tensor) -> list[Tensor]:
        """Q1, Q2, their log-softmax, Q̂1, Q̂2 (of the tokens [N] chosen at hidden [N, D]) and V: [N] each."""
        with torch.autocast(hidden.device.type, enabled=False):
            seen = [head.features(hidden) for head in (self.q1, self.q2)]
            qs = [head.of(part, token_ids) for head, part in zip((self.q1, self.q2), seen, strict=True)]
            chances = [
                lp.selected(part, head.outer.weight, head.outer.bias, token_ids)[0]
                for head, part in zip((self.q1, self.q2), seen, strict=True)
            ]
            with torch.no_grad():
                targets = [head.of(head.features(hidden), token_ids) for head in (self.target_q1, self.target_q2)]
            return [*qs, *chances, *targets, self.v(hidden).squeeze(-1)]

    @torch.no_grad()
    def guide(self, logits: Tensor, hidden: Tensor, beta: float) -> Tensor:
        """Logits [..., V] at hidden [..., D], moved by the advantages: see `functional.ilql.guided`."""
        with torch.autocast(hidden.device.type, enabled=False):
            target_qs = [self.target_q1(hidden), self.target_q2(hidden)]
            return ilql.guided(logits, target_qs, self.v(hidden).squeeze(-1), beta)


class ILQLActor(Actor):
    """A policy that imitates, and value heads that guide it when it answers.

    beta: how much they are heard when an engine or `generate` samples; 0 is the imitating policy alone. Whoever asks
    for log-probabilities gets those of the imitating policy.
    """

    def __init__(
        self, model: Any, lora_rank: int = 0, lora_train_bias: str = "none", lora_alpha: float | None = None,
        beta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(model, lora_rank, lora_train_bias, lora_alpha)
        head = self.model.get_output_embeddings()
        self.heads = ILQLHeads(head_width(trunk_of(self.model).config), int(head.weight.shape[0]))
        self.beta = beta

    def forward(
        self,
        sequences: Tensor,
        num_actions: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
        action_mask: Tensor | None = None,
        return_readings: bool = False,
    ) -> Any:
        """As an actor's; with return_readings `Readings` of the actions instead, from the same pass."""
        if not return_readings:
            return super().forward(sequences, num_actions, attention_mask, temperature, return_entropy, action_mask)
        mask = torch.ones_like(sequences[:, -num_actions:]) if action_mask is None else action_mask
        logprobs, _, hidden = self._read(sequences, num_actions, attention_mask, temperature, False, mask)
        index = mask.reshape(-1).nonzero().squeeze(1)
        chosen = sequences[:, -num_actions:].flatten().index_select(0, index)
        found = self.heads.read(hidden.flatten(0, 1).index_select(0, index), chosen)
        q1, q2, chance1, chance2, target1, target2, values = (_at(mask, numbers) for numbers in found)
        return Readings(logprobs, (q1, q2), (chance1, chance2), (target1, target2), values)

    def decode(self, **inputs: Any) -> Any:
        """As an actor's, the logits of the last tokens guided."""
        if not self.beta:
            return super().decode(**inputs)
        with self._watched() as seen:
            output = super().decode(**inputs)
        if "texts" in inputs:
            return self.heads.guide(output, seen[0].view(*output.shape[:-1], -1), self.beta)
        output.logits = self.heads.guide(output.logits[:, -1:], seen[0][:, -1:], self.beta)
        return output

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        """As an actor's, guided."""
        if not self.beta:
            return super().generate(input_ids, *arguments, **options)
        with self._watched() as seen:
            return super().generate(input_ids, *arguments, **options, logits_processor=self._processors(seen))

    def _processors(self, seen: list[Tensor]) -> LogitsProcessorList:
        actor = self

        class Guide(LogitsProcessor):  # type: ignore[misc]
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return actor.heads.guide(scores, seen[0][:, -1], actor.beta)

        return LogitsProcessorList([Guide()])

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """A list that holds the hidden states that the output head was last given."""
        seen: list[Tensor] = []

        def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[:] = [given[0]]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            yield seen
        finally:
            hook.remove()

    def to_checkpoint(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As an actor's, and the heads."""
        return super().to_checkpoint(own) | {k: tensor for k, tensor in own.items() if k.startswith("heads.")}

    def from_checkpoint(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As an actor's; the heads stay what they are where the file is a plain policy's."""
        heads = {name: saved.get(name, tensor) for name, tensor in own.items() if name.startswith("heads.")}
        return super().from_checkpoint(own, {k: t for k, t in saved.items() if k not in heads}) | heads

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Any = None,
        dtype: torch.dtype | str = torch.float32,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A plain folder of the imitating policy, as an actor's, and the heads with `beta` in a file of their own."""
        own = self.state_dict() if state is None else state
        super().save_pretrained(directory, tokenizer, dtype, own)
        heads = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in below("heads.", own).items()}
        save_file(heads, Path(directory) / HEADS_FILE, metadata={"beta": repr(self.beta)})

    @classmethod
    def from_pretrained(cls, directory: str | Path, beta: float | None = None, **options: Any) -> ILQLActor:
        """Reads what `save_pretrained` wrote. beta: None is the one it was saved with; options: of `load_causal_lm`.

        Raises ValueError for a folder without heads, or with those of another model.
        """
        actor = cls(load_causal_lm(directory, **options))
        actor.load_heads(directory)
        actor.beta = actor.beta if beta is None else beta
        return actor

    def load_heads(self, directory: str | Path) -> None:
        """Takes over the heads that `save_pretrained` wrote, and their `beta`. Raises ValueError as `from_pretrained`.

        Under `deferral.defer_weights` too: heads are always built with weights.
        """
        file = Path(resolve(directory)) / HEADS_FILE
        if not file.is_file():
            raise ValueError(f"{directory} holds no {HEADS_FILE}: give the export of an ILQL run")
        with safe_open(file, "pt") as stored:
            heads = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 no mapping
            beta = float(stored.metadata()["beta"])
        try:
            self.heads.load_state_dict(heads)
        except RuntimeError as error:
            raise ValueError(f"{file} does not fit the model beside it: {error}") from error
        self.beta = beta


def has_value_heads(name: str) -> bool:
    """Whether this is the folder of a model with value heads."""
    return (Path(resolve(name)) / HEADS_FILE).is_file()
