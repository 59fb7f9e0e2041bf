"""ILQL's losses against numbers of other projects' own code, a fixed point known in closed form, and their gates."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefero.functional import ilql

VECTORS = Path(__file__).parents[1] / "vectors"
SETTINGS = {
    "randomwalks": {"tau": 0.8, "gamma": 0.99, "beta": 0.0, "cql_scale": 0.1, "awac_scale": 1.0},
    "default": {"tau": 0.7, "gamma": 0.99, "beta": 0.0, "cql_scale": 0.1, "awac_scale": 1.0},
    "awac_beta1": {"tau": 0.9, "gamma": 1.0, "beta": 1.0, "cql_scale": 0.5, "awac_scale": 0.7},
}


@pytest.fixture(scope="module")
def v() -> dict[str, Tensor]:
    with np.load(VECTORS / "09_ilql.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def at(table: Tensor, tokens: Tensor) -> Tensor:
    return table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def our_losses(v: dict[str, Tensor], tables: dict[str, Tensor], **settings: float) -> ilql.Losses:
    """Theirs give whole tables and states by number; `dones` is 1 where a state is *not* the end."""
    mask, actions = v["dones"][:, :-1], v["tokens"][:, 1:].gather(1, v["actions_ixs"])
    logits = tables["logits"].gather(1, v["actions_ixs"].unsqueeze(-1).expand(-1, -1, 6))
    return ilql.losses(
        at(logits.log_softmax(-1), actions),
        [at(tables[name], actions) for name in ("q1", "q2")],
        [at(tables[name].log_softmax(-1), actions) for name in ("q1", "q2")],
        [at(v[name], actions) for name in ("tq1", "tq2")],
        tables["vs"][:, :-1, 0],
        v["rewards"],
        mask,
        **settings,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_trlx(v: dict[str, Tensor], name: str) -> None:
    tables = {key: v[key].clone().requires_grad_() for key in ("logits", "q1", "q2", "vs")}
    found = our_losses(v, tables, **SETTINGS[name])
    for part, theirs in (("total", "loss"), *((p, f"loss_{p}") for p in ("q", "v", "cql", "awac"))):
        value = getattr(found, part).detach().numpy()
        np.testing.assert_allclose(value, v[f"trlx_{name}_{theirs}"].numpy(), rtol=1e-9, atol=1e-12)
    found.total.backward()
    for key, table in tables.items():
        np.testing.assert_allclose(table.grad.numpy(), v[f"trlx_{name}_grad_{key}"].numpy(), rtol=1e-9, atol=1e-12)


def test_the_paper_s_own_code_gives_the_same(v: dict[str, Tensor]) -> None:
    found = our_losses(v, {key: v[key] for key in ("logits", "q1", "q2", "vs")}, **SETTINGS["randomwalks"])
    for part, theirs in (("v", "snell_v_loss_tau.8"), ("q", "snell_q_loss_g.99"), ("cql", "snell_cql_loss")):
        np.testing.assert_allclose(getattr(found, part).numpy(), v[theirs].numpy(), rtol=1e-9)


@pytest.mark.parametrize("beta", [0, 1, 100])
def test_guided_logits_are_those_of_trlx(v: dict[str, Tensor], beta: int) -> None:
    theirs = v[f"generate_adv_logits_beta{beta}_top3"]
    ours = ilql.guided(v["logits"][:, -1].log_softmax(-1), [v["tq1"][:, -1], v["tq2"][:, -1]], v["vs"][:, -1, 0], beta)
    kept = theirs.isfinite()
    np.testing.assert_allclose(ours[kept].numpy(), theirs[kept].numpy(), rtol=1e-9, atol=1e-9)
    lowest = ours.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    assert bool(((ours < lowest) == ~kept).all())  # top 3 by what was added, not by the logits


def test_other_people_s_tokens_take_no_time_and_nothing_comes_after_the_last() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]])
    assert ilql.next_values(values, mask).tolist() == [[4.0, 0.0, 0.0, 5.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_is_no_action_changes_nothing(poison: float) -> None:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])

    def run(elsewhere: float) -> list[Tensor]:
        torch.manual_seed(2)
        drawn = [torch.randn(3, 5, dtype=torch.float64) for _ in range(9)]
        x = [t.masked_fill(mask == 0, elsewhere).requires_grad_() for t in drawn]
        found = ilql.losses(x[0], x[1:3], x[3:5], x[5:7], x[7], x[8], mask, beta=1.0)
        found.total.backward()
        return [*found, *(t.grad for t in (*x[:5], x[7])), *(t.grad for t in (*x[5:7], x[8]))]

    clean, poisoned = run(0.0), run(poison)
    assert clean[-3:] == [None] * 3  # neither the slow copies nor the rewards learn
    for ours, theirs in zip(poisoned[:-3], clean[:-3], strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_at_all_is_no_loss() -> None:
    none = torch.zeros(2, 3)
    assert float(ilql.losses(none, [none], [none], [none], none, none, none).total) == 0.0


@pytest.mark.parametrize("tau", ["0.5", "0.8", "0.99"])
def test_the_tabular_fixed_point_is_reached(tau: str) -> None:
    """The chain of 6 states of the vectors: Q, V and Q̂ as tables, all state-action pairs in one batch."""
    known = json.loads((VECTORS / "toy_ilql.json").read_text(encoding="utf-8"))
    following, reward, terminal, mu = (
        torch.tensor(known[key], dtype=torch.float64) for key in ("next", "reward", "terminal", "mu")
    )
    following, wanted = following.long(), torch.tensor(known["results"][tau]["V_fixed_point"], dtype=torch.float64)
    states, choices = mu.shape
    q = torch.zeros(states, choices, dtype=torch.float64, requires_grad=True)
    v = torch.zeros(states, dtype=torch.float64, requires_grad=True)
    slow = torch.zeros(states, choices, dtype=torch.float64)
    optimizer = torch.optim.Adam([q, v], lr=0.05)
    # A row for each pair: the action, then (unless the chain ends there) one in the next state that costs nothing.
    first, pair = torch.arange(states).repeat_interleave(choices), torch.arange(choices).repeat(states)
    weight, nothing = mu.flatten() / states, torch.zeros(states * choices, dtype=torch.float64)
    mask = torch.stack([torch.ones_like(nothing), 1 - terminal.flatten()], dim=1)

    def weighed(x: Tensor) -> Tensor:
        return x.detach() + weight * (x - x.detach())  # how often a pair is met: it scales gradients, not values

    for step in range(5000):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 4000 else 1e-3
        after = v.detach()[following.flatten()]
        values = torch.stack([weighed(v[first]), after], dim=1)
        qs, slows = torch.stack([weighed(q[first, pair]), after], 1), torch.stack([slow[first, pair], after], 1)
        loss = ilql.losses(
            torch.zeros_like(qs), [qs], [torch.zeros_like(qs)], [slows], values,
            torch.stack([reward.flatten(), after], dim=1), mask, tau=float(tau), gamma=known["gamma"], norm=1.0,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        ilql.polyak_([slow], [q], 0.1)
    assert float((v.detach() - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tau": 0.0}, "tau=0.0 is out of range; use"),
        ({"tau": 1.0}, "tau=1.0 is out of range; use"),
        ({"gamma": 1.1}, "gamma=1.1 is out of range; use"),
        ({"cql_scale": -1.0}, "cql_scale=-1.0 is out of range; use"),
        ({"qs": []}, "hold 0, 1 and 1 tensors; give"),
        ({"values": torch.zeros(2, 4)}, "values has shape .* give"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, object], reason: str) -> None:
    none = torch.zeros(2, 3)
    given = {"logprobs": none, "qs": [none], "q_logprobs": [none], "target_qs": [none], "values": none,
             "rewards": none, "mask": none}  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        ilql.losses(**(given | settings))


def test_guiding_and_moving_refuse_what_means_nothing() -> None:
    table = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="beta=-1"):
        ilql.guided(table, [table], torch.zeros(2), -1)
    with pytest.raises(ValueError, match="has shape"):
        ilql.guided(table, [table], torch.zeros(3), 1)
    with pytest.raises(ValueError, match="rate=0"):
        ilql.polyak_([table], [table], 0.0)
    with pytest.raises(ValueError, match="argument 2"):
        ilql.polyak_([table], [], 0.5)
