"""What the names of metrics mean to those who show them: `section/name`, and which ones matter most."""

from __future__ import annotations

import math
from collections.abc import Iterable

# The five curves that tell how an alignment run goes, under the last part of their names; first = shown first.
KINDS: dict[str, frozenset[str]] = {
    "reward": frozenset({"reward", "score"}),
    "gold": frozenset({"gold", "gold_reward"}),
    "kl": frozenset({"kl"}),
    "length": frozenset({"length", "num_tokens"}),
    "diversity": frozenset({"diversity", "distinct", "distinct_words"}),
}
_SECTIONS = ("rollout", "eval", "ppo", "reward", "sft")


def section(name: str) -> str:
    """The part before the first slash; "other" for a name without one."""
    return name.partition("/")[0] if "/" in name else "other"


def leaf(name: str) -> str:
    """The part after the last slash."""
    return name.rpartition("/")[2]


def kind(name: str) -> str | None:
    """reward, gold, kl, length or diversity; None for any other metric."""
    last = leaf(name)
    return next((kind for kind, leaves in KINDS.items() if last in leaves), None)


def _rank(name: str) -> tuple[int, int, str]:
    last, found = leaf(name), kind(name)
    if found is not None:
        order = list(KINDS).index(found)
    else:
        order = 10 + [last == "loss", last == "accuracy", last.endswith("loss"), True].index(True)
    where = section(name)
    return order, _SECTIONS.index(where) if where in _SECTIONS else len(_SECTIONS), name


def by_importance(names: Iterable[str]) -> list[str]:
    """Names sorted: the key curves first, then losses and accuracies, then the rest."""
    return sorted(names, key=_rank)


def headline(names: Iterable[str], limit: int = 5) -> list[str]:
    """The few metrics worth a line: one of each kind, then losses and accuracies, then whatever there is."""
    chosen: list[str] = []
    kinds: set[str] = set()
    for name in by_importance(names):
        found = kind(name)
        if found is None or found not in kinds:
            chosen.append(name)
            kinds |= {found} if found else set()
    return chosen[:limit]


def short(value: float) -> str:
    """A number in about four significant digits, for people."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as 7s, 2m05s or 1h02m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
