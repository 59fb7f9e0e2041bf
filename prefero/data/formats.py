"""The data sets people have, told apart by their columns and turned into four kinds of rows.

`to_sft` gives rows to imitate, `to_preferences` comparisons, `to_labelled` single answers with a verdict, `to_prompts`
questions. A shape is a name, the columns that tell it, and the functions that read one row; a new data set is one more
entry in `SHAPES`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar, overload

from prefero.data.parsing import BadRowError
from prefero.data.sources import Budget, Complaint, Row, Rows, as_rows, nearest
from prefero.types import Message

T = TypeVar("T")
Question: TypeAlias = str | tuple[Message, ...]

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ASSISTANT_TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class Demonstration:
    """A prompt (text or messages) and the completion to imitate; the completion brings its own leading space."""

    id: str
    prompt: Question
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages whose every assistant turn is to be imitated; the last turn is the assistant's."""

    id: str
    messages: tuple[Message, ...]


SFTRow: TypeAlias = Demonstration | Conversation


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, the first preferred; margin says by how much (0: unknown)."""

    id: str
    prompt: Question
    chosen: str
    rejected: str
    margin: float = 0.0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """One answer to a prompt, and whether it is one to be had."""

    id: str
    prompt: Question
    completion: str
    desirable: bool
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """A prompt (text or messages) and the row's further columns, which rewards may use."""

    id: str
    prompt: Question
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """What was said, and what it was worth: on the whole, or for each token that was chosen; None: not known yet.

    columns: the row's other columns, which whoever scores it may need.
    """

    row: SFTRow
    reward: float | tuple[float, ...] | None
    columns: Mapping[str, Any] = field(default_factory=dict)


class Table(Sequence[T], Generic[T]):
    """Converted rows: what shape they came in, which rows were bad, and how many were dropped for what reason."""

    def __init__(
        self, items: Iterable[T], source: str, shape: str, bad: Sequence[Complaint], dropped: Mapping[str, int]
    ) -> None:
        self.items, self.source, self.shape = list(items), source, shape
        self.bad, self.dropped = list(bad), dict(dropped)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Table[T]: ...
    def __getitem__(self, index: int | slice) -> T | Table[T]:
        if isinstance(index, slice):
            return Table(self.items[index], self.source, self.shape, self.bad, self.dropped)
        return self.items[index]

    def __repr__(self) -> str:
        return f"Table({self.source!r}, {self.shape}: {len(self)} rows, {len(self.bad)} bad, dropped {self.dropped})"


@dataclass(frozen=True)
class Shape:
    """How one kind of row is told by its columns and read; a reader is absent where the shape has nothing to give."""

    name: str
    columns: tuple[str, ...]
    prompt: Callable[[Row], Question]
    completion: Callable[[Row], str] | None = None
    comparison: Callable[[Row], tuple[Question, str, str, float] | None] | None = None
    messages: Callable[[Row], tuple[Message, ...]] | None = None
    desirable: Callable[[Row], bool] | None = None


# --- reading one value ---------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    if name not in row:
        raise BadRowError(f"no column {name!r}{nearest(name, row)}; columns present: {', '.join(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise BadRowError(f"column {name!r} must be text, got {type(value).__name__}")
    if not empty and not value.strip():
        raise BadRowError(f"column {name!r} is empty")
    return value


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    try:
        if value is None or isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRowError(f"column {name!r} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise BadRowError(f"column {name!r} must be finite, got {value!r}")
    return number


def read_messages(value: Any, name: str = "messages") -> tuple[Message, ...]:
    """A list of {"role": ..., "content": ...} as messages. Raises ValueError (a BadRowError) naming what is wrong."""
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRowError(f"column {name!r} must be a non-empty list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise BadRowError(f"column {name!r}: message {number} must be an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRowError(f"column {name!r}: message {number} needs text under {key!r}")
        if not message["role"].isidentifier():
            raise BadRowError(f"column {name!r}: message {number} has role {message['role']!r}; use user or assistant")
        messages.append({"role": message["role"], "content": message["content"]})
    return tuple(messages)


def _question(row: Row, name: str = "prompt") -> Question:
    """A prompt column: text, or messages that end before the assistant speaks."""
    if isinstance(row.get(name), (list, tuple)):
        messages = read_messages(row[name], name)
        if messages[-1]["role"] == "assistant":
            raise BadRowError(f"column {name!r} must end before the assistant speaks")
        return messages
    return _text(row, name)


def _spaced(prompt: str, answer: str) -> str:
    """The answer with a space in front where prompt and answer would run into one word."""
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else f" {answer}"


def as_messages(prompt: Question | Sequence[Message]) -> tuple[Message, ...]:
    """A string becomes one user message; messages stay."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)


# --- the shapes ----------------------------------------------------------------------------------------------------


def _alpaca_prompt(row: Row) -> str:
    instruction = _text(row, "instruction")
    given = _text(row, "input", empty=True) if row.get("input") is not None else ""
    # str.replace, not str.format: braces in the data are text
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    before, _, after = template.partition("{instruction}")
    return before + instruction + after.replace("{input}", given)


def _last_answer(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    messages = read_messages(value, name)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadRowError(f"column {name!r} must end with what the assistant says")
    return messages[:-1], messages[-1]["content"]


def _pair(row: Row) -> tuple[Question, str, str, float]:
    margin = _number(row, "margin") if row.get("margin") is not None else 0.0
    prompt = _question(row)
    answers = []
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), (list, tuple)):
            before, answer = _last_answer(row[name], name)
            if before and before != as_messages(prompt):
                raise BadRowError(f"column {name!r} does not continue the messages of 'prompt'")
            prompt = before or prompt  # a plain 'prompt' beside whole talks only repeats what was asked
            answers.append(answer)
        else:
            answers.append(_text(row, name))
    return prompt, answers[0], answers[1], margin


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt two transcripts share and the two answers, cut after the last common "Assistant:" turn.

    Raises ValueError (a BadRowError) when they share none, as when the people asked different questions.
    """
    limit = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    cut = chosen.rfind(ASSISTANT_TURN, 0, limit)
    if cut < 0:
        raise BadRowError(f"'chosen' and 'rejected' share no prompt ending in {ASSISTANT_TURN!r}")
    cut += len(ASSISTANT_TURN)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _transcripts(row: Row) -> tuple[Question, str, str, float]:
    if isinstance(row.get("chosen"), (list, tuple)):
        before, chosen = _last_answer(row["chosen"], "chosen")
        other, rejected = _last_answer(row.get("rejected"), "rejected")
        if before != other or not before:
            raise BadRowError("'chosen' and 'rejected' must share all messages but the last")
        return before, chosen, rejected, 0.0
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise BadRowError("'chosen' and 'rejected' are the same")
    return *split_transcripts(chosen, rejected), 0.0


def _summary_prompt(row: Row) -> str:
    info = row.get("info")
    if not isinstance(info, Mapping):
        raise BadRowError("column 'info' must be an object with 'post' or 'article'")
    name = next((n for n in ("post", "article") if isinstance(info.get(n), str) and info[n].strip()), None)
    if name is None:
        raise BadRowError(f"column 'info' has neither text in 'post' nor in 'article'; it has {', '.join(info)}")
    title = info.get("title")
    heading = f"TITLE: {title}\n\n" if isinstance(title, str) and title.strip() else ""
    return f"{heading}{'POST' if name == 'post' else 'ARTICLE'}: {info[name].strip()}\n\nTL;DR:"


def _summaries(row: Row) -> tuple[Question, str, str, float]:
    prompt, summaries, choice = _summary_prompt(row), row.get("summaries"), _number(row, "choice")
    if not isinstance(summaries, (list, tuple)) or len(summaries) != 2:
        raise BadRowError("column 'summaries' must hold two summaries")
    if choice not in (0, 1):
        raise BadRowError(f"column 'choice' must be 0 or 1, got {row['choice']!r}")
    if not all(isinstance(summary, Mapping) for summary in summaries):
        raise BadRowError("column 'summaries' must hold objects with 'text'")
    texts = [_spaced(prompt, _text(summary, "text")) for summary in summaries]
    return prompt, texts[int(choice)], texts[1 - int(choice)], 0.0


def _webgpt_prompt(row: Row) -> str:
    question = row.get("question")
    text = _text(question, "full_text") if isinstance(question, Mapping) else _text(row, "question")
    return f"Question: {text.strip()}\n\nAnswer:"


def _webgpt(row: Row) -> tuple[Question, str, str, float] | None:
    prompt = _webgpt_prompt(row)
    scores = [_number(row, f"score_{i}") for i in (0, 1)]
    if scores[0] == scores[1]:
        return None
    answers = [_spaced(prompt, _text(row, f"answer_{i}")) for i in (0, 1)]
    best = int(scores[1] > scores[0])
    return prompt, answers[best], answers[1 - best], abs(scores[0] - scores[1])


def _conversation(row: Row) -> tuple[Message, ...]:
    messages = read_messages(row.get("messages"))
    if messages[-1]["role"] != "assistant":
        raise BadRowError("column 'messages' must end with the assistant, whose turns are learned")
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise BadRowError("column 'messages' has an empty assistant turn")
    return messages


def _before_last_answer(row: Row) -> Question:
    messages = read_messages(row.get("messages"))
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise BadRowError("column 'messages' holds no question")
    return asked


def _completion(row: Row) -> str:
    if isinstance(row.get("completion"), (list, tuple)):
        return _last_answer(row["completion"], "completion")[1]
    return _text(row, "completion")


def _verdict(row: Row) -> bool:
    """A label as data sets write it: true or false, 1 or 0, in a CSV as text."""
    label = row.get("label")
    verdicts = {"true": True, "false": False, "1": True, "0": False}
    plain = str(int(label)) if isinstance(label, float) and label in (0, 1) else str(label).lower()
    if plain not in verdicts:
        raise BadRowError(f"column 'label' must be true or false, got {label!r}")
    return verdicts[plain]


# The order matters: a row is read by the first shape all of whose columns it has.
SHAPES: tuple[Shape, ...] = (
    Shape("summarize_from_feedback", ("info", "summaries", "choice"), _summary_prompt, comparison=_summaries),
    Shape("webgpt_comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt_prompt,
          comparison=_webgpt),
    Shape("rm-static", ("prompt", "response", "chosen", "rejected"), _question, comparison=_pair),
    Shape("preference", ("prompt", "chosen", "rejected"), _question, comparison=_pair),
    Shape("hh-rlhf", ("chosen", "rejected"), lambda row: _transcripts(row)[0], comparison=_transcripts),
    Shape("messages", ("messages",), _before_last_answer, messages=_conversation),
    Shape("alpaca", ("instruction", "output"), _alpaca_prompt, completion=lambda row: _text(row, "output")),
    Shape("labelled", ("prompt", "completion", "label"), _question, completion=_completion, desirable=_verdict),
    Shape("prompt-completion", ("prompt", "completion"), _question, completion=_completion),
    Shape("prompt-response", ("prompt", "response"), lambda row: _text(row, "prompt"),
          completion=lambda row: _spaced(_text(row, "prompt"), _text(row, "response"))),
    Shape("prompts", ("prompt",), _question),
    Shape("text", ("text",), lambda row: "", completion=lambda row: _text(row, "text")),
)  # fmt: skip


def detect_shape(rows: Rows, accepted: Sequence[Shape] = SHAPES) -> Shape:
    """The first shape all of whose columns the data set has; ValueError listing shapes and columns if there is none."""
    columns = rows.columns
    for shape in accepted:
        if set(shape.columns) <= set(columns):
            return shape
    names = sorted({name for shape in accepted for name in shape.columns})
    hints = "".join(nearest(column, names) for column in columns if column not in names)
    shapes = "; ".join(f"{shape.name}: {', '.join(shape.columns)}" for shape in accepted)
    raise ValueError(
        f"{rows.source}: columns {', '.join(columns)} are no shape accepted here{hints}. Accepted shapes: {shapes}"
    )


def to_sft(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int | None = None) -> Table[SFTRow]:
    """Rows to imitate; of preference shapes, the chosen answer; of labelled rows, those to be had.

    The other labelled rows are dropped and counted under `.dropped["undesirable"]`.

    max_bad_rows: None takes the budget the rows were read with. Raises ValueError for an unknown shape and for more bad
    rows (missing or empty answers, wrong types) than the budget.
    """

    def convert(shape: Shape, row: Row, row_id: str) -> SFTRow | None:
        if shape.desirable is not None and not shape.desirable(row):
            return None
        if shape.messages is not None:
            return Conversation(row_id, shape.messages(row))
        if shape.completion is not None:
            return Demonstration(row_id, shape.prompt(row), shape.completion(row))
        assert shape.comparison is not None
        pair = shape.comparison(row)
        return None if pair is None else Demonstration(row_id, pair[0], pair[1])

    accepted = [s for s in SHAPES if s.messages or s.completion or s.comparison]
    return _convert(rows, accepted, convert, max_bad_rows)


def to_labelled(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int | None = None) -> Table[Labelled]:
    """Single answers with a verdict; a comparison gives two, the chosen answer to be had and the rejected one not.

    Raises ValueError for an unknown shape and for more bad rows than the budget.
    """
    source = as_rows(rows, max_bad_rows=max_bad_rows or 0)
    able = [shape for shape in SHAPES if shape.desirable or shape.comparison]
    if detect_shape(source, able).comparison is not None:
        pairs = to_preferences(source, max_bad_rows=max_bad_rows)
        items = [
            Labelled(f"{pair.id}/{side}", pair.prompt, getattr(pair, side), side == "chosen", pair.columns)
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        return Table(items, pairs.source, pairs.shape, pairs.bad, pairs.dropped)

    def convert(shape: Shape, row: Row, row_id: str) -> Labelled:
        assert shape.completion is not None
        assert shape.desirable is not None
        verdict = shape.desirable(row)
        return Labelled(row_id, shape.prompt(row), shape.completion(row), verdict, _further(shape, row))

    return _convert(source, [shape for shape in SHAPES if shape.desirable], convert, max_bad_rows)


def to_preferences(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int | None = None) -> Table[Comparison]:
    """Comparisons; rows with equal scores are dropped and counted under `.dropped["tie"]`.

    Raises ValueError for an unknown shape and for more bad rows (equal or empty answers, wrong types) than the budget.
    """

    def convert(shape: Shape, row: Row, row_id: str) -> Comparison | None:
        assert shape.comparison is not None
        pair = shape.comparison(row)
        if pair is None:
            return None
        prompt, chosen, rejected, margin = pair
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.strip():
                raise BadRowError(f"the {name} answer is empty")
        if chosen == rejected:
            raise BadRowError("the chosen and the rejected answer are the same")
        return Comparison(row_id, prompt, chosen, rejected, margin, _further(shape, row))

    return _convert(rows, [s for s in SHAPES if s.comparison], convert, max_bad_rows)


def to_prompts(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int | None = None) -> Table[PromptRow]:
    """The prompts alone, with the row's other columns (which a reward may need, such as the true answer).

    Raises ValueError for an unknown shape and for more bad rows (missing or empty prompts) than the budget.
    """

    def convert(shape: Shape, row: Row, row_id: str) -> PromptRow:
        return PromptRow(row_id, shape.prompt(row), {k: v for k, v in row.items() if k != "prompt"})

    return _convert(rows, [s for s in SHAPES if s.name != "text"], convert, max_bad_rows)


def to_trajectories(rows: Iterable[Mapping[str, Any]], *, max_bad_rows: int | None = None) -> Table[Trajectory]:
    """Rows to learn values from: demonstrations or conversations, and their column `reward` where there is one.

    Raises ValueError for an unknown shape and for more bad rows (missing or empty answers, wrong types, rewards that
    are no finite numbers) than the budget.
    """

    def convert(shape: Shape, row: Row, row_id: str) -> Trajectory:
        demonstrated: SFTRow
        if shape.messages is not None:
            demonstrated = Conversation(row_id, shape.messages(row))
        else:
            assert shape.completion is not None
            demonstrated = Demonstration(row_id, shape.prompt(row), shape.completion(row))
        reward = row.get("reward")
        if isinstance(reward, (list, tuple)):
            reward = tuple(_number({"reward": number}, "reward") for number in reward)
        elif reward is not None:
            reward = _number(row, "reward")
        return Trajectory(demonstrated, reward, {k: v for k, v in _further(shape, row).items() if k != "reward"})

    return _convert(rows, [s for s in SHAPES if s.messages or s.completion], convert, max_bad_rows)


def _further(shape: Shape, row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*shape.columns, "margin")}


def _convert(
    rows: Iterable[Mapping[str, Any]],
    accepted: Sequence[Shape],
    convert: Callable[[Shape, Row, str], T | None],
    max_bad_rows: int | None,
) -> Table[T]:
    """Reads every row as the data set's shape; None from `convert` drops a row: a tie, or one labelled undesirable."""
    source = as_rows(rows, max_bad_rows=max_bad_rows or 0)
    shape = detect_shape(source, accepted)
    budget = Budget(source.source, source.max_bad_rows if max_bad_rows is None else max_bad_rows, source.bad)
    dropped: Counter[str] = Counter()
    why = "tie" if shape.desirable is None else "undesirable"
    items: list[T] = []
    for index, row in enumerate(source):
        try:
            item = convert(shape, row, source.row_id(index))
        except BadRowError as error:
            budget.spend(source.lines[index], str(error))
            continue
        if item is None:
            dropped[why] += 1
        else:
            items.append(item)
    if not items:
        raise ValueError(
            f"{source.source}: no usable row as {shape.name} ({len(budget.bad)} bad, {dropped[why]} dropped: {why}); "
            "give a data set with at least one good row"
        )
    return Table(items, source.source, shape.name, budget.bad, dropped)
