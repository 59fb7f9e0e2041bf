"""Formulas of algorithms that compare the answers of a prompt, against other projects' numbers, and their refusals."""

from __future__ import annotations

import math

import pytest
import torch
from test_formula_vectors import EXACT, WITH_EPSILON, gradient, leaf, same, vectors

from prefero.functional import advantages, kl, masked, policy


def rows(per_completion, mask):
    return per_completion.unsqueeze(1) * mask


class TestGroups:
    v = vectors("05_group_advantages")
    given = (v["reward"], v["group"])

    def test_grpo(self) -> None:
        ours = advantages.group_relative(*self.given)
        same(rows(ours, self.v["mask"]), self.v["verl_grpo_std"])
        same(advantages.group_relative(*self.given, epsilon=1e-4), self.v["trl_grpo_group"])
        same(advantages.group_relative(*self.given, scale="batch", epsilon=1e-4), self.v["trl_grpo_batch"])

    def test_without_scale(self) -> None:
        ours = advantages.group_relative(*self.given, scale="none")
        same(rows(ours, self.v["mask"]), self.v["verl_grpo_nostd_drgrpo"])
        same(ours, self.v["trl_grpo_none"])

    def test_leave_one_out(self) -> None:
        ours = advantages.leave_one_out(*self.given)
        same(rows(ours, self.v["mask"]), self.v["verl_rloo"])
        same(ours, self.v["trl_rloo_norm0"])
        same(ours, 1.5 * advantages.group_relative(*self.given, scale="none"))

    def test_reinforce_pp(self) -> None:
        ours = advantages.reinforce_pp(self.v["rfpp_token_level_rewards"], self.v["mask"], 1.0)
        same(ours, self.v["verl_rfpp_g1"], rtol=WITH_EPSILON, where=self.v["mask"])
        difference = advantages.group_relative(*self.given, scale="none")
        baseline = masked.whiten(rows(difference, self.v["mask"]), self.v["mask"], unbiased=True)
        same(baseline, self.v["verl_rfpp_baseline"], rtol=WITH_EPSILON, where=self.v["mask"])

    def test_the_order_of_rows_does_not_matter(self) -> None:
        order = torch.tensor([4, 0, 3, 5, 2, 1])
        for formula in (advantages.group_relative, advantages.leave_one_out):
            same(formula(self.given[0][order], self.given[1][order] + 7), formula(*self.given)[order])

    @pytest.mark.parametrize("scale", ["group", "none", "batch"])
    def test_equal_rewards_are_worth_nothing(self, scale: str) -> None:
        ours = advantages.group_relative(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long), scale)
        assert float(ours.abs().max()) < 1e-6 and (scale != "group" or not ours.any())

    def test_a_shift_of_rewards_changes_nothing_and_grpo_knows_no_scale(self) -> None:
        reward, group = self.given
        for formula in (advantages.group_relative, advantages.leave_one_out):
            same(formula(reward + 3, group), formula(reward, group), rtol=1e-6)
        exact = {"epsilon": 0.0}
        same(advantages.group_relative(9 * reward, group, **exact), advantages.group_relative(reward, group, **exact))

    @pytest.mark.parametrize("formula", [advantages.group_relative, advantages.leave_one_out])
    def test_what_is_refused(self, formula) -> None:
        two = torch.tensor([0, 0])
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=r"rewards\[1\] is .*give finite"):
                formula(torch.tensor([1.0, bad]), two)
        with pytest.raises(ValueError, match="group 5 has a single completion"):
            formula(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 5]))
        with pytest.raises(ValueError, match="shape"):
            formula(torch.ones(2), torch.zeros(3))
        with pytest.raises(ValueError, match="scale"):
            advantages.group_relative(torch.ones(2), two, scale="std")


class TestLosses:
    v = vectors("06_trl_grpo_rloo_loss") | vectors("00_inputs")
    per_token = v["seq_advantages"].unsqueeze(1) * torch.ones_like(v["mask"])

    def check(self, losses, how: str, value: str, norm=None, rtol: float = EXACT) -> None:
        logprobs = leaf(self.v["logprobs"])
        loss = masked.aggregate(losses(logprobs), self.v["mask"], how, norm)
        same(loss, self.v[value], rtol)
        same(gradient(loss, logprobs), self.v[f"{value}_grad"], rtol)

    def clipped(self, logprobs):
        return policy.ppo_clip(logprobs, self.v["old_logprobs"], self.per_token, 0.2, 0.2)

    @pytest.mark.parametrize(
        ("kind", "how", "norm"),
        [("grpo", "sequence_mean", None), ("dapo", "token_mean", None), ("dr_grpo", "sequence_sum_norm", 48)],
    )
    def test_means(self, kind: str, how: str, norm: float | None) -> None:
        self.check(self.clipped, how, f"trl_{kind}", norm)

    def test_the_penalty_in_the_loss_has_its_importance_weight(self) -> None:
        def losses(logprobs):
            ratio = (logprobs - self.v["old_logprobs"]).exp()
            return self.clipped(logprobs) + 0.04 * ratio * kl.estimate(logprobs, self.v["ref_logprobs"], "k3")

        self.check(losses, "sequence_mean", "trl_grpo_beta.04")

        def without(logprobs):
            return self.clipped(logprobs) + 0.04 * kl.estimate(logprobs, self.v["ref_logprobs"], "k3")

        self.check(without, "sequence_mean", "trl_grpo_beta.04_no_bias_corr")

    @pytest.mark.parametrize(("name", "clips"), [("eps02", (0.2, 0.2)), ("3e-4_4e-4", (3e-4, 4e-4))])
    @pytest.mark.parametrize("per_row", [True, False])
    def test_gspo(self, name: str, clips: tuple[float, float], per_row: bool) -> None:
        given = self.v["seq_advantages"] if per_row else self.per_token
        losses = lambda logprobs: policy.gspo(logprobs, self.v["old_logprobs"], given, self.v["mask"], *clips)  # noqa: E731
        self.check(losses, "sequence_mean", f"trl_gspo_seq_grpo_{name}")

    def test_gspo_is_what_others_have(self) -> None:
        v = vectors("03_policy_value_loss") | self.v
        logprobs = leaf(v["logprobs"])
        per_token = policy.gspo(logprobs, v["old_logprobs"], v["seq_advantages"], v["mask"], 0.2, 0.2)
        loss = masked.aggregate(per_token, v["mask"], "sequence_mean")
        for theirs in ("verl", "openrlhf"):
            same(loss, v[f"{theirs}_gspo_eps02"])
            theirs_gradient = v[f"{theirs}_gspo_eps02_grad"]
            same(torch.autograd.grad(loss, logprobs, retain_graph=True)[0], theirs_gradient, rtol=WITH_EPSILON)

    def test_truncated_weights(self) -> None:
        ours = policy.truncated_weights(self.v["old_logprobs"], self.v["rollout_logprobs"], 2.0)
        same(ours, self.v["tis_ratio_cap2"], where=self.v["mask"])
        with pytest.raises(ValueError, match="cap"):
            policy.truncated_weights(self.v["logprobs"], self.v["logprobs"], 0.0)


def test_gspo_refuses_advantages_that_differ_within_a_sequence() -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one number a sequence"):
        policy.gspo(zeros, zeros, torch.arange(6.0).view(2, 3), torch.ones(2, 3), 0.2, 0.2)
    with pytest.raises(ValueError, match="give"):
        policy.gspo(zeros, zeros, torch.zeros(3), torch.ones(2, 3), 0.2, 0.2)


@pytest.mark.parametrize("what", ["gspo", "cispo"])
def test_masked_slots_are_blind(what: str) -> None:
    logprobs, old = leaf(torch.tensor([[-1.0, math.nan]])), torch.tensor([[-1.1, math.inf]])
    mask = torch.tensor([[1.0, 0.0]])
    if what == "gspo":
        per_token = policy.gspo(logprobs, old, torch.tensor([1.0]), mask, 0.2, 0.2)
    else:
        per_token = policy.cispo(logprobs, old, torch.ones(1, 2), None, 3.0)
    given = gradient(masked.aggregate(per_token, mask), logprobs)
    assert float(given[0, 0]) != 0 and float(given[0, 1]) == 0


@pytest.mark.parametrize(
    ("file", "value", "low", "high"),
    [("03_policy_value_loss", "verl_cispo", 0.2, 0.2), ("06_trl_grpo_rloo_loss", "trl_cispo", None, 4.0)],
)
def test_cispo(file: str, value: str, low: float | None, high: float) -> None:
    v = vectors("00_inputs") | vectors(file)
    logprobs = leaf(v["logprobs"])
    per_token = v["seq_advantages"].unsqueeze(1).expand_as(v["mask"])
    loss = masked.aggregate(policy.cispo(logprobs, v["old_logprobs"], per_token, low, high), v["mask"])
    same(loss, v[value])
    same(gradient(loss, logprobs), v[f"{value}_grad"])
