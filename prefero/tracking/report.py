"""report.html: one calm page about a run, made from the files of its folder and from nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prefero.tracking.base import pair_scores
from prefero.tracking.charts import LARGE, SMALL, Chart, draw
from prefero.tracking.history import History, finite_number, read_history
from prefero.tracking.names import KINDS, by_importance, duration, kind, section, short
from prefero.tracking.notices import KL_BOUND, Notice, find_notices
from prefero.tracking.run_folder import RunFolder
from prefero.tracking.text import visible

_FOLD_FROM = 420  # characters shown before a text is folded away
_MAX_TEXT = 20_000
_MAX_PAIRS = 60
_MAX_ROLLOUTS = 12  # a stage, the newest ones
_MAX_SAMPLE_STAGES = 12
_MAX_SETTINGS = 1_000
_MAX_DEPTH = 12
_MEANING = {
    "reward": "What the policy is trained to raise.",
    "gold": "The measure that is never trained on.",
    "kl": "Distance from the reference, in nats.",
    "length": "Tokens of a completion.",
    "diversity": "How little completions repeat themselves.",
}
_LABELS = {"kl": "KL", "rm": "RM", "heldout": "held-out"}
_SECTION_TITLES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "rollout": "Rollouts",
    "ppo": "PPO updates",
    "dpo": "DPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "cpo": "CPO",
    "policy": "Policy updates",
    "actor": "Actor",
    "value": "Value estimates",
    "ilql": "Imitation and values (ILQL)",
    "critic": "Critic",
    "eval": "Evaluation",
    "other": "Other",
}


@dataclass(frozen=True)
class Words:
    """A text to show: folded behind its beginning when long, cut with a note when huge."""

    text: str
    beginning: str = ""
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A headline number. before is "" for a single number; direction says whether `value` went up or down."""

    label: str
    value: str
    before: str = ""
    change: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Comparison:
    """The same measures of several things, such as the policy before and after: a column each, a row a measure."""

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Group:
    """Charts under one heading, each with its meaning, and metrics that were measured once."""

    title: str
    charts: list[tuple[Chart, str]] = field(default_factory=list)
    single: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """The same prompt answered before and after, with what both were worth where known ("" where not)."""

    prompt: Words
    before: Words
    after: Words
    judged_by: str
    score_before: str
    score_after: str


@dataclass(frozen=True)
class Sampled:
    """A prompt and its completion as seen while training, and the numbers that came with it."""

    step: str
    prompt: Words
    completion: Words
    numbers: tuple[tuple[str, str], ...]


def write_report(run: RunFolder | str | Path, *, kl_bound: float = KL_BOUND) -> Path:
    """Writes report.html of a run and returns its path.

    kl_bound: nats per completion above which the report warns about the KL. Damaged parts of the run are named in the
    report and left out. Raises ValueError when the folder holds no run.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    return folder.write_report(render(folder, kl_bound=kl_bound))


def render(run: RunFolder, *, kl_bound: float = KL_BOUND) -> str:
    """The page as text: no script, no address outside of itself, every text of the run escaped."""
    history = read_history(run.metrics())
    notices: list[Notice] = []
    config, summary = _config(run, notices), _summary(run, notices)
    notices = find_notices(history, summary, kl_bound) + notices
    versions = summary.pop("versions", {})
    pairs, hidden_pairs, sampled = _samples(run)
    comparison = _comparison(summary)
    cards, details = _cards({key: value for key, value in summary.items() if key not in comparison.columns})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # for every template, whatever its name: jinja2's own default is no escaping at all
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("report.html.j2").render(
        name=run.name,
        cards=cards,
        details=details,
        comparison=comparison,
        notices=notices,
        groups=_groups(history),
        slots=_slots(history),
        stages=_stages(history),
        pairs=pairs,
        hidden_pairs=hidden_pairs,
        judged_by=next((pair.judged_by for pair in pairs if pair.judged_by), ""),
        sampled=sampled,
        settings=_settings(config),
        versions=[(key, _value(item)) for key, item in versions.items()] if isinstance(versions, dict) else [],
    )


def _shown(value: Any) -> Any:
    """What every {{ expression }} goes through before it is escaped: nothing hidden, nothing reordered."""
    return visible(value) if type(value) is str else value


def _config(run: RunFolder, notices: list[Notice]) -> Any:
    try:
        return run.config()
    except ValueError as error:
        notices.append(Notice("warning", "The config cannot be read", str(error)[:500]))
        return {}


def _summary(run: RunFolder, notices: list[Notice]) -> dict[str, Any]:
    try:
        summary = run.summary()
    except ValueError as error:
        notices.append(Notice("warning", "The summary cannot be read", str(error)[:500]))
        return {}
    if "seconds" not in summary:
        notices.append(Notice("note", "Not finished", "This run has not ended: it goes on, or it was stopped."))
    return summary


def _cards(summary: Mapping[str, Any]) -> tuple[list[Card], list[tuple[str, str]]]:
    """Numbers as cards, `x_before` with `x_after` and `x_stderr` as one; everything else as a table."""
    cards: list[Card] = []
    used: set[str] = set()
    for key in summary:
        base = key.removesuffix("_before")
        before, after = (finite_number(summary.get(f"{base}_{end}")) for end in ("before", "after"))
        if base != key and before is not None and after is not None:
            change = _signed(after - before)
            cards.append(Card(_label(base), _number(after), _number(before), change, _spread(summary, base)))
            used |= {key, f"{base}_after", f"{base}_stderr"}
    for key, value in summary.items():
        number = finite_number(value)
        if key not in used and number is not None and not key.endswith("_stderr"):
            shown = duration(number) if key == "seconds" or key.endswith("_seconds") else _number(number)
            cards.append(Card(_label(key), shown, spread=_spread(summary, key)))
            used |= {key, f"{key}_stderr"}
    rest = {key: value for key, value in summary.items() if key not in used}
    return cards[:24], _settings(rest)


def _comparison(summary: Mapping[str, Any]) -> Comparison:
    """The parts of a summary that hold the same measures, side by side; nothing when fewer than two do."""
    parts = {key: value for key, value in summary.items() if isinstance(value, dict) and value}
    first = next(iter(parts.values()), {})
    alike = {key: value for key, value in parts.items() if first.keys() & value.keys()}
    names = list(dict.fromkeys(name for value in alike.values() for name in value))[:100]
    if len(alike) < 2 or any(isinstance(item, dict | list) for value in alike.values() for item in value.values()):
        return Comparison()
    rows = (
        (name, tuple(_optional(part.get(name)) or _value(part.get(name)) for part in alike.values())) for name in names
    )
    return Comparison(tuple(alike), tuple(rows))


def _spread(summary: Mapping[str, Any], key: str) -> str:
    stderr = finite_number(summary.get(f"{key}_stderr"))
    return "" if stderr is None else f"± {_number(stderr)}"


def _label(key: str) -> str:
    return " ".join(_LABELS.get(word, word) for word in visible(key).split("_"))[:60]


def _number(value: float) -> str:
    return short(float(f"{value:.3g}") if abs(value) < 1000 else value)


def _optional(value: Any) -> str:
    number = finite_number(value)
    return "" if number is None else _number(number)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "±") + _number(abs(value))


def _slots(history: History) -> dict[str, int]:
    """A colour for each stage that draws a line, the same in every chart."""
    drawn = [stage for stage in history.stages if any(stage in stages for stages in history.series.values())]
    return {stage: index % 6 for index, stage in enumerate(drawn)}


def _groups(history: History) -> list[Group]:
    """The key curves first, then every other metric by section."""
    slots, groups = _slots(history), {"": Group("Key curves")}
    for name in by_importance(history.series):
        found, by_stage = kind(name), history.series[name]
        where = "" if found else section(name)
        group = groups.setdefault(where, Group(_SECTION_TITLES.get(where, where)))
        points = [point for series in by_stage.values() for point in series.points()]
        if len(points) == 1 and not found:
            group.single.append((name, _number(points[0][1])))
        elif chart := draw(name, list(by_stage.values()), slots, LARGE if found else SMALL):
            group.charts.append((chart, _MEANING[found] if found else ""))
    order = ["", *(name for name in _SECTION_TITLES if name in groups)]
    order += sorted(name for name in groups if name not in order)
    return [groups[name] for name in order if groups[name].charts or groups[name].single]


def _stages(history: History) -> list[tuple[str, str, str, list[str]]]:
    """Rows of the table of stages: name, rows logged, last step, and how its first metrics went."""
    rows = []
    for stage in history.stages.values():
        names = [name for name in by_importance(history.series) if stage.name in history.series[name]]
        moves = []
        for name in names[: len(KINDS) + 1]:
            values = [value for _, value in history.series[name][stage.name].points()]
            if values:
                ends = (values[0], values[-1]) if len(values) > 1 else values
                moves.append(f"{name} {' → '.join(_number(value) for value in ends)}")
        rows.append((stage.name or "run", f"{stage.num_rows:,}", short(stage.last_step), moves))
    return rows[:100]


def _samples(run: RunFolder) -> tuple[list[Pair], int, list[tuple[str, list[Sampled]]]]:
    """The before/after pairs (the newest ones), how many are not shown, and the newest rollouts of each stage."""
    pairs: deque[Mapping[str, Any]] = deque(maxlen=_MAX_PAIRS)
    rollouts: dict[str, deque[Mapping[str, Any]]] = {}
    num_pairs = 0
    for row in run.samples() if run.samples_file.is_file() else ():
        if row is None:
            continue
        if "before" in row and "after" in row:
            pairs.append(row)
            num_pairs += 1
        elif "completion" in row:
            stage = str(row.get("stage") or "run")
            if stage in rollouts or len(rollouts) < _MAX_SAMPLE_STAGES:
                rollouts.setdefault(stage, deque(maxlen=_MAX_ROLLOUTS)).append(row)
    shown = [_pair(row) for row in pairs]
    return shown, num_pairs - len(shown), [(stage, [_sampled(row) for row in rows]) for stage, rows in rollouts.items()]


def _pair(row: Mapping[str, Any]) -> Pair:
    kind, *scores = pair_scores(row)
    before, after = map(_optional, scores)
    texts = (_words(row.get("prompt", "")), _words(row["before"]), _words(row["after"]))
    return Pair(*texts, kind.capitalize(), before, after)


def _sampled(row: Mapping[str, Any]) -> Sampled:
    parts = row.get("parts")
    everything = [*row.items(), *(parts.items() if isinstance(parts, dict) else ())]
    numbers = [(key, _optional(value)) for key, value in everything if key != "step" and _optional(value)]
    step = _optional(row.get("step")) or "–"
    return Sampled(step, _words(row.get("prompt", "")), _words(row["completion"]), tuple(numbers[:12]))


def _words(value: Any) -> Words:
    text = value if isinstance(value, str) else repr(value)
    note = f"{len(text):,} characters, the first {_MAX_TEXT:,} are shown" if len(text) > _MAX_TEXT else ""
    text = text[:_MAX_TEXT]
    return Words(text, text[: _FOLD_FROM // 2] if len(text) > _FOLD_FROM else "", note)


def _value(value: Any) -> str:
    return "" if value is None else str(value)[:2_000]


def _settings(config: Any) -> list[tuple[str, str]]:
    """A nested config as (dotted key, value) rows, at most a thousand."""
    rows = list(islice(_flat(config, "", 0), _MAX_SETTINGS + 1))
    if len(rows) > _MAX_SETTINGS:
        rows[_MAX_SETTINGS:] = [("…", f"only the first {_MAX_SETTINGS:,} settings are shown")]
    return rows


def _flat(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth < _MAX_DEPTH:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(value, list) and depth < _MAX_DEPTH and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{key}[{index}]", depth + 1)
    elif depth < _MAX_DEPTH or not isinstance(value, dict | list):
        yield key, ", ".join(_value(item) for item in value[:200]) if isinstance(value, list) else _value(value)
    else:
        yield key, "nested too deeply to show"
