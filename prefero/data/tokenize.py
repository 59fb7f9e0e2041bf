"""Text to token ids, such that training sees exactly what generation saw.

Four rules hold everywhere. (1) Prompt and completion are tokenised apart and joined, so the prompt's ids are a prefix
of the whole and no token straddles the boundary. (2) A sequence starts with one BOS if the tokenizer uses one and ends
with one EOS. (3) What people wrote never becomes a special token. (4) Nothing is padded here, and no id is ever taken
for padding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from prefero.data.formats import (
    Comparison,
    Conversation,
    Demonstration,
    Labelled,
    PromptRow,
    Question,
    SFTRow,
    as_messages,
)
from prefero.data.spelling import encode_continuation, encode_following, encode_plain, encode_rendered, facts, frame
from prefero.data.templates import guard_messages, render, segments
from prefero.types import Message, Prompt

Truncate: TypeAlias = Literal["error", "left", "right", "drop"]
Encoded = TypeVar("Encoded")
Source = TypeVar("Source", PromptRow, SFTRow, Comparison, Labelled)


class TooLongError(ValueError):
    """A row does not fit into max_length tokens."""


class Example(NamedTuple):
    """Token ids of a whole sequence, and 1 on those whose loss counts."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True)
class EncodedComparison:
    """Two whole sequences (prompt and answer), the preferred one first; key is the same for the same prompt."""

    id: str
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0
    key: str = ""


@dataclass(frozen=True)
class EncodedPair:
    """Two answers behind one prompt, the preferred one first; the loss masks mark the answers alone."""

    id: str
    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class EncodedLabel:
    """An answer behind its prompt and whether it is to be had; beside it another prompt's answer behind this prompt."""

    id: str
    answer: Example
    unrelated: Example
    desirable: bool


# --- prompts and completions ---------------------------------------------------------------------------------------


def encode_prompt(
    tokenizer: Any,
    prompt: Question | Sequence[Message],
    id: str = "",
    *,
    max_length: int | None = None,
    columns: Mapping[str, Any] | None = None,
    truncate: Truncate = "error",
    chat: bool = False,
) -> Prompt:
    """A prompt ready to be continued: BOS if used, the text, and for messages the template's generation prompt.

    chat: put a string through the chat template as a user message. What was asked, as messages, is kept under
    columns["messages"] (and not what a row of that name may hold besides: the answer to imitate).
    truncate: "left" keeps the BOS and the last tokens, "right" the first; messages are never cut, a torn template is no
    prompt. Raises TooLongError (a ValueError naming the row) over `max_length` tokens otherwise ("drop" is for
    `encode_prompts`), and ValueError for an empty prompt.
    """
    prefix, _ = frame(tokenizer)
    further = dict(columns or {})
    as_chat = chat or not isinstance(prompt, str)
    if as_chat:
        messages = as_messages(prompt)
        further["messages"] = list(messages)
        guard = guard_messages(tokenizer, messages)
        rendered = render(tokenizer, messages, guard, add_generation_prompt=True)
        ids, text = encode_rendered(tokenizer, rendered, guard), guard.show(rendered)
    else:
        assert isinstance(prompt, str)
        ids, text = encode_plain(tokenizer, prompt), prompt
    if not ids:
        raise ValueError(f"{id or 'prompt'}: the prompt is empty; a policy needs at least one token to continue")
    ids = _framed(ids, prefix)
    if max_length is not None and len(ids) > max_length:
        if as_chat or truncate not in ("left", "right"):
            raise TooLongError(_too_long(id or text[:60], len(ids), max_length, as_chat))
        room = max_length - len(prefix)
        if room <= 0:
            raise ValueError(f"max_length = {max_length}: no room for a prompt token; give at least {len(prefix) + 1}")
        body = ids[len(prefix) :]
        body = body[-room:] if truncate == "left" else body[:room]
        ids, text = [*prefix, *body], str(tokenizer.decode(body))
    return Prompt(id, tuple(ids), text, further)


def encode_example(
    tokenizer: Any,
    prompt: Prompt,
    completion: str,
    max_length: int | None = None,
    *,
    end: bool = True,
    truncate: Truncate = "error",
) -> Example:
    """Prompt and completion as one sequence ending in exactly one EOS; the loss counts on the completion and its EOS.

    An EOS string at the end of `completion` is the EOS, not text; an empty completion is the EOS alone. end: False
    leaves the EOS out (a completion cut by a length limit). truncate: "left" drops the prompt's first tokens (not the
    BOS) and keeps the answer whole, "right" drops the end and with it the EOS, which would be untrue there.
    Raises TooLongError over `max_length` tokens otherwise.
    """
    prefix, eos = frame(tokenizer)
    text = completion.removesuffix(tokenizer.eos_token) if tokenizer.eos_token else completion
    starts = len(prompt.token_ids) <= len(prefix)  # no prompt: the completion is the text's beginning
    answer = (encode_plain if starts else encode_continuation)(tokenizer, text)
    answer += [eos] if end else []
    return _fit(_join(list(prompt.token_ids), answer), len(prefix), max_length, truncate, prompt.id or prompt.text[:60])


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    id: str = "",
    *,
    max_length: int | None = None,
    truncate: Truncate = "error",
) -> Example:
    """Messages as one sequence; the loss counts on what the assistant says, up to and including each turn's EOS.

    What a template puts after the EOS (ChatML's newline) is never learned, and dropped after the last turn; a template
    without EOS gets one there. Raises as `encode_example`; "left" is refused, a torn template is no conversation.
    """
    prefix, eos = frame(tokenizer)
    guard = guard_messages(tokenizer, messages)
    ids: list[int] = []
    mask: list[int] = []
    pieces = segments(tokenizer, messages, guard)
    while pieces and not pieces[-1].learn:
        pieces.pop()
    if not pieces:
        raise ValueError(f"{id or 'row'}: the messages hold no assistant turn to learn")
    for number, piece in enumerate(pieces):
        if number == 0:
            new = _framed(encode_rendered(tokenizer, piece.text, guard), prefix)
        else:
            marker = str(tokenizer.convert_ids_to_tokens(ids[-1])) if ids[-1] in facts(tokenizer).special_ids else ""
            new = encode_following(tokenizer, piece.text, lambda part: encode_rendered(tokenizer, part, guard), marker)
        spoken = _turn_end(tokenizer, new, eos) if piece.learn else 0
        if number == len(pieces) - 1:
            new = new[:spoken] if eos in new[:spoken] else [*new[:spoken], eos]
            spoken = len(new)
        ids += new
        mask += [1] * spoken + [0] * (len(new) - spoken)
    mask[0] = 0  # nothing comes before the first token to predict it
    if truncate == "left" and max_length is not None and len(ids) > max_length:
        raise TooLongError(_too_long(id, len(ids), max_length, True))
    return _fit(Example(tuple(ids), tuple(mask)), len(prefix), max_length, truncate, id)


def _turn_end(tokenizer: Any, ids: list[int], eos: int) -> int:
    """How many ids of an assistant segment are the assistant's: through the EOS, else through the last end marker."""
    if eos in ids:
        return ids.index(eos) + 1
    special = facts(tokenizer).special_ids
    last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
    return last + 1 if not str(tokenizer.decode(ids[last + 1 :])).strip() else len(ids)


def _framed(ids: list[int], prefix: tuple[int, ...]) -> list[int]:
    """The ids behind exactly one BOS, whether or not a template wrote it."""
    return ids if tuple(ids[: len(prefix)]) == prefix else [*prefix, *ids]


def _join(prompt: list[int], answer: list[int]) -> Example:
    ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
    if mask:
        mask[0] = 0  # nothing comes before the first token to predict it
    return Example(tuple(ids), tuple(mask))


def _fit(example: Example, num_prefix: int, max_length: int | None, truncate: Truncate, name: str) -> Example:
    ids, mask = example
    if max_length is None or len(ids) <= max_length:
        return example
    if truncate == "right" and any(mask[:max_length]):
        return Example(ids[:max_length], mask[:max_length])
    excess, first_learned = len(ids) - max_length, mask.index(1) if any(mask) else len(ids)
    if truncate == "left" and num_prefix + excess < first_learned:
        return Example(ids[:num_prefix] + ids[num_prefix + excess :], mask[:num_prefix] + mask[num_prefix + excess :])
    raise TooLongError(_too_long(name, len(ids), max_length, False))


def _too_long(name: str, length: int, max_length: int, chat: bool) -> str:
    cures = "truncate='drop'" if chat else "truncate='left', 'right' or 'drop'"
    return f"{name}: {length} tokens do not fit in max_length = {max_length}; raise max_length or pass {cures}"


# --- whole rows ----------------------------------------------------------------------------------------------------


def encode_sft(
    tokenizer: Any, row: SFTRow, max_length: int | None = None, *, truncate: Truncate = "error", chat: bool = False
) -> Example:
    """A demonstration or a conversation as an Example; chat: put text prompts through the chat template."""
    if isinstance(row, Conversation):
        return encode_conversation(tokenizer, row.messages, row.id, max_length=max_length, truncate=truncate)
    return _encode_answers(tokenizer, row, [row.completion], max_length, truncate, chat)[0]


def keep_end(tokenizer: Any, token_ids: Sequence[int], max_length: int) -> tuple[int, ...]:
    """At most max_length ids: the BOS, if the tokenizer uses one, and the last of the rest.

    The way a text to be judged is cut: how it ends decides what it is worth.
    """
    if len(token_ids) <= max_length:
        return tuple(token_ids)
    prefix, _ = frame(tokenizer)
    return (*prefix, *token_ids[len(token_ids) - (max_length - len(prefix)) :])


def encode_comparison(
    tokenizer: Any, row: Comparison, max_length: int | None = None, *, truncate: Truncate = "error", chat: bool = False
) -> EncodedComparison:
    """Both answers behind the prompt, as an EncodedComparison; arguments as `encode_sft`."""
    answers = (row.chosen, row.rejected)
    chosen, rejected = (e.token_ids for e in _encode_answers(tokenizer, row, answers, max_length, truncate, chat))
    if chosen == rejected and len(chosen) == max_length:
        raise TooLongError(f"{row.id}: the first {max_length} tokens of both answers are the same; raise max_length")
    key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt)
    return EncodedComparison(row.id, chosen, rejected, row.margin, key)


def encode_pair(
    tokenizer: Any, row: Comparison, max_length: int | None = None, *, truncate: Truncate = "error", chat: bool = False
) -> EncodedPair:
    """Both answers behind the prompt, to be told apart by their log-probabilities; arguments as `encode_sft`.

    Of a conversation the last answer alone is marked. Raises TooLongError where cutting leaves two equal answers, and
    ValueError where the answers are equal to begin with.
    """
    answers = (row.chosen, row.rejected)
    chosen, rejected = map(_last_answer, _encode_answers(tokenizer, row, answers, max_length, truncate, chat))
    if chosen == rejected:
        if len(chosen.token_ids) == max_length:
            raise TooLongError(
                f"{row.id}: the first {max_length} tokens of both answers are the same; raise max_length"
            )
        raise ValueError(f"{row.id}: the chosen and the rejected answer are the same tokens; leave the row out")
    return EncodedPair(row.id, chosen, rejected)


def encode_labelled(
    tokenizer: Any, row: Labelled, max_length: int | None = None, *, truncate: Truncate = "error", chat: bool = False
) -> Example:
    """The answer behind its prompt, marked alone; arguments as `encode_sft`."""
    return _last_answer(_encode_answers(tokenizer, row, [row.completion], max_length, truncate, chat)[0])


def with_unrelated(rows: Sequence[tuple[str, Example, bool]], max_length: int | None = None) -> list[EncodedLabel]:
    """Rows (id, answer behind its prompt, verdict), each with an answer to another prompt behind its own.

    Where one prompt has more than half of the rows, some of its answers meet it again. max_length: the answer is cut
    there. Which answer meets which prompt depends on the rows alone. Raises ValueError for fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"there are {len(rows)} labelled rows, so no answer is unrelated to another prompt; give more")
    cuts = [example.loss_mask.index(1) for _, example, _ in rows]
    prompts = [example.token_ids[:cut] for (_, example, _), cut in zip(rows, cuts, strict=True)]
    order = sorted(range(len(rows)), key=prompts.__getitem__)
    # Sorted, the rows of a prompt stand together: as many steps on as the largest such group has rows is another one.
    steps = min(max(Counter(prompts).values()), len(rows) // 2)
    other = {row: order[(place + steps) % len(order)] for place, row in enumerate(order)}
    found = []
    for place, (name, answer, desirable) in enumerate(rows):
        given = rows[other[place]][1].token_ids[cuts[other[place]] :]
        unrelated = _join(list(prompts[place]), list(given))
        found.append(EncodedLabel(name, answer, Example(*(part[:max_length] for part in unrelated)), desirable))
    return found


def _last_answer(example: Example) -> Example:
    """The same with the loss on the last run of marked tokens alone: in a conversation, on the last answer."""
    mask = list(example.loss_mask)
    place = len(mask) - 1
    while place >= 0 and not mask[place]:
        place -= 1
    while place >= 0 and mask[place]:
        place -= 1
    return Example(example.token_ids, tuple([0] * (place + 1) + mask[place + 1 :]))


def _encode_answers(
    tokenizer: Any,
    row: Demonstration | Comparison | Labelled,
    answers: Sequence[str],
    max_length: int | None,
    truncate: Truncate,
    chat: bool,
) -> list[Example]:
    """Each answer behind the row's prompt, which is tokenised once unless it is messages."""
    if chat or not isinstance(row.prompt, str):
        asked = as_messages(row.prompt)
        talks = [(*asked, {"role": "assistant", "content": answer}) for answer in answers]
        return [encode_conversation(tokenizer, t, row.id, max_length=max_length, truncate=truncate) for t in talks]
    # without a prompt it is plain text to imitate: the whole of it is the completion
    nothing = Prompt(row.id, frame(tokenizer)[0], "")
    prompt = encode_prompt(tokenizer, row.prompt, row.id) if row.prompt else nothing
    return [encode_example(tokenizer, prompt, answer, max_length, truncate=truncate) for answer in answers]


def encode_prompts(
    tokenizer: Any,
    rows: Iterable[PromptRow],
    *,
    max_length: int | None = None,
    truncate: Truncate = "error",
    chat: bool = False,
) -> list[Prompt]:
    """Every row as a Prompt; truncate="drop" leaves out those too long (ValueError when none is left)."""
    return encode_rows(
        rows,
        lambda row: encode_prompt(
            tokenizer, row.prompt, row.id, max_length=max_length, columns=row.columns, truncate=truncate, chat=chat
        ),
        drop=truncate == "drop",
    )


def encode_rows(rows: Iterable[Source], encode: Callable[[Source], Encoded], *, drop: bool = False) -> list[Encoded]:
    """`encode` of every row; drop: leave out the rows that are too long instead of stopping at the first."""
    encoded: list[Encoded] = []
    too_long: TooLongError | None = None
    for row in rows:
        try:
            encoded.append(encode(row))
        except TooLongError as error:
            if not drop:
                raise
            too_long = error
    if not encoded and too_long is not None:
        raise ValueError(f"every row is too long; the last: {too_long}")
    return encoded
