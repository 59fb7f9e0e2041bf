"""PPO of roles that share a backbone: the numbers of networks of their own, one loss in a hydra, the known optima."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from ppo_world import CountsToken, actor, critic, experience, gradients, trainer
from tiny import llama_config
from torch import nn
from transformers import LlamaForCausalLM

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.models.base import Actor, Critic
from prefero.models.shared import HydraActor, backbone_of, critic_on, freeze_lower, sharing
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer


def hydra(seed: int = 0) -> HydraActor:
    model = HydraActor(actor(seed).model, lora_rank=2).double()
    nn.init.normal_(model.value_head.weight, std=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("rank", [2, 0], ids=["adapters", "upper layers"])
def test_shared_networks_learn_what_separate_ones_do(rank: int) -> None:
    after = []
    for shares in (True, False):
        policy = actor(0).model
        if not rank:
            freeze_lower(policy, 1)
        policy = Actor(policy, rank).double()
        torch.manual_seed(4)
        values = critic_on(policy, rank) if shares else Critic(deepcopy(backbone_of(policy)), lora_rank=rank)
        values = values.double()
        reference = None if rank else (sharing if shares else deepcopy)(policy).requires_grad_(False)
        one = trainer(PPO(policy, values, reference, PPOSettings(kl_coef=0.2)), lr=0.1)
        one.generate_kwargs = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0}
        torch.manual_seed(5)
        for _ in range(3):
            one.step([torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])] * 4)
        after.append(
            {f"{role}.{k}": v for role, m in (("a", policy), ("c", values)) for k, v in m.state_dict().items()}
        )
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[1])
    assert any("lora_B" in name and tensor.any() for name, tensor in after[0].items()) or not rank


@pytest.mark.parametrize("parts", [1, 3])
def test_a_hydras_gradient_is_the_sum_of_both_losses(parts: int) -> None:
    model = hydra()
    settings = PPOSettings(kl_coef=0.3, lam=0.9, value_coef=0.7)
    ppo = PPO(model, model, None, settings)
    batch = experience(ppo)
    one = trainer(ppo, micro_batch_size=None if parts == 1 else 2)
    metrics = one.training_step(batch)
    stepped = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    apart = hydra()
    total, mask = float(ppo.count(batch)), batch.action_mask.bool()
    whitening = ppo.whitening([batch])
    roles = PPO(apart, apart, None, settings)
    logprobs, entropy = apart(
        batch.sequences, batch.num_actions, batch.attention_mask, return_entropy=True, action_mask=mask
    )
    policy_loss = roles._actor_loss(batch, total, whitening, logprobs, entropy).value
    value_loss = roles._critic_loss(batch, total, apart.values(batch.sequences, mask, batch.attention_mask)).value
    (policy_loss + 0.7 * value_loss).backward()
    expected = {name: p.detach() - p.grad for name, p in apart.named_parameters() if p.grad is not None}
    for name, tensor in expected.items():
        # Norms compute in float32, and two backward passes round elsewhere than one.
        torch.testing.assert_close(stepped[name], tensor, rtol=1e-6, atol=2e-7, msg=name)
    assert any("lora" in name for name in expected) and "value_head.weight" in expected
    assert metrics["actor_loss"] == pytest.approx(float(policy_loss)) and float(value_loss) > 0
    assert metrics["critic_loss"] == pytest.approx(float(value_loss))
    assert metrics["actor/gradient_norm_max"] > 0 and "critic/gradient_norm_max" not in metrics
    assert not gradients(model)


@pytest.mark.parametrize("kind", ["shared", "hydra"])
def test_adapters_on_one_backbone_find_the_better_arm(kind: str) -> None:
    torch.manual_seed(0)
    config = llama_config(2, num_hidden_layers=1, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    base = LlamaForCausalLM(config)
    nn.init.normal_(
        base.lm_head.weight, std=0.3
    )  # it is frozen: with a head of nearly nothing no adapter could be sure
    policy: Any = (HydraActor if kind == "hydra" else Actor)(base, 4)
    values = policy if kind == "hydra" else critic_on(policy, 4)
    learn = [
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for model in dict.fromkeys((policy, values))
    ]
    one = PPOTrainer(
        NaiveStrategy("cpu"), policy, values, CountsToken(1), None, learn[0], learn[-1],
        train_batch_size=16, settings=PPOSettings(kl_coef=0.0), max_new_tokens=1, pad_token_id=0,
    )  # fmt: skip
    prompt, arms = torch.zeros(16, 1, dtype=torch.long), torch.tensor([[0, 0], [0, 1]])
    frozen = [p.clone() for p in policy.parameters() if not p.requires_grad]

    def better() -> float:
        with torch.no_grad():
            return float(policy(arms, 1)[1].exp())

    assert better() < 0.9
    for _ in range(200):
        metrics = one.step(list(prompt))
        if better() > 0.99:
            break
    assert better() > 0.99, metrics
    assert all(
        torch.equal(a, b) for a, b in zip(frozen, [p for p in policy.parameters() if not p.requires_grad], strict=True)
    )


def test_what_one_role_learns_may_not_move_another() -> None:
    policy = actor(0)
    for roles in ({"critic": Critic(policy.model.model).double()}, {"initial_model": Actor(policy.model)}):
        given = {"critic": critic(1), "initial_model": None, **roles}
        optimizers = [torch.optim.SGD(model.parameters()) for model in (policy, given["critic"])]
        with pytest.raises(ValueError, match="would also move the"):
            PPOTrainer(
                NaiveStrategy("cpu"), policy, given["critic"], CountsToken(1), given["initial_model"], *optimizers,
                settings=PPOSettings(kl_coef=0.0 if given["initial_model"] is None else 0.1),
            )  # fmt: skip
    one = hydra()
    with pytest.raises(ValueError, match="which one optimizer learns"):
        PPOTrainer(NaiveStrategy("cpu"), one, one, CountsToken(1), None,
                   torch.optim.SGD(one.model.parameters()), torch.optim.SGD(one.value_head.parameters()))  # fmt: skip


def test_a_hydra_that_is_not_one_network_is_refused() -> None:
    with pytest.raises(ValueError, match="give one network as both"):
        PPO(hydra(), hydra(), None)
    with pytest.raises(ValueError, match="a hydra gives values per token only"):
        model = hydra()
        trainer(PPO(model, model, None, PPOSettings(level="sequence")))
    with pytest.raises(ValueError, match="value_coef=0"):
        PPOSettings(value_coef=0.0)
    assert critic(1).level == "token"
