"""How a tokenizer spells plain text: what frames a sequence, what must never come out of what people wrote."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefero.data.templates import Guard, special_strings

_ANCHORS = (":", "\n", "a", "0", ".")


@dataclass(frozen=True)
class Facts:
    """What is asked of a tokenizer again and again; slow to find out for each row."""

    prefix: tuple[int, ...]
    special_ids: frozenset[int]
    special: dict[str, int]
    pattern: re.Pattern[str]
    adds_space: bool
    anchors: tuple[tuple[str, list[int]], ...]


_FACTS: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], Facts]] = weakref.WeakKeyDictionary()


def facts(tokenizer: Any) -> Facts:
    """The tokenizer's facts, found once and again when its special tokens change."""
    key = (len(tokenizer), *(getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "add_bos_token")))
    known = _FACTS.get(tokenizer)
    if known is None or known[0] != key:
        known = (key, _find_facts(tokenizer))
        _FACTS[tokenizer] = known
    return known[1]


def _find_facts(tokenizer: Any) -> Facts:
    probe = _probe(tokenizer)
    bare = _ids(tokenizer, probe)
    framed = list(tokenizer(probe, add_special_tokens=True).input_ids)
    starts = [i for i in range(len(framed)) if bare and framed[i : i + len(bare)] == bare]
    if not bare and framed and framed[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        starts = [1]
    prefix = framed[: starts[0]] if starts else []
    while len(prefix) > 1 and prefix[0] == prefix[1]:
        prefix = prefix[1:]
    strings = special_strings(tokenizer)
    special = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in strings}
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    patterns = []
    for text in sorted(strings, key=len, reverse=True):
        token = added.get(text)  # a token may swallow the white space beside it
        before, after = ("\\s*" if token and flag else "" for flag in (token and token.lstrip, token and token.rstrip))
        patterns.append(f"{before}{re.escape(text)}{after}")
    first = tokenizer.convert_ids_to_tokens(bare[:1])
    # unknown text is spelt <unk>, so people's words may yield that one
    special_ids = frozenset({*special.values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id})
    adds_space = bool(first) and str(first[0]).startswith(("\u2581", "\u0120"))
    return Facts(
        prefix=tuple(prefix),
        special_ids=special_ids,
        special=special,
        pattern=re.compile("(" + "|".join(patterns) + ")" if patterns else r"((?!))"),
        adds_space=adds_space,
        anchors=tuple((anchor, _ids(tokenizer, anchor)) for anchor in _ANCHORS if adds_space),
    )


def _probe(tokenizer: Any) -> str:
    """A letter or word that the tokenizer can spell; a vocabulary of digits alone, without <unk>, fails on others."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.unk_token is not None or "a" in vocabulary or "\u0120a" in vocabulary:
        return "a"
    special = set(special_strings(tokenizer))
    return str(tokenizer.decode([next(index for word, index in vocabulary.items() if word not in special)]))


def frame(tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """The ids a sequence starts with (one BOS or CLS; nothing if the tokenizer uses none) and its end id (EOS or SEP).

    Found by asking the tokenizer to frame a letter, not by its attributes: GPT-2 names a BOS that it never puts.
    Raises ValueError for a tokenizer with no end token.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no completion could end; "
            "set tokenizer.eos_token"
        )
    return facts(tokenizer).prefix, int(end)


def pad_id(tokenizer: Any) -> int:
    """An id to fill padding with; which one is of no consequence, because every mask is explicit."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of what somebody wrote: special-token strings in it are spelt out as ordinary text.

    Raises ValueError when the vocabulary has no other way to spell one.
    """
    known = facts(tokenizer)
    ids = _ids(tokenizer, text, split_special_tokens=True)
    if not known.special_ids.intersection(ids):
        return ids
    # a word-level or unigram vocabulary finds "</s>" as a word of its own: spell it in two halves
    ids = []
    for piece in known.pattern.split(text):
        halves = (piece[:1], piece[1:]) if piece.strip() in known.special else (piece,)
        for half in halves:
            ids += _ids(tokenizer, half, split_special_tokens=True) if half else []
    bad = known.special_ids.intersection(ids)
    if bad:
        names = tokenizer.convert_ids_to_tokens(sorted(bad))
        raise ValueError(f"the text {text[:60]!r} cannot be spelt without the special tokens {names}; take them out")
    return ids


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of text that follows other text: without the space some tokenizers (Llama's) put before a first word."""
    return encode_following(tokenizer, text, lambda part: encode_plain(tokenizer, part))


def encode_following(tokenizer: Any, text: str, encode: Callable[[str], list[int]], marker: str = "") -> list[int]:
    """`encode` of a text that follows other text: anchored to something before it, whose own ids are cut off again.

    marker: the special token right before the text, if there is one; some tokenizers start a first word after it.
    """
    known = facts(tokenizer)
    if not text or not known.adds_space:
        return encode(text)
    for anchor, before in ((marker, encode(marker)),) if marker else known.anchors:
        whole = encode(anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    return encode(text)


def _ids(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens).input_ids)


def encode_rendered(tokenizer: Any, text: str, guard: Guard) -> list[int]:
    """Ids of rendered text: the template's own markers are special, whatever hides behind stand-ins is not."""
    if not any(stand_in in text for stand_in in guard.stand_ins.values()):
        return _ids(tokenizer, text)
    known, probe = facts(tokenizer), _probe(tokenizer)
    ids: list[int] = []
    marker = ""
    for piece in known.pattern.split(text):
        if piece.strip() in known.special:
            marker = piece.strip()
            ids.append(known.special[marker])
        elif piece:
            # some tokenizers put their first-word space after a marker, some only at the very start: ask
            fresh = not marker or _ids(tokenizer, marker + probe)[1:] == _ids(tokenizer, probe)
            ids += (encode_plain if fresh else encode_continuation)(tokenizer, guard.show(piece))
    return ids
