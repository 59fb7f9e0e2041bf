"""report.html: one file that runs nothing, loads nothing, hides nothing, and shows what the run's files say."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import HOSTILE

from prefero.tracking import RunFolder
from prefero.tracking.report import write_report

_VOID = {"meta", "link", "base", "br", "img", "input", "embed", "hr"}
_ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section", "h1",
    "h2", "h3", "h4", "p", "a", "div", "b", "i", "small", "ul", "li", "span", "figure", "figcaption", "svg",
    "g", "line", "path", "circle", "text", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
}  # fmt: skip


class Page(HTMLParser):
    """A page as a browser would read it: elements with attributes, and the text in each."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)

    def all(self, tag: str, name: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and (name is None or name in (a.get("class") or "").split())]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def is_harmless(html: str) -> Page:
    """Asserts that nothing on the page can run or load; returns the page."""
    page = Page(html)
    assert page.stack == []
    assert {tag for tag, _ in page.elements} <= _ALLOWED
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {
                "src",
                "srcset",
                "action",
                "formaction",
                "data",
                "background",
                "poster",
                "style",
                "xlink:href",
            }
            assert name != "href" or (value or "").startswith("#"), (tag, value)
            assert name != "http-equiv" or value == "Content-Security-Policy"
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert not re.search(r"url\(|@import|expression|https?:|//", style)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", html)
    html.encode()
    return page


def made(path: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None, **summary: Any) -> RunFolder:
    with RunFolder.create(path, config or {}) as run:
        tracker = run.tracker()
        for row in rows:
            tracker.start(row.pop("stage", "ppo"))
            tracker.log(row, row.pop("step"))
        tracker.close()
        if summary:
            run.write_summary(summary)
    return run


def report(run: RunFolder) -> str:
    return write_report(run.path).read_text()


def add_samples(run: RunFolder, rows: list[dict[str, Any]], stage: str = "ppo") -> None:
    tracker = run.tracker(stage)
    tracker.log_samples(rows, 1)
    tracker.close()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_anywhere_is_only_text(tmp_path: Path, text: str) -> None:
    name = "".join(c for c in text if c not in "/\x00" and not "\ud800" <= c <= "\udfff")[:100]
    row = {"stage": text, "step": 1, text: 1.0, f"{text}/x": 2.0, "rollout/reward": math.nan}
    run = made(
        tmp_path / name, [row, {**row, "step": 2}], {text: text, "list": [text, {text: text}]}, **{text: text, "n": 1}
    )
    sample = {"prompt": text, "completion": text, text: 1.0, "parts": {text: 2.0}}
    add_samples(run, [sample, {"prompt": text, "before": text, "after": text}], stage=text)
    long = {"prompt": text * 50, "before": text * 50, "after": text * 3000}
    add_samples(run, [long])
    page = is_harmless(report(run))
    longest = max(re.findall("[A-Za-z0-9]+", text), key=len)
    assert page.words.count(longest) >= 12  # shown, not dropped


def test_hidden_characters_are_shown(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [], {"x": "a\u202eb"})
    add_samples(run, [{"prompt": "p\x1b[31m", "completion": "c\u2066\x00\ud800"}])
    page = is_harmless(report(run))
    for shown in ("a⟨U+202E⟩b", "p␛[31m", "c⟨U+2066⟩␀⟨U+D800⟩"):
        assert shown in page.words


def test_hostile_files_of_a_foreign_folder(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [])
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    run.config_file.write_text(bomb + "when: 2020-01-01\nset: !!set {<b>: null}\n1: {true: .nan}\n")
    run.metrics_file.write_text(
        '{"step": 1, "stage": ["<b>"], "a/x": 1, "nonfinite": [{}, "a/x"]}\n{"step": NaN}\n{"a"'
    )
    run.samples_file.write_text(
        '{"completion": ["<script>"], "prompt": {"a": 1}, "step": "x"}\n{"before": 1, "after": null}\n'
    )
    run.summary_file.write_text('{"versions": "<i>", "x": [[[["<script>"]]]], "kl_before": 1e999, "kl_after": true, "big": 1%s}' % ("0" * 400))  # fmt: skip  # noqa: E501
    page = is_harmless(report(run))
    assert "2 lines of metrics.jsonl could not be read" in page.words
    assert "only the first 1,000 settings are shown" in page.words
    run.config_file.write_text("a: [<script>")
    run.summary_file.write_text("<script>")
    page = is_harmless(report(run))
    assert "The config cannot be read" in page.words
    assert "The summary cannot be read" in page.words


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    page = is_harmless(report(made(tmp_path / "run", [])))
    assert "No metrics were logged" in page.words
    assert "This run has not ended" in page.words
    assert page.all("svg") == []
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(tmp_path)


def test_before_the_report_is_written_there_is_a_page_that_says_so(tmp_path: Path) -> None:
    text = made(tmp_path / "run", []).report_file.read_text()
    assert "prefero report" in text
    assert "default-src 'none'" in text


def test_shows_what_the_files_say(tmp_path: Path) -> None:
    rows = [{"step": i, "rollout/reward": i / 10, "ppo/actor_loss": -i / 10, "mine/x": 1.0} for i in range(1, 11)]
    rows += [{"stage": "sft", "step": i, "sft/loss": 1 / i} for i in range(1, 4)]
    summary = {
        "heldout_reward_before": 0.1, "heldout_reward_after": 0.875, "heldout_reward_stderr": 0.02, "kl": 3.25,
        "rm_accuracy": 0.9, "seconds": 125.0, "command": "prefero quickstart",
    }  # fmt: skip
    run = made(tmp_path / "my-run", rows, {"ppo": {"kl_coef": 0.05, "clip": [0.2, 0.3]}, "empty": {}}, **summary)
    add_samples(run, [{"prompt": "PROMPT", "before": "WAS", "after": "IS", "gold_before": 0.1, "gold_after": 0.9}])
    add_samples(run, [{"prompt": "Q", "completion": "DURING", "reward": 0.5, "parts": {"rm": 0.25}}])
    page = is_harmless(report(run))
    words = page.words
    for shown in (
        "my-run", "held-out reward 0.875 ± 0.02 from 0.1, +0.775", "KL 3.25", "RM accuracy 0.9", "seconds 2m05s",
        "command prefero quickstart", "PROMPT WAS IS 0.1 → 0.9", "DURING", "reward 0.5", "rm 0.25",
        "ppo.kl_coef 0.05", "ppo.clip 0.2, 0.3", "sft/loss 1 → 0.333", "python 3.",
    ):  # fmt: skip
        assert shown in words, shown
    assert "heldout_reward_stderr" not in words
    heads = ["Result", "before and after", "Key curves", "Supervised fine-tuning", "PPO updates", "mine", "Stages"]
    places = [re.search(f"<h2>[^<]*{head}</h2>", run.report_file.read_text()) for head in heads]
    assert None not in places
    starts = [place.start() for place in places if place]
    assert starts == sorted(starts)
    assert len(page.all("svg")) == 4


def test_what_was_measured_once_is_a_number_not_a_chart(tmp_path: Path) -> None:
    run = made(
        tmp_path / "run",
        [{"step": 1, "sft/loss": 2.0, "sft/eval_loss": 1.5, "eval/gold": 1.0}, {"step": 2, "sft/loss": 1.0}],
    )
    add_samples(run, [{"prompt": "", "completion": ""}])
    page = is_harmless(report(run))
    assert "sft/eval_loss 1.5" in page.words
    assert [(chart["aria-label"] or "").split()[0] for chart in page.all("svg")] == ["eval/gold", "sft/loss"]
    assert page.words.count("(empty)") == 2


def test_the_same_measures_stand_side_by_side(tmp_path: Path) -> None:
    summary = {
        "before": {"eval/gold": 0.125, "<b>": 1},
        "after": {"eval/gold": 0.5},
        "best_of_16": {"eval/gold": 0.25, "bound": 2},
    }
    page = is_harmless(report(made(tmp_path / "run", [], kl=1, **summary)))
    assert "before after best of 16 eval/gold 0.125 0.5 0.25 <b> 1 – – bound – – 2" in page.words
    assert "before.eval/gold" not in page.words
    alone = is_harmless(report(made(tmp_path / "alone", [], before={"eval/gold": 0.125}, odd={"a": [1]})))
    assert "before.eval/gold 0.125 odd.a 1" in alone.words


def test_every_link_leads_somewhere_on_the_page(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [{"step": 1, "a/x": 1.0}], {"a": 1}, kl=1.0)
    add_samples(run, [{"prompt": "p", "before": "b", "after": "a"}, {"prompt": "p", "completion": "c"}])
    page = is_harmless(report(run))
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {(a["href"] or "")[1:] for a in page.all("a")} == targets


def test_charts_are_sound_svg(tmp_path: Path) -> None:
    rows = [{"step": i, "rollout/reward": math.sin(i), "rollout/kl": 0.1 * i} for i in range(1, 60)]
    rows += [{"stage": "eval", "step": i, "rollout/kl": math.inf if i == 2 else 1.0} for i in range(1, 4)]
    page = is_harmless(report(made(tmp_path / "run", rows)))
    charts = page.all("svg")
    assert [chart.get("class") for chart in charts] == [None, "many"]
    assert charts[1]["aria-label"] == "rollout/kl by step; ppo ends at 5.9; eval ends at 1"
    number = r"-?\d+(\.\d+)?(e-?\d+)?"
    for path in page.all("path"):
        assert re.fullmatch(f"M{number},{number}(L{number},{number})*", path["d"] or "")
    for tag in ("line", "circle", "text"):
        for attributes in page.all(tag):
            places = [
                attributes[key] for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r") if key in attributes
            ]
            assert places
            assert all(-20 <= float(place or "nan") <= 480 for place in places)
    assert len(page.all("path", "raw")) == 1  # the wave is smoothed, the straight line is not
    assert len(page.all("text", "gap")) == 1


def test_over_optimisation_is_a_visible_notice(tmp_path: Path) -> None:
    def rows(fall: float) -> list[dict[str, Any]]:
        return [
            {"step": i, "rollout/reward": i / 10, "eval/gold": i / 10 - fall * max(0, i - 10) / 5} for i in range(20)
        ]

    bad, good = (
        is_harmless(report(made(tmp_path / name, rows(fall), seconds=1.0))) for name, fall in (("bad", 1), ("good", 0))
    )
    assert "Over-optimisation" in bad.words
    assert len(bad.all("div", "warning")) == 1
    assert bad.all("div", "warning")[0]["role"] == "alert"
    assert good.all("div", "notice") == []


def test_huge_inputs_are_capped_and_said(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [], {f"k{i}": i for i in range(1500)})
    with run.metrics_file.open("a") as file:
        for i in range(3000):
            file.write(json.dumps({"stage": "ppo", "step": i, "rollout/reward": math.sin(i)}) + "\n")
        file.write(json.dumps({"step": 1, **{f"m/{i}": 1.0 for i in range(400)}}) + "\n")
    add_samples(run, [{"prompt": "p", "before": "b" * 100_000, "after": "short"} for _ in range(100)])
    html = report(run)
    page = is_harmless(html)
    assert len(html) < 4_000_000
    assert "ppo: 3,000 points, drawn with at most 2,000" in page.words
    assert "40 earlier samples are in samples.jsonl" in page.words
    assert "100,000 characters, the first 20,000 are shown" in page.words
    assert "only the first 1,000 settings are shown" in page.words
    assert "metric names are not shown" in page.words
    assert len(page.all("details")) >= 60
    assert max(len(text) for text in page.text) <= 20_001


def test_long_texts_are_folded_and_whole(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [], {"a": 1})
    text = " ".join(str(i) for i in range(400))
    add_samples(run, [{"prompt": "p", "before": "b", "after": text}])
    page = is_harmless(report(run))
    assert text in page.text
    assert len(page.all("details")) == 2  # this text, and the config


def test_the_same_files_give_the_same_report(tmp_path: Path) -> None:
    run = made(tmp_path / "run", [{"step": 1, "a/x": 1.0}], {"a": 1}, kl=2.0)
    first = report(run)
    assert report(run) == first


def test_phone_dark_mode_and_print_are_minded(tmp_path: Path) -> None:
    html = report(made(tmp_path / "run", []))
    for needed in ("prefers-color-scheme: dark", "@media print", "max-width: 640px", "width=device-width"):
        assert needed in html
