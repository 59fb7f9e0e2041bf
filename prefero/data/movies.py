"""The real run's data: critics' one-line reviews, labelled by people as fresh or rotten, split by movie.

A preference here is "the fresh review of a movie over the rotten one of the same movie": derived from the labels, not
from people who compared two texts. Splitting by movie keeps every movie's reviews on one side.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prefero.cache import cache_root
from prefero.data.convert import write_jsonl

Split = Literal["train", "validation", "test"]
Label = Literal["fresh", "rotten"]

PROMPT = "Movie review:"
NUM_HELD_OUT_PAIRS = 3000
_MIN_CHARACTERS = 11
_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\x85": "..."})


class Review(NamedTuple):
    """One critic's snippet about one movie."""

    movie: str
    label: Label
    text: str


def clean(text: str) -> str:
    """White space runs become one space, curly quotes plain ones; quotes around the whole text go."""
    text = " ".join(text.translate(_PLAIN).split())
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text


def convert(raw: Path, out: Path) -> None:
    """The corpus's bz2 CSV (category, text, movie_name) to `reviews.jsonl`; plots and near-empty texts are left out.

    Raises ValueError when a column is missing.
    """
    (file,) = raw.glob("*.csv.bz2")
    with bz2.open(file) as binary:
        table = csv.DictReader(io.TextIOWrapper(binary, encoding="utf-8", newline=""))
        missing = {"category", "text", "movie_name"} - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"{file.name} has no column {', '.join(sorted(missing))}; it has {table.fieldnames}")
        rows = [
            {"movie": row["movie_name"], "label": row["category"], "text": clean(row["text"])}
            for row in table
            if row["category"] in ("fresh", "rotten") and len(" ".join(row["text"].split())) >= _MIN_CHARACTERS
        ]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "reviews.jsonl", rows)


def split_of(movie: str) -> Split:
    """Which split a movie is in: MD5 of its name modulo 10, 0 test, 1 validation, the rest train."""
    remainder = int(hashlib.md5(movie.encode(), usedforsecurity=False).hexdigest(), 16) % 10
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


def reviews(split: Split, path: Path | None = None) -> list[Review]:
    """The split's reviews in the corpus's order.

    path: the reviews' JSONL; the fetched one unless given. Raises ValueError when it is not there or the split is
    unknown.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'validation' or 'test'")
    path = path or cache_root() / "data" / "rotten-tomatoes" / "reviews.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there; get the movie reviews with `prefero fetch rotten-tomatoes`")
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                review = Review(row["movie"], row["label"], row["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a review with movie, label and text ({error}); "
                    "delete its folder and run `prefero fetch rotten-tomatoes` again"
                ) from None
            if split_of(review.movie) == split:
                found.append(review)
    return found


def sft_rows(split: Split = "train", path: Path | None = None) -> list[dict[str, str]]:
    """Every review as the completion of one fixed prompt, fresh and rotten alike."""
    return [{"prompt": PROMPT, "completion": " " + review.text} for review in reviews(split, path)]


def rated_rows(split: Split = "train", path: Path | None = None) -> list[dict[str, Any]]:
    """Every review as the completion of one fixed prompt, worth 1 where it is fresh and -1 where it is rotten."""
    return [
        {"prompt": PROMPT, "completion": " " + review.text, "reward": 1.0 if review.label == "fresh" else -1.0}
        for review in reviews(split, path)
    ]


def preference_rows(
    split: Split = "train", *, limit: int | None = None, seed: int = 0, path: Path | None = None
) -> list[dict[str, str]]:
    """Pairs of one movie's reviews, fresh chosen and rotten rejected; one movie's pairs stand together.

    The order of movies, and of pairs within one, is drawn from the seed. Column `movie` names the group, so that a
    loader may put one movie's pairs into one batch and forward each text once. limit: keep that many pairs, drawn
    evenly from all of them.
    """
    movies: dict[str, tuple[list[str], list[str]]] = {}
    for review in reviews(split, path):
        movies.setdefault(review.movie, ([], []))[review.label == "rotten"].append(" " + review.text)
    rng = random.Random(seed)
    order = sorted(movies)
    rng.shuffle(order)
    rows = []
    for movie in order:
        pairs = [(fresh, rotten) for fresh in movies[movie][0] for rotten in movies[movie][1]]
        rng.shuffle(pairs)
        rows += [{"prompt": PROMPT, "chosen": a, "rejected": b, "movie": movie} for a, b in pairs]
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(rng.sample(range(len(rows)), limit))]
    return rows


def held_out_pairs(path: Path | None = None) -> list[dict[str, str]]:
    """The fixed 3,000 pairs of held-out movies that reward models are compared by."""
    return preference_rows("test", limit=NUM_HELD_OUT_PAIRS, path=path)


def prompts(split: Split, n: int, *, num_words: int = 4, seed: int = 0, path: Path | None = None) -> list[str]:
    """`n` beginnings of reviews to go on with: the fixed prompt and a review's first words.

    Only reviews with at least twice as many words serve; a beginning serves once. Raises ValueError when the split
    has fewer.
    """
    texts = [review.text.split() for review in reviews(split, path)]
    starts = [" ".join(words[:num_words]) for words in texts if len(words) >= 2 * num_words]
    distinct: Sequence[str] = sorted(set(starts))
    if n > len(distinct):
        raise ValueError(f"n is {n}, but the {split} split has only {len(distinct)} different beginnings")
    return [f"{PROMPT} {start}" for start in random.Random(seed).sample(distinct, n)]
