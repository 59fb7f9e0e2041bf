"""Every data set shape, from the shipped samples and by hand, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefero.data import read_rows, to_labelled, to_preferences, to_prompts, to_sft
from prefero.data.formats import ALPACA_WITH_INPUT, SHAPES, Conversation, Demonstration, split_transcripts

SAMPLES = Path(__file__).parents[2] / "examples" / "data"

SHAPE_OF = {
    "prompt_completion.jsonl": "prompt-completion",
    "messages.jsonl": "messages",
    "text.jsonl": "text",
    "alpaca.json": "alpaca",
    "prompts.csv": "prompts",
    "rm_static.jsonl": "rm-static",
    "hh_rlhf.jsonl": "hh-rlhf",
    "preferences.jsonl": "preference",
    "summarize_from_feedback.jsonl": "summarize_from_feedback",
    "webgpt_comparisons.jsonl": "webgpt_comparisons",
    "instruct_synthetic.jsonl": "prompt-response",
    "labelled.jsonl": "labelled",
}


def test_every_shape_has_a_shipped_sample() -> None:
    assert sorted(SHAPE_OF) == sorted(path.name for path in SAMPLES.iterdir())
    assert sorted(SHAPE_OF.values()) == sorted(shape.name for shape in SHAPES)


@pytest.mark.parametrize("name", SHAPE_OF)
def test_the_samples_convert_to_all_they_can(name: str) -> None:
    shape = next(shape for shape in SHAPES if shape.name == SHAPE_OF[name])
    for convert, able in (
        (to_sft, bool(shape.completion or shape.messages or shape.comparison)),
        (to_preferences, bool(shape.comparison)),
        (to_labelled, bool(shape.comparison or shape.desirable)),
        (to_prompts, shape.name != "text"),
    ):
        rows = read_rows(SAMPLES / name)
        if not able:
            with pytest.raises(ValueError, match="Accepted shapes"):
                convert(rows)
            continue
        table = convert(rows)
        assert table.shape == shape.name and table.bad == []
        halves = 2 if convert is to_labelled and shape.comparison else 1
        assert len(table) / halves + sum(table.dropped.values()) == len(rows)
        assert len({row.id for row in table}) == len(table)


def one(convert: Any, **row: Any) -> Any:
    return convert([row])[0]


def test_prompt_completion_and_text_are_verbatim() -> None:
    row = one(to_sft, prompt="2+2=", completion="4")
    assert (row.prompt, row.completion, row.id) == ("2+2=", "4", "rows:1")
    assert one(to_sft, text=" as it is ") == Demonstration("rows:1", "", " as it is ")


def test_alpaca_prompts_hold_the_text_as_it_is() -> None:
    row = one(to_sft, instruction="Use {input} and {x}", input="a {instruction}", output="done")
    assert row.prompt == ALPACA_WITH_INPUT.split("{instruction}")[0] + (
        "Use {input} and {x}\n\n### Input:\na {instruction}\n\n### Response:"
    )
    assert row.completion == "done"
    for nothing in ({}, {"input": ""}, {"input": None}):
        without = one(to_sft, instruction="Go", output="done", **nothing)
        assert without.prompt.endswith("completes the request.\n\n### Instruction:\nGo\n\n### Response:")
        assert "### Input" not in without.prompt and "further context" not in without.prompt


def test_prompt_csv_keeps_its_columns() -> None:
    row = one(to_prompts, act="Chef", prompt="Cook.")
    assert row.prompt == "Cook." and row.columns == {"act": "Chef"}


def test_hh_rlhf_is_cut_at_the_last_shared_turn() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = one(to_preferences, chosen=f"{start} yes, \n\nAssistant: too", rejected=f"{start} yellow")
    assert (row.prompt, row.chosen, row.rejected) == (start, " yes, \n\nAssistant: too", " yellow")
    assert one(to_prompts, chosen=f"{start} x", rejected=f"{start} y").prompt == start


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=10), st.text(max_size=10), st.text(max_size=10))
def test_cut_transcripts_join_again(prompt: str, chosen: str, rejected: str) -> None:
    start = prompt + "\n\nAssistant:"
    shared, left, right = split_transcripts(start + chosen, start + rejected)
    assert shared + left == start + chosen and shared + right == start + rejected
    assert shared.startswith(start) and shared.endswith("\n\nAssistant:")


def test_messages_in_every_place() -> None:
    ask = [{"role": "user", "content": "q"}]
    say = {"role": "assistant", "content": "a"}
    chat = one(to_sft, messages=[*ask, say])
    assert isinstance(chat, Conversation) and chat.messages == (*ask, say)
    assert one(to_sft, prompt=ask, completion=[say]).completion == "a"
    assert one(to_prompts, messages=[*ask, say]).prompt == tuple(ask)
    other = {"role": "assistant", "content": "b"}
    for pair in (
        one(to_preferences, prompt=ask, chosen=[say], rejected=[other]),
        one(to_preferences, prompt=ask, chosen="a", rejected="b"),
        one(to_preferences, chosen=[*ask, say], rejected=[*ask, other]),
        one(to_preferences, prompt="q", chosen=[*ask, say], rejected=[*ask, other]),
    ):
        assert (pair.prompt, pair.chosen, pair.rejected) == (tuple(ask), "a", "b")


def test_preference_margin_and_columns() -> None:
    row = one(to_preferences, prompt="p", chosen="a", rejected="b", margin="1.5", movie="m")
    assert row.margin == 1.5 and row.columns == {"movie": "m"}
    assert one(to_preferences, prompt="p", chosen="a", rejected="b").margin == 0.0


@pytest.mark.parametrize("choice", [0, 1, "1"])
def test_summaries(choice: Any) -> None:
    texts = ["first", " second"]
    summaries = [{"text": text} for text in texts]
    row = one(to_preferences, info={"post": " P ", "title": "T"}, summaries=summaries, choice=choice)
    assert row.prompt == "TITLE: T\n\nPOST: P\n\nTL;DR:"
    spaced = [" first", " second"]
    assert (row.chosen, row.rejected) == (spaced[int(choice)], spaced[1 - int(choice)])
    article = one(to_preferences, info={"post": None, "article": "A"}, summaries=summaries, choice=choice)
    assert article.prompt == "ARTICLE: A\n\nTL;DR:"


def test_webgpt_takes_the_better_answer_and_drops_ties() -> None:
    def row(a: float, b: float) -> dict[str, Any]:
        return {"question": {"full_text": "Q?"}, "answer_0": "x", "answer_1": "y", "score_0": a, "score_1": b}

    table = to_preferences([row(1.0, -0.5), row(0, 0), row(-1, 0.25), row(0.5, 0.5)])
    assert [(r.prompt, r.chosen, r.rejected, r.margin) for r in table] == [
        ("Question: Q?\n\nAnswer:", " x", " y", 1.5),
        ("Question: Q?\n\nAnswer:", " y", " x", 1.25),
    ]
    assert table.dropped == {"tie": 2} and [r.id for r in table] == ["rows:1", "rows:3"]
    with pytest.raises(ValueError, match="no usable row as webgpt_comparisons"):
        to_preferences([row(0, 0)])


def test_instruct_synthetic_words_do_not_run_together() -> None:
    assert one(to_sft, prompt="Say hi.", response="Hi").completion == " Hi"
    assert one(to_sft, prompt="Say hi.\n", response="Hi").completion == "Hi"
    assert one(to_sft, prompt="Say hi.", response=" Hi").completion == " Hi"


def test_preferences_teach_their_chosen_answer() -> None:
    row = one(to_sft, prompt="p", response="r", chosen="a", rejected="b")
    assert (row.prompt, row.completion) == ("p", "a")


@pytest.mark.parametrize(
    ("convert", "row", "why"),
    [
        (to_preferences, {"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
        (to_preferences, {"prompt": "p", "chosen": " ", "rejected": "a"}, "'chosen' is empty"),
        (to_preferences, {"prompt": "", "chosen": "b", "rejected": "a"}, "'prompt' is empty"),
        (to_preferences, {"prompt": "p", "chosen": "b", "rejected": 3}, "must be text, got int"),
        (to_preferences, {"prompt": "p", "chosen": "b", "rejected": "a", "margin": "much"}, "must be a number"),
        (to_preferences, {"chosen": "Human: b", "rejected": "Human: a"}, "share no prompt"),
        (to_preferences, {"chosen": "\n\nAssistant:", "rejected": "\n\nAssistant: a"}, "chosen answer is empty"),
        (to_preferences, {"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0}, "two summaries"),
        (to_preferences, {"info": {"post": "p"}, "summaries": [{"text": "a"}] * 2, "choice": 2}, "0 or 1"),
        (to_preferences, {"info": {}, "summaries": [], "choice": 0}, "neither text"),
        (to_sft, {"prompt": "p", "completion": ""}, "'completion' is empty"),
        (to_sft, {"prompt": "p", "completion": None}, "must be text, got NoneType"),
        (to_sft, {"messages": []}, "non-empty list"),
        (to_sft, {"messages": [{"role": "user", "content": "q"}]}, "must end with the assistant"),
        (to_sft, {"messages": [{"role": "user"}]}, "needs text under 'content'"),
        (to_sft, {"messages": [{"role": "<|im_end|>", "content": "q"}]}, "use user or assistant"),
        (to_sft, {"messages": [{"role": "assistant", "content": " "}]}, "empty assistant turn"),
        (to_prompts, {"prompt": "  "}, "'prompt' is empty"),
        (to_prompts, {"prompt": [{"role": "assistant", "content": "q"}]}, "before the assistant speaks"),
    ],
)
def test_bad_rows(tmp_path: Path, convert: Any, row: dict[str, Any], why: str) -> None:
    good = {
        to_preferences: {"prompt": "p", "chosen": "a", "rejected": "b"},
        to_sft: {"prompt": "p", "completion": "c"},
        to_prompts: {"prompt": "p"},
    }[convert]
    if not set(good) <= set(row):
        with pytest.raises(ValueError, match=why):
            convert([row])
        return
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + "\n".join(json.dumps(r) for r in (good, row, good)))
    with pytest.raises(ValueError, match=why) as caught:
        convert(read_rows(path))
    assert str(caught.value).startswith(f"{path}:3: ") and "--max-bad-rows" in str(caught.value)
    table = convert(read_rows(path, max_bad_rows=1))
    assert len(table) == 2 and table.bad[0].line == 3 and why in table.bad[0].why


def test_one_budget_for_reading_and_converting(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('nonsense\n{"prompt": ""}\n{"prompt": "p"}\n')
    assert len(to_prompts(read_rows(path, max_bad_rows=2)).bad) == 2
    with pytest.raises(ValueError, match=r"x.jsonl:2: .*2 bad rows so far"):
        to_prompts(read_rows(path, max_bad_rows=1))


def test_a_row_without_the_column_of_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completoin": "c"}]
    with pytest.raises(ValueError, match=r"rows:2: no column 'completion' \(did you mean 'completoin'\?\)"):
        to_sft(rows)


def test_an_unknown_shape_lists_shapes_and_columns() -> None:
    with pytest.raises(ValueError, match="columns promt, completion are no shape accepted here") as caught:
        to_sft([{"promt": "a", "completion": "b"}])
    assert "did you mean 'prompt'" in str(caught.value) and "alpaca: instruction, output" in str(caught.value)


def test_labels_are_verdicts_and_comparisons_give_two() -> None:
    rows = [{"prompt": "a", "completion": " x", "label": label} for label in (True, False, 1, 0, "True", "0", 1.0)]
    table = to_labelled(rows)
    assert [row.desirable for row in table] == [True, False, True, False, True, False, True]
    assert [row.completion for row in to_sft(rows)] == [" x"] * 4 and to_sft(rows).dropped == {"undesirable": 3}
    pairs = to_labelled([{"prompt": "a", "chosen": "b", "rejected": "c", "topic": "t"}])
    assert [(row.completion, row.desirable, row.id) for row in pairs] == [
        ("b", True, "rows:1/chosen"), ("c", False, "rows:1/rejected"),
    ]  # fmt: skip
    assert pairs[0].columns == {"topic": "t"}
    with pytest.raises(ValueError, match="column 'label' must be true or false, got 'good'"):
        to_labelled([{"prompt": "a", "completion": "b", "label": "good"}])
    with pytest.raises(ValueError, match="'completion' is empty"):
        to_labelled([{"prompt": "a", "completion": " ", "label": True}])
    with pytest.raises(ValueError, match="Accepted shapes"):
        to_labelled([{"prompt": "a", "completion": "b"}])
