"""The terminal: readable in a pipe, live on a terminal, and deaf to commands inside model text."""

import io
import math
import re
import unicodedata

import pytest
from hostile_texts import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from prefero.tracking.console import ConsoleTracker, sample_table
from prefero.tracking.names import by_importance, duration, headline, short
from prefero.tracking.text import for_terminal, visible

PAIRS = [{"prompt": text, "before": text, "after": text} for text in HOSTILE]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Latin(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def commands(output: str) -> list[str]:
    """Control characters of a terminal's output that rich's own colours and cursor movements do not explain."""
    return [
        c for c in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output) if unicodedata.category(c) == "Cc" and c not in "\n\r"
    ]


def test_plain_lines_one_an_interval() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(stream, every=5, clock=clock)
    tracker.start("ppo", 100)
    for step in range(1, 13):
        tracker.log(
            {"ppo/loss": 0.25, "rollout/reward": step / 10, "policy/loss": 9.0, "actor/gradient_norm_max": 9.0}
            | ({"eval/gold": 2.0} if step == 2 else {}),
            step,
        )
        tracker.log({"eval/kl": -2e-7}, step)  # more of the same step: no line of its own
        clock.now += 1
    tracker.start("eval")
    tracker.close()
    assert stream.getvalue().splitlines() == [
        "ppo: step 1/100 (1%)  reward 0.1  loss 0.25",
        "ppo: step 6/100 (6%)  reward 0.6  gold 2  kl 0  loss 0.25  1m34s left",
        "ppo: step 11/100 (11%)  reward 1.1  gold 2  kl 0  loss 0.25  1m29s left",
        "ppo done: step 12  reward 1.2  gold 2  kl 0  loss 0.25  in 12s",
    ]


def test_plain_output_has_no_control_characters() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(stream, every=0)
    for text in HOSTILE:
        tracker.start(text, 1)
        tracker.log({f"{text}/{text}": 1.0}, 1)
        tracker.log_samples([{"prompt": text, "completion": text}], 1)
    tracker.close()
    sample_table(PAIRS, stream=stream, limit=99)
    hidden = {c for c in stream.getvalue() if unicodedata.category(c) in {"Cc", "Cf", "Cs"}}
    assert hidden == {"\n"}
    stream.getvalue().encode()


def test_headlines_can_be_chosen_and_are_told_apart() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(stream, headlines=["ppo/loss", "sft/loss"], every=0)
    tracker.log({"ppo/loss": 1.0, "sft/loss": 2.0, "rollout/reward": 3.0}, 1)
    assert stream.getvalue() == "run: step 1  ppo/loss 1  sft/loss 2\n"


def test_a_stream_without_utf8_gets_escapes_not_a_crash() -> None:
    stream = Latin()
    tracker = ConsoleTracker(stream)
    tracker.log({"a/é": 1.0}, 1)
    tracker.log_samples([{"prompt": "ü", "completion": "\U0001f600"}], 1)
    sample_table([{"prompt": "ü", "before": "x", "after": "y"}], stream=stream)
    stream.seek(0)
    assert "\\xfc \\u2192 \\U0001f600" in stream.read()


def test_live_display_shows_progress_and_keeps_a_line_a_stage() -> None:
    stream = Terminal()
    tracker = ConsoleTracker(stream)
    for stage in ("sft", "ppo"):
        tracker.start(stage, 10)
        for step in range(1, 11):
            tracker.log({f"{stage}/loss": 1 / step, f"{stage}/minor": 1.0}, step)
        tracker.log_samples([{"prompt": "[red]p", "completion": "\x1b]0;evil\x07c"}], 10)
        assert tracker._display is not None
        tracker._display._live.refresh()
    tracker.close()
    output = stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "10/10" in plain
    assert "[red]p → c" in plain
    assert "  loss 0.1\n" in plain
    assert plain.count("sft done: step 10  loss 0.1") == 1
    assert plain.count("ppo done: step 10  loss 0.1") == 1
    assert commands(output) == []
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")  # the cursor is given back


def test_a_stage_started_again_with_its_length_has_one_bar() -> None:
    stream = Terminal()
    tracker = ConsoleTracker(stream)
    tracker.start("sft")
    tracker.start("sft", 3)
    tracker.log({"sft/loss": 1.0}, 1)
    assert tracker._display is not None
    assert [task.total for task in tracker._display._progress.tasks] == [3]
    tracker.close()


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_live_display_survives_hostile_text_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    tracker = ConsoleTracker(stream)
    tracker.log({"no/stage": 1.0}, 1)
    for text in HOSTILE:
        tracker.start(text, 2)
        tracker.log({text: 1.0}, 1)
        tracker.log_samples([{"prompt": text, "completion": text}], 1)
    tracker.close()
    sample_table(PAIRS, stream=stream, limit=99)
    assert commands(stream.getvalue()) == []
    assert "8;;" not in stream.getvalue()  # no hyperlink, neither OSC 8 nor rich's [link=...]


def test_sample_table_wide_and_narrow() -> None:
    row = {"prompt": "how was it?", "before": "bad [bold]x", "after": "good", "gold_before": -0.5, "gold_after": 0.75}
    wide, narrow, pipe = Terminal(), Terminal(), io.StringIO()
    sample_table([row], stream=wide, width=100)
    sample_table([row], stream=narrow, width=40)
    sample_table([row], stream=pipe)
    assert "-0.5 → 0.75" in wide.getvalue()
    assert "bad [bold]x" in wide.getvalue()
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", wide.getvalue()).splitlines())) <= 100
    expected = "how was it?\n  before: [gold -0.5] bad [bold]x\n  after:  [gold 0.75] good\n"
    assert narrow.getvalue() == pipe.getvalue() == expected


def test_a_run_without_gold_shows_its_rewards() -> None:
    row = {"prompt": "p", "before": "b", "after": "a", "reward_before": 0.25, "reward_after": 0.5}
    wide, pipe = Terminal(), io.StringIO()
    sample_table([row], stream=wide, width=100)
    sample_table([row], stream=pipe)
    assert "0.25 → 0.5" in wide.getvalue()
    assert pipe.getvalue() == "p\n  before: [reward 0.25] b\n  after:  [reward 0.5] a\n"


def test_sample_table_limit() -> None:
    rows = [{"prompt": f"p{i}", "before": "c", "after": "d"} for i in range(20)]
    stream = io.StringIO()
    sample_table(rows, stream=stream, limit=3)
    assert stream.getvalue().count("before:") == 3


def test_visible_names_what_hides() -> None:
    assert visible("a\x1b[0m\x00\u202eb\n\tc\x85\u2028\ud800") == "a␛[0m␀⟨U+202E⟩b\n\tc⟨U+0085⟩⟨U+2028⟩⟨U+D800⟩"
    assert visible("\U0001f469\u200d\U0001f4bb שלום ป\r\n") == "\U0001f469\u200d\U0001f4bb שלום ป\n"


@settings(deadline=None)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_visible_and_for_terminal_leave_nothing_hidden(text: str) -> None:
    for shown in (visible(text).replace("\n", "").replace("\t", ""), for_terminal(text)):
        assert all(unicodedata.category(c) not in {"Cc", "Cs", "Zl", "Zp"} for c in shown)
        assert all(unicodedata.category(c) != "Cf" or c in "\u200c\u200d" for c in shown)
        shown.encode()


def test_escape_sequences_vanish_whole() -> None:
    assert for_terminal("a\x1b[1;31mb\x1b]8;;http://x\x1b\\c\x1b]8;;\x07d\x1b(Be\x9b2Jf\x1bPq#0\x1b\\g") == "abcdefg"
    assert for_terminal("kept\x1b]0;never ended") == "kept"
    assert for_terminal("x" * 50, 10) == "x" * 9 + "…"
    assert for_terminal("  two\n lines\t") == "two lines"


def test_names_and_numbers_for_people() -> None:
    names = ["zeta", "ppo/actor_loss", "eval/gold", "eval/kl", "rollout/kl", "reward/accuracy", "rollout/reward"]
    assert by_importance(names)[:4] == ["rollout/reward", "eval/gold", "rollout/kl", "eval/kl"]
    assert headline(names) == ["rollout/reward", "eval/gold", "rollout/kl", "reward/accuracy", "ppo/actor_loss"]
    numbers = (3.0, 0.123456, 12345.6, 1e9, 1e-7, math.nan)
    assert [short(x) for x in numbers] == ["3", "0.1235", "12346", "1e+09", "1e-07", "nan"]
    assert [duration(x) for x in (0.4, 59, 61, 3600 + 61)] == ["0s", "59s", "1m01s", "1h01m"]


def test_interactive_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ConsoleTracker(Terminal())._display is not None
    assert ConsoleTracker(io.StringIO())._display is None
    monkeypatch.setenv("TERM", "dumb")
    assert ConsoleTracker(Terminal())._display is None
    assert isinstance(Console(), Console)
