"""Text that a model wrote, made safe to look at: no terminal commands, nothing invisible or reordered in silence."""

from __future__ import annotations

import re
import unicodedata

# CSI, OSC/DCS/SOS/PM/APC strings (ended by BEL, ST or the end of the text), then two-character escapes. The 8-bit
# forms (U+009B, U+009D, ...) count too: some terminals obey them.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|\Z)"
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
# Joiners shape Indic, Persian and emoji text; everything else of category Cf only hides or reorders.
_JOINERS = "\u200c\u200d"
_UNUSUAL = re.compile(r"[^ -~\n\t]")  # most characters of most texts are passed over without a look-up


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return category in {"Cs", "Cc", "Zl", "Zp"} or (category == "Cf" and character not in _JOINERS)


def visible(text: str) -> str:
    """Every control, bidirectional, invisible or surrogate character replaced by a visible stand-in.

    ESC becomes ␛ and so on; others are named, as in ⟨U+202E⟩. Line breaks and tabs stay.
    """
    return _UNUSUAL.sub(_stand_in, text.replace("\r\n", "\n"))


def _stand_in(match: re.Match[str]) -> str:
    character = match[0]
    if not _is_invisible(character):
        return character
    return chr(0x2400 + ord(character)) if character < " " else f"⟨U+{ord(character):04X}⟩"


def for_terminal(text: str, limit: int | None = None) -> str:
    """One line that is safe to print: escape sequences removed, white space folded, the rest made visible.

    limit: longest result, in characters; a longer text ends with an ellipsis.
    """
    if limit is not None:
        text = text[: 20 * limit + 1000]  # a megabyte of model text is not worth a regular expression
    line = " ".join(visible(_ESCAPES.sub("", text)).split())
    if limit is not None and len(line) > limit:
        return line[: max(limit - 1, 0)].rstrip() + "…"
    return line
