"""The movie reviews: split by movie, paired within a movie, cleaned lightly. On a corpus made up here."""

import bz2
import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from prefero.data import movies
from prefero.data.movies import PROMPT, clean, preference_rows, prompts, reviews, sft_rows, split_of

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 movies with 3 fresh and 2 rotten reviews each, plots and empties between them."""
    folder = tmp_path_factory.mktemp("corpus")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
    for movie in range(60):
        name = f"movie_{movie}"
        table.writerow(["plot", f"A long story about number {movie}.", name, "True"])
        for label, count in (("fresh", 3), ("rotten", 2)):
            for i in range(count):
                table.writerow([label, f"Review {movie} {label} {i} says\na lot about this one", name, "True"])
        table.writerow(["rotten", "Eh.", name, "True"])
        table.writerow(["fresh", "  \n Hm.    \n ", name, "True"])
    raw = folder / "raw"
    raw.mkdir()
    (raw / "corpus.csv.bz2").write_bytes(bz2.compress(text.getvalue().encode()))
    movies.convert(raw, folder / "out")
    return folder / "out" / "reviews.jsonl"


def test_plots_and_near_empty_texts_are_left_out(corpus: Path) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert len(rows) == 300
    assert Counter(row["label"] for row in rows) == {"fresh": 180, "rotten": 120}
    assert rows[0] == {"movie": "movie_0", "label": "fresh", "text": "Review 0 fresh 0 says a lot about this one"}


def test_every_movie_is_in_one_split_by_its_name(corpus: Path) -> None:
    seen: dict[str, set[str]] = {split: {review.movie for review in reviews(split, corpus)} for split in SPLITS}
    assert sum(map(len, seen.values())) == 60 == len(set.union(*seen.values()))
    for split, names in seen.items():
        assert names
        for name in names:
            digit = int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 10
            assert split == {0: "test", 1: "validation"}.get(digit, "train") == split_of(name)
    # known by hand, so that a change of the rule cannot go unseen
    assert [split_of(name) for name in ("aankhen", "abandon", "memento", "up")] == ["train", "test", "train", "train"]


def test_pairs_are_fresh_over_rotten_of_one_movie_and_stand_together(corpus: Path) -> None:
    rows = preference_rows("train", path=corpus)
    names = {review.movie for review in reviews("train", corpus)}
    assert len(rows) == 6 * len(names)
    assert len({(row["chosen"], row["rejected"]) for row in rows}) == len(rows)
    for row in rows:
        number = row["movie"].removeprefix("movie_")
        assert row["prompt"] == PROMPT
        assert row["chosen"].startswith(f" Review {number} fresh")
        assert row["rejected"].startswith(f" Review {number} rotten")
    runs = [row["movie"] for before, row in zip([{}, *rows], rows, strict=False) if before.get("movie") != row["movie"]]
    assert len(runs) == len(set(runs)) == len(names)
    assert runs != sorted(runs)


def test_pairs_follow_the_seed_and_the_limit(corpus: Path) -> None:
    whole = preference_rows("train", path=corpus)
    assert whole == preference_rows("train", path=corpus)
    other = preference_rows("train", seed=1, path=corpus)
    assert whole != other and sorted(map(str, whole)) == sorted(map(str, other))
    some = preference_rows("train", limit=40, path=corpus)
    assert len(some) == 40 and [row for row in whole if row in some] == some
    assert len({row["movie"] for row in some}) > 15
    assert preference_rows("train", limit=10**6, path=corpus) == whole


def test_the_held_out_pairs_are_of_test_movies(corpus: Path) -> None:
    pairs = movies.held_out_pairs(corpus)
    assert pairs == movies.held_out_pairs(corpus)
    assert pairs and {split_of(pair["movie"]) for pair in pairs} == {"test"}


def test_sft_rows_hold_every_review_of_the_split(corpus: Path) -> None:
    rows = sft_rows("train", corpus)
    assert [row["completion"] for row in rows] == [" " + review.text for review in reviews("train", corpus)]
    assert {row["prompt"] for row in rows} == {"Movie review:"}


def test_prompts_are_distinct_beginnings_of_their_split(corpus: Path) -> None:
    found = prompts("test", 8, path=corpus)
    assert len(set(found)) == 8 and found == prompts("test", 8, path=corpus) != prompts("test", 8, seed=1, path=corpus)
    starts = {" ".join(review.text.split()[:4]) for review in reviews("test", corpus)}
    assert {prompt.removeprefix("Movie review: ") for prompt in found} <= starts
    with pytest.raises(ValueError, match=r"n is 1000, but the test split has only \d+ different beginnings"):
        prompts("test", 1000, path=corpus)


def test_a_common_beginning_and_a_short_review_do_not_make_two_prompts(tmp_path: Path) -> None:
    texts = ["One of the best films of the year", "One of the best of its kind at all", "Too short to serve here"]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps({"movie": "movie_1", "label": "fresh", "text": t}) + "\n" for t in texts))
    assert prompts("train", 1, path=path) == ["Movie review: One of the best"]
    with pytest.raises(ValueError, match="only 1 different"):
        prompts("train", 2, path=path)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  It\u2019s \n\n fine\u2026 ", "It's fine..."),
        ('"A hit."', "A hit."),
        ("\u201cA hit.\u201d", "A hit."),
        ('"Up" beats "Down"', '"Up" beats "Down"'),
        ('He said "no"', 'He said "no"'),
        ("Touch\u00e9!", "Touch\u00e9!"),
        ('"', '"'),
    ],
)
def test_cleaning_is_light(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned == clean(cleaned)


def test_what_is_missing_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="`prefero fetch rotten-tomatoes`"):
        sft_rows("train")
    with pytest.raises(ValueError, match="split is 'dev'; it must be 'train', 'validation' or 'test'"):
        reviews("dev", corpus)  # type: ignore[arg-type]
    broken = tmp_path / "reviews.jsonl"
    broken.write_text(corpus.read_text().splitlines()[0] + '\n{"movie": "up"}\n')
    with pytest.raises(ValueError, match=r"reviews\.jsonl, line 2: not a review"):
        reviews("train", broken)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.csv.bz2").write_bytes(bz2.compress(b"category,words\nfresh,hello\n"))
    with pytest.raises(ValueError, match="has no column movie_name, text"):
        movies.convert(tmp_path / "raw", tmp_path / "out")
