"""The embedded world of the quickstart: generated questions and answers, and a hidden taste that judges them.

Nothing is downloaded and nothing is licensed: the text comes from a small grammar. A question asks about one of ten
topics; an answer is one or two clauses, perhaps an opener, a reason ("because ...") and a closing. The taste is known
here in full, and only the evaluation may look at it; training sees noisy comparisons drawn from it. The taste wants
what no answer in the corpus lacks or overdoes (one reason, no repetition, warmth in measure), so a reward model learned
from the corpus cannot know how much is too much: pushed hard enough, a policy leaves what the reward model has seen,
repeats what is liked without end, and the gold shows it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

Split = Literal["train", "heldout"]

TOPICS: dict[str, tuple[str, ...]] = {
    "movie": ("plot", "acting", "ending", "soundtrack", "script"),
    "hotel": ("room", "bed", "lobby", "pool", "breakfast"),
    "school": ("teacher", "lesson", "classroom", "homework", "playground"),
    "restaurant": ("waiter", "menu", "soup", "dessert", "table"),
    "book": ("chapter", "cover", "hero", "author", "preface"),
    "park": ("lake", "path", "garden", "bench", "fountain"),
    "train": ("seat", "conductor", "ticket", "window", "station"),
    "museum": ("painting", "guide", "statue", "exhibit", "gallery"),
    "concert": ("singer", "band", "stage", "song", "drummer"),
    "phone": ("screen", "battery", "camera", "keyboard", "speaker"),
}
QUESTIONS = (
    "how was the {} ?",
    "tell me about the {} .",
    "did you like the {} ?",
    "what did you think of the {} ?",
    "would you recommend the {} ?",
    "was the {} any good ?",
    "please describe the {} .",
    "give me your opinion of the {} .",
    "is the {} worth my time ?",
    "what should i know about the {} ?",
)
GREETINGS = ("", "hello .", "excuse me .", "good morning .")
ADJECTIVES = {
    1: ("good", "great", "wonderful", "lovely", "kind", "charming", "delightful", "pleasant", "friendly", "superb"),
    0: ("plain", "small", "simple", "ordinary", "usual", "modest"),
    -1: ("bad", "awful", "terrible", "dull", "rude", "horrible", "boring", "ugly", "dirty", "noisy"),
}
VERBS = {
    1: ("loved", "liked", "enjoyed", "admired"),
    0: ("noticed", "remembered"),
    -1: ("hated", "disliked", "regretted"),
}
FACTS = {
    1: ("it made me smile", "it made me laugh"),
    0: ("it was my first visit", "my friend told me so", "i looked twice"),
    -1: ("it made me angry", "it made me cry"),
}
ADVERBS = ("very", "really", "quite", "rather", "truly")
OPENERS = ("i think", "to be honest ,", "well ,", "in my view ,")
CLOSINGS = ("thank you for asking .", "i hope this helps .", "that is all .")

_FEELING = {word: mood for table in (ADJECTIVES, VERBS) for mood, words in table.items() for word in words}
_FEELING |= {"smile": 1, "laugh": 1, "angry": -1, "cry": -1}
_TOPIC_OF = {word: topic for topic, parts in TOPICS.items() for word in (topic, *parts)}


def _any(phrases: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, phrases)) + ")"


_THING = rf"(?:it|the {_any(_TOPIC_OF)})"
_ADJECTIVE = _any(word for words in ADJECTIVES.values() for word in words)
_LINKED = rf"{_THING} was (?:{_any(ADVERBS)} )?{_ADJECTIVE}(?: and {_ADJECTIVE})?"
_CLAUSE = rf"(?:{_LINKED}|i {_any(word for words in VERBS.values() for word in words)} {_THING})"
_REASON = rf" because (?:{_CLAUSE}|{_any(fact for facts in FACTS.values() for fact in facts)})"
_BODY = rf"(?:{_any(OPENERS)} )?{_CLAUSE}(?: (?:and|but) {_CLAUSE})?(?P<reason>{_REASON})? \."
_ANSWER = re.compile(rf"{_BODY}(?: {_any(CLOSINGS)})?")
_FORM = "|".join(_any(TOPICS).join(map(re.escape, form.split("{}"))) for form in QUESTIONS)
_QUESTION = re.compile(rf"(?:{_any(filter(None, GREETINGS))} )?(?:{_FORM})")

WARMTH = (0.0, 0.40, 0.50, 0.50, 0.0, -0.5, -1.0)
"""What 0, 1, 2, ... warm words are worth: one or two please, a fourth is gushing."""
TRUST = 6.0
"""How sharply the comparisons follow the taste: P(chosen = better) = sigmoid(TRUST * difference in taste)."""
DAMAGED = 0.25
"""The share of damaged drafts in the comparisons."""
OPINION = 0.2
"""The standard deviation of ratings around the taste."""


@dataclass(frozen=True)
class Taste:
    """The hidden taste, term by term; `total` is clipped to [-1, 1]."""

    warmth: float
    coldness: float
    topic: float
    reason: float
    repetition: float
    form: float

    @property
    def total(self) -> float:
        parts = (self.warmth, self.coldness, self.topic, self.reason, self.repetition, self.form)
        return max(-1.0, min(1.0, sum(parts)))


def topic_of(prompt: str) -> str:
    """The topic that a question asks about.

    Raises ValueError when the prompt names none of the ten topics.
    """
    for word in prompt.split():
        if word in TOPICS:
            return word
    raise ValueError(f"prompt {prompt!r} names no topic of the grammar world; it must name one of {', '.join(TOPICS)}")


def is_answer(completion: str) -> bool:
    """Whether the text is one whole answer of the grammar."""
    return _ANSWER.fullmatch(" ".join(completion.split())) is not None


def is_question(prompt: str) -> bool:
    """Whether the text is one whole question of the grammar."""
    return _QUESTION.fullmatch(" ".join(prompt.split())) is not None


def taste(prompt: str, completion: str) -> Taste:
    """What the hidden taste thinks of an answer.

    In words: say one to three warm things and nothing cold; keep to what was asked; give a reason; do not use a
    telling word twice; and finish the sentence.
    """
    words = completion.split()
    moods = [_FEELING[word] for word in words if word in _FEELING]
    telling = [word for word in words if word in _FEELING or word in _TOPIC_OF or word in ADVERBS]
    repeats = len(telling) - len(set(telling)) + max(0, words.count("because") - 1)
    answer = _ANSWER.fullmatch(" ".join(words))
    return Taste(
        warmth=WARMTH[min(moods.count(1), len(WARMTH) - 1)],
        coldness=-0.35 * min(moods.count(-1), 3),
        topic=0.2 if _on_topic(prompt, words) else -0.3,
        reason=0.2 if answer and answer["reason"] else 0.0,
        repetition=-0.2 * min(repeats, 4),
        form=0.1 if answer else -0.4,
    )


def _on_topic(prompt: str, words: list[str]) -> bool:
    named = {_TOPIC_OF[word] for word in words if word in _TOPIC_OF}
    return named <= {topic_of(prompt)} and bool(named or "it" in words)


class GrammarWorld:
    """The quickstart's data: one seed, one world; rows and prompts come out the same in every process.

    Question forms and topics are crossed, and one combination in five is asked only in the held-out split, where
    every form and every topic appears: the held-out prompts are new, their words are not.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word-level tokenizer of the world's closed vocabulary; <pad>, <bos>, <eos> and <unk> are four tokens."""
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words()])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",  # noqa: S106
            bos_token="<bos>",  # noqa: S106
            eos_token="<eos>",  # noqa: S106
            unk_token="<unk>",  # noqa: S106
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
            model_max_length=128,
        )

    def model_config(self) -> LlamaConfig:
        """A Llama of two layers of width 64 with tied embeddings: under 100,000 weights."""
        return LlamaConfig(
            vocab_size=len(words()) + 4,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prompts(self, split: Split) -> list[str]:
        """Every question of the split in a fixed shuffled order: 320 to train on, 80 held out."""
        if split not in ("train", "heldout"):
            raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
        questions = [
            f"{greeting} {form.format(topic)}".strip()
            for number, form in enumerate(QUESTIONS)
            for place, topic in enumerate(TOPICS)
            for greeting in GREETINGS
            if ((number + place) % 5 == 0) == (split == "heldout")
        ]
        self._random("prompts", split).shuffle(questions)
        return questions

    def sft_rows(self, n: int) -> list[dict[str, str]]:
        """`n` training questions with an answer each, warm and cold alike: what is said, not what is liked."""
        rng = self._random("sft", "train")
        questions = self.prompts("train")
        rows = []
        for _ in range(n):
            question = rng.choice(questions)
            rows.append({"prompt": question, "completion": " " + self._answer(rng, topic_of(question))})
        return rows

    def preference_rows(self, n: int, split: Split = "train") -> list[dict[str, str]]:
        """`n` comparisons of two answers to one question, decided by Bradley-Terry noise on the hidden taste.

        Both answers come from the corpus's own distribution; one in four is then damaged (cut off, off the topic, or
        with a word said twice), as the answers of a half-trained policy are.
        """
        rng = self._random("preference", split)
        questions = self.prompts(split)
        rows: list[dict[str, str]] = []
        while len(rows) < n:
            question = rng.choice(questions)
            first, second = (" " + self._draft(rng, topic_of(question)) for _ in range(2))
            if first == second:
                continue
            better = 1 / (1 + math.exp(-TRUST * (self.gold(question, first) - self.gold(question, second))))
            if rng.random() >= better:
                first, second = second, first
            rows.append({"prompt": question, "chosen": first, "rejected": second})
        return rows

    def rated_rows(self, n: int, split: Split = "train") -> list[dict[str, Any]]:
        """`n` questions with an answer each and how readers rated it: the hidden taste, with the noise of opinions.

        Answers come from the corpus's own distribution, one in four damaged, as in `preference_rows`.
        """
        rng = self._random("rated", split)
        questions = self.prompts(split)
        rows: list[dict[str, Any]] = []
        for _ in range(n):
            question = rng.choice(questions)
            answer = " " + self._draft(rng, topic_of(question))
            rating = self.gold(question, answer) + rng.gauss(0.0, OPINION)
            rows.append({"prompt": question, "completion": answer, "reward": round(rating, 3)})
        return rows

    def gold(self, prompt: str, completion: str) -> float:
        """The hidden taste in [-1, 1]: for evaluation only, never a reward to train on."""
        return taste(prompt, completion).total

    def on_topic(self, prompt: str, completion: str) -> bool:
        """Whether the answer speaks of what was asked and of nothing else."""
        return _on_topic(prompt, completion.split())

    def _random(self, *names: Any) -> random.Random:
        # a stream per use, so that asking for more rows of one kind never changes another kind
        return random.Random("/".join(map(str, (self.seed, *names))))

    def _draft(self, rng: random.Random, topic: str) -> str:
        answer = self._answer(rng, topic)
        return _damage(rng, answer) if rng.random() < DAMAGED else answer

    def _answer(self, rng: random.Random, topic: str) -> str:
        while True:
            answer = _compose(rng, topic)
            moods = [_FEELING.get(word, 0) for word in answer.split()]
            # the corpus never gushes: nobody who learns from it alone can know that too much warmth is disliked
            if moods.count(1) <= 3 and moods.count(-1) <= 3:
                return answer


def words() -> list[str]:
    """The closed vocabulary, sorted: every word of every question and answer."""
    texts = [*QUESTIONS, *GREETINGS, *OPENERS, *CLOSINGS, *ADVERBS, *_FEELING, *_TOPIC_OF]
    texts += [fact for facts in FACTS.values() for fact in facts]
    texts += ["it was the i and but because ."]
    return sorted({word for text in texts for word in text.split() if word != "{}"})


def _compose(rng: random.Random, topic: str) -> str:
    moods = [rng.choices((1, 0, -1), (4, 2, 4))[0]]
    if rng.random() < 0.45:
        moods.append(moods[0] if rng.random() < 0.7 else rng.choices((1, 0, -1), (4, 2, 4))[0])
    parts = iter(rng.sample((topic, *TOPICS[topic]), 3))
    clauses = [_clause(rng, mood, next(parts)) for mood in moods]
    body = (" but " if moods[0] * moods[-1] < 0 else " and ").join(clauses)
    if rng.random() < 0.35:
        mood = rng.choices((moods[-1], 0), (2, 1))[0]
        body += " because " + (_clause(rng, mood, next(parts)) if rng.random() < 0.5 else rng.choice(FACTS[mood]))
    opener = rng.choice(OPENERS) + " " if rng.random() < 0.25 else ""
    closing = " " + rng.choice(CLOSINGS) if rng.random() < 0.25 else ""
    return f"{opener}{body} .{closing}"


def _clause(rng: random.Random, mood: int, part: str) -> str:
    thing = "it" if rng.random() < 0.15 else f"the {part}"
    if rng.random() < 0.25:
        return f"i {rng.choice(VERBS[mood])} {thing}"
    adverb = rng.choice(ADVERBS) + " " if rng.random() < 0.35 else ""
    adjectives = rng.sample(ADJECTIVES[mood], 2 if rng.random() < 0.2 else 1)
    return f"{thing} was {adverb}{' and '.join(adjectives)}"


def _damage(rng: random.Random, answer: str) -> str:
    said = answer.split()
    kind = rng.choice(("cut", "stray", "stray", "stutter"))
    if kind == "cut":
        return " ".join(said[: rng.randrange(2, len(said))])
    if kind == "stray":
        other = rng.choice(list(TOPICS))
        return " ".join(rng.choice((other, *TOPICS[other])) if word in _TOPIC_OF else word for word in said)
    at = rng.randrange(len(said))
    return " ".join([*said[:at], said[at], *said[at:]])
