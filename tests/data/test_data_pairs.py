"""Pairs and labelled rows as token ids: what is marked, what is shared, what is unrelated, what is refused."""

import pytest
import torch
from tiny import tiny_tokenizer

from prefero.data import (
    Comparison,
    Example,
    Labelled,
    TooLongError,
    collate_labelled,
    collate_pairs,
    encode_labelled,
    encode_pair,
    with_unrelated,
)
from prefero.types import ReferencedLabelledBatch, ReferencedPairBatch

TOKENIZER = tiny_tokenizer()


def marked(example: Example) -> str:
    return str(TOKENIZER.decode([i for i, m in zip(example.token_ids, example.loss_mask, strict=True) if m]))


def test_the_answers_alone_are_marked_and_end_with_eos() -> None:
    pair = encode_pair(TOKENIZER, Comparison("p", "how was the movie ?", " good .", " bad !"))
    assert (marked(pair.chosen), marked(pair.rejected)) == ("good . <eos>", "bad ! <eos>")
    prompt = pair.chosen.loss_mask.index(1)
    assert pair.chosen.token_ids[:prompt] == pair.rejected.token_ids[:prompt]


def test_of_a_conversation_only_the_last_answer_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    talk = ({"role": "user", "content": "how"}, {"role": "assistant", "content": "good"},
            {"role": "user", "content": "tell me"})  # fmt: skip
    pair = encode_pair(tokenizer, Comparison("p", talk, "great", "bad"))
    assert (marked(pair.chosen), marked(pair.rejected)) == ("great <eos>", "bad <eos>")


def test_equal_answers_are_refused_before_and_after_cutting() -> None:
    with pytest.raises(ValueError, match="p: the chosen and the rejected answer are the same tokens"):
        encode_pair(TOKENIZER, Comparison("p", "how", " good", " good"))
    with pytest.raises(TooLongError, match="the first 2 tokens of both answers are the same"):
        encode_pair(TOKENIZER, Comparison("p", "how", " good .", " good !"), 2, truncate="right")


def test_texts_that_several_pairs_hold_stand_once_in_a_batch() -> None:
    answers = [" good", " bad", " great"]
    pairs = [encode_pair(TOKENIZER, Comparison(f"{a}{b}", "how", a, b)) for a in answers for b in answers if a != b]
    table = {text: float(place) for place, text in enumerate({pair.chosen: 0 for pair in pairs})}
    plain, known = collate_pairs(pairs), collate_pairs(pairs, references=table)
    assert plain.token_ids.shape[0] == 3 and len(plain) == 6 and bool(plain.counted.all())
    assert not isinstance(plain, ReferencedPairBatch) and isinstance(known, ReferencedPairBatch)
    for row, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            text, place = getattr(pair, side), int(getattr(known, side)[row])
            assert tuple(known.token_ids[place].tolist()) == text.token_ids
            assert tuple(known.loss_mask[place].tolist()) == text.loss_mask
            assert float(known.ref_logprobs[place]) == table[text]


def labelled(*rows: tuple[str, str, bool]) -> list[tuple[str, Example, bool]]:
    return [
        (f"{i}", encode_labelled(TOKENIZER, Labelled(f"{i}", prompt, answer, verdict)), verdict)
        for i, (prompt, answer, verdict) in enumerate(rows)
    ]


def test_what_stands_beside_a_row_answers_another_prompt() -> None:
    rows = labelled(("how", " good", True), ("how", " bad", False), ("tell me", " great", True),
                    ("the movie", " awful", False), ("the movie", " it was", True))  # fmt: skip
    found = with_unrelated(rows)
    given = {text: rows[i][1].token_ids[: rows[i][1].loss_mask.index(1)] for i, text in enumerate("01234")}
    answers = {marked(example): given[name] for name, example, _ in rows}
    for (name, own, verdict), row in zip(rows, found, strict=True):
        cut = own.loss_mask.index(1)
        assert row.answer == own and row.desirable == verdict and row.id == name
        assert row.unrelated.token_ids[:cut] == own.token_ids[:cut]
        assert answers[marked(row.unrelated)] != own.token_ids[:cut]
    assert with_unrelated(rows) == found
    assert max(len(row.unrelated.token_ids) for row in with_unrelated(rows, 4)) == 4


def test_a_single_prompt_still_gets_another_answer_and_one_row_is_refused() -> None:
    rows = labelled(*[("how", f" {word}", True) for word in ("good", "bad", "great")])
    assert all(marked(row.unrelated) != marked(row.answer) for row in with_unrelated(rows))
    with pytest.raises(ValueError, match="there are 1 labelled rows"):
        with_unrelated(rows[:1])


def test_labelled_rows_become_two_blocks() -> None:
    found = with_unrelated(labelled(("how", " good", True), ("tell me", " bad it was", False)))
    table = {text: float(i) for i, row in enumerate(found) for text in (row.answer, row.unrelated)}
    batch = collate_labelled(found, references=table)
    assert isinstance(batch, ReferencedLabelledBatch) and len(batch) == 2
    assert batch.desirable.tolist() == [True, False] and batch.ref_logprobs.tolist() == [0.0, 1.0]
    assert batch.unrelated_ids.shape == batch.unrelated_loss_mask.shape
    assert torch.equal(batch.loss_mask.sum(1), torch.tensor([2, 4]))
    assert torch.equal(batch.unrelated_loss_mask.sum(1), torch.tensor([4, 2]))
