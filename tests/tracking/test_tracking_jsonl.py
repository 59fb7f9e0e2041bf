"""metrics.jsonl and samples.jsonl: the same bytes for the same numbers, whole rows after any crash."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_texts import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from prefero.tracking import JsonlTracker, RunFolder, Trackers, sample_rows
from prefero.tracking.base import pair_scores
from prefero.tracking.files import MAX_LINE_BYTES, read_rows
from prefero.tracking.jsonl import read_metrics
from prefero.types import Completion, Prompt, Score, ScoredRollout


def test_rows_carry_stage_step_and_numbers(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.start("sft", 10)
    tracker.log({"sft/loss": torch.tensor(0.5), "sft/rows": 3, "sft/half": np.float32(0.25)}, 1)
    tracker.start("ppo")
    tracker.log({"ppo/loss": 1e-7}, 1)
    assert read_metrics(tmp_path / "m.jsonl") == [  # before close: every line is flushed
        {"stage": "sft", "step": 1, "sft/loss": 0.5, "sft/rows": 3.0, "sft/half": 0.25},
        {"stage": "ppo", "step": 1, "ppo/loss": 1e-7},
    ]
    tracker.close()
    tracker.close()


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log({"a/x": math.nan, "a/y": 1.0, "a/z": -math.inf}, 4)
    tracker.close()
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"stage": "", "step": 4, "a/x": None, "a/y": 1.0, "a/z": None, "nonfinite": ["a/x", "a/z"]}


def test_two_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    for name, seconds in (("one", 1.5), ("two", 2.5)):
        with RunFolder.create(tmp_path / name, {"seed": 0}) as run:
            tracker = run.tracker("sft")
            for step in range(5):
                tracker.log({"sft/loss": 1 / (step + 1), "time/seconds": seconds * step}, step)
            tracker.log({"time/seconds": seconds}, 5)
            tracker.log_samples([{"prompt": "p", "completion": "c", "reward": 0.1}], 5)
            tracker.close()
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(read_metrics(tmp_path / "one" / "metrics.jsonl")) == 5


@pytest.mark.parametrize("bad", ["0.5", None, torch.zeros(2), [1.0], 10**400, object()])
def test_what_is_no_number_is_named(tmp_path: Path, bad: object) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r"metric 'sft/loss'.*not one number"):
        tracker.log({"sft/loss": bad}, 1)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'step' is taken"):
        tracker.log({"step": 1.0}, 1)
    with pytest.raises(ValueError, match="sample 0 has the column 'stage'"):
        tracker = JsonlTracker(tmp_path / "m.jsonl", tmp_path / "s.jsonl")
        tracker.log_samples([{"stage": "x"}], 1)
    tracker.close()
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_a_line_cut_anywhere_is_passed_over_and_written_over(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    tracker = JsonlTracker(whole)
    for step in range(3):
        tracker.log({"a/é": step + 0.5}, step)
    tracker.close()
    content = whole.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(content) + 1):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(content[:cut])
        complete = cut >= len(content) - 1  # only the line break is missing, or nothing
        assert len(read_metrics(torn)) == (3 if complete else 2)
        tracker = JsonlTracker(torn)
        tracker.log({"a/é": 9.0}, 9)
        tracker.close()
        assert [row["step"] for row in read_metrics(torn)] == ([0, 1, 2, 9] if complete else [0, 1, 9])


def test_a_long_torn_tail_is_found_from_the_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "' + b"y" * 200_000)
    JsonlTracker(path).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(b'{"torn from the start' + b"y" * 200_000)
    JsonlTracker(path).close()
    assert path.read_bytes() == b""


def test_damaged_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [
        b'{"step": 1}', b"not json", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"",
        b'{"x": "' + b"a" * (MAX_LINE_BYTES + 10) + b'"}', b'{"step": 2}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = list(read_rows(path))
    assert [row for row in rows if row is not None] == [{"step": 1}, {"step": 2}]
    assert rows.count(None) == 6


def test_samples_keep_any_text(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl", tmp_path / "s.jsonl", stage="ppo")
    tracker.log_samples([{"prompt": text, "completion": text, "parts": {"rm": math.nan}} for text in HOSTILE], 7)
    tracker.close()
    rows = list(read_rows(tmp_path / "s.jsonl"))
    assert [row and row["completion"] for row in rows] == list(HOSTILE)
    assert rows[0] is not None
    assert rows[0]["parts"] == {"rm": None}
    assert rows[0]["nonfinite"] == ["parts.rm"]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(min_size=1), st.floats(), max_size=4), st.text(alphabet=st.characters()))
def test_any_name_and_any_float_come_back(
    tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float], text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    metrics = {f"a/{name}": value for name, value in metrics.items()} | {"a/last": 0.0}
    tracker = JsonlTracker(folder / "m.jsonl", folder / "s.jsonl", stage=text)
    tracker.log(metrics, 1)
    tracker.log_samples([{"prompt": text}], 1)
    tracker.close()
    (row,) = read_metrics(folder / "m.jsonl")
    assert row["stage"] == text
    for name, value in metrics.items():
        assert row[name] == (value if math.isfinite(value) else None)
        assert (name in row.get("nonfinite", [])) == (not math.isfinite(value))
    (sample,) = read_rows(folder / "s.jsonl")
    assert sample is not None
    assert sample["prompt"] == text


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        JsonlTracker(tmp_path / "m.jsonl")
    assert (tmp_path / "elsewhere").read_text() == "untouched"


class _Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.calls: list[object] = []
        self.fails = fails

    def log(self, metrics: object, step: int) -> None:
        self.calls.append((metrics, step))

    def log_samples(self, rows: object, step: int) -> None:
        self.calls.append((rows, step))

    def close(self) -> None:
        self.calls.append("close")
        if self.fails:
            raise OSError("disk gone")


class _StageRecorder(_Recorder):
    def start(self, stage: str, total: int | None = None) -> None:
        self.calls.append((stage, total))


def test_fan_out_reaches_everyone_and_closes_everyone() -> None:
    first, second, third = _StageRecorder(), _Recorder(fails=True), _StageRecorder()
    with pytest.raises(OSError, match="disk gone"), Trackers([first, second, third]) as trackers:
        trackers.start("sft", 5)
        trackers.log({"sft/loss": 1.0}, 2)
        trackers.log_samples([{"prompt": "p"}], 3)
    assert first.calls == third.calls == [("sft", 5), ({"sft/loss": 1.0}, 2), ([{"prompt": "p"}], 3), "close"]
    assert second.calls == [({"sft/loss": 1.0}, 2), ([{"prompt": "p"}], 3), "close"]


def test_rows_from_scored_rollouts() -> None:
    prompt = Prompt("p1", (1, 2), "say hi", {"gold": 0.5, "hidden": object()})
    rollout = ScoredRollout(prompt, Completion((5, 2), (-0.1, -0.2), "hi", "stop"), Score(0.7, {"rm": 0.8}))
    assert sample_rows([rollout], columns=["gold"]) == [
        {
            "id": "p1", "prompt": "say hi", "completion": "hi", "reward": 0.7, "parts": {"rm": 0.8}, "num_tokens": 2,
            "finish_reason": "stop", "gold": 0.5,
        }
    ]  # fmt: skip


def test_a_pair_is_judged_by_gold_or_else_by_its_reward() -> None:
    assert pair_scores({"gold_before": 0.0, "gold_after": 1.0, "reward_after": 5.0}) == ("gold", 0.0, 1.0)
    assert pair_scores({"reward_before": -1.0, "reward_after": 2.0}) == ("reward", -1.0, 2.0)
    assert pair_scores({"gold_after": 1.0}) == ("gold", None, 1.0)
    assert pair_scores({"prompt": "p"}) == ("", None, None)
