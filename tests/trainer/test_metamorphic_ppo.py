"""What must not matter to PPO: padding, order, splits, what stands behind masks; and what must stay equal."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from ppo_world import (
    EOS,
    actor,
    algorithm,
    assert_same,
    clone,
    counts_token,
    critic,
    experience,
    gradients,
    prompts,
    rows,
    scores,
    trainer,
)
from tiny import tiny_tokenizer
from torch import nn

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.rollout.buffer import make_experience_batch, split_experience_batch
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer
from prefero.trainer.collate import collate_rollouts
from prefero.types import Experience


def loss_gradients(ppo: PPO, batch: Experience) -> tuple[list[float], dict[str, torch.Tensor]]:
    total = float(ppo.count(batch))
    values = []
    for loss in ppo.losses(batch, total, ppo.whitening([batch])):
        loss.value.backward()
        values.extend([float(loss.value.detach()), *(float(number) for number in loss.metrics.values())])
    both = nn.ModuleList([ppo.actor, ppo.critic])
    found = gradients(both)
    both.zero_grad()
    return values, found


# 1. padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(1, 0), (7, 0), (0, 3), (7, 3)])
def test_the_amount_of_padding_does_not_matter(left: int, right: int) -> None:
    ppo = algorithm()
    tight = ppo.experience(*rows(), scores())
    wide = ppo.experience(*rows(left=left, right=right), scores())
    for name in ("action_log_probs", "values", "advantages"):
        one, other = getattr(tight, name), getattr(wide, name)[:, : tight.num_actions]
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert not getattr(wide, name)[:, tight.num_actions :].any()
    torch.testing.assert_close(tight.info["kl"], wide.info["kl"], rtol=1e-9, atol=1e-12)
    losses, found = loss_gradients(ppo, tight)
    wide_losses, wide_found = loss_gradients(ppo, wide)
    assert losses == pytest.approx(wide_losses, rel=1e-9)
    assert_same(found, wide_found)


# 2. order and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("portion", [{"size": 1}, {"size": 2}, {"size": 4}, {"tokens": 1}, {"tokens": 20}])
def test_any_micro_batch_split_gives_the_same_step(level: str, portion: dict[str, int]) -> None:
    ppo = PPO(actor(0), critic(1, level=level), actor(5), PPOSettings(level=level, kl_coef=0.3, value_clip=0.1))
    batch = ppo.experience(*rows(), scores())
    batch.action_log_probs = batch.action_log_probs + 0.25 * (-1.0) ** torch.arange(batch.num_actions)
    whole, split = clone(ppo), clone(ppo)
    metrics = trainer(whole).training_step(batch)
    split_metrics = trainer(split, **{f"micro_batch_{name}": number for name, number in portion.items()}).training_step(
        batch
    )
    for one, other in ((whole.actor, split.actor), (whole.critic, split.critic)):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert metrics == pytest.approx(split_metrics, rel=1e-6, abs=1e-9)
    assert not torch.equal(whole.actor.model.lm_head.weight, ppo.actor.model.lm_head.weight)


def test_two_rows_of_different_lengths_are_averaged_over_tokens() -> None:
    """Advantages of ±1 on rows of different lengths: a mean of micro-batch means would give another loss."""
    ppo = algorithm(whiten_advantages=False, value_clip=None)
    batch = make_experience_batch([split_experience_batch(experience(ppo))[row] for row in (0, 2)])
    batch.action_log_probs = ppo.actor(batch.sequences, batch.num_actions, batch.attention_mask).detach()
    batch.advantages = torch.where(batch.action_mask, torch.tensor([[1.0], [-1.0]], dtype=torch.float64), 0.0)
    lengths = batch.action_mask.sum(1).tolist()
    assert lengths[0] != lengths[1]
    metrics = trainer(ppo, micro_batch_size=1, lr=0.0).training_step(batch)
    assert metrics["actor_loss"] == pytest.approx((lengths[1] - lengths[0]) / sum(lengths), rel=1e-9)


def test_the_order_of_rows_does_not_matter() -> None:
    ppo = algorithm()
    batch = experience(ppo)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    _, found = loss_gradients(ppo, batch)
    _, shuffled = loss_gradients(ppo, batch.map(lambda tensor: tensor[order]))
    assert_same(found, shuffled)


def test_judging_rollouts_in_parts_gives_the_same_experience() -> None:
    ppo = algorithm()
    sequences, mask, actions = rows()
    whole = ppo.experience(sequences, mask, actions, scores())
    halves = [
        item
        for part in (slice(0, 3), slice(3, 6))
        for item in split_experience_batch(
            ppo.experience(sequences[part], mask[part], actions[part], scores()[part])
        )
    ]  # fmt: skip
    joined = make_experience_batch(halves)
    for name in ("sequences", "action_log_probs", "values", "advantages", "reward"):
        one, other = getattr(whole, name), getattr(joined, name)
        if name == "sequences":
            one, other = one * mask, other * joined.attention_mask
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_minibatches_are_whitened_by_the_whole_learn_phase() -> None:
    """One epoch over minibatches without movement sums to the loss of the whole buffer: 0 for whitened advantages."""
    ppo = algorithm()
    batch = ppo.experience(*rows(), scores())
    whitening = ppo.whitening([batch])
    parts = [batch.map(lambda tensor, row=row: tensor[row : row + 2]) for row in (0, 2, 4)]
    total = float(ppo.count(batch))
    whole = sum(float(next(ppo.losses(part, total, whitening)).value.detach()) for part in parts)
    assert whole == pytest.approx(0.0, abs=1e-9)
    single = float(next(ppo.losses(parts[0], float(ppo.count(parts[0])), whitening)).value.detach())
    assert abs(single) > 1e-3
    subject = trainer(ppo, train_batch_size=2, lr=0.0)
    subject.replay_buffer.append(batch)
    seen = []
    subject.training_step = lambda part: seen.append(subject._whitening) or {  # type: ignore[method-assign]
        "value/error": 0.0, "value/bias": 0.0, "value/return": 0.0, "value/return_square": 0.0
    }  # fmt: skip
    subject.learn()
    assert len(seen) == 3 and len(set(seen)) == 1
    assert (seen[0].shift, seen[0].scale) == pytest.approx((whitening.shift, whitening.scale))


# 3. learning rate 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_without_learning_nothing_moves(temperature: float) -> None:
    torch.manual_seed(0)
    ppo = algorithm(temperature=temperature)
    subject = trainer(ppo, lr=0.0, max_epochs=3, train_batch_size=3, temperature=temperature,
                      max_length=9, top_k=0, eos_token_id=EOS, pad_token_id=0)  # fmt: skip
    ids = torch.randint(3, 12, (4, 3))
    history = []
    for _ in range(3):
        torch.manual_seed(1)
        history.append(subject.step([ids[row] for row in range(4)]))
    for metrics in history:
        assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)
        assert metrics["policy/approx_kl"] < 1e-12
        assert metrics["policy/clip_fraction"] == 0.0
    assert [m["rollout/kl"] for m in history] == [history[0]["rollout/kl"]] * 3
    assert [m["rollout/score"] for m in history] == [history[0]["rollout/score"]] * 3


def test_dropout_is_off_in_every_pass_and_modes_come_back() -> None:
    config = actor().model.config
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    from prefero.models.llama import LlamaActor, LlamaCritic

    ppo = PPO(LlamaActor(config=config, dropout=True).double(), LlamaCritic(config=config, dropout=True).double(),
              None, PPOSettings(kl_coef=0.0))  # fmt: skip
    assert any(getattr(module, "attention_dropout", 0.0) == 0.5 for module in ppo.actor.modules())
    ppo.actor.train()
    ppo.critic.eval()
    modes = [module.training for module in (*ppo.actor.modules(), *ppo.critic.modules())]
    one, other = (ppo.experience(*rows(), scores()) for _ in range(2))
    assert torch.equal(one.action_log_probs, other.action_log_probs)
    assert torch.equal(one.values, other.values)
    assert modes == [module.training for module in (*ppo.actor.modules(), *ppo.critic.modules())]
    subject = trainer(ppo, lr=0.0, train_batch_size=6)
    subject.replay_buffer.append(one)
    assert subject.learn()["policy/ratio_max"] == pytest.approx(1.0, abs=1e-9)


# 4. poison ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, 1e30, math.inf])
def test_what_stands_behind_the_mask_reaches_nothing(poison: float) -> None:
    ppo = algorithm(dual_clip=3.0)
    batch = experience(ppo, right=2)
    losses, found = loss_gradients(ppo, batch)
    poisoned = replace(batch)
    for name in ("action_log_probs", "values", "advantages"):
        clean = getattr(batch, name)
        setattr(poisoned, name, torch.where(batch.action_mask, clean, torch.full_like(clean, poison)))
    poisoned_losses, poisoned_found = loss_gradients(ppo, poisoned)
    assert losses == poisoned_losses
    assert_same(found, poisoned_found, rtol=0.0)


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_old_logprobs_behind_the_mask_reach_no_advantage(poison: float) -> None:
    ppo = algorithm()
    sequences, mask, actions = rows(right=2)
    old = ppo.experience(sequences, mask, actions, scores()).action_log_probs
    poisoned = torch.where(actions, old, torch.full_like(old, poison))
    one = ppo.experience(sequences, mask, actions, scores(), old)
    other = ppo.experience(sequences, mask, actions, scores(), poisoned)
    assert torch.equal(one.advantages, other.advantages)
    assert torch.equal(one.info["kl"], other.info["kl"])


# 5. after EOS ------------------------------------------------------------------------------------------------------


def test_tokens_after_the_end_change_nothing() -> None:
    ppo = algorithm()
    sequences, mask, actions = rows(right=2)
    other = torch.where(mask.bool(), sequences, torch.randint(3, 12, sequences.shape))
    assert not torch.equal(sequences, other)
    one, two = ppo.experience(sequences, mask, actions, scores()), ppo.experience(other, mask, actions, scores())
    for name in ("action_log_probs", "values", "advantages"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-14)
    assert_same(loss_gradients(ppo, one)[1], loss_gradients(ppo, two)[1], rtol=1e-9)


# 6. shift and scale of the reward -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 5.0), (3.0, 0.0), (0.5, -2.0)])
def test_whitening_makes_the_reward_scale_free(scale: float, shift: float) -> None:
    ppo = PPO(actor(0), critic(1), None, PPOSettings(kl_coef=0.0, lam=1.0))
    nn.init.zeros_(ppo.critic.value_head.weight)
    one = ppo.experience(*rows(), scores())
    two = ppo.experience(*rows(), scale * scores() + shift)
    whitened = [torch.where(e.action_mask, ppo.whitening([e])(e.advantages), 0.0) for e in (one, two)]
    torch.testing.assert_close(*whitened, rtol=1e-6, atol=1e-7)


# 7. LoRA -----------------------------------------------------------------------------------------------------------


def test_a_lora_actor_is_its_own_reference() -> None:
    torch.manual_seed(0)
    policy = actor(0, lora_rank=4)
    base = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name}
    ppo = PPO(policy, critic(1), None, PPOSettings(kl_coef=0.3))
    first = ppo.experience(*rows(), scores())
    assert torch.equal(first.info["kl"], torch.zeros_like(first.info["kl"]))
    trained = [p for p in policy.parameters() if p.requires_grad]
    subject = PPOTrainer(NaiveStrategy("cpu"), policy, ppo.critic, nn.Linear(1, 1), None,
                         torch.optim.Adam(trained, lr=0.05), torch.optim.Adam(ppo.critic.parameters()),
                         settings=ppo.settings)  # fmt: skip
    subject.training_step(first)
    subject.training_step(first)
    assert ppo.experience(*rows(), scores()).info["kl"].abs().max() > 1e-3
    assert all(torch.equal(p, base[name]) for name, p in policy.named_parameters() if name in base)


# 9, 10. rollouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3])
def test_the_samplers_logprobs_are_the_trainers(temperature: float) -> None:
    policy = actor(0, torch.float32)
    engine = HFEngine(policy, tiny_tokenizer(), eos_token_ids=[EOS])
    params = SamplingParams(8, temperature=temperature)
    batch = collate_rollouts(collect(prompts(), engine, counts_token(5), params, num_samples=4))
    assert batch.logprobs is not None
    ppo = PPO(policy, critic(1, torch.float32), None, PPOSettings(kl_coef=0.0, temperature=temperature))
    arguments = (batch.sequences, batch.attention_mask, batch.action_mask, torch.zeros(16))
    sampled = ppo.experience(*arguments, batch.logprobs, batch.ended)
    computed = ppo.experience(*arguments, None, batch.ended)
    torch.testing.assert_close(sampled.action_log_probs, computed.action_log_probs, rtol=0, atol=1e-4)


def test_rows_hold_exactly_the_ids_that_were_sampled() -> None:
    tokenizer = tiny_tokenizer()
    policy = actor(0, torch.float32, vocab_size=len(tokenizer))
    engine = HFEngine(policy, tokenizer, eos_token_ids=[EOS])
    asked = [replace(prompt, token_ids=(1, *prompt.token_ids)) for prompt in prompts()]
    rollouts = collect(asked, engine, counts_token(5), SamplingParams(12), num_samples=4)
    batch = collate_rollouts(rollouts)
    num_prompt = batch.sequences.shape[1] - batch.action_mask.shape[1]
    for row, rollout in enumerate(rollouts):
        ids = (*rollout.prompt.token_ids, *rollout.completion.token_ids)
        assert tuple(batch.sequences[row][batch.attention_mask[row].bool()].tolist()) == ids
        actions = batch.sequences[row, num_prompt:][batch.action_mask[row]].tolist()
        assert tuple(actions) == rollout.completion.token_ids
        assert ids.count(EOS) == (rollout.completion.finish_reason == "stop") == bool(batch.ended[row])
        words = tokenizer.decode([token for token in rollout.completion.token_ids if token != EOS])
        if not {"<pad>", "<bos>", "<unk>"} & set(words.split()):
            assert tokenizer(words, add_special_tokens=False)["input_ids"] == [
                token for token in rollout.completion.token_ids if token != EOS
            ]
    assert batch.ended.any() and not batch.ended.all()


# 12. seeds -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes() -> None:
    def run(seed: int) -> str:
        torch.manual_seed(0)
        ppo = algorithm()
        sampling = SamplingParams(5, seed=seed)
        subject = trainer(ppo, lr=0.05, reward_model=counts_token(5), sampling=sampling, num_samples=2,
                          engine=HFEngine(ppo.actor, tiny_tokenizer(), eos_token_ids=[EOS]),
                          train_batch_size=3, max_epochs=2)  # fmt: skip
        return json.dumps([subject.step(prompts()) for _ in range(2)])

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_copy_learns_the_same_from_the_same_experience() -> None:
    """Nothing hidden in the trainer (an optimizer state aside) decides what is learned."""
    ppo = algorithm()
    one, other = clone(ppo), clone(ppo)
    batch = experience(ppo)
    for copy in (one, other):
        trainer(copy).training_step(deepcopy(batch))
    assert_same(dict(one.actor.state_dict()), dict(other.actor.state_dict()), rtol=0.0)
