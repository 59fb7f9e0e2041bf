"""What every engine of ours does with prompts and answers: requests checked, text decoded, completions made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefero.rollout.engine import SamplingParams, TruncatedCompletion
from prefero.rollout.sampling import draw, penalised, stream_key, uniforms
from prefero.types import Completion, Prompt

_REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no whole character yet


@dataclass
class Row:
    """One completion in the making."""

    index: int
    prompt: Prompt
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stopped: int = 0  # characters at the end, from a stop text on, that are no part of the answer


def causal_lm(actor: Any) -> Any:
    """The Hugging Face (or PEFT) model inside an Actor, or the model itself."""
    for candidate in (actor, getattr(actor, "model", None)):
        if isinstance(candidate, (PreTrainedModel, PeftModel)):
            return candidate
    raise ValueError(
        f"actor is a {type(actor).__name__}, which neither is nor holds (as .model) a Hugging Face causal language "
        "model: give an Actor or a transformers model"
    )


def base_of(model: Any) -> Any:
    """The Hugging Face model, adapters inside or around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def end_tokens(asked: Sequence[int] | None, model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: those asked for, or all that tokenizer and model name."""
    found: Any = asked
    if found is None:  # a chat's turn often ends with another token than a text
        further = getattr(model.generation_config, "eos_token_id", None)
        named = [tokenizer.eos_token_id, *(further if isinstance(further, list | tuple) else [further])]
        found = [token for token in named if token is not None] or None
    if found is None:
        raise ValueError(
            "engine eos_token_ids is None and neither tokenizer nor model names an EOS token: give the ids of the "
            "tokens that end an answer, or () to always run to max_new_tokens"
        )
    ids = frozenset(found)
    vocabulary = int(base_of(model).config.get_text_config().vocab_size)
    if not all(0 <= token < vocabulary for token in ids):
        raise ValueError(
            f"engine eos_token_ids are {sorted(ids)}, not all inside the model's vocabulary of {vocabulary}: use "
            "the tokenizer that belongs to this model"
        )
    return ids


def rows_of(prompts: Sequence[Prompt], params: SamplingParams, config: Any) -> list[Row]:
    """A row for every prompt, each with the key of its random numbers; config: the language model's.

    Raises ValueError naming the prompt for an empty prompt, an unknown token id, one id used for two different prompts,
    and prompt + max_new_tokens beyond the model's context.
    """
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
            _check(prompt, params, config)
        sample = prompt.first_sample + asked[asking]
        rows.append(Row(index, prompt, stream_key(params.seed, params.step, prompt.id, sample)))
        asked[asking] += 1
    return rows


def _check(prompt: Prompt, params: SamplingParams, config: Any) -> None:
    length = len(prompt.token_ids)
    if length == 0:
        raise ValueError(f"prompt {prompt.id!r} has no tokens: drop the row, or start prompts with a BOS token")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length + params.max_new_tokens > limit:
        raise ValueError(
            f"prompt {prompt.id!r} has {length} tokens; with max_new_tokens {params.max_new_tokens} that is beyond "
            f"the model's context of {limit}: shorten or drop the prompt, or lower max_new_tokens"
        )
    vocabulary = int(config.vocab_size)
    unknown = next((token for token in params.logit_bias if token >= vocabulary), None)
    if unknown is not None:
        raise ValueError(
            f"sampling.logit_bias names token id {unknown}, outside the model's vocabulary of {vocabulary}: use the "
            "ids of the model's tokenizer"
        )
    wrong = next((token for token in prompt.token_ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(
            f"prompt {prompt.id!r} holds token id {wrong}, outside the model's vocabulary of {vocabulary}: "
            "use the tokenizer that belongs to this model"
        )


def advance(rows: Sequence[Row], logits: Tensor, params: SamplingParams, eos: frozenset[int], tokenizer: Any) -> None:
    """Draws a token for every row from its logits [B, V]; those that have not ended get it, and end if it ends them."""
    keys, lengths = (
        torch.tensor(numbers) for numbers in ([row.key for row in rows], [len(row.token_ids) for row in rows])
    )
    allowed = None
    early = lengths < params.min_new_tokens
    if eos and bool(early.any()):
        allowed = torch.ones(len(rows), logits.shape[-1], dtype=torch.bool)
        allowed[:, sorted(eos)] = ~early.unsqueeze(1)
    drawn = draw(
        logits,
        None if params.greedy else uniforms(keys, lengths),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        allowed=allowed,
        instead=_other_logits(rows, logits, params) if params.changes_logits else None,
    )
    columns = (drawn.token_ids.tolist(), drawn.logprobs.tolist(), drawn.sampling_logprobs.tolist())
    for row, token, logprob, chance in zip(rows, *columns, strict=True):
        if row.finish_reason is None:
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.sampling_logprobs.append(chance)
            if token in eos:
                row.finish_reason = "stop"
            elif stopped := _completed(row, params, tokenizer):
                row.finish_reason, row.stopped = "stop", stopped
            elif len(row.token_ids) == params.max_new_tokens:
                row.finish_reason = "length"


def _other_logits(rows: Sequence[Row], logits: Tensor, params: SamplingParams) -> Tensor:
    """What is drawn by in the place of the model's logits: repetitions punished, then the bias added."""
    other = logits.float()
    if params.repetition_penalty != 1.0:
        seen = [sorted({*row.prompt.token_ids, *row.token_ids}) for row in rows]
        other = penalised(other, seen, params.repetition_penalty)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=other.device)
        added = torch.tensor([float(value) for value in params.logit_bias.values()], device=other.device)
        other = other.index_add(-1, ids, added.expand(len(rows), -1))
    return other


def _completed(row: Row, params: SamplingParams, tokenizer: Any) -> int:
    """How many characters stand from the first stop text on that a row's latest token has completed; 0: it has none."""
    if not params.stop or len(row.token_ids) < params.min_new_tokens:
        return 0
    # A character is at most four bytes, and a token at least one.
    latest = row.token_ids[-(4 * max(map(len, params.stop)) + 4) :]
    before, now = _decoded(tokenizer, latest[:-1]), _decoded(tokenizer, latest)
    found = [now.find(stop, max(0, len(before) - len(stop) + 1)) for stop in params.stop]
    return max((len(now) - place for place in found if place >= 0), default=0)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    # Cleaning up spaces would change text that is already out, and text the reward model must read as written.
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def texts_of(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """What each completion adds to its prompt's text: decoded after the prompt, so a joining space is kept.

    A stop text, and what came with it, is no part of it.
    """
    texts = []
    for row in rows:
        prompt = _decoded(tokenizer, row.prompt.token_ids)
        whole = _decoded(tokenizer, (*row.prompt.token_ids, *row.token_ids))
        text = whole[len(prompt) :] if whole.startswith(prompt) else _decoded(tokenizer, row.token_ids)
        texts.append(text[: max(0, len(text) - row.stopped)])
    return texts


def pieces(row: Row, tokenizer: Any, params: SamplingParams, steps: Iterator[Any]) -> Iterator[str]:
    """A completion's text as it grows with every step; a piece never ends inside a character or a stop text."""
    shown = ""
    for _ in steps:
        text = texts_of([row], tokenizer)[0]
        if row.finish_reason is None:
            text = text[: len(text) - _begun(text, params.stop)]
        if len(text) > len(shown) and text.startswith(shown) and not text.endswith(_REPLACEMENT):
            yield text[len(shown) :]
            shown = text
    rest = texts_of([row], tokenizer)[0][len(shown) :]
    if rest:
        yield rest


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop text."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def completion_from(row: Row, text: str, params: SamplingParams) -> Completion:
    """The finished row as what the algorithms read."""
    assert row.finish_reason is not None
    token_ids, logprobs = tuple(row.token_ids), tuple(row.logprobs)
    if params.truncates:
        chances = tuple(row.sampling_logprobs)
        return TruncatedCompletion(token_ids, logprobs, text, row.finish_reason, chances)
    return Completion(token_ids, logprobs, text, row.finish_reason)
