"""The random-walks task: the same graphs and walks as its source, and a measure that is exact at every edge."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch

from prefero.data.randomwalks import MAX_NODES, SEEDS, RandomWalks, load_tasks
from prefero.recipes.walker import fresh_walker, walker
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.make import make_engine
from prefero.types import Completion, Rollout

FILE = Path(__file__).parents[1] / "vectors" / "randomwalks_tasks.json"
KNOWN = {task["seed"]: task for task in json.loads(FILE.read_text(encoding="utf-8"))["tasks"]}
# edges of seed 1000: b -> dju, d -> alt, j -> n, n -> ab; the shortest way from b is bda


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    return RandomWalks.generate(1000)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_the_graph_the_walks_and_the_shortest_ways_of_the_source(seed: int) -> None:
    made, known = RandomWalks.generate(seed), KNOWN[seed]
    assert (dict(made.edges), list(made.walks)) == (known["edges"], known["walks"])
    assert made.shortest == known["shortest_num_nodes"]
    assert made.mean_optimality == pytest.approx(known["mean_optimality_of_walks"], abs=1e-8)  # theirs are float32


def test_a_file_of_tasks_gives_the_same(task: RandomWalks) -> None:
    read = load_tasks(FILE)
    assert [found.seed for found in read] == list(SEEDS)
    assert read[0] == task and round(read[0].mean_optimality, 4) == 0.3515
    assert list(task.shortest.values()) == [3, 4, 2, 4, 3, 5, 5, 3, 3, 3, 4, 4, 2, 5, 4, 4, 4, 3, 4, 4]


@pytest.mark.parametrize(
    ("walk", "worth"),
    [
        ("bda", 1.0),
        ("bjna", 6 / 7),
        ("bdaxyz", 1.0),  # what stands after the goal does not count
        ("ba", 0.0),  # no such edge
        ("bjda", 0.0),
        ("bd", 0.0),  # not there
        ("b", 0.0),
        ("bjnbjnbda", 1 / 7),
        ("bjnbjnbjna", 0.0),  # ten nodes: there, but too late
        ("bjnbjnbjnbjna", 0.0),  # never below 0
    ],
)
def test_a_walk_is_worth_what_it_saves(task: RandomWalks, walk: str, worth: float) -> None:
    assert task.optimality(walk) == pytest.approx(worth, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_walk_from_every_start_is_worth_one(seed: int) -> None:
    made = RandomWalks.generate(seed)

    def ways(walk: str) -> list[str]:
        if walk[-1] == "a" or len(walk) == MAX_NODES:
            return [walk]
        return [way for there in made.edges[walk[-1]] for way in ways(walk + there)]

    best = {start: max(map(made.optimality, ways(start))) for start in made.starts}
    assert len(best) == 20 and set(best.values()) == {1.0}


@pytest.mark.parametrize("walk", ["", "a", "z"])
def test_a_walk_that_begins_at_no_start_is_refused(task: RandomWalks, walk: str) -> None:
    with pytest.raises(ValueError, match="begins at no start; give one that begins with bcde"):
        task.optimality(walk)


@pytest.mark.parametrize("seed", [1001, 1003, 1033])
def test_a_start_that_cannot_reach_the_goal_is_refused_with_the_reason(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed}: from '.' the goal 'a' cannot be reached.*use another seed"):
        RandomWalks.generate(seed)


def test_a_goal_that_is_too_far_away_is_refused() -> None:
    edges = {"a": "a"} | {there: here for here, there in zip("abcdefghi", "bcdefghij", strict=True)}
    with pytest.raises(ValueError, match="from 'j' the goal 'a' cannot be reached in fewer than 10 nodes"):
        RandomWalks(0, edges, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "not a file of random-walk tasks"),
        ('{"tasks": [{"seed": 1}]}', "KeyError: 'edges'"),
        ('{"tasks": []}', "holds no task"),
        ('{"tasks": [{"seed": 1, "edges": {"a": "a", "b": "z"}, "walks": []}]}', "'z' is no node"),
        ('{"tasks": [{"seed": 1, "edges": {"b": "b"}, "walks": []}]}', "'a' is no node"),
        ('{"tasks": [{"seed": 1, "edges": {"a": "a", "b": "b"}, "walks": []}]}', "from 'b' the goal"),
        ('{"tasks": [{"seed": 1, "edges": {"a": "a", "b": "a"}, "walks": ["bz"]}]}', "'z' is no node"),
        ('{"tasks": [{"seed": 1, "edges": {"a": "a", "b": "a"}, "walks": ["b"]}]}', "'b' is no walk"),
        ('{"tasks": [{"seed": 1, "edges": {"a": "a", "b": "a"}, "walks": [""]}]}', "'' is no walk"),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as error:
        load_tasks(file)
    assert str(file) in str(error.value)


def test_letters_are_tokens_and_the_end_is_its_own(task: RandomWalks) -> None:
    tokenizer = task.tokenizer
    assert tokenizer("bda|").input_ids == [1, 3, 0, 21]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (21, 21, 22, 23)
    assert tokenizer.decode([1, 3, 0, 21, 22], skip_special_tokens=True) == "bda"


def test_walks_are_learned_behind_their_start_and_end_only_at_the_goal(task: RandomWalks) -> None:
    reached, cut = task.examples(["bda", "bjnbjnbjnb"])
    assert reached == ((1, 3, 0, 21), (0, 1, 1, 1))
    assert cut.token_ids[-1] == 1 and len(cut.token_ids) == 10


def test_the_reward_reads_tokens_and_no_text(task: RandomWalks) -> None:
    def scored(start: str, *tokens: int) -> float:
        prompt = next(prompt for prompt in task.prompts() if prompt.id == start)
        return task.reward([Rollout(prompt, Completion(tokens, (0.0,) * len(tokens), "", "length"))])[0].value

    assert scored("b", 3, 0, 21) == 1.0
    assert scored("b", 3, 22, 0) == 0.0  # a padding token, invisible in the text, ends the walk
    assert scored("b", 21, 3, 0) == 0.0  # as the end token does
    assert scored("b") == 0.0


def test_an_engine_walks_and_is_rewarded(task: RandomWalks) -> None:
    engine = make_engine(fresh_walker(task), task.tokenizer)
    rollouts = collect(task.prompts(), engine, task.reward, SamplingParams(MAX_NODES - 1), num_samples=2)
    assert [rollout.prompt.id for rollout in rollouts[::2]] == task.starts
    assert all(0.0 <= rollout.score.value <= 1.0 for rollout in rollouts)


def test_a_walker_is_the_same_whatever_was_drawn_before(task: RandomWalks) -> None:
    first = fresh_walker(task, seed=3)
    torch.rand(5)
    second, other = fresh_walker(task, seed=3), fresh_walker(task, seed=4)
    weights = [actor.model.transformer.wte.weight for actor in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_supervision_makes_it_walk_about_as_well_as_the_walks_it_saw(task: RandomWalks) -> None:
    def mean(actor: object) -> float:
        engine = make_engine(actor, task.tokenizer)
        rollouts = collect(task.prompts(), engine, task.reward, SamplingParams(MAX_NODES - 1), num_samples=25)
        return fmean(rollout.score.value for rollout in rollouts)

    assert mean(fresh_walker(task)) < 0.03
    assert 0.12 < mean(walker(task)) < 0.45
