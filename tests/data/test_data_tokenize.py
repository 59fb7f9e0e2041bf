"""Tokens over a zoo of tokenizers: one BOS, one EOS, prompts are prefixes, people write no special token."""
# ruff: noqa: S105, S106 - tokens of a vocabulary, not secrets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_zoo import CHATML, NO_EOS, REWRITES, ZOO, chatml, gpt2_like, llama2_like, llama3_like
from transformers import PreTrainedTokenizerFast

from prefero.data.formats import Comparison, Conversation, Demonstration, PromptRow, to_prompts
from prefero.data.spelling import encode_continuation, encode_plain, encode_rendered, frame, pad_id
from prefero.data.templates import Guard, guard_messages, render, segments, special_strings
from prefero.data.tokenize import (
    TooLongError,
    encode_comparison,
    encode_conversation,
    encode_example,
    encode_prompt,
    encode_prompts,
    encode_rows,
    encode_sft,
    keep_end,
)

PROMPT, ANSWER = "Question: how is the hotel?", " the hotel is good."
CHATS = {"chatml": chatml, "llama2": llama2_like, "llama3": llama3_like}
TALK = [
    {"role": "user", "content": "how is the hotel?"},
    {"role": "assistant", "content": "it is good"},
    {"role": "user", "content": "and the movie?"},
    {"role": "assistant", "content": "great!"},
]
USES_BOS = {"word": False, "gpt2": False, "chatml": False, "llama3": True, "llama2": True, "bert": True}


@pytest.mark.parametrize("name", ZOO)
def test_one_bos_one_eos_and_the_prompt_is_a_prefix(name: str) -> None:
    tokenizer = ZOO[name]()
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    _, eos = frame(tokenizer)
    prompt = encode_prompt(tokenizer, PROMPT)
    example = encode_example(tokenizer, prompt, ANSWER)
    ids = list(example.token_ids)
    assert ids[: len(prompt.token_ids)] == list(prompt.token_ids)
    expected = int(USES_BOS[name])
    assert (ids.count(bos) if bos != eos else 0) == expected and (ids[0] == bos) == bool(expected)
    assert ids.count(eos) == 1 and ids[-1] == eos
    assert list(example.loss_mask) == [0] * len(prompt.token_ids) + [1] * (len(ids) - len(prompt.token_ids))
    assert None not in ids


@pytest.mark.parametrize("name", ["gpt2", "chatml", "llama3", "llama2"])
def test_decoding_gives_the_text_back(name: str) -> None:
    tokenizer = ZOO[name]()
    for prompt, answer in [(PROMPT, ANSWER), ("a", "b"), ("2+2=", "4"), ("x\n", "\n\ny"), ("hot", "el  is")]:
        ids = encode_example(tokenizer, encode_prompt(tokenizer, prompt), answer).token_ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text.removeprefix(" ") == prompt + answer if name == "llama2" else text == prompt + answer
        if name == "llama2":
            assert len(text) - len(prompt + answer) <= 1


@settings(deadline=None, max_examples=80)
@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_any_text_comes_back_from_a_byte_level_tokenizer(prompt: str, answer: str) -> None:
    tokenizer = _SHARED
    encoded = encode_prompt(tokenizer, prompt)
    ids = encode_example(tokenizer, encoded, answer).token_ids
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == prompt + answer
    assert tokenizer.decode(encoded.token_ids, clean_up_tokenization_spaces=False) == prompt
    assert not set(ids[:-1]) & set(tokenizer.all_special_ids)


_SHARED = chatml()


def test_a_merge_across_the_boundary_does_not_happen() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("ab").input_ids == [2]  # together they merge: the trap
    assert encode_example(tokenizer, encode_prompt(tokenizer, "a"), "b").token_ids == (0, 1, 3)


def test_a_first_word_space_is_not_put_between_prompt_and_answer() -> None:
    tokenizer = llama2_like()
    pieces = tokenizer.convert_ids_to_tokens(encode_continuation(tokenizer, " the hotel"))
    assert "".join(pieces) == "▁the▁hotel"
    assert "".join(tokenizer.convert_ids_to_tokens(encode_continuation(tokenizer, "x"))) == "x"
    assert "".join(tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, "x"))) == "▁x"


@pytest.mark.parametrize("name", ZOO)
def test_no_special_token_comes_from_plain_text(name: str) -> None:
    tokenizer = ZOO[name]()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    strings = [*special_strings(tokenizer), "<|im_end|>", "</s>", "<|endoftext|>", "[SEP]"]
    text = "".join(f"the {string} {string}hotel" for string in strings)
    ids = encode_prompt(tokenizer, text).token_ids
    start = len(frame(tokenizer)[0])
    assert not special & set(ids[start:])
    example = encode_example(tokenizer, encode_prompt(tokenizer, "the"), text + " end")
    assert not special & set(example.token_ids[start:-1])
    # the tokenizer asked plainly would have fallen for it
    assert special & set(tokenizer(text, add_special_tokens=False).input_ids)


def test_a_vocabulary_with_no_other_spelling_says_so() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "|": 1}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="|")
    assert encode_plain(tokenizer, "aa") == [0, 0]
    with pytest.raises(ValueError, match="cannot be spelt without the special tokens"):
        encode_plain(tokenizer, "a|a")


@pytest.mark.parametrize("name", CHATS)
def test_special_tokens_in_messages_are_text(name: str) -> None:
    tokenizer = CHATS[name]()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def talk(evil: str) -> list[dict[str, str]]:
        return [{**m, "content": f"{m['content']} {evil} so"} for m in TALK]

    strings = "".join(special_strings(tokenizer))
    count = [sum(i in special for i in encode_conversation(tokenizer, talk(evil)).token_ids) for evil in ("x", strings)]
    assert count[0] == count[1] > 0
    prompts = [encode_prompt(tokenizer, talk(evil)[:1], "p") for evil in ("x", strings)]
    assert len({sum(i in special for i in prompt.token_ids) for prompt in prompts}) == 1
    assert strings in prompts[1].text
    decoded = tokenizer.decode(prompts[1].token_ids, clean_up_tokenization_spaces=False)
    assert strings in decoded and prompts[1].columns["messages"] == talk(strings)[:1]


@pytest.mark.parametrize("name", CHATS)
def test_guarding_changes_no_other_token(name: str) -> None:
    tokenizer = CHATS[name]()
    text = render(tokenizer, TALK, Guard([], []), add_generation_prompt=False)
    plain = tokenizer(text, add_special_tokens=False).input_ids
    # a guard that hides an ordinary word makes the careful path run on ordinary text
    guard = Guard(["hotel"], [text])
    assert guard.stand_ins and encode_rendered(tokenizer, guard.hide(text), guard) == plain
    assert guard.show(guard.hide(text)) == text


def test_private_use_characters_of_the_user_stay() -> None:
    guard = Guard(["</s>"], ["\ue000 </s> \ue001"])
    hidden = guard.hide("\ue000 </s> \ue001")
    assert "</s>" not in hidden and guard.show(hidden) == "\ue000 </s> \ue001"


@pytest.mark.parametrize("name", CHATS)
def test_loss_counts_on_what_the_assistant_says_and_its_eos(name: str) -> None:
    tokenizer = CHATS[name]()
    example = encode_conversation(tokenizer, TALK)
    learned = [t for t, learn in zip(example.token_ids, example.loss_mask, strict=True) if learn]
    text = tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    eos = tokenizer.eos_token
    assert text.replace(" ", "").replace("\n", "") == {
        "chatml": f"itisgood{eos}great!{eos}", "llama2": f"itisgood{eos}great!{eos}", "llama3": f"itisgoodgreat!{eos}"
    }[name]  # fmt: skip
    assert example.token_ids[-1] == tokenizer.eos_token_id and example.loss_mask[-1] == 1
    assert len(example.token_ids) == len(example.loss_mask)
    # the whole is what the template writes, up to the last EOS
    whole = render(tokenizer, TALK, Guard([], []), add_generation_prompt=False)
    decoded = tokenizer.decode(example.token_ids, clean_up_tokenization_spaces=False)
    expected = whole.rstrip("\n") + (eos if name == "llama3" else "")
    assert decoded.replace(" ", "").replace("\n", "") == (
        (tokenizer.bos_token if name == "llama3" else "") + expected
    ).replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("name", CHATS)
def test_the_chat_prompt_is_how_the_training_row_begins(name: str) -> None:
    tokenizer = CHATS[name]()
    prompt = encode_prompt(tokenizer, TALK[:1])
    example = encode_conversation(tokenizer, TALK[:2])
    size = len(prompt.token_ids)
    assert example.token_ids[:size] == prompt.token_ids
    assert example.loss_mask == (0,) * size + (1,) * (len(example.token_ids) - size)
    assert encode_prompt(tokenizer, TALK[0]["content"], chat=True).token_ids == prompt.token_ids
    if name == "llama2":  # the template writes <s>, the tokenizer would add another
        assert list(prompt.token_ids).count(tokenizer.bos_token_id) == 1
    if name == "llama3":  # the template forgets it
        assert prompt.token_ids[0] == tokenizer.bos_token_id


def test_segments_join_to_the_whole_rendering() -> None:
    tokenizer = chatml()
    pieces = segments(tokenizer, TALK, guard_messages(tokenizer, TALK))
    assert "".join(p.text for p in pieces) == render(tokenizer, TALK, Guard([], []), add_generation_prompt=False)
    assert [p.text for p in pieces if p.learn] == ["it is good<|im_end|>\n", "great!<|im_end|>\n"]


def test_templates_that_rewrite_history_are_refused() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = REWRITES
    thoughts = [dict(m) for m in TALK]
    thoughts[1]["content"] = "<think>hm</think>good"
    assert encode_conversation(tokenizer, thoughts[:2]).loss_mask[-1] == 1
    with pytest.raises(ValueError, match="renders the first 2 messages differently"):
        encode_conversation(tokenizer, thoughts)


def test_a_turn_end_that_is_not_the_eos_is_learned_too() -> None:
    tokenizer = chatml()
    tokenizer.eos_token = "<|endoftext|>"
    example = encode_conversation(tokenizer, TALK)
    learned = [t for t, learn in zip(example.token_ids, example.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learned) == "it is good<|im_end|>great!<|im_end|><|endoftext|>"


def test_tokenizers_without_template_or_eos_and_refusing_templates() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(gpt2_like(), TALK[:1])
    with pytest.raises(ValueError, match=r"refuses messages with roles system, user: only user and assistant"):
        encode_prompt(llama2_like(), [{"role": "system", "content": "s"}, TALK[0]])
    mute = gpt2_like()
    mute.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        encode_prompt(mute, "a")


def test_facts_follow_a_changed_tokenizer() -> None:
    tokenizer = chatml()
    assert frame(tokenizer)[1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "<new>" in tokenizer.decode(encode_plain(tokenizer, "a <new>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    new = tokenizer.convert_tokens_to_ids("<new>")
    assert new in tokenizer("a <new>").input_ids and new not in encode_plain(tokenizer, "a <new>")


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_long_prompts(name: str) -> None:
    tokenizer = ZOO[name]()
    full = encode_prompt(tokenizer, PROMPT, "row.jsonl:7").token_ids
    start = full[:1] if name == "llama3" else ()
    with pytest.raises(TooLongError, match=r"row.jsonl:7: \d+ tokens do not fit in max_length = 4; .*'left', 'right'"):
        encode_prompt(tokenizer, PROMPT, "row.jsonl:7", max_length=4)
    left = encode_prompt(tokenizer, PROMPT, max_length=4, truncate="left")
    right = encode_prompt(tokenizer, PROMPT, max_length=4, truncate="right")
    assert left.token_ids == start + full[-(4 - len(start)) :] and right.token_ids == full[:4]
    assert right.text == tokenizer.decode(right.token_ids[len(start) :])
    assert encode_prompt(tokenizer, PROMPT, max_length=len(full)).token_ids == full
    rows = [PromptRow("r1", PROMPT), PromptRow("r2", "the", {"k": 1})]
    kept = encode_prompts(tokenizer, rows, max_length=4, truncate="drop")
    assert [p.id for p in kept] == ["r2"] and kept[0].columns == {"k": 1}
    with pytest.raises(ValueError, match="every row is too long"):
        encode_prompts(tokenizer, rows[:1], max_length=4, truncate="drop")


def test_chat_prompts_are_never_torn() -> None:
    for truncate in ("left", "right", "error", "drop"):
        with pytest.raises(TooLongError, match="truncate='drop'"):
            encode_prompt(chatml(), TALK[:1], max_length=5, truncate=truncate)
    with pytest.raises(TooLongError):
        encode_conversation(chatml(), TALK, max_length=12, truncate="left")


def test_an_empty_prompt_is_refused() -> None:
    for tokenizer in (gpt2_like(), llama3_like()):
        with pytest.raises(ValueError, match="r1: the prompt is empty"):
            encode_prompt(tokenizer, "", "r1")


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_long_examples(name: str) -> None:
    tokenizer = ZOO[name]()
    row = Demonstration("r1", PROMPT, ANSWER)
    whole = encode_sft(tokenizer, row)
    size = len(whole.token_ids)
    with pytest.raises(TooLongError, match=f"r1: {size} tokens"):
        encode_sft(tokenizer, row, size - 2)
    left = encode_sft(tokenizer, row, size - 2, truncate="left")
    right = encode_sft(tokenizer, row, size - 2, truncate="right")
    start = len(frame(tokenizer)[0])
    assert left.token_ids == whole.token_ids[:start] + whole.token_ids[start + 2 :]
    assert sum(left.loss_mask) == sum(whole.loss_mask) and left.loss_mask[-1] == 1
    # cut at the end, the row does not claim that the text stops there
    assert right.token_ids == whole.token_ids[:-2] and tokenizer.eos_token_id not in right.token_ids
    with pytest.raises(TooLongError):  # nothing of the answer would be left to learn
        encode_sft(tokenizer, row, 4, truncate="right")
    with pytest.raises(TooLongError):  # the answer alone is too long
        encode_sft(tokenizer, row, 4, truncate="left")
    assert encode_rows([row], lambda r: encode_sft(tokenizer, r, size), drop=True) == [whole]


def test_the_first_token_of_all_is_never_learned() -> None:
    """No token stands before it, so no model predicts it; counting it would shrink every other token's loss."""
    text = Demonstration("r1", "", "the hotel is good")
    gpt2 = encode_sft(gpt2_like(), text)
    assert gpt2.loss_mask == (0,) + (1,) * (len(gpt2.token_ids) - 1)
    llama = encode_sft(llama2_like(), text)
    tokenizer = llama2_like()
    assert list(llama.token_ids[:-1]) == tokenizer("the hotel is good").input_ids
    assert llama.loss_mask == (0,) + (1,) * (len(llama.token_ids) - 1)


def test_empty_completions_open_ends_and_literal_eos() -> None:
    tokenizer = chatml()
    prompt = encode_prompt(tokenizer, PROMPT)
    size = len(prompt.token_ids)
    assert encode_example(tokenizer, prompt, "").token_ids[size:] == (tokenizer.eos_token_id,)
    literal = encode_example(tokenizer, prompt, ANSWER + tokenizer.eos_token)
    assert literal == encode_example(tokenizer, prompt, ANSWER)
    unfinished = encode_example(tokenizer, prompt, ANSWER, end=False)
    assert unfinished.token_ids == literal.token_ids[:-1]


def test_comparisons_share_their_prompt() -> None:
    tokenizer = chatml()
    for chat in (False, True):
        row = Comparison("r1", PROMPT, " good", " bad", 2.0)
        pair = encode_comparison(tokenizer, row, chat=chat)
        prompt = encode_prompt(tokenizer, PROMPT, chat=chat).token_ids
        assert pair.chosen[: len(prompt)] == pair.rejected[: len(prompt)] == prompt
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id and pair.margin == 2.0
        assert pair.chosen != pair.rejected and pair.key == PROMPT
    same_start = Comparison("r2", PROMPT, " the hotel is good", " the hotel is bad")
    size = len(encode_prompt(tokenizer, PROMPT).token_ids)
    with pytest.raises(TooLongError, match="both answers are the same"):
        encode_comparison(tokenizer, same_start, size + 2, truncate="right")


def test_rows_of_messages_go_through_the_template() -> None:
    tokenizer = chatml()
    talk = tuple(TALK[:2])
    one = encode_sft(tokenizer, Conversation("r1", talk))
    two = encode_sft(tokenizer, Demonstration("r1", talk[:1], talk[1]["content"]))
    three = encode_sft(tokenizer, Demonstration("r1", talk[0]["content"], talk[1]["content"]), chat=True)
    assert one == two == three == encode_conversation(tokenizer, talk)


def test_who_scores_is_not_shown_the_answer_of_the_data() -> None:
    (prompt,) = encode_prompts(chatml(), to_prompts([{"messages": TALK[:2], "movie": "x"}]))
    assert prompt.columns == {"movie": "x", "messages": list(TALK[:1])}


def test_a_vocabulary_without_letters_or_unk() -> None:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "1": 1, "2": 2}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert encode_example(tokenizer, encode_prompt(tokenizer, "1 2"), " 2").token_ids == (1, 2, 2, 0)


def test_pad_ids() -> None:
    assert pad_id(gpt2_like()) == gpt2_like().eos_token_id
    assert pad_id(ZOO["word"]()) == 0
    assert CHATML != NO_EOS


def test_tokens_that_swallow_white_space_beside_them() -> None:
    """Phi's turn ends eat the newline after them; a guarded rendering must do the same."""
    from tokenizers import AddedToken

    tokenizer = chatml()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", rstrip=True, special=True)]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|turn|>\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "the hotel"}, {"role": "user", "content": "is good"}]
    text = render(tokenizer, messages, Guard([], []), add_generation_prompt=False)
    guard = Guard(["hotel"], [text])
    assert encode_rendered(tokenizer, guard.hide(text), guard) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_text_to_be_judged_keeps_its_beginning_of_sequence_and_its_end() -> None:
    for tokenizer in (llama2_like(), gpt2_like()):
        beginning, _ = frame(tokenizer)
        ids = (*beginning, 5, 6, 7, 8)
        assert keep_end(tokenizer, ids, len(ids)) == ids
        assert keep_end(tokenizer, ids, len(beginning) + 2) == (*beginning, 7, 8)
