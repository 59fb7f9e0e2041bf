"""Mistakes that other systems shipped without noticing, each made visible here in the real trainers."""

import itertools
import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from ppo_world import EOS, CountsToken, actor, algorithm, clone, counts_token, critic, prompts, rows, scores, trainer
from tiny import llama_config, tiny_llama, tiny_tokenizer

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.models.base import Actor
from prefero.models.llama import LlamaActor
from prefero.rollout.collect import collect
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.rollout.native.engine import NativeEngine
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer, SFTTrainer
from prefero.trainer.collate import collate_rollouts
from prefero.types import Completion, Prompt, TokenBatch


@pytest.mark.parametrize("engine", [HFEngine, NativeEngine])
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_a_sampler_with_other_log_probabilities_than_the_trainer_is_noticed(engine: Any, wrong: float) -> None:
    class Sampler(engine):  # type: ignore[misc]
        def generate(self, *arguments: Any) -> list[Completion]:
            done = super().generate(*arguments)
            return [replace(c, logprobs=tuple(logprob - wrong for logprob in c.logprobs)) for c in done]

    policy, values = actor(0, torch.float32), critic(1, torch.float32)
    subject = PPOTrainer(
        NaiveStrategy("cpu"), policy, values, counts_token(5), None, torch.optim.Adam(policy.parameters(), lr=1e-2),
        torch.optim.Adam(values.parameters()), settings=PPOSettings(kl_coef=0.0, temperature=0.8), train_batch_size=4,
        max_epochs=2, engine=Sampler(policy, tiny_tokenizer(), eos_token_ids=[EOS]), max_logprob_mismatch=0.1,
        sampling=SamplingParams(6, temperature=0.8, seed=1), num_samples=4,
    )  # fmt: skip
    if wrong:
        with pytest.raises(ValueError, match=r"are 0\.3 nats a token away.*at most 0\.1"):
            subject.step(prompts())
        fresh = actor(0, torch.float32).state_dict()
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in policy.state_dict().items())
        return
    for _ in range(2):  # the second with weights that have moved
        metrics = subject.step(prompts())
        assert 0.0 <= metrics["rollout/logprob_mismatch"] < 1e-5 < metrics["policy/logprob_change"]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_reported_kl_is_the_kl(temperature: float) -> None:
    """The mean over own samples of the summed log-ratio, against the sum over all nine completions."""
    config = llama_config(3, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(3)
    policy, reference = LlamaActor(config=config), LlamaActor(config=config)
    for model in (policy, reference):
        torch.nn.init.normal_(model.model.lm_head.weight, std=0.3)
    ppo = PPO(policy, critic(vocab_size=3, dtype=torch.float32), reference, PPOSettings(temperature=temperature))
    every = torch.tensor([(0, 1, *answer) for answer in itertools.product(range(3), repeat=2)])
    with torch.no_grad():
        logp, logq = (model(every, 2, temperature=temperature).sum(1) for model in (policy, reference))
    exact = float((logp.exp() * (logp - logq)).sum())
    engine = HFEngine(policy, tiny_tokenizer(), batch_size=1000, eos_token_ids=())
    params = SamplingParams(2, temperature=temperature, seed=1)
    batch = collate_rollouts(collect([Prompt("p", (0, 1), "p")], engine, counts_token(1), params, num_samples=1000))
    arguments = (batch.sequences, batch.attention_mask, batch.action_mask, torch.zeros(1000), batch.logprobs)
    kl = ppo.experience(*arguments).info["kl"]
    assert exact > 0.05
    assert abs(float(kl.mean()) - exact) < 4 * float(kl.std()) / math.sqrt(1000)


def test_no_penalty_is_the_same_as_no_reference() -> None:
    with_reference = algorithm(kl_coef=0.0)
    without = PPO(with_reference.actor, with_reference.critic, None, with_reference.settings)
    one, other = (ppo.experience(*rows(), scores()) for ppo in (with_reference, without))
    assert torch.equal(one.advantages, other.advantages)
    assert "kl" in one.info and "kl" not in other.info


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("value_clip", [None, 0.2])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_every_setting_can_be_used(level: Any, value_clip: Any, dual_clip: Any) -> None:
    settings = PPOSettings(level=level, value_clip=value_clip, dual_clip=dual_clip, kl_coef=0.3)
    ppo = PPO(actor(0), critic(1, level=level), actor(5), settings)
    made = ppo.experience(*rows(), scores())
    metrics = trainer(ppo).training_step(made)
    assert all(math.isfinite(number) for number in metrics.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_negative_price_is_no_price(level: Any) -> None:
    """Not a reward for drifting away."""
    models = actor(0), critic(1, level=level), actor(5)
    none, negative = (PPO(*models, PPOSettings(level=level, kl_coef=price)) for price in (0.0, -0.5))
    one, other = (ppo.experience(*rows(), scores()) for ppo in (none, negative))
    assert torch.equal(one.advantages, other.advantages)
    with pytest.raises(ValueError, match="kl_coef=nan"):
        PPOSettings(kl_coef=math.nan)


def test_a_custom_stop_token_is_an_end() -> None:
    """The penalty for unfinished answers asks for the token that really stops generation, not the model's own EOS."""
    torch.manual_seed(0)
    ppo = algorithm(missing_eos_penalty=10.0, kl_coef=0.0)
    subject = trainer(ppo, reward_model=CountsToken(99), max_length=12, eos_token_id=5, pad_token_id=0)
    made = subject.collect([torch.tensor([3, 4])] * 32)
    ended = (made.sequences[:, 2:] == 5).any(1)
    assert ended.any() and not ended.all()
    assert made.action_mask[:, -1].any()  # no column beyond the longest answer
    assert made.reward.tolist() == [0.0 if end else -10.0 for end in ended]


def test_columns_that_no_answer_reaches_are_not_judged() -> None:
    class Width(CountsToken):
        def forward(self, sequences: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            widths.append(sequences.shape[1])
            return super().forward(sequences, attention_mask)

    widths: list[int] = []
    every = list(range(3, 12))  # any token but three ends an answer: all are short
    subject = trainer(algorithm(), reward_model=Width(5), max_length=60, eos_token_id=every, pad_token_id=0)
    torch.manual_seed(0)
    made = subject.collect([torch.tensor([3, 4])] * 4)
    longest = int(made.action_mask.sum(1).max())
    assert longest < 20
    assert made.sequences.shape[1] == widths[0] == 2 + longest == made.attention_mask.shape[1]
    assert made.num_actions == longest


def test_a_trained_adapter_generates_what_the_trainer_recomputes() -> None:
    torch.manual_seed(0)
    policy = actor(0, torch.float32, lora_rank=4)
    values = critic(1, torch.float32)
    engine = HFEngine(policy, tiny_tokenizer(), eos_token_ids=[EOS])
    subject = PPOTrainer(
        NaiveStrategy("cpu"), policy, values, counts_token(5), None,
        torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.02),
        torch.optim.Adam(values.parameters(), lr=0.02), train_batch_size=16, num_samples=4, engine=engine,
        sampling=SamplingParams(6, temperature=0.8), settings=PPOSettings(temperature=0.8),
    )  # fmt: skip
    history = [subject.step(prompts()) for _ in range(5)]
    assert abs(history[0]["rollout/kl"]) < 1e-4 < abs(history[-1]["rollout/kl"])
    batch = collate_rollouts(collect(prompts(), engine, counts_token(5), SamplingParams(6, temperature=0.8)))
    assert batch.logprobs is not None
    with torch.no_grad():
        again = policy(batch.sequences, batch.action_mask.shape[1], batch.attention_mask, temperature=0.8)
    kept = batch.action_mask
    torch.testing.assert_close(again[kept], batch.logprobs[kept].float(), rtol=0, atol=1e-4)


def test_an_adapter_on_the_output_head_is_not_forgotten() -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"]), model)
    torch.nn.init.normal_(model.lm_head.lora_B["default"].weight)
    ids = torch.randint(3, 32, (2, 6))
    expected = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    bare = torch.log_softmax(model.lm_head.base_layer(model.model(ids).last_hidden_state), -1)
    assert (bare[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) - expected).abs().max() > 0.1
    torch.testing.assert_close(Actor(model)(ids, 5), expected, rtol=0, atol=1e-5)


def test_the_end_is_learned_where_padding_is_the_end_token() -> None:
    model = actor(0, torch.float32)
    token_ids = torch.tensor([[3, 4, EOS, EOS, EOS], [3, 5, 6, 7, EOS]])
    attention = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss_mask = attention.clone()
    loss_mask[:, 0] = 0
    batches = [TokenBatch(token_ids, attention, loss_mask)] * 20

    def ends() -> float:
        with torch.no_grad():
            return float(model(token_ids, 4, attention)[:, [1, 3]].diagonal().exp().min())

    before = ends()
    SFTTrainer(model, NaiveStrategy("cpu"), torch.optim.Adam(model.parameters(), lr=1e-2), batches, max_epochs=1).fit()
    assert before < 0.3 and ends() > 0.6


def test_evaluation_leaves_no_trace() -> None:
    """A run that is examined on the way ends with the weights of one that is not."""
    ids = torch.randint(3, 12, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids))
    one, other = actor(), actor()
    for model, eval_batches in ((one, None), (other, [batch])):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        SFTTrainer(model, NaiveStrategy("cpu"), optimizer, [batch] * 4, eval_batches, max_epochs=1,
                   eval_interval=1 if eval_batches else None).fit()  # fmt: skip
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_nothing_but_the_trained_models_moves() -> None:
    ppo = algorithm()
    before = deepcopy(ppo.reference)
    judge = CountsToken(5)
    subject = trainer(clone(ppo), reward_model=judge)
    subject.training_step(ppo.experience(*rows(), scores()))
    reference = subject.algorithm.reference
    assert reference is not None and before is not None
    for model in (reference, judge):
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for one, other in zip(reference.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
