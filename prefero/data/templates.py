"""Chat templates: messages to text with the tokenizer's own template, and which stretches of it the assistant spoke.

Text only; `tokenize` turns it into ids. A template mixes its own markers with what people wrote, and a tokenizer cannot
tell them apart afterwards: a user who types "<|im_end|>" would end the turn. So special-token strings inside messages
travel through the template as private-use stand-ins (`Guard`) and are put back, as plain text, at tokenising.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from prefero.types import Message

_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation (still guarded) and whether the assistant spoke it."""

    text: str
    learn: bool


class Guard:
    """Swaps the special-token strings found in `texts` for characters that occur in none of them, and back.

    tokens: the tokenizer's special strings. `stand_ins` is empty when nobody wrote one, which is the usual case.
    """

    def __init__(self, tokens: Iterable[str], texts: Sequence[str]) -> None:
        found = sorted((t for t in tokens if t and any(t in text for text in texts)), key=len, reverse=True)
        taken = set().union(*texts) if found else set()
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        self.stand_ins: dict[str, str] = dict(zip(found, free, strict=False))
        self._hide = _pattern(self.stand_ins)
        self._back = {stand_in: token for token, stand_in in self.stand_ins.items()}
        self._show = _pattern(self._back)

    def hide(self, text: str) -> str:
        """The text with stand-ins in place of special-token strings."""
        return self._hide.sub(lambda match: self.stand_ins[match[0]], text)

    def show(self, text: str) -> str:
        """The text as it was written."""
        return self._show.sub(lambda match: self._back[match[0]], text)


def _pattern(strings: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def special_strings(tokenizer: Any) -> list[str]:
    """Every string that the tokenizer would read as one special token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *tokenizer.all_special_tokens]))


def guard_messages(tokenizer: Any, messages: Sequence[Message]) -> Guard:
    """A guard for what these messages say."""
    return Guard(special_strings(tokenizer), [message["content"] for message in messages])


def render(tokenizer: Any, messages: Sequence[Message], guard: Guard, *, add_generation_prompt: bool) -> str:
    """The messages through the tokenizer's chat template, guarded.

    Raises ValueError when the tokenizer has no template, or the template refuses the messages (roles out of order).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, but the data are messages; use an "
            "instruct model's tokenizer, set tokenizer.chat_template, or give prompts as plain text"
        )
    hidden = [{**message, "content": guard.hide(message["content"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages with roles {roles}: {error}") from error
    assert isinstance(text, str)
    return text


def segments(tokenizer: Any, messages: Sequence[Message], guard: Guard) -> list[Segment]:
    """The conversation cut where the assistant starts and stops speaking; the texts join to the full rendering.

    Each assistant turn starts where a generation prompt ends, as it will when the model is used. That is only defined
    when every shorter rendering is a prefix of the longer: ValueError otherwise (templates that rewrite earlier turns).
    """
    whole = render(tokenizer, messages, guard, add_generation_prompt=False)
    pieces: list[Segment] = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:turn], guard, add_generation_prompt=True)
        answered = render(tokenizer, messages[: turn + 1], guard, add_generation_prompt=False)
        if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= done):
            raise ValueError(
                f"the chat template renders the first {turn + 1} messages differently once more follow, or its "
                "generation prompt is not how an assistant turn starts, so the assistant's tokens cannot be told "
                "apart; give one row for each assistant turn, or a template that only appends"
            )
        pieces += [Segment(whole[done : len(asked)], False), Segment(whole[len(asked) : len(answered)], True)]
        done = len(answered)
    if done < len(whole):
        pieces.append(Segment(whole[done:], False))
    return [piece for piece in pieces if piece.text]
