"""Secrets kept out of files: by the name of the key, and by the look of the value."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = frozenset(
    {
        "password",
        "passwd",
        "passphrase",
        "pwd",
        "secret",
        "secrets",
        "apikey",
        "authorization",
        "credential",
        "credentials",
        "bearer",
        "cookie",
    }
)
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("auth", "key"), ("account", "key")})
# `token` is also a word of this trade: these are the ones that name a place in the vocabulary or a unit.
_PLAIN_TOKENS = frozenset(
    {
        "pad",
        "eos",
        "bos",
        "unk",
        "mask",
        "cls",
        "sep",
        "stop",
        "end",
        "start",
        "first",
        "last",
        "per",
        "image",
        "special",
        "think",
        "next",
        "each",
        "new",
    }
)
_VALUES = (
    (re.compile(r"(?P<keep>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/?#]+@"), r"\g<keep>" + REDACTED + "@"),
    (
        re.compile(r"(?i)(?P<keep>[?&](?:[a-z0-9_-]*token|api[_-]?key|key|password|secret|sig|signature)=)[^&\s#]+"),
        r"\g<keep>" + REDACTED,
    ),
    (re.compile(r"(?i)(?P<keep>\bbearer\s+)(?=\S*[0-9])[A-Za-z0-9+/=_.~-]{16,}"), r"\g<keep>" + REDACTED),
    (re.compile(r"(?i)(?P<keep>\bauthorization\s*[:=]\s*)\S+(?:[ \t]+\S+)?"), r"\g<keep>" + REDACTED),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
            r"|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
        ),
        REDACTED,
    ),
)


def _words(key: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
    return [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is a secret (`hf_token`, `apiKey`, but not `eos_token`)."""
    words = _words(key)
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairwise(words)):
        return True
    return words[-1:] == ["token"] and not _PLAIN_TOKENS.intersection(words[:-1])


def redact(value: Any, secret: bool = False) -> Any:
    """A copy of a plain value with secrets replaced by "[redacted]".

    secret: the value stands under a secret's key; then only True, False, None and "" stay, which can be none.
    """
    if isinstance(value, dict):
        return {key: redact(item, secret or is_secret_key(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item, secret) for item in value]
    if secret:
        return value if value is None or isinstance(value, bool) or value == "" else REDACTED
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """The text without user names and passwords in URLs, bearer tokens and keys of well-known shapes."""
    for pattern, replacement in _VALUES:
        text = pattern.sub(replacement, text)
    return text
