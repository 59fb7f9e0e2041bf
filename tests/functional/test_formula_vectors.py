"""Every formula against numbers computed by other projects' own code (tests/vectors), values and gradients."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefero.functional import advantages, kl, logprobs, masked, policy, reward, supervised, value

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT = 1e-9
WITH_EPSILON = 1e-7  # where the source adds an epsilon of its own
SINGLE = 1e-5  # where the source computes in float32


def vectors(name: str) -> dict[str, Tensor]:
    with np.load(VECTORS / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def same(ours: Tensor | float, theirs: Tensor, rtol: float = EXACT, where: Tensor | None = None) -> None:
    ours = torch.as_tensor(ours, dtype=torch.float64)
    theirs = theirs.double()
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    atol = 1e-12 if rtol < SINGLE else 1e-7
    np.testing.assert_allclose(ours.detach().numpy(), theirs.numpy(), rtol=rtol, atol=atol)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("settings", ["g1.0_l0.95", "g0.99_l0.9", "g1.0_l1.0", "g0.9_l0.0"])
class TestGAE:
    def test_masked(self, settings: str) -> None:
        v = vectors("01_gae")
        gamma, lam = (float(part[1:]) for part in settings.split("_"))
        ours, returns = advantages.gae(v["token_level_rewards"], v["values"], v["mask"], gamma, lam)
        for theirs in (f"verl_adv_unwhitened_{settings}", f"openrlhf_adv_{settings}"):
            same(ours, v[theirs], where=v["mask"])
        for theirs in (f"verl_returns_{settings}", f"openrlhf_returns_{settings}"):
            same(returns, v[theirs], where=v["mask"])
        whitened = masked.whiten(ours, v["mask"], unbiased=True)
        same(whitened, v[f"verl_whitened_adv_{settings}"], rtol=WITH_EPSILON, where=v["mask"])
        outside = ~v["mask"].bool()
        assert not ours[outside].any() and not returns[outside].any() and not whitened[outside].any()

    def test_without_a_mask(self, settings: str) -> None:
        v = vectors("01_gae")
        rewards = vectors("00_inputs")["rewards"]
        gamma, lam = (float(part[1:]) for part in settings.split("_"))
        every = torch.ones_like(rewards)
        ours, returns = advantages.gae(rewards, v["values"], every, gamma, lam)
        same(ours, v[f"trlx_nomask_adv_{settings}_whiten0"])
        same(ours, v[f"slime_chunked_nomask_adv_{settings}"])
        same(returns, v[f"trlx_nomask_returns_{settings}"])
        whitened = masked.whiten(ours, every, unbiased=True)
        same(whitened, v[f"trlx_nomask_adv_{settings}_whiten1"], rtol=WITH_EPSILON)


def test_gae_skips_holes() -> None:
    v = vectors("01_gae")
    mask = v["hole_mask"]
    ours, returns = advantages.gae(v["hole_token_level_rewards"], v["values"], mask, 1.0, 0.95)
    same(ours, v["verl_hole_adv_unwhitened"], where=mask)
    same(returns, v["verl_hole_returns"], where=mask)
    same(masked.whiten(ours, mask, unbiased=True), v["verl_hole_adv_whitened"], rtol=WITH_EPSILON, where=mask)


def test_whiten() -> None:
    v = vectors("02_whiten")
    every = torch.ones_like(v["x"])
    same(masked.whiten(v["x"], every), v["biased_shift1"])
    same(masked.whiten(v["x"], every, shift_mean=False), v["biased_shift0"])
    same(masked.whiten(v["x"], every, shift_mean=False, unbiased=True), v["unbiased_shift0"], WITH_EPSILON)
    # The numbers as printed by TensorFlow in float32.
    same(masked.whiten(v["x"], every, shift_mean=False), v["blog_tf_shift_mean_False"], rtol=SINGLE)
    x, mask = v["masked_x"], v["mask"]
    same(masked.whiten(x, mask), v["masked_biased"], rtol=WITH_EPSILON, where=mask)
    same(masked.whiten(x, mask, unbiased=True), v["masked_unbiased"], rtol=WITH_EPSILON, where=mask)
    rows = torch.stack([masked.whiten(row, kept) for row, kept in zip(x, mask, strict=True)])
    same(rows, v["openrlhf_normalize_dim1"], rtol=WITH_EPSILON)


AGGREGATES = {
    "token_mean": ("token_mean", None),
    "seq_mean_token_sum": ("sequence_sum_norm", 6),
    "seq_mean_token_mean": ("sequence_mean", None),
    "seq_mean_token_sum_norm": ("sequence_sum_norm", 8),
}


def ppo(v: dict[str, Tensor], high: float = 0.2, dual: float | None = None) -> tuple[Tensor, Tensor]:
    lp = leaf(v["logprobs"])
    return policy.ppo_clip(lp, v["old_logprobs"], v["advantages"], 0.2, high, dual), lp


@pytest.mark.parametrize("name", AGGREGATES)
def test_policy_loss_of_verl(name: str) -> None:
    v = vectors("03_policy_value_loss")
    how, norm = AGGREGATES[name]
    # verl's masked mean adds 1e-8 to its denominator.
    rtol = WITH_EPSILON if how == "sequence_mean" else EXACT
    tokens, lp = ppo(v, dual=3.0)
    loss = masked.aggregate(tokens, v["mask"], how, norm)
    same(loss, v[f"verl_vanilla_{name}"], rtol)
    same(gradient(loss, lp), v[f"verl_vanilla_{name}_grad"], rtol)
    higher, _ = ppo(v, high=0.28, dual=3.0)
    same(masked.aggregate(higher, v["mask"], how, norm), v[f"verl_vanilla_cliphigher_{name}"], rtol)
    same(masked.aggregate(v["advantages"], v["mask"], how, norm), v[f"verl_agg_{name}"], rtol)


def test_token_mean_over_a_global_count() -> None:
    v = vectors("03_policy_value_loss")
    # Two processes average their gradients, so verl doubles a loss over the 40 tokens of both.
    ours = 2 * masked.aggregate(v["advantages"], v["mask"], norm=40)
    same(ours, v["verl_agg_token_mean_dp2_global40"])
    same(2 * masked.aggregate(v["advantages"], v["mask"], norm=torch.tensor(40)), v["verl_agg_token_mean_dp2_global40"])


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize(("token", "how"), [(1, "token_mean"), (0, "sequence_mean")])
def test_policy_loss_of_openrlhf(dual: float | None, token: int, how: str) -> None:
    v = vectors("03_policy_value_loss")
    tokens, lp = ppo(v, dual=dual)
    loss = masked.aggregate(tokens, v["mask"], how)
    rtol = EXACT if token else WITH_EPSILON  # its mean over a row adds 1e-8 to the row's length
    same(loss, v[f"openrlhf_ppo_token{token}_dual{dual}"], rtol)
    same(gradient(loss, lp), v[f"openrlhf_ppo_token{token}_dual{dual}_grad"], rtol)


def test_policy_loss_of_trlx_and_slime() -> None:
    v = vectors("03_policy_value_loss")
    tokens, lp = ppo(v)
    vpred = leaf(v["vpred"])
    policy_loss = masked.aggregate(tokens, v["mask"])
    value_loss = masked.aggregate(value.clipped(vpred, v["values"], v["returns"], 0.2), v["mask"])
    same(policy_loss, v["trlx_policy_loss"])
    same(value_loss, v["trlx_value_loss"])
    total = policy_loss + 1.2 * value_loss
    same(total, v["trlx_total_loss"])
    to_lp, to_values = torch.autograd.grad(total, (lp, vpred))
    same(to_lp, v["trlx_total_grad_logprobs"])
    same(to_values, v["trlx_total_grad_values"])
    dual, _ = ppo(v, high=0.28, dual=3.0)
    same(dual, v["slime_token_losses_low.2_high.28_c3"])


def test_value_loss() -> None:
    v = vectors("03_policy_value_loss")
    clipped = masked.aggregate(value.clipped(v["vpred"], v["values"], v["returns"], 0.2), v["mask"])
    same(clipped, v["verl_value_loss"], WITH_EPSILON)
    same(clipped, v["openrlhf_value_loss_clip"])
    plain = masked.aggregate(value.clipped(v["vpred"], v["values"], v["returns"], math.inf), v["mask"])
    same(plain, v["openrlhf_value_loss_noclip"])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators(kind: str) -> None:
    v = vectors("04_kl_reward")
    lp = leaf(v["logprobs"])
    ours = kl.estimate(lp, v["ref_logprobs"], kind)
    same(ours, v[f"verl_{kind}"])
    same(ours, v[f"nemo_{kind}"])
    same(ours, v[f"openrlhf_{kind}_f32"], SINGLE)
    same(ours, v[f"slime_{kind}_f32"], SINGLE)
    same(gradient(ours.sum(), lp), v[f"verl_{kind}_grad"])


def test_penalised_rewards() -> None:
    v = vectors("04_kl_reward")
    inputs = v["logprobs"], v["ref_logprobs"], v["mask"], 0.1
    same(kl.penalised_rewards(v["score"], *inputs), v["openrlhf_reward_shaped_klcoef.1"])
    same(kl.penalised_rewards(v["score"].clamp(-0.5, 0.5), *inputs), v["openrlhf_reward_clip_-0.5_0.5"])
    # verl's shaping of rewards that a task gives token by token.
    base = vectors("01_gae")["token_level_rewards"]
    ours = base + kl.penalised_rewards(torch.zeros_like(v["score"]), *inputs)
    same(ours, v["verl_rewards_klratio.1"], where=v["mask"])


def test_adaptive_coefficient() -> None:
    v = vectors("04_kl_reward")
    coefficient = kl.AdaptiveCoefficient(initial=0.15, target=6.0, horizon=10000)
    for measured, expected in zip(v["adaptive_kl_inputs"], v["adaptive_kl_coefs"], strict=True):
        same(coefficient.update(float(measured), 512), expected)
        assert coefficient.value == pytest.approx(float(expected), rel=1e-12)


def test_reward_model_losses() -> None:
    v = vectors("08_reward_model")
    pairs = v["chosen"], v["rejected"]
    same(reward.bradley_terry(*pairs), v["pairwise"])
    same(reward.bradley_terry(*pairs), v["trl_rm"])
    same(reward.bradley_terry(*pairs, margin=v["margin"]), v["pairwise_margin"])
    same(reward.bradley_terry(*pairs, v["margin"]), v["trl_rm_margin"])
    same(reward.bradley_terry(*pairs, centering=0.01), v["trl_rm_center.01"])
    same(reward.log_exp(*pairs), v["logexp"])


def shifted(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors' logits already stand at the token they predict: put a first token before, a last logit after."""
    return (
        torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1),
        torch.cat([torch.zeros_like(ids[:, :1]), ids], dim=1),
    )


def test_log_probabilities() -> None:
    v = vectors("10_logprobs_masks")
    logits, ids = shifted(v["logits"], v["ids"])
    for temperature in (1.0, 0.7):
        ours = logprobs.token_logprobs(logits, ids, temperature)
        same(ours[:, 1:], v[f"trl_selective_log_softmax_T{temperature}"])
        assert not ours[:, 0].any()
    same(logprobs.token_logprobs(logits, ids)[:, 1:], v["verl_logprobs_v2"])
    same(logprobs.entropy(v["logits"]), v["entropy"])
    # The identity as hidden states and head: the logits themselves.
    head = torch.eye(v["logits"].shape[-1], dtype=torch.float64)
    chosen, entropies = logprobs.selected(v["logits"], head, None, v["ids"], chunk_size=3, with_entropy=True)
    assert entropies is not None
    same(chosen, v["verl_logprobs_v2"])
    same(entropies, v["entropy"])


def test_cross_entropy_is_minus_the_mean_log_probability() -> None:
    v = vectors("10_logprobs_masks")
    logits, ids = shifted(v["logits"], v["ids"])
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    ours = supervised.cross_entropy(logprobs.token_logprobs(logits, ids), mask, mask.sum())
    same(ours, -v["verl_logprobs_v2"].mean())
    same(ours, torch.nn.functional.cross_entropy(v["logits"].flatten(0, 1), v["ids"].flatten()))


def test_single_precision_stays_close() -> None:
    v = vectors("03_policy_value_loss")
    single = {key: tensor.float() for key, tensor in v.items()}
    tokens, lp = ppo(single, dual=3.0)
    loss = masked.aggregate(tokens, single["mask"])
    assert loss.dtype == torch.float32
    same(loss, v["verl_vanilla_token_mean"], SINGLE)
    same(gradient(loss, lp), v["verl_vanilla_token_mean_grad"], SINGLE)
