"""DPO and its kin against numbers computed by other projects' own code (tests/vectors), values and gradients."""

import math

import pytest
import torch
from test_formula_vectors import gradient, leaf, same, vectors
from torch import Tensor

from prefero.functional import masked, preference

BETA = 0.1
SINGLE = 1e-6


def pairs(v: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return v["policy_chosen"], v["policy_rejected"], v["ref_chosen"], v["ref_rejected"]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_original_losses(beta: float) -> None:
    v = vectors("07_preference_losses")
    same(preference.dpo(*pairs(v), beta, "sigmoid"), v[f"dpo_orig_beta{beta}"])
    same(preference.dpo(*pairs(v), beta, "sigmoid").mean(), v[f"openrlhf_dpo_beta{beta}"])
    for kind in ("sigmoid", "cdpo"):
        same(preference.dpo(*pairs(v), beta, kind, 0.1), v[f"cdpo_orig_beta{beta}_ls.1"])
    same(preference.dpo(*pairs(v), beta, "ipo"), v[f"ipo_orig_beta{beta}_summed_logps"])
    same(preference.dpo(*pairs(v), beta, "ipo").mean(), v[f"openrlhf_ipo_beta{beta}"])


@pytest.mark.parametrize(
    ("kind", "smoothing", "theirs"),
    [
        ("sigmoid", 0.0, "trl_sigmoid_beta.1"),
        ("hinge", 0.0, "trl_hinge_beta.1"),
        ("ipo_mean", 0.0, "trl_ipo_beta.1"),
        ("robust", 0.1, "trl_robust_beta.1_ls.1"),
        ("apo_zero", 0.0, "trl_apo_zero_beta.1"),
        ("apo_down", 0.0, "trl_apo_down_beta.1"),
    ],
)
def test_every_kind_of_dpo_and_its_gradient_by_token(kind: str, smoothing: float, theirs: str) -> None:
    v = vectors("07_preference_losses")
    mask = v["trl_completion_mask"][:, 1:].bool()
    tokens = leaf(v["trl_policy_token_logps"])
    policy, reference = masked.sum(tokens, mask, dim=1), masked.sum(v["trl_ref_token_logps"], mask, dim=1)
    lengths = mask.sum(1)
    loss = preference.dpo(
        policy[:5], policy[5:], reference[:5], reference[5:], BETA, kind, smoothing, lengths[:5], lengths[5:]
    ).mean()
    same(loss, v[theirs])
    if f"{theirs}_grad" in v:
        ours = gradient(loss, tokens)
        same(ours, v[f"{theirs}_grad"], where=mask)
        assert not ours[~mask].any()


def test_the_two_forms_of_ipo_differ_by_design() -> None:
    v = vectors("07_preference_losses")
    assert float(v["openrlhf_ipo_beta0.1"]) == pytest.approx(85.9, abs=0.01)
    assert float(v["trl_ipo_beta.1"]) == pytest.approx(29.0, abs=0.01)


@pytest.mark.parametrize("suffix", ["", "pos"])
def test_kto(suffix: str) -> None:
    v = vectors("07_preference_losses")
    point = preference.kto_reference_point(v["kto_kl_policy_pos" if suffix else "kto_kl_policy"], v["kto_kl_ref"])
    same(point, v[f"kto_halos_KL{suffix}"])
    logps = leaf(torch.cat([v["policy_chosen"], v["policy_rejected"]]))
    references = torch.cat([v["ref_chosen"], v["ref_rejected"]])
    desirable = torch.arange(10) < 5
    losses = preference.kto(logps, references, desirable, point, BETA, undesirable_weight=1.33)
    name = "kto_halos_losses_KLpos" if suffix else "kto_halos_losses_chosen_then_rejected_uw1.33"
    same(losses, v[name])
    same(losses.mean(), v["trl_kto_loss_KLpos_uw1.33" if suffix else "trl_kto_loss_uw1.33"])
    # The slope is that of a sigmoid: by hand, since no project hands it out.
    gain = BETA * (logps.detach() - references - point)
    slope = BETA * torch.sigmoid(gain) * torch.sigmoid(-gain)
    same(gradient(losses.sum(), logps), torch.where(desirable, -slope, 1.33 * slope))


def test_the_reference_point_is_held_at_zero_and_has_no_gradient() -> None:
    unrelated = leaf(torch.tensor([-3.0, -5.0], dtype=torch.float64))
    assert float(preference.kto_reference_point(unrelated, torch.tensor([-2.0, -2.0]).double())) == 0.0
    free = leaf(torch.tensor(0.7, dtype=torch.float64))
    logps = leaf(torch.tensor([-1.0, -2.0], dtype=torch.float64))
    losses = preference.kto(logps, logps.detach() - 0.1, torch.tensor([True, False]), free, BETA)
    losses.sum().backward()
    assert logps.grad is not None and free.grad is None
    point = preference.kto_reference_point(unrelated, torch.tensor([-4.0, -9.0]).double())
    assert float(point) > 0.0 and not point.requires_grad


def test_simpo_cpo_and_orpo() -> None:
    v = vectors("07_preference_losses")
    means = v["avg_chosen"], v["avg_rejected"]
    ours = preference.simpo(*means, beta=2.0, gamma=1.0)
    same(ours, v["simpo_official_beta2_gbr.5"])
    same(ours, v["trl_simpo_beta2_gamma1"])
    same(preference.cpo(v["policy_chosen"], v["policy_rejected"], BETA), v["trl_cpo_sigmoid_beta.1"])
    odds = preference.orpo(*means, BETA)
    same(odds, v["orpo_official_minus_ratio_alpha.1"])
    same(odds, v["trl_orpo_or_term_beta.1"], SINGLE)


@pytest.mark.parametrize("kind", [*preference.DPO_KINDS, "kto", "orpo", "simpo", "cpo"])
def test_slopes_are_those_of_the_values(kind: str) -> None:
    v = vectors("07_preference_losses")
    chosen, rejected = leaf(v["policy_chosen"]), leaf(v["policy_rejected"])
    if kind in ("orpo", "simpo"):
        chosen, rejected = leaf(v["avg_chosen"]), leaf(v["avg_rejected"])

    def loss(c: Tensor, r: Tensor) -> Tensor:
        if kind in preference.DPO_KINDS:
            smoothing = 0.1 if kind in ("cdpo", "robust") else 0.0
            lengths = v["len_chosen"], v["len_rejected"]
            return preference.dpo(c, r, v["ref_chosen"], v["ref_rejected"], 0.07, kind, smoothing, *lengths)
        if kind == "kto":
            wanted = torch.tensor([True, False, True, False, True])
            return preference.kto(c, v["ref_chosen"], wanted, 0.3, 0.2, 1.5, 0.5) + 0.0 * r
        return {
            "orpo": lambda: preference.orpo(c, r, 0.3),
            "simpo": lambda: preference.simpo(c, r, 2.0, 0.4),
            "cpo": lambda: preference.cpo(c, r, 0.2),
        }[kind]()

    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def test_odds_keep_their_digits_at_both_ends() -> None:
    certain = torch.tensor([0.0, -1e-300, -1e-15, -0.5, -0.7, -800.0], dtype=torch.float64, requires_grad=True)
    odds = preference.log_odds(certain)
    assert bool(odds.isfinite().all()) and bool((odds[:-1] >= odds[1:]).all())
    assert float(odds[-1].detach()) == -800.0
    assert bool(gradient(odds.sum(), certain).isfinite().all())
    near = preference.log_odds(torch.tensor([-1e-12, -1e-9], dtype=torch.float64))
    same(near, torch.tensor([-math.log(math.expm1(x)) for x in (1e-12, 1e-9)], dtype=torch.float64), 1e-12)
    halves = preference.orpo(certain.detach().half(), certain.detach().half(), 1.0)
    assert halves.dtype == torch.float32 and bool(halves.isfinite().all())


def test_what_makes_no_sense_is_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    refusals = [
        (lambda: preference.dpo(two, two, two, two, 0.1, "sigmoyd"), "kind='sigmoyd' is unknown; use one of"),
        (lambda: preference.dpo(two, two, two, two, 0.0), "beta=0.0 is out of range; use"),
        (lambda: preference.dpo(two, two, two, two, float("nan")), "beta=nan"),
        (lambda: preference.dpo(two, two, three, two, 0.1), "give chosen_logps .* the same shape"),
        (lambda: preference.dpo(*[torch.zeros(0)] * 4, 0.1), "empty"),
        (lambda: preference.dpo(two, two, two, two, 0.1, "cdpo", 0.5), "label_smoothing=0.5 is out of range"),
        (lambda: preference.dpo(two, two, two, two, 0.1, "ipo", 0.1), "means nothing for kind='ipo'; use 0"),
        (lambda: preference.dpo(two, two, two, two, 0.1, "robust"), "kind='robust' with label_smoothing=0"),
        (lambda: preference.dpo(two, two, two, two, 0.1, "ipo_mean"), "give chosen_lengths"),
        (lambda: preference.dpo(two, two, two, two, 0.1, "ipo_mean", 0.0, two, two), "without a token; give"),
        (lambda: preference.kto(two, two, two.bool(), 0.0, -1.0), "beta=-1.0"),
        (lambda: preference.kto(two, two, three.bool(), 0.0, 1.0), "desirable has shape"),
        (lambda: preference.kto(two, two, two.bool(), 0.0, 1.0, -1.0), "desirable_weight=-1.0"),
        (lambda: preference.kto_reference_point(torch.zeros(0), torch.zeros(0)), "empty"),
        (lambda: preference.orpo(two, three, 0.1), "rejected_logps has shape"),
        (lambda: preference.orpo(two, two, 0.0), "beta=0.0"),
        (lambda: preference.simpo(two, two, 1.0, -0.1), "gamma=-0.1"),
        (lambda: preference.cpo(two, two, 0.0), "beta=0.0"),
    ]
    for attempt, message in refusals:
        with pytest.raises(ValueError, match=message):
            attempt()
