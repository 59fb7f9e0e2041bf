"""The seed's surface of the PPO trainer: its loop, its hooks, its refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_world import EOS, CountsToken, actor, algorithm, counts_token, critic, experience, prompts, trainer
from tiny import tiny_tokenizer
from torch import nn

from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.experience_maker import Experience, ExperienceMaker, NaiveExperienceMaker
from prefero.replay_buffer import NaiveReplayBuffer
from prefero.rollout.engine import SamplingParams
from prefero.rollout.hf import HFEngine
from prefero.strategies.group import Group
from prefero.strategies.naive import NaiveStrategy
from prefero.trainer import PPOTrainer, Trainer
from prefero.trainer.callbacks import Callback, PerformanceEvaluator, SaveCheckpoint
from prefero.trainer.experience import _own_draws
from prefero.trainer.update import cosine

GENERATE = {"max_length": 7, "eos_token_id": EOS, "pad_token_id": 0}


class Diary(Callback):
    def __init__(self) -> None:
        self.entries: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *arguments: self.entries.append(
                " ".join([name.removeprefix("on_"), *(str(a) for a in arguments if isinstance(a, int))])
            )
        return super().__getattribute__(name)


def ids(count: int = 8) -> list[torch.Tensor]:
    return list(torch.randint(3, 12, (count, 3), generator=torch.Generator().manual_seed(0)))


def test_every_hook_is_called_in_order() -> None:
    diary = Diary()
    subject = trainer(callbacks=[diary], experience_batch_size=2, train_batch_size=2, max_epochs=2, lr=0.0, **GENERATE)
    subject.fit(torch.stack(ids()), num_episodes=2, max_timesteps=1, update_timesteps=2)
    made = ["make_experience_start", "make_experience_end"]
    learned = [
        entry
        for epoch in range(2)
        for entry in (
            f"learn_epoch_start {epoch}", *["learn_batch_start", "learn_batch_end"] * 2, f"learn_epoch_end {epoch}"
        )
    ]  # fmt: skip
    assert diary.entries == [
        "fit_start", "episode_start 0", *made, "episode_end 0", "episode_start 1", *made, *learned, "episode_end 1",
        "fit_end",
    ]  # fmt: skip


def test_hooks_are_called_in_the_sample_mode_too() -> None:
    diary = Diary()
    subject = trainer(
        callbacks=[diary], sample_replay_buffer=True, max_epochs=2, train_batch_size=2, lr=0.0, **GENERATE
    )
    subject.step(ids())
    assert diary.entries[2:] == [
        entry
        for epoch in range(2)
        for entry in (f"learn_epoch_start {epoch}", "learn_batch_start", "learn_batch_end", f"learn_epoch_end {epoch}")
    ]


def test_timesteps_count_over_episodes_and_nothing_is_left_unlearned() -> None:
    subject = trainer(experience_batch_size=2, train_batch_size=2, lr=0.0, **GENERATE)
    held = []
    learn = subject.learn
    subject.learn = lambda: held.append(len(subject.replay_buffer)) or learn()  # type: ignore[method-assign]
    subject.fit(ids(), num_episodes=2, max_timesteps=4, update_timesteps=3)
    assert held == [6, 6, 4]
    assert len(subject.replay_buffer) == 0


def test_every_row_is_learned_from_once_an_epoch() -> None:
    subject = trainer(train_batch_size=4, max_epochs=2, lr=0.0, **GENERATE)
    seen: list[float] = []
    step = subject.training_step
    subject.training_step = lambda batch: seen.extend(batch.info["row"].tolist()) or step(batch)  # type: ignore[method-assign]
    made = subject.collect(ids(6))
    for row, item in enumerate(subject.replay_buffer.items):  # type: ignore[attr-defined]
        item.info["row"] = torch.tensor(float(row))
    subject.learn()
    assert len(made) == 6 and sorted(seen) == sorted([float(row) for row in range(6)] * 2)
    assert seen[:6] != seen[6:]


def test_training_step_returns_the_seeds_losses_and_moves_both_models() -> None:
    ppo = algorithm()
    subject = trainer(ppo, lr=0.1)
    before = ppo.actor.model.lm_head.weight.clone(), ppo.critic.value_head.weight.clone()
    metrics = subject.training_step(experience(ppo))
    assert math.isfinite(metrics["actor_loss"]) and metrics["critic_loss"] > 0
    assert not torch.equal(before[0], ppo.actor.model.lm_head.weight)
    assert not torch.equal(before[1], ppo.critic.value_head.weight)
    assert all(not p.requires_grad for p in ppo.reference.parameters())
    assert all(p.grad is None for p in ppo.reference.parameters())


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_prompts_depends_on_the_seed(seed: int) -> None:
    def asked(seed: int) -> list[list[int]]:
        subject = trainer(experience_batch_size=2, train_batch_size=2, lr=0.0, **GENERATE)
        subject.seed = seed
        rows: list[list[int]] = []
        make = subject.collect
        subject.collect = lambda batch: (rows.extend(row.tolist() for row in batch), make(batch))[1]
        subject.fit(torch.stack(ids()), num_episodes=4, max_timesteps=1, update_timesteps=1)
        return rows

    assert asked(seed) == asked(seed) != asked(seed + 1)


def test_prompts_may_be_dicts_through_a_tokenizer() -> None:
    def tokenizer(drawn: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        stacked = torch.stack(drawn)
        return {"input_ids": stacked, "attention_mask": torch.ones_like(stacked)}

    subject = trainer(tokenizer=tokenizer, experience_batch_size=3, lr=0.0, **GENERATE)
    subject.fit(ids(), num_episodes=1, max_timesteps=1, update_timesteps=1)
    made = subject.collect(ids(4))
    assert isinstance(made, Experience) and len(made) == 4 and made.sequences.shape[1] == 7
    assert torch.equal(made.info["truncated"].bool(), ~(made.sequences[:, 3:] == EOS).any(1))


def test_the_temperature_of_generation_is_that_of_every_logprob() -> None:
    ppo = algorithm()
    hot = PPOTrainer(
        NaiveStrategy("cpu"), ppo.actor, ppo.critic, CountsToken(5), ppo.reference,
        torch.optim.SGD(ppo.actor.parameters(), lr=0.0), torch.optim.SGD(ppo.critic.parameters(), lr=0.0),
        temperature=0.5, **GENERATE,
    )  # fmt: skip
    made = hot.collect(ids())
    expected = ppo.actor(made.sequences, made.num_actions, made.attention_mask, temperature=0.5)
    torch.testing.assert_close(made.action_log_probs, torch.where(made.action_mask, expected, 0.0))
    assert hot.learn()["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)


def test_the_engine_path_keeps_rollouts_and_uses_new_random_numbers_each_step() -> None:
    ppo = algorithm()
    engine = HFEngine(ppo.actor, tiny_tokenizer(), eos_token_ids=[EOS])
    updated = []
    engine.update_weights = lambda policy: updated.append(policy)  # type: ignore[method-assign]
    subject = trainer(ppo, lr=0.0, reward_model=counts_token(5), engine=engine, sampling=SamplingParams(5, seed=3),
                      num_samples=3, micro_batch_size=5)  # fmt: skip
    metrics = subject.step(prompts())
    first = subject.last_rollouts
    assert len(first) == 12 and [r.prompt.id for r in first[:4]] == ["0", "0", "0", "1"]
    scores = [float(r.completion.token_ids.count(5)) for r in first]
    assert metrics["rollout/score"] == pytest.approx(sum(scores) / 12)
    lengths = [len(r.completion.token_ids) for r in first]
    assert metrics["rollout/length"] == pytest.approx(sum(lengths) / 12)
    stopped = [r.completion.finish_reason == "stop" for r in first]
    assert metrics["rollout/truncated"] == pytest.approx(1 - sum(stopped) / 12)
    subject.step(prompts())
    assert [r.completion.token_ids for r in first] != [r.completion.token_ids for r in subject.last_rollouts]
    assert updated == [ppo.actor, ppo.actor]


def test_an_engine_may_be_scored_by_a_reward_model_over_ids() -> None:
    ppo = algorithm()
    subject = trainer(ppo, lr=0.0, engine=HFEngine(ppo.actor, tiny_tokenizer(), eos_token_ids=[EOS]),
                      sampling=SamplingParams(5), num_samples=2, micro_batch_size=3)  # fmt: skip
    made = subject.collect(prompts())
    expected = CountsToken(5)(made.sequences, made.attention_mask)
    assert torch.equal(made.info["score"], expected) and expected.any()


class Broken(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.unused = answer, nn.Parameter(torch.zeros(1))

    def forward(self, sequences: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([1.0, math.nan]), "row 1 is nan"), (None, "returned NoneType"),
        (torch.zeros(3), r"\(3,\) scores for 2 completions"),
    ],
)  # fmt: skip
def test_a_broken_reward_model_stops_at_once(answer: Any, message: str) -> None:
    subject = trainer(reward_model=Broken(answer), **GENERATE)
    with pytest.raises(ValueError, match=message):
        subject.step(ids(2))


def test_a_loss_that_is_not_finite_moves_no_weights() -> None:
    ppo = algorithm()
    subject = trainer(ppo, lr=0.1, micro_batch_size=2)
    batch = experience(ppo)
    batch.advantages[4, 0] = math.inf
    subject._whitening = subject.algorithm.whitening([experience(ppo)])
    before = {name: p.clone() for name, p in ppo.actor.named_parameters()}
    metrics = subject.training_step(batch)
    assert metrics["actor/skipped_max"] == 1
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in ppo.actor.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": PPOSettings(kl_coef=0.0), "kl_coef": 0.2}, "inside settings"),
        ({"settings": PPOSettings(temperature=0.7)}, "settings.temperature=0.7"),
        ({"settings": PPOSettings(level="sequence")}, "level"),
        ({"sampling": SamplingParams(4)}, "belong together"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"train_batch_size": 0}, "sample_batch_size=0"),
        ({"reward_model": counts_token(5)}, "engine="),
        ({"initial_model": None}, "needs a reference"),
        ({"do_sample": False}, "do_sample=False gives PPO nothing"),
        ({"num_beams": 4}, "num_beams=4 gives PPO nothing"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    policy, values = actor(), critic()
    arguments: dict[str, Any] = {
        "strategy": NaiveStrategy("cpu"), "actor": policy, "critic": values, "reward_model": CountsToken(5),
        "initial_model": actor(5), "actor_optim": torch.optim.SGD(policy.parameters(), lr=0.1),
        "critic_optim": torch.optim.SGD(values.parameters(), lr=0.1), **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        PPOTrainer(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingParams(4, greedy=True)}, "greedy"),
        ({"sampling": SamplingParams(4, temperature=0.5)}, "temperature"),
        ({"sampling": SamplingParams(4), "max_length": 9}, "max_length: with an engine"),
    ],
)
def test_contradictions_about_the_engine_are_refused(changes: dict[str, Any], message: str) -> None:
    ppo = algorithm()
    with pytest.raises(ValueError, match=message):
        trainer(ppo, engine=HFEngine(ppo.actor, tiny_tokenizer()), **changes)


def test_prompts_of_several_lengths_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="2 to 3 tokens and there is no tokenizer"):
        trainer(max_length=6).collect([torch.tensor([3, 4]), torch.tensor([3, 4, 5])])


def test_exchanged_optimizers_are_refused() -> None:
    policy, values = actor(), critic()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (values, policy)]
    with pytest.raises(ValueError, match="optimizer given for the actor"):
        PPOTrainer(NaiveStrategy("cpu"), policy, values, CountsToken(5), actor(5), *optimizers)


def test_the_actor_cannot_be_its_own_frozen_reference() -> None:
    ppo = algorithm()
    with pytest.raises(ValueError, match="deepcopy"):
        trainer(PPO(ppo.actor, ppo.critic, ppo.actor, ppo.settings))


def test_schedulers_and_the_adaptive_coefficient_move_once_a_learn_phase() -> None:
    from prefero.functional.kl import AdaptiveCoefficient

    ppo = algorithm(kl_coef=AdaptiveCoefficient(0.5, target=1e-6, horizon=80))
    subject = trainer(ppo, train_batch_size=2, max_epochs=2, **GENERATE)
    optimizer = subject.learners[0].optimizer
    subject.schedulers.append(cosine(optimizer, 4))
    metrics = subject.step(ids(8))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert metrics["policy/kl_coef"] == 0.5
    assert metrics["rollout/kl"] > 1e-5
    assert ppo.kl_coef == subject.algorithm.kl_coef == pytest.approx(0.5 * (1 + 0.2 * 8 / 80))


def test_the_seeds_maker_and_trainer_can_be_put_together_by_hand() -> None:
    ppo = algorithm()
    maker = NaiveExperienceMaker(ppo.actor, ppo.critic, CountsToken(5), ppo.reference, kl_coef=0.2)
    assert isinstance(maker, ExperienceMaker)

    class Counter(Trainer):
        def training_step(self, experience: Experience) -> dict[str, float]:
            return {"rows": float(len(experience)), "rows_max": float(len(experience))}

    subject = Counter(NaiveStrategy("cpu"), maker, NaiveReplayBuffer(4), **GENERATE)
    made = subject.collect(ids(6))
    assert made.info["kl"].abs().max() > 0
    assert subject.learn() == {"rows": 3.0, "rows_max": 4.0}


def test_save_checkpoint_writes_the_seeds_layout(tmp_path: Path) -> None:
    ppo = algorithm()
    strategy = NaiveStrategy("cpu")
    optimizer = torch.optim.Adam(ppo.actor.parameters())
    callback = SaveCheckpoint(tmp_path, 2, strategy, ppo.actor, ppo.critic, optimizer)
    subject = trainer(ppo, callbacks=[callback], experience_batch_size=2, lr=0.0, **GENERATE)
    subject.fit(ids(), num_episodes=3, max_timesteps=1, update_timesteps=1)
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    folder = "checkpoint/episode_1"
    assert files == [f"{folder}/actor-optim-rank-0.pt", f"{folder}/actor.pt", f"{folder}/critic.pt"]
    other = actor(9)
    strategy.load_model(other, tmp_path / folder / "actor.pt")
    torch.testing.assert_close(other.model.lm_head.weight, ppo.actor.model.lm_head.weight, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="interval=0"):
        SaveCheckpoint(tmp_path, 0, strategy)


def test_the_performance_evaluator_counts_the_seeds_flops(capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = PerformanceEvaluator(7, 5, 3, 2, enable_grad_checkpoint=True, ignore_episodes=1)
    subject = trainer(callbacks=[evaluator], experience_batch_size=2, train_batch_size=2, lr=0.0, **GENERATE)
    subject.fit(ids(), num_episodes=2, max_timesteps=1, update_timesteps=1)
    # One measured batch of 2 rows of 7 tokens, 4 of them generated after a prompt of 3.
    assert evaluator.making_experience.samples == evaluator.learning.samples == 2
    assert evaluator.making_experience.flops == 2 * 7 * 2 * (3 + 7 - 1) * 4 / 2 + 2 * (7 + 5 + 3 + 2) * 2 * 7
    learned = evaluator.learning.flops / (2 * (7 + 5) * 2 * 4)
    assert learned == int(learned) and 4 <= learned <= 7  # the batch is as long as its longest row
    printed = capsys.readouterr().out
    assert "Making experience throughput" in printed and "Learning throughput" in printed


def test_processes_that_are_seeded_alike_draw_numbers_of_their_own() -> None:
    def drawn(group: Group) -> tuple[float, float]:
        torch.manual_seed(7)
        with _own_draws(group):
            inside = float(torch.rand(()))
        return inside, float(torch.rand(()))

    alone, first, second = (drawn(group) for group in (Group(), Group(0, 2), Group(1, 2)))
    assert len({alone[0], first[0], second[0]}) == 3
    assert first[1] == second[1], "what they must draw alike, they still do"
    torch.manual_seed(7)
    assert alone[0] == float(torch.rand(())), "one process draws as it always did"
