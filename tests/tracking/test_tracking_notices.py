"""Notices and curves: what is said appears when it is true, and only then."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefero.tracking.charts import LARGE, MAX_POINTS, draw, nice_ticks, thin
from prefero.tracking.history import Series, finite_number, read_history, smooth
from prefero.tracking.notices import find_notices

Curve = Callable[[float], float]


def rising(x: float) -> float:
    return 2 * (1 - math.exp(-3 * x))


def hill(x: float) -> float:
    return 0.2 + 1.6 * x - 2.4 * max(0.0, x - 0.5)


def titles(curves: dict[str, Curve], noise: float = 0.0, count: int = 20, seed: int = 0, **summary: float) -> list[str]:
    source = random.Random(seed)
    rows = [
        {
            "stage": "ppo",
            "step": i,
            **{name: curve(i / count) + source.gauss(0, noise) for name, curve in curves.items()},
        }
        for i in range(1, count + 1)
    ]
    return [notice.title for notice in find_notices(read_history(rows), summary)]


OVER = "Over-optimisation: the reward rises while gold falls"


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_over_optimisation_is_seen(noise: float) -> None:
    assert all(titles({"rollout/reward": rising, "eval/gold": hill}, noise, seed=s) == [OVER] for s in range(20))
    assert titles({"rollout/reward": rising, "eval/gold": lambda x: -x}) == [OVER]  # from the first step on


def test_over_optimisation_is_seen_when_gold_is_measured_rarely() -> None:
    rows = [
        {"step": i, "rollout/reward": rising(i / 60), **({"eval/gold": hill(i / 60)} if i % 10 == 0 else {})}
        for i in range(1, 61)
    ]
    assert [notice.title for notice in find_notices(read_history(rows), {})] == [OVER]


@pytest.mark.parametrize(
    "curves",
    [
        {"rollout/reward": rising, "eval/gold": rising},
        {"rollout/reward": hill, "eval/gold": hill},  # both fall: a failure, but not this one
        {"rollout/reward": rising, "eval/gold": lambda x: 0.5},
        {"rollout/reward": rising, "eval/gold": lambda x: min(x, 0.6) - 0.02 * max(0.0, x - 0.6)},  # a ripple
        {"rollout/reward": rising},
        {"eval/gold": hill},
    ],
)
def test_over_optimisation_is_not_claimed(curves: dict[str, Curve]) -> None:
    assert titles(curves) == []


def test_gold_is_compared_with_the_reward_on_the_same_prompts() -> None:
    curves: dict[str, Curve] = {"rollout/reward": rising, "eval/gold": hill, "eval/reward": hill}
    assert titles(curves) == []
    assert titles(curves | {"rollout/reward": hill, "eval/reward": rising}) == [OVER]


def test_noise_on_a_flat_gold_seldom_looks_like_a_fall() -> None:
    flat: dict[str, Curve] = {"rollout/reward": rising, "eval/gold": lambda x: 0.5}
    assert sum(OVER in titles(flat, 0.1, seed=seed) for seed in range(100)) <= 8


def test_the_logged_standard_error_is_believed() -> None:
    gold: dict[str, Curve] = {"rollout/reward": rising, "eval/gold": hill}
    assert titles(gold | {"eval/gold_stderr": lambda x: 0.01}) == [OVER]
    assert titles(gold | {"eval/gold_stderr": lambda x: 0.5}) == []


def test_gold_in_another_stage_does_not_count() -> None:
    rows = [{"stage": "sft", "step": i, "eval/gold": hill(i / 20)} for i in range(20)]
    rows += [{"stage": "ppo", "step": i, "rollout/reward": rising(i / 20)} for i in range(20)]
    assert find_notices(read_history(rows), {}) == []


def test_kl_diversity_and_length() -> None:
    assert titles({"rollout/kl": lambda x: 12 * x}) == ["The policy has moved far from the reference"]
    assert titles({"rollout/kl": lambda x: 9 * x}) == []
    assert titles({"rollout/diversity": lambda x: 0.6 - 0.4 * x}) == ["Diversity collapsed"]
    assert titles({"rollout/diversity": lambda x: 0.6 - 0.1 * x}) == []
    assert titles({"rollout/length": lambda x: 10 + 40 * x}) == ["Completions changed length"]
    assert titles({"rollout/length": lambda x: 20 - 15 * x}) == ["Completions changed length"]
    assert titles({"rollout/length": lambda x: 10 + 5 * x}) == []
    history = read_history([{"step": 1, "rollout/kl": 5.0}])
    assert [n.title for n in find_notices(history, {}, kl_bound=4)] == ["The policy has moved far from the reference"]


def test_worse_than_before() -> None:
    keys = ("heldout_reward_before", "heldout_reward_after", "heldout_reward_stderr")
    for before, after, stderr, worse in [(1, 0.5, 0.1, True), (1, 0.9, 0.1, False), (0, 1, 0.1, False)]:
        found = titles({}, 0.0, 0, **dict(zip(keys, (before, after, stderr), strict=True)))
        assert found == (["Gold is lower than before"] if worse else [])
    summary = {"heldout_reward_before": 1.0, "heldout_reward_after": 0.0, "heldout_reward_is": "reward"}
    [notice] = find_notices(read_history([]), summary)
    assert notice.title == "Reward is lower than before"
    assert "never" not in notice.text


def test_lost_numbers_and_lines_are_told() -> None:
    rows = [{"step": 1, "a/x": None, "nonfinite": ["a/x"]}, {"step": 2, "a/x": 1.0}, None, {"a/x": 1.0}, {"step": "3"}]
    found = find_notices(read_history(rows), {})
    assert [(n.title, n.text) for n in found] == [
        ("Numbers that are not finite", "NaN or infinite: a/x (1 times)."),
        ("Damaged lines", "3 lines of metrics.jsonl could not be read."),
    ]


def test_skipped_steps_are_told() -> None:
    rows = [{"step": step, "actor/skipped_max": float(step == 3), "critic/skipped_max": 0.0} for step in (1, 2, 3, 4)]
    [notice] = find_notices(read_history(rows), {})
    assert notice.title == "Skipped optimizer steps"
    assert "The actor did not learn from all batches of 1 of 4 logged steps" in notice.text


def test_a_resumed_run_replaces_the_steps_it_did_again() -> None:
    rows = [{"step": step, "a/x": float(step)} for step in (1, 2, 3, 4)] + [{"step": 3, "a/x": 30.0}]
    assert read_history(rows).series["a/x"][""].points() == [(1, 1), (2, 2), (3, 30)]


def test_strange_values_are_passed_over() -> None:
    row = {
        "step": 1,
        "a/s": "x",
        "a/b": True,
        "a/l": [1],
        "a/none": None,
        "a/big": 10**400,
        "a/nan": math.nan,
        "a/ok": 2,
    }
    series = read_history([row]).series
    assert {name: by_stage[""].values for name, by_stage in series.items()} == {"a/nan": [None], "a/ok": [2.0]}
    assert finite_number(1e301) is None


def test_smooth() -> None:
    assert smooth([0, 3, 6, 3, 0], 3) == [1.5, 3, 4, 3, 1.5]
    assert smooth([1e20, 0.25, 0.25, 0.25], 1) == [1e20, 0.25, 0.25, 0.25]
    assert smooth([1e20, 0.25, 0.25, 0.25], 3)[2:] == [0.25, 0.25]


def test_thin_keeps_every_spike_and_the_order() -> None:
    points = [(float(i), 0.0) for i in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    points[7] = (7.0, -99.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert {99.0, -99.0} <= {value for _, value in kept}
    assert kept == sorted(kept)
    assert thin(points[:10]) == points[:10]


def test_chart_geometry() -> None:
    chart = draw("a/x", [Series("a/x", "s", [0, 5, 10], [0.0, None, 10.0])], {"s": 2})
    assert chart is not None
    (line,) = chart.lines
    start, end = (tuple(map(float, part.split(","))) for part in line.path[1:].split("L"))
    assert start[0] == chart.left
    assert end[0] == chart.right == line.end.x
    assert start[1] > end[1]  # up is more
    assert (line.slot, line.end_value, line.raw) == (2, "10", "")
    assert line.gaps == ((chart.left + chart.right) / 2,)
    assert [dot.title for dot in line.dots] == ["step 0: 0", "step 10: 10"]
    assert draw("a/x", [Series("a/x", "s", [0], [None])], {}) is None


def test_many_points_are_thinned_and_said() -> None:
    chart = draw("a/x", [Series("a/x", "s", list(range(5000)), [math.sin(i) for i in range(5000)])], {})
    assert chart is not None
    assert chart.lines[0].raw.count("L") <= MAX_POINTS
    assert chart.notes == ("s: 5,000 points, drawn with at most 2,000",)
    assert len(chart.lines[0].dots) <= 41


def test_labels_at_the_same_end_do_not_overlap() -> None:
    series = [Series("a/x", f"s{i}", [0, 1], [0.0, 1.0 + i / 1000]) for i in range(4)]
    chart = draw("a/x", series, {})
    assert chart is not None
    heights = sorted(line.end_label_y for line in chart.lines)
    assert all(b - a >= 10.9 for a, b in pairwise(heights))
    assert [line.label for line in chart.lines] == ["s0", "s1", "s2", "s3"]


_FLOATS = st.floats(-1e300, 1e300)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(_FLOATS, _FLOATS | st.none(), min_size=1, max_size=40))
def test_any_curve_stays_inside_its_chart(curve: dict[float, float | None]) -> None:
    points = sorted(curve.items())
    chart = draw("a/x", [Series("a/x", "", [s for s, _ in points], [v for _, v in points])], {})
    if chart is None:
        assert all(value is None for _, value in points)
        return
    for pair in chart.lines[0].path[1:].split("L"):
        x, y = map(float, pair.split(","))
        assert chart.left - 0.2 <= x <= LARGE[0] and 0 <= y <= chart.bottom + 0.2
    ticks = [tick.at for tick in chart.y_ticks]
    assert 1 <= len(ticks) <= 8
    assert len({tick.label for tick in chart.y_ticks}) == len(ticks)


@settings(deadline=None, max_examples=300)
@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_are_round_inside_and_told_apart(low: float, span: float) -> None:
    marks = nice_ticks(low, low + span, 4)
    labels = [label for _, label in marks]
    assert 2 <= len(marks) <= 6
    assert len(set(labels)) == len(labels)
    for at, label in marks:
        assert low - span * 1e-6 <= at <= low + span * (1 + 1e-6)
        assert abs(float(label) - at) <= 0.02 * span + 1e-9 * abs(at)
