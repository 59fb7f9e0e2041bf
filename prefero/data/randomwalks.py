"""Random walks: a graph, walks over it that nobody planned, and the shortest way to the goal as the known optimum.

21 nodes, a to u, some of them joined by directed edges; a walk starts anywhere but at the goal `a` and ends there, or
after ten nodes. A prompt is the letter a walk starts with, the completion the letters that follow, and a walk is worth
(10 - L) / (10 - L*): L nodes up to the goal, L* on the shortest way. The best policy earns exactly 1 from every start.
The task and its measure are those of the benchmark that trlX made known (https://github.com/CarperAI/trlx,
examples/randomwalks); by the same seed the same graph and the same walks come out.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from prefero.data.tokenize import Example
from prefero.data.trajectories import EncodedTrajectory, rewarded
from prefero.types import Prompt, Rollout, Score

GOAL = "a"
MAX_NODES = 10
"""Nodes of the longest walk; a walk of so many is worth nothing."""
SEEDS = (1000, 1002, 1004, 1005, 1006)
"""Tasks on which others' results are known."""
_NUM_NODES, _EDGE, _NUM_WALKS = 21, 0.1, 1000
_END, _PAD = "|", "_"


@dataclass(frozen=True)
class RandomWalks:
    """One graph: for each node the nodes its edges lead to, and walks that were drawn on it.

    Raises ValueError for nodes that are no letters or not there, for walks of no step, and for a start from which the
    goal cannot be reached in fewer than MAX_NODES nodes: what a walk from there is worth would be a division by zero.
    """

    seed: int
    edges: Mapping[str, str]
    walks: Sequence[str]
    shortest: Mapping[str, int] = field(init=False)
    """Nodes on the shortest way to the goal, by start; both ends count."""

    def __post_init__(self) -> None:
        nodes = set(self.edges)
        wrong = sorted({*nodes, *"".join(self.edges.values()), *"".join(self.walks)} - nodes & {*string.ascii_letters})
        if wrong or GOAL not in nodes:
            raise ValueError(
                f"random walks of seed {self.seed}: {wrong[0] if wrong else GOAL!r} is no node; give `edges` as one "
                "letter a node, the goal 'a' among them, with the letters it leads to"
            )
        found = _shortest(self.edges)
        for start in self.starts:
            if found.get(start, MAX_NODES) >= MAX_NODES:
                raise ValueError(
                    f"random walks of seed {self.seed}: from {start!r} the goal {GOAL!r} cannot be reached in fewer "
                    f"than {MAX_NODES} nodes, so no walk from there has a worth; use another seed, or another graph"
                )
        object.__setattr__(self, "shortest", {start: found[start] for start in self.starts})
        for walk in self.walks:
            if len(walk) < 2 or walk[0] == GOAL:
                raise ValueError(
                    f"random walks of seed {self.seed}: {walk!r} is no walk; give two letters or more, the first of "
                    "them not the goal"
                )

    @staticmethod
    def generate(seed: int) -> RandomWalks:
        """The task of a seed: 21 nodes, an edge between two of them with probability 0.1, 1,000 walks.

        Raises ValueError for a seed whose graph has a start without a way to the goal.
        """
        random = np.random.RandomState(seed)
        leads = np.zeros((_NUM_NODES, _NUM_NODES), dtype=bool)
        while not leads.any(axis=1).all():
            leads = random.rand(_NUM_NODES, _NUM_NODES) > 1 - _EDGE
            np.fill_diagonal(leads, False)
        leads[0] = np.arange(_NUM_NODES) == 0  # whoever is at the goal stays there
        after = [np.flatnonzero(row) for row in leads]
        letters = string.ascii_lowercase[:_NUM_NODES]
        edges = {letter: "".join(letters[i] for i in after[node]) for node, letter in enumerate(letters)}
        walks = [_walk(random, after) for _ in range(_NUM_WALKS)]
        return RandomWalks(seed, edges, ["".join(letters[node] for node in walk) for walk in walks])

    @property
    def starts(self) -> list[str]:
        """Every node but the goal."""
        return sorted(set(self.edges) - {GOAL})

    def optimality(self, walk: str) -> float:
        """What a walk is worth, from 0 (a step without an edge, or not at the goal in time) to 1 (a shortest way).

        What stands after the goal does not count. Raises ValueError for a walk that begins at no start.
        """
        if walk[:1] not in self.shortest:
            raise ValueError(f"the walk {walk!r} begins at no start; give one that begins with {''.join(self.starts)}")
        length = MAX_NODES
        for place, (here, there) in enumerate(pairwise(walk), 2):
            if there not in self.edges[here]:
                break
            if there == GOAL:
                length = min(place, MAX_NODES)
                break
        return (MAX_NODES - length) / (MAX_NODES - self.shortest[walk[0]])

    @property
    def mean_optimality(self) -> float:
        """Of the walks that were drawn."""
        return fmean(map(self.optimality, self.walks))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A token a letter; `|` begins and ends texts, `_` fills up."""
        vocabulary = {letter: index for index, letter in enumerate([*sorted(self.edges), _END, _PAD])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=_END,
            eos_token=_END,
            pad_token=_PAD,
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
            model_max_length=2 * MAX_NODES,
        )

    def model_config(self) -> GPT2Config:
        """A GPT-2 of six layers of width 144: 1.5 million weights."""
        end = self.tokenizer.eos_token_id
        return GPT2Config(
            vocab_size=len(self.tokenizer), n_positions=2 * MAX_NODES, n_embd=144, n_layer=6, n_head=12,
            bos_token_id=end, eos_token_id=end, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip

    def prompts(self) -> list[Prompt]:
        """Every start; the letter is the prompt's id too."""
        return [Prompt(start, self._ids(start), start) for start in self.starts]

    def examples(self, walks: Sequence[str] | None = None) -> list[Example]:
        """Walks (None: those drawn) to learn from: all but the first letter, and the end where the goal was reached."""
        examples = []
        for walk in self.walks if walks is None else walks:
            ids = self._ids(walk)
            if walk.endswith(GOAL):
                ids = (*ids, int(self.tokenizer.eos_token_id))
            examples.append(Example(ids, (0, *[1] * (len(ids) - 1))))
        return examples

    def trajectories(self) -> list[EncodedTrajectory]:
        """The walks that were drawn, with what they are worth."""
        return [
            rewarded(f"walk {number}", example, self.optimality(walk))
            for number, (walk, example) in enumerate(zip(self.walks, self.examples(), strict=True), 1)
        ]

    def reward(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """The worth of walks that were completed, read from the tokens themselves: a `Reward`.

        A walk ends before the first token that is no letter.
        """
        letters = dict(enumerate(sorted(self.edges)))
        scores = []
        for rollout in rollouts:
            walk = ""
            for token in (*rollout.prompt.token_ids, *rollout.completion.token_ids):
                if token not in letters:
                    break
                walk += letters[token]
            scores.append(Score(self.optimality(walk)))
        return scores

    def _ids(self, walk: str) -> tuple[int, ...]:
        places = {letter: index for index, letter in enumerate(sorted(self.edges))}
        return tuple(places[letter] for letter in walk)


def load_tasks(path: str | Path) -> list[RandomWalks]:
    """Tasks from a JSON file: {"tasks": [{"seed": 1000, "edges": {"a": "a", "b": "dju", ...}, "walks": ["sda", ...]}]}.

    Further keys are ignored. Raises ValueError naming the file and what is wrong with it.
    """
    try:
        tasks: Any = json.loads(Path(path).read_text(encoding="utf-8"))["tasks"]
        read = [(int(task["seed"]), dict(task["edges"]), list(task["walks"])) for task in tasks]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: not a file of random-walk tasks ({type(error).__name__}: {error}); give {{"tasks": [...]}} with '
            "`seed`, `edges` and `walks` in each"
        ) from error
    if not read:
        raise ValueError(f"{path}: it holds no task; give one or more")
    try:
        return [RandomWalks(seed, edges, walks) for seed, edges, walks in read]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shortest(edges: Mapping[str, str]) -> dict[str, int]:
    """Nodes on the shortest way to the goal from each node that has one: breadth first, backwards."""
    found, frontier = {GOAL: 1}, [GOAL]
    while frontier:
        before = [node for node in edges if node not in found and any(there in frontier for there in edges[node])]
        found |= dict.fromkeys(before, found[frontier[0]] + 1)
        frontier = before
    return found


def _walk(random: np.random.RandomState, after: Sequence[Any]) -> list[int]:
    """One walk: a start that is not the goal (node 0), then any edge, up to the goal or MAX_NODES nodes."""
    start = 0
    while start == 0:
        start = int(random.randint(0, len(after)))
    walk = [start]
    while walk[-1] != 0 and len(walk) < MAX_NODES:
        walk.append(int(random.choice(after[walk[-1]])))
    return walk
