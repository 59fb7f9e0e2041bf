"""The engine that samples with the trainer's own modules and weights, through any Hugging Face causal LM."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefero.models.base import Actor
from prefero.models.trunk import evaluating, full_precision_head
from prefero.rollout.engine import SamplingParams, TruncatedCompletion
from prefero.rollout.sampling import Draw, draw, stream_key, uniforms
from prefero.types import Completion, Prompt

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no whole character yet
_DROP_AT = 8  # finished rows leave once they are 1/8 of the batch: each leave copies the key/value cache


@dataclass
class _Row:
    """One completion in the making."""

    index: int
    prompt: Prompt
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


def causal_lm(actor: Any) -> Any:
    """The Hugging Face (or PEFT) model inside an Actor, or the model itself."""
    for candidate in (actor, getattr(actor, "model", None)):
        if isinstance(candidate, (PreTrainedModel, PeftModel)):
            return candidate
    raise ValueError(
        f"actor is a {type(actor).__name__}, which neither is nor holds (as .model) a Hugging Face causal language "
        "model: give an Actor or a transformers model"
    )


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout), and logits as the trainer computes them."""
    with evaluating(model), full_precision_head(model):
        yield


class HFEngine:
    """Generates with a Hugging Face causal language model: its own decode loop over the model's forward.

    actor: an `Actor`, or a transformers or PEFT model (an active LoRA adapter is used as it stands). tokenizer: only
    decodes text and names EOS. batch_size: completions decoded at once. eos_token_ids: tokens that end a completion;
    by default the tokenizer's and those of the model's generation config; an empty sequence for none. It computes in
    whatever precision the model, or an autocast around the call, has. Raises ValueError where there is no EOS.
    """

    def __init__(
        self, actor: Any, tokenizer: Any, batch_size: int = 32, eos_token_ids: Sequence[int] | None = None
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"engine batch_size is {batch_size!r}: give a whole number, 1 or more")
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.update_weights(actor)
        self.eos_token_ids = self._eos(eos_token_ids)

    def update_weights(self, actor: Any) -> None:
        """Points at this actor; nothing is copied, generation always runs the very weights that train."""
        self.model: Any = causal_lm(actor)
        self._forward_of: Callable[..., Any] = actor.decode if isinstance(actor, Actor) else self.model
        inner: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self._accepts = frozenset(inspect.signature(inner.forward).parameters)
        self._config: Any = inner.config.get_text_config()

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order asked; a prompt asked n times gets samples 0 to n-1.

        `TruncatedCompletion`s when `params` truncate the distribution. Raises ValueError naming the prompt for an
        empty prompt, an unknown token id, one id used for two different prompts, and prompt + max_new_tokens
        beyond the model's context.
        """
        rows = self._rows(prompts, params)
        longest_first = sorted(rows, key=lambda row: -len(row.prompt.token_ids))
        with _ready(self.model):
            for start in range(0, len(rows), self.batch_size):
                for _ in self._decode(longest_first[start : start + self.batch_size], params):
                    pass
        texts = self._texts(rows)
        return [self._completion(row, text, params) for row, text in zip(rows, texts, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The completion's text in pieces as it comes; a piece never ends inside a character.

        The pieces joined are the `text` of `generate` for the same prompt and parameters. The model stays in
        evaluation mode until the iterator is exhausted or closed. Raises ValueError, before the first piece, as
        `generate` does.
        """
        return self._pieces(self._rows([prompt], params)[0], params)

    def _pieces(self, row: _Row, params: SamplingParams) -> Iterator[str]:
        shown = ""
        with _ready(self.model):
            for _ in self._decode([row], params):
                text = self._texts([row])[0]
                if len(text) > len(shown) and text.startswith(shown) and not text.endswith(_REPLACEMENT):
                    yield text[len(shown) :]
                    shown = text
        rest = self._texts([row])[0][len(shown) :]
        if rest:
            yield rest

    def _eos(self, asked: Sequence[int] | None) -> frozenset[int]:
        found: Any = asked
        if found is None:  # a chat's turn often ends with another token than a text
            further = getattr(self.model.generation_config, "eos_token_id", None)
            named = [self.tokenizer.eos_token_id, *(further if isinstance(further, list | tuple) else [further])]
            found = [token for token in named if token is not None] or None
        if found is None:
            raise ValueError(
                "engine eos_token_ids is None and neither tokenizer nor model names an EOS token: give the ids of the "
                "tokens that end an answer, or () to always run to max_new_tokens"
            )
        ids = frozenset(found)
        vocabulary = int(self._config.vocab_size)
        if not all(0 <= token < vocabulary for token in ids):
            raise ValueError(
                f"engine eos_token_ids are {sorted(ids)}, not all inside the model's vocabulary of {vocabulary}: use "
                "the tokenizer that belongs to this model"
            )
        return ids

    def _rows(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[_Row]:
        known: dict[str, Prompt] = {}
        asked: Counter[tuple[str, int]] = Counter()
        rows = []
        for index, prompt in enumerate(prompts):
            if known.setdefault(prompt.id, prompt).token_ids != prompt.token_ids:
                raise ValueError(
                    f"prompt id {prompt.id!r} names two different prompts (texts {known[prompt.id].text[:60]!r} and "
                    f"{prompt.text[:60]!r}): give every prompt its own id, their samples are drawn by it"
                )
            asking = (prompt.id, prompt.first_sample)
            if asked[asking] == 0:
                self._check_prompt(prompt, params)
            sample = prompt.first_sample + asked[asking]
            key = stream_key(params.seed, params.step, prompt.id, sample)
            rows.append(_Row(index, prompt, key))
            asked[asking] += 1
        return rows

    def _check_prompt(self, prompt: Prompt, params: SamplingParams) -> None:
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {prompt.id!r} has no tokens: drop the row, or start prompts with a BOS token")
        limit = getattr(self._config, "max_position_embeddings", None)
        if limit is not None and length + params.max_new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.id!r} has {length} tokens; with max_new_tokens {params.max_new_tokens} that is beyond "
                f"the model's context of {limit}: shorten or drop the prompt, or lower max_new_tokens"
            )
        vocabulary = int(self._config.vocab_size)
        wrong = next((token for token in prompt.token_ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(
                f"prompt {prompt.id!r} holds token id {wrong}, outside the model's vocabulary of {vocabulary}: "
                "use the tokenizer that belongs to this model"
            )

    def _decode(self, rows: list[_Row], params: SamplingParams) -> Iterator[None]:
        """Fills the rows with tokens until each has ended; yields after every token."""
        device = self.model.get_input_embeddings().weight.device
        token_ids, mask = _left_padded([row.prompt.token_ids for row in rows], params.max_new_tokens, device)
        width = token_ids.shape[1]
        position_ids = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
        keys = torch.tensor([row.key for row in rows])
        cache: Any = None
        for step in range(params.max_new_tokens):
            logits, cache = self._forward(token_ids, mask[:, : width + step], position_ids, cache)
            drawn = self._draw(logits, keys, step, params)
            self._append(rows, drawn, step + 1 == params.max_new_tokens)
            yield
            alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
            if not alive:
                return
            token_ids, position_ids = drawn.token_ids.to(device).unsqueeze(-1), position_ids[:, -1:] + 1
            if (len(rows) - len(alive)) * _DROP_AT >= len(rows):
                rows = [rows[i] for i in alive]
                kept = torch.tensor(alive, device=device)
                token_ids, position_ids, mask = token_ids[kept], position_ids[kept], mask[kept]
                keys = keys[kept.to(keys.device)]
                cache.batch_select_indices(kept)

    def _forward(self, token_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, V] after the last column, and the key/value cache grown by the columns given."""
        inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": mask, "past_key_values": cache}
        optional = {"position_ids": position_ids, "logits_to_keep": 1}
        inputs |= {name: value for name, value in optional.items() if name in self._accepts}
        # no_grad, not inference_mode: buffers a model makes on the way (rotary tables) must stay usable for training.
        with torch.no_grad():
            output = self._forward_of(**inputs, use_cache=True)
        if output.past_key_values is None:
            raise ValueError(
                f"model {type(self.model).__name__} returned no key/value cache: the engine needs a decoder that "
                "supports use_cache"
            )
        return output.logits[:, -1], output.past_key_values

    def _draw(self, logits: Tensor, keys: Tensor, step: int, params: SamplingParams) -> Draw:
        allowed = None
        if step < params.min_new_tokens:
            allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
            allowed[list(self.eos_token_ids)] = False
        return draw(
            logits,
            None if params.greedy else uniforms(keys, step),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            allowed=allowed,
        )

    def _append(self, rows: Sequence[_Row], drawn: Draw, last: bool) -> None:
        columns = (drawn.token_ids.tolist(), drawn.logprobs.tolist(), drawn.sampling_logprobs.tolist())
        for row, token, logprob, chance in zip(rows, *columns, strict=True):
            if row.finish_reason is None:
                row.token_ids.append(token)
                row.logprobs.append(logprob)
                row.sampling_logprobs.append(chance)
                if token in self.eos_token_ids:
                    row.finish_reason = "stop"
                elif last:
                    row.finish_reason = "length"

    def _texts(self, rows: Sequence[_Row]) -> list[str]:
        """What each completion adds to its prompt's text: decoded after the prompt, so a joining space is kept."""
        prompts = self._decoded([row.prompt.token_ids for row in rows])
        wholes = self._decoded([(*row.prompt.token_ids, *row.token_ids) for row in rows])
        alone = self._decoded([row.token_ids for row in rows])
        return [
            whole[len(prompt) :] if whole.startswith(prompt) else text
            for prompt, whole, text in zip(prompts, wholes, alone, strict=True)
        ]

    def _decoded(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        # Cleaning up spaces would change text that is already out, and text the reward model must read as written.
        return [
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in sequences
        ]

    def _completion(self, row: _Row, text: str, params: SamplingParams) -> Completion:
        assert row.finish_reason is not None
        token_ids, logprobs = tuple(row.token_ids), tuple(row.logprobs)
        if params.truncates:
            chances = tuple(row.sampling_logprobs)
            return TruncatedCompletion(token_ids, logprobs, text, row.finish_reason, chances)
        return Completion(token_ids, logprobs, text, row.finish_reason)


def _left_padded(sequences: Sequence[Sequence[int]], room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] padded on the left, and their attention mask [B, P + room] with the room for new tokens at 1."""
    width = max(len(sequence) for sequence in sequences)
    token_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width + room, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        token_ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return token_ids.to(device), mask.to(device)
