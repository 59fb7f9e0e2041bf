"""What a reader should be told before looking at the curves: computed from the curves themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from prefero.tracking.history import History, Series, noise, smooth
from prefero.tracking.names import section, short

KL_BOUND = 10.0
_MIN_POINTS = 4
# A fall is called a fall when it is above this many standard errors of the smoothed curve: the peak is picked as the
# highest of many noisy points, so that the usual two would cry wolf on a flat curve.
_SURE = 3.5


@dataclass(frozen=True)
class Notice:
    """One thing to know; level "warning" or "note"."""

    level: str
    title: str
    text: str


def find_notices(history: History, summary: Mapping[str, Any], kl_bound: float = KL_BOUND) -> list[Notice]:
    """All notices of a run: over-optimisation, KL, diversity, length, lost numbers, skipped steps, damaged lines.

    kl_bound: nats per completion above which the policy counts as far from the reference.
    """
    found: list[Notice] = []
    for stage in history.stages:
        found += _over_optimisation(history, stage)
        found += _high_kl(history, stage, kl_bound)
        found += _collapse(history, stage)
        found += _length_drift(history, stage)
    found += _worse_than_before(summary)
    found += _not_finite(history)
    found += _skipped(history)
    if history.num_damaged:
        found.append(
            Notice("note", "Damaged lines", f"{history.num_damaged} lines of metrics.jsonl could not be read.")
        )
    if history.dropped:
        found.append(Notice("note", "Too many metrics", f"At least {len(history.dropped)} metric names are not shown."))
    return found


def _over_optimisation(history: History, stage: str) -> Iterator[Notice]:
    """Goodhart: the learned reward goes on rising while the gold reward falls from its peak (Gao et al. 2023)."""
    golds, proxies = history.of_kind("gold", stage), history.of_kind("reward", stage)
    if not golds or not proxies:
        return
    gold = golds[0]
    # Best compared on the same prompts; the samples of the rollouts serve where the reward was not evaluated.
    proxy = next((one for one in proxies if section(one.name) == section(gold.name)), proxies[0])
    if len(gold.points()) < _MIN_POINTS or len(proxy.points()) < _MIN_POINTS:
        return
    steps, values, gold_noise = _trend(gold, _stderr(history, gold))
    peak = max(range(len(values)), key=values.__getitem__)
    drop = values[peak] - values[-1]
    proxy_steps, proxy_values, proxy_noise = _trend(proxy, _stderr(history, proxy))
    at_peak = min(range(len(proxy_steps)), key=lambda index: abs(proxy_steps[index] - steps[peak]))
    rise = proxy_values[-1] - proxy_values[at_peak]
    falls = drop > max(_SURE * gold_noise, 0.1 * (max(values) - min(values)))
    rises = rise > max(proxy_noise, 0.05 * (max(proxy_values) - min(proxy_values)))
    if falls and rises:
        yield Notice(
            "warning",
            "Over-optimisation: the reward rises while gold falls",
            f"In {_named(stage)}, {gold.name} fell from {short(values[peak])} at step {short(steps[peak])} to "
            f"{short(values[-1])}, while {proxy.name} rose from {short(proxy_values[at_peak])} to "
            f"{short(proxy_values[-1])}. The policy has learned what the reward model gets wrong. Raise the KL "
            "coefficient, stop earlier, or train the reward model on samples of this policy.",
        )


def _trend(series: Series, stderr: float | None) -> tuple[list[float], list[float], float]:
    """Steps, smoothed values, and the standard error of one smoothed value."""
    points = series.points()
    values = [value for _, value in points]
    window = max(3, len(values) // 20 | 1) if len(values) >= 5 else 1
    if stderr is None:
        stderr = noise(values)
    # window // 2 + 1 values make the average at the very end, the least certain one and the one that is compared.
    return [step for step, _ in points], smooth(values, window), stderr / math.sqrt(window // 2 + 1)


def _stderr(history: History, series: Series) -> float | None:
    """The logged standard error beside a metric (`eval/gold_stderr` beside `eval/gold`), its median over the stage."""
    beside = history.series.get(series.name + "_stderr", {}).get(series.stage)
    values = [value for _, value in beside.points()] if beside else []
    return median(values) if values else None


def _ends(series: Series) -> tuple[float, float] | None:
    """The mean of the first and of the last few values; None when there are too few to speak of a change."""
    values = [value for _, value in series.points()]
    if len(values) < _MIN_POINTS:
        return None
    few = max(1, min(5, len(values) // 4))
    return fmean(values[:few]), fmean(values[-few:])


def _high_kl(history: History, stage: str, bound: float) -> Iterator[Notice]:
    for series in history.of_kind("kl", stage)[:1]:
        values = [value for _, value in series.points()]
        last = fmean(values[-3:]) if values else 0.0
        if last > bound:
            yield Notice(
                "warning",
                "The policy has moved far from the reference",
                f"{series.name} ends at {short(last)} nats in {_named(stage)}, above {short(bound)}. Look at the "
                "samples before trusting the reward, or raise the KL coefficient.",
            )


def _collapse(history: History, stage: str) -> Iterator[Notice]:
    for series in history.of_kind("diversity", stage)[:1]:
        ends = _ends(series)
        if ends and ends[0] > 0 and ends[1] < 0.6 * ends[0]:
            yield Notice(
                "warning",
                "Diversity collapsed",
                f"{series.name} fell from {short(ends[0])} to {short(ends[1])} in {_named(stage)}: the policy repeats "
                "itself. Raise the KL coefficient or lower the learning rate.",
            )


def _length_drift(history: History, stage: str) -> Iterator[Notice]:
    for series in history.of_kind("length", stage)[:1]:
        ends = _ends(series)
        if ends and ends[0] > 0 and not 0.5 <= ends[1] / ends[0] <= 2:
            yield Notice(
                "warning",
                "Completions changed length",
                f"{series.name} went from {short(ends[0])} to {short(ends[1])} in {_named(stage)}: check that the "
                "reward is not paid for length.",
            )


def _worse_than_before(summary: Mapping[str, Any]) -> Iterator[Notice]:
    keys = ("heldout_reward_before", "heldout_reward_after", "heldout_reward_stderr")
    before, after, stderr = (summary.get(key) for key in keys)
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return
    spread = stderr if isinstance(stderr, int | float) else 0.0
    if after < before - 2 * spread:
        rewarded = summary.get("heldout_reward_is") == "reward"
        what, whose = ("reward", "trained on") if rewarded else ("gold reward", "never trained on")
        yield Notice(
            "warning",
            f"{'Reward' if rewarded else 'Gold'} is lower than before",
            f"On held-out prompts the {what} went from {short(before)} to {short(after)}: by the measure that was "
            f"{whose}, this run made the model worse.",
        )


def _not_finite(history: History) -> Iterator[Notice]:
    counts = {
        name: sum(series.values.count(None) for series in stages.values()) for name, stages in history.series.items()
    }
    lost = [f"{name} ({count} times)" for name, count in counts.items() if count]
    if lost:
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        yield Notice("warning", "Numbers that are not finite", f"NaN or infinite: {', '.join(lost[:10])}{more}.")


def _skipped(history: History) -> Iterator[Notice]:
    """Optimizer steps that were not taken because a loss or gradient was not finite."""
    for name, stages in history.series.items():
        role, _, metric = name.partition("/")
        values = [value for series in stages.values() for _, value in series.points()]
        if metric == "skipped_max" and (count := sum(value > 0 for value in values)):
            yield Notice(
                "warning",
                "Skipped optimizer steps",
                f"The {role} did not learn from all batches of {count} of {len(values)} logged steps: a loss or "
                "gradient was not finite.",
            )


def _named(stage: str) -> str:
    return f"stage {stage}" if stage else "the run"
