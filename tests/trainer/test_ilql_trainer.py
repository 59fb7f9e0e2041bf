"""ILQL's trainer: any split gives one gradient, nothing follows the last action, values guide to the best answers."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from ppo_world import assert_same
from tiny import gpt2_config, tiny_llama
from transformers import GPT2LMHeadModel

from prefero.algorithms.ilql import ILQL, ILQLSettings
from prefero.data import collate_trajectories, rewarded
from prefero.data.randomwalks import MAX_NODES, RandomWalks
from prefero.data.tokenize import Example
from prefero.models.ilql import ILQLActor
from prefero.optimizer import HybridAdam
from prefero.recipes.walker import ilql_walker
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.make import make_engine
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import ILQLTrainer
from prefero.types import TokenBatch, TrajectoryBatch

EOS = 2


def network() -> ILQLActor:
    """GPT-2, because the norms of transformers' Llama compute in float32 even in a float64 model."""
    torch.manual_seed(0)
    return ILQLActor(GPT2LMHeadModel(gpt2_config(12))).double().eval()


def batch(extra: int = 0) -> TrajectoryBatch:
    """Four texts of 2 to 7 tokens, one of two turns, with rewards on their way and at their end."""
    lengths, prompts = [2, 7, 4, 5], [1, 2, 2, 1]
    generator = torch.Generator().manual_seed(4)
    ids = torch.full((4, 7 + extra), EOS)
    attention, chosen = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, : length - 1] = torch.randint(3, 12, (length - 1,), generator=generator)
        attention[row, :length] = 1
        chosen[row, prompt:length] = 1
    chosen[1, 4] = 0  # somebody else's
    rewards = torch.randn(4, 7 + extra, generator=generator, dtype=torch.float64) * chosen
    return TrajectoryBatch(ids, attention, chosen, rewards)


def trainer(model: ILQLActor, data: Any, lr: float = 1.0, **changes: Any) -> ILQLTrainer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    return ILQLTrainer(model, NaiveStrategy("cpu"), optimizer, data, **changes)


PORTIONS = [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 14}]


@pytest.mark.parametrize("portion", PORTIONS)
def test_it_does_not_depend_on_micro_batches(portion: dict[str, int]) -> None:
    whole = network()
    split = deepcopy(whole)
    settings = ILQLSettings(awac_beta=0.5, cql_scale=0.3)
    metrics = trainer(whole, [batch()], settings=settings).fit()
    split_metrics = trainer(split, [batch()], settings=settings, **portion).fit()
    assert_same(dict(whole.state_dict()), dict(split.state_dict()))
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-9), name


def test_padding_and_what_stands_in_it_do_not_matter() -> None:
    one, other, wide = network(), network(), batch(extra=3)
    ids = torch.where(wide.attention_mask.bool(), wide.token_ids, 9)
    narrow = batch()
    wide = TrajectoryBatch(ids, wide.attention_mask, wide.loss_mask, torch.nn.functional.pad(narrow.rewards, (0, 3)))
    trainer(one, [narrow]).fit()
    trainer(other, [wide]).fit()
    assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_the_loss_is_that_of_the_formula_written_out() -> None:
    """Row by row and token by token, from whole tables; a row's last action is followed by nothing."""
    with torch.no_grad():
        _compare_with_the_formula()


def _compare_with_the_formula() -> None:
    model, data = network(), batch()
    s = ILQLSettings(tau=0.8, gamma=0.9, awac_beta=0.7, cql_scale=0.2, awac_scale=0.6)
    (loss,) = ILQL(model, s).losses(data, total := float(ILQL(model).count(data)))
    output = model.model(data.token_ids, attention_mask=data.attention_mask, output_hidden_states=True)
    hidden, heads, parts = output.hidden_states[-1], model.heads, dict.fromkeys(("q", "v", "cql", "awac"), 0.0)
    q1, q2, t1, t2 = (head(hidden) for head in (heads.q1, heads.q2, heads.target_q1, heads.target_q2))
    value = heads.v(hidden)[..., 0]
    for row in range(4):
        places = data.loss_mask[row].nonzero()[:, 0].tolist()
        for place, after in zip(places, [*places[1:], None], strict=True):
            state, token = (row, place - 1), int(data.token_ids[row, place])
            following = 0.0 if after is None else float(value[row, after - 1])
            wanted = float(data.rewards[row, place]) + 0.9 * following
            slow, now = min(float(t1[state][token]), float(t2[state][token])), float(value[state])
            parts["q"] += sum((wanted - float(q[state][token])) ** 2 for q in (q1, q2)) / total
            parts["v"] += (0.8 if slow >= now else 0.2) * (slow - now) ** 2 / total
            parts["cql"] -= sum(float(q[state].log_softmax(-1)[token]) for q in (q1, q2)) / total
            parts["awac"] -= math.exp(0.7 * (slow - now)) * float(output.logits[state].log_softmax(-1)[token]) / total
    for name, number in parts.items():
        assert float(loss.metrics[f"ilql/{name}_loss"]) == pytest.approx(number, rel=1e-9), name
    assert float(loss.value) == pytest.approx(parts["q"] + parts["v"] + 0.2 * parts["cql"] + 0.6 * parts["awac"])


def test_slow_copies_move_every_so_many_steps_by_so_much() -> None:
    model = network()

    def gaps() -> dict[str, float]:
        fast, slow = model.heads.q1.state_dict(), model.heads.target_q1.state_dict()
        return {name: float((fast[name] - slow[name]).abs().max()) for name in fast}

    # Weights that do not learn, so that the way from the copies to them is known.
    with torch.no_grad():
        for parameter in model.heads.q1.parameters():
            parameter.add_(1.0)
    before = gaps()
    run = trainer(model, [batch()] * 5, lr=0.0, settings=ILQLSettings(sync_rate=0.5, sync_every=2))
    run.fit()
    assert gaps() == pytest.approx({name: gap * 0.25 for name, gap in before.items()})  # after steps 2 and 4


def test_evaluation_moves_nothing_and_is_told_apart() -> None:
    model = network()
    run = trainer(model, [batch()], eval_batches=[batch()])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = run.evaluate([batch()])
    assert_same(before, dict(model.state_dict()))
    assert {"ilql/loss", "ilql/q_loss", "ilql/value"} <= set(found)
    assert "ilql/eval_loss" in run.fit()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: TokenBatch(b.token_ids, b.attention_mask, b.loss_mask), "needs rewards, got a TokenBatch: use"),
        (lambda b: _with(b, 1, 3, math.nan), "the reward of row 1, token 3 is nan: use finite"),
        (lambda b: _with(b, 1, 3, math.inf), "the reward of row 1, token 3 is inf: use finite"),
        (lambda b: _with(b, 1, 4, 1.0), "row 1 is rewarded at token 4, which nobody chose"),
        (lambda b: _with(b, 0, 0, 1.0), "row 0 is rewarded at token 0, which nobody chose"),
        (lambda b: TrajectoryBatch(b.token_ids, b.attention_mask, b.loss_mask * 0, b.rewards * 0), "nothing to learn"),
    ],
)
def test_batches_that_mean_nothing_are_refused(change: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        trainer(network(), [change(batch())]).fit()


def _with(data: TrajectoryBatch, row: int, column: int, number: float) -> TrajectoryBatch:
    data.rewards[row, column] = number
    return data


@pytest.mark.parametrize(
    "wrong", [{"tau": 1.0}, {"gamma": 1.5}, {"sync_rate": 0.0}, {"sync_every": 0}, {"cql_scale": -1.0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        ILQLSettings(**wrong)  # type: ignore[arg-type]


def test_rewards_on_the_way_lead_somewhere_else_than_rewards_at_the_end() -> None:
    """Two tokens, then two more: the first earns at once, the second only lets one earn; what comes in between costs.

    After 5, token 6 earns 1 and then nothing; token 7 earns nothing and then token 8 earns 2, or token 9 loses 2. Who
    imitates is as likely to say 9 as 8; whoever knows values says 7 and 8.
    """
    ways = [((5, 6, 8), (1.0, 0.0)), ((5, 6, 9), (1.0, 0.0)), ((5, 7, 8), (0.0, 2.0)), ((5, 7, 9), (0.0, -2.0))]
    rows = [rewarded(str(ids), Example(ids, (0, 1, 1)), rewards) for ids, rewards in ways]
    torch.manual_seed(0)
    actor = ILQLActor(tiny_llama(12))
    optimizer = HybridAdam([p for p in actor.parameters() if p.requires_grad], lr=3e-3)
    data = [collate_trajectories(rows, 0)] * 250
    settings = ILQLSettings(tau=0.95, gamma=1.0, cql_scale=0.01)
    ILQLTrainer(actor, NaiveStrategy("cpu"), optimizer, data, settings=settings).fit()
    read = actor(torch.tensor([ids for ids, _ in ways]), 2, return_readings=True)
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0], [2.0, -2.0]])
    torch.testing.assert_close(read.qs[0], wanted, atol=0.3, rtol=0)
    actor.beta = 20.0
    guided = actor.generate(torch.tensor([[5]]), False, max_new_tokens=2, do_sample=False, eos_token_id=[0])[0]
    assert guided.tolist() == [[5, 7, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1000, 1005])
def test_on_random_walks_the_values_find_the_shortest_ways(seed: int) -> None:
    task = RandomWalks.generate(seed)
    learner = ilql_walker(task, seed)
    learner.fit()
    actor = learner.model
    assert isinstance(actor, ILQLActor)
    engine = make_engine(actor, task.tokenizer)

    def mean(beta: float, **how: Any) -> float:
        actor.beta = beta
        rollouts = collect(task.prompts(), engine, task.reward, SamplingParams(MAX_NODES - 1, **how), 25)
        return sum(rollout.score.value for rollout in rollouts) / len(rollouts)

    assert mean(100.0) >= 0.95  # 0.83 is the best known of others, as a median
    assert mean(100.0, greedy=True) >= 0.97
    assert mean(0.0) < 0.7  # without values it walks as the walks it saw
