"""The embedded world: closed, balanced, repeatable, and with a taste that says what its docstring says."""

import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from prefero.data import grammar
from prefero.data.grammar import TOPICS, GrammarWorld, is_answer, is_question, taste, topic_of, words

QUESTION = "how was the movie ?"


@pytest.fixture(scope="module")
def world() -> GrammarWorld:
    return GrammarWorld(0)


@pytest.fixture(scope="module")
def rows(world: GrammarWorld) -> list[dict[str, str]]:
    return world.sft_rows(4000)


def feelings(text: str) -> list[int]:
    return [grammar._FEELING[word] for word in text.split() if word in grammar._FEELING]


# SHA-256 of the first rows of seed 3; changes only when the world is changed on purpose
DIGEST = "8e7a2c6d3a420fbe3404729910f3aea85aedc45505a6e89121a8c283abb1d10c"


def test_the_same_seed_gives_the_same_world_everywhere(world: GrammarWorld) -> None:
    def rows(made: GrammarWorld) -> str:
        return json.dumps([made.sft_rows(20), made.preference_rows(20, "train"), made.prompts("heldout")])

    assert rows(GrammarWorld(3)) == rows(GrammarWorld(3)) != rows(world)
    assert hashlib.sha256(rows(GrammarWorld(3)).encode()).hexdigest() == DIGEST


def test_more_rows_of_one_kind_only_append(world: GrammarWorld) -> None:
    assert world.sft_rows(50)[:10] == world.sft_rows(10)
    assert world.preference_rows(50, "train")[:10] == world.preference_rows(10, "train")


def test_held_out_combinations_never_reach_training(world: GrammarWorld) -> None:
    def combinations(prompts: list[str]) -> set[tuple[str, str]]:
        found = set()
        for prompt in prompts:
            topic = topic_of(prompt)
            form = next(f for f in grammar.QUESTIONS if prompt.endswith(f.format(topic)))
            found.add((form, topic))
        return found

    held_out, train = combinations(world.prompts("heldout")), combinations(world.prompts("train"))
    assert held_out.isdisjoint(train) and len(held_out) == 20 and len(train) == 80
    used = [row["prompt"] for row in world.sft_rows(3000)] + [r["prompt"] for r in world.preference_rows(2000, "train")]
    assert combinations(used) == train
    assert combinations([r["prompt"] for r in world.preference_rows(500, "heldout")]) <= held_out
    for part in (held_out, train):
        assert {topic for _, topic in part} == set(TOPICS)
        assert {form for form, _ in part} == set(grammar.QUESTIONS)


def test_prompts_are_distinct_questions_of_the_grammar(world: GrammarWorld) -> None:
    everything = world.prompts("train") + world.prompts("heldout")
    assert len(set(everything)) == len(everything) == 400
    assert all(is_question(prompt) for prompt in everything)
    assert not is_question("how was the moon ?")
    assert not is_question("how was the movie")


def test_the_corpus_is_varied_balanced_and_measured(rows: list[dict[str, str]]) -> None:
    answers = [row["completion"] for row in rows]
    assert len(set(answers)) > 3600
    moods = [sum(feelings(answer)) for answer in answers]
    assert abs(sum(moods)) / len(moods) < 0.1
    warm, cold = (sum(mood * sign > 0 for mood in moods) / len(moods) for sign in (1, -1))
    assert abs(warm - cold) < 0.05 and warm > 0.3
    assert max(feelings(answer).count(1) for answer in answers) == 3
    lengths = [len(answer.split()) for answer in answers]
    assert min(lengths) <= 5 and max(lengths) >= 25 and max(lengths) <= 32
    for sign in ("because", "but", "i think", "thank you for asking ."):
        assert 0.03 < sum(sign in answer for answer in answers) / len(answers) < 0.5
    topics = [topic_of(row["prompt"]) for row in rows]
    assert all(0.05 < topics.count(topic) / len(topics) < 0.15 for topic in TOPICS)


def test_every_answer_parses_keeps_to_its_topic_and_uses_known_words(
    world: GrammarWorld, rows: list[dict[str, str]]
) -> None:
    known = set(words())
    assert 140 <= len(known) <= 200
    for row in rows:
        assert is_answer(row["completion"]), row
        assert world.on_topic(**row), row
        assert set(row["prompt"].split()) | set(row["completion"].split()) <= known
    for pair in world.preference_rows(1000, "train"):
        assert set(pair["chosen"].split()) | set(pair["rejected"].split()) <= known


SOME_ROWS = GrammarWorld(1).sft_rows(50)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_answer_does_not_parse(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(SOME_ROWS))
    said = row["completion"].split()
    cut = " ".join(said[: data.draw(st.integers(0, len(said) - 1))])
    assert not is_answer(cut) or cut.endswith(".")
    at = data.draw(st.integers(0, len(said) - 1))
    assert not is_answer(" ".join([*said[:at], said[at], *said[at:]]))


def test_the_tokenizer_holds_the_whole_world(world: GrammarWorld, rows: list[dict[str, str]]) -> None:
    tokenizer = world.tokenizer()
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    for row in rows[:500]:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert set(ids).isdisjoint(special)
            assert tokenizer.decode(ids) == " ".join(text.split())
        joined = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert joined == tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
    assert tokenizer("moon")["input_ids"] == [tokenizer.unk_token_id]
    assert set(tokenizer("how")) == {"input_ids", "attention_mask"}
    ids = tokenizer("how was the movie ?", return_tensors="pt")["input_ids"]
    model = LlamaForCausalLM(world.model_config())
    assert model(input_ids=ids).logits.shape == (1, 5, len(tokenizer))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("the plot was good .", "the plot was plain ."),
        ("the plot was plain .", "the plot was bad ."),
        ("the plot was bad .", "the plot was bad and the acting was dull ."),
        ("the plot was good and kind .", "the plot was good ."),
        ("the plot was good because it made me smile .", "the plot was good ."),
        ("the plot was good .", "the pool was good ."),
        ("the plot was good .", "the plot was good"),
        ("the plot was good .", "the plot was was good ."),
        ("the plot was very good .", "the plot was good good ."),
        ("the plot was good .", "the plot was good and the plot was good ."),
        ("the plot was good and kind .", "the plot was good and kind and the acting was great and lovely ."),
        (
            "the plot was good because it made me smile .",
            "the plot was good because it made me smile because it made me laugh .",
        ),
    ],
)
def test_the_taste_prefers(world: GrammarWorld, better: str, worse: str) -> None:
    assert world.gold(QUESTION, better) > world.gold(QUESTION, worse)


def test_the_taste_in_numbers(world: GrammarWorld) -> None:
    table = {
        "the plot was good because i loved the acting .": 1.0,  # .5 warmth, .2 topic, .2 reason, .1 form
        "the plot was good .": 0.7,
        "it was plain .": 0.3,
        "the pool was bad .": -0.55,
        "the plot was good and kind and the acting was great and lovely .": 0.3,  # four warm words: gushing
        "good good good good good good good": -1.0,
        "": -0.7,  # no warmth, nothing said of the topic, no sentence
    }
    for completion, value in table.items():
        assert world.gold(QUESTION, completion) == pytest.approx(value), completion
        assert world.gold(QUESTION, " " + completion) == pytest.approx(value), completion


def test_every_term_of_the_taste_is_named() -> None:
    verdict = taste(QUESTION, "the plot was good and i hated the pool because the plot was rude .")
    assert verdict == grammar.Taste(0.4, -0.7, -0.3, 0.2, -0.2, 0.1)
    assert verdict.total == pytest.approx(-0.5)


def test_gushing_pays_ever_less(world: GrammarWorld) -> None:
    kind_words = list(grammar.ADJECTIVES[1])
    values = [taste(QUESTION, " ".join(kind_words[:n])).warmth for n in range(9)]
    assert values[1] > values[0] and values[2] > values[1]
    assert values[3] > values[4] > values[5] > values[6] == values[8]
    assert values[5] < values[0]


def test_comparisons_follow_the_taste_with_bradley_terry_noise(world: GrammarWorld) -> None:
    right = total = 0
    expected = spread = 0.0
    for pair in world.preference_rows(4000, "train"):
        gap = abs(world.gold(pair["prompt"], pair["chosen"]) - world.gold(pair["prompt"], pair["rejected"]))
        if gap == 0:
            continue
        p = 1 / (1 + math.exp(-grammar.TRUST * gap))
        expected, spread, total = expected + p, spread + p * (1 - p), total + 1
        right += world.gold(pair["prompt"], pair["chosen"]) > world.gold(pair["prompt"], pair["rejected"])
    assert abs(right - expected) < 4 * math.sqrt(spread)
    assert 0.8 < right / total < 0.95
    assert all(pair["chosen"] != pair["rejected"] for pair in world.preference_rows(500, "heldout"))


def test_a_share_of_the_drafts_is_damaged(world: GrammarWorld) -> None:
    drafts = [
        (row["prompt"], row[side]) for row in world.preference_rows(2000, "train") for side in ("chosen", "rejected")
    ]
    whole = [is_answer(draft) and world.on_topic(prompt, draft) for prompt, draft in drafts]
    assert 0.73 < sum(whole) / len(whole) < 0.85


def test_bad_input_is_explained(world: GrammarWorld) -> None:
    with pytest.raises(ValueError, match=r"split is 'test'.*'train' or 'heldout'"):
        world.prompts("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'how was the moon \?' names no topic"):
        world.gold("how was the moon ?", "it was good .")
