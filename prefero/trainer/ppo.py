"""The PPO trainer: the seed's entry point and the recipes' engine-driven loop in one class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prefero.algorithms.base import learning_mode
from prefero.algorithms.ppo import CHANGE, PPO, PPOSettings, Whitening, explained_variance
from prefero.faults import fault
from prefero.models.base import Actor, Critic
from prefero.models.shared import HydraActor
from prefero.rewards.base import Reward
from prefero.rollout.buffer import NaiveReplayBuffer
from prefero.rollout.engine import Engine, SamplingParams
from prefero.strategies.base import Strategy
from prefero.strategies.group import Group
from prefero.trainer.base import Trainer
from prefero.trainer.callbacks.base import Callback
from prefero.trainer.experience import EngineExperienceMaker, ExperienceMaker, NaiveExperienceMaker
from prefero.trainer.split import MicroBatches, MicroBatchLimit, share_experience, split_experience
from prefero.trainer.state import Saved, Snapshot, keep_learner, keep_strategy, restore_learner, restore_strategy
from prefero.trainer.update import Learner, update
from prefero.types import Experience, Metrics, ScoredRollout

_SEED_NUMBERS = {"kl_coef": 0.1, "eps_clip": 0.2, "value_clip": 0.4}


class PPOTrainer(Trainer):
    """Trains an actor and a critic with PPO.

    The first seventeen arguments are the seed's. train_batch_size: rows of an optimiser step. buffer_limit: rows
    the buffer keeps (0: all). Keyword arguments beyond them: settings replaces kl_coef, eps_clip and value_clip
    by all numbers of PPO. micro_batch_size, micro_batch_tokens: rows and tokens forwarded at once (None: all of the
    step), with no influence on the result. max_norm: gradients longer than that are shortened.
    schedulers: stepped once a learn phase.

    Without an engine, prompts are token ids (or become them through `tokenizer`), the actor generates with
    generate_kwargs, and reward_model reads token ids. With an `engine` and `sampling`, prompts are `Prompt`s, each
    answered num_samples times, and reward_model may be any `Reward` over rollouts; `last_rollouts` keeps the
    latest. The sampling temperature is used in every log-probability. max_logprob_mismatch: nats a token between the
    log-probabilities of sampler and trainer, above which training stops.

    Frozen models get no gradients, and no model has dropout. Raises ValueError for contradictory arguments.
    """

    def __init__(
        self,
        strategy: Strategy,
        actor: Actor,
        critic: Critic | HydraActor,
        reward_model: nn.Module | Reward,
        initial_model: Actor | None,
        actor_optim: Optimizer,
        critic_optim: Optimizer,
        kl_coef: float = 0.1,
        train_batch_size: int = 8,
        buffer_limit: int = 0,
        buffer_cpu_offload: bool = True,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        experience_batch_size: int = 8,
        max_epochs: int = 1,
        tokenizer: Callable[[Any], Any] | None = None,
        sample_replay_buffer: bool = False,
        dataloader_pin_memory: bool = True,
        callbacks: Sequence[Callback] = (),
        *,
        settings: PPOSettings | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        max_norm: float | None = None,
        schedulers: Sequence[LRScheduler] = (),
        engine: Engine | None = None,
        sampling: SamplingParams | None = None,
        num_samples: int = 1,
        max_logprob_mismatch: float = math.inf,
        **generate_kwargs: Any,
    ) -> None:
        if (
            settings is not None
            and {"kl_coef": kl_coef, "eps_clip": eps_clip, "value_clip": value_clip} != _SEED_NUMBERS
        ):
            raise ValueError("give kl_coef, eps_clip and value_clip inside settings=PPOSettings(...), or no settings")
        temperature = _temperature(engine, sampling, generate_kwargs)
        settings = settings or PPOSettings(
            kl_coef=kl_coef, clip_low=eps_clip, value_clip=value_clip, temperature=temperature
        )
        _check(settings, temperature, critic)
        self.limit = MicroBatchLimit(micro_batch_size, micro_batch_tokens)
        for model in (actor, critic):
            strategy.settle(model)
        _freeze(initial_model, reward_model, trained=(actor, critic))
        self.algorithm = PPO(actor, critic, initial_model, settings)
        self.engine = engine
        maker = self._maker(reward_model, sampling, num_samples, strategy.group)
        super().__init__(
            strategy, maker, NaiveReplayBuffer(train_batch_size, buffer_limit, buffer_cpu_offload),
            experience_batch_size, max_epochs, tokenizer, sample_replay_buffer, dataloader_pin_memory, callbacks,
            **generate_kwargs,
        )  # fmt: skip
        self.actor, self.critic = actor, critic
        self.learners = [Learner("actor", "actor_loss", actor, actor_optim)]
        if critic is not actor:
            self.learners.append(Learner("critic", "critic_loss", critic, critic_optim))
        _check_apart({"actor": actor, "critic": critic, "initial_model": initial_model, "reward_model": reward_model},
                     {"actor": actor_optim, "critic": critic_optim})  # fmt: skip
        self.max_norm = max_norm
        self.max_logprob_mismatch = max_logprob_mismatch
        self.schedulers = list(schedulers)
        self._whitening: Whitening | None = None

    def _maker(
        self,
        reward_model: Any,
        sampling: SamplingParams | None,
        num_samples: int,
        group: Group,
    ) -> ExperienceMaker:
        ppo = self.algorithm
        if self.engine is not None and sampling is not None:
            return EngineExperienceMaker(ppo, self.engine, reward_model, sampling, num_samples, self.limit, group)
        if isinstance(reward_model, nn.Module):
            return NaiveExperienceMaker(ppo.actor, ppo.critic, reward_model, ppo.reference, algorithm=ppo, group=group)
        raise ValueError("a reward over texts needs rollouts: give engine=... and sampling=..., or a reward model")

    @property
    def last_rollouts(self) -> list[ScoredRollout]:
        """What the engine and the reward said last; empty without an engine."""
        return self.experience_maker.last_rollouts if isinstance(self.experience_maker, EngineExperienceMaker) else []

    def step(self, prompts: Any) -> Metrics:
        """One turn of the crank: answer the prompts, learn from everything in the buffer, empty it.

        Returns the metrics of the rollouts (`rollout/...`) and of the learn phase.
        """
        self.collect(prompts)
        metrics = self.learn()
        self.replay_buffer.clear()
        return metrics

    def keep(self, snapshot: Snapshot) -> None:
        """Puts everything that training changes into a snapshot."""
        super().keep(snapshot)
        for learner in self.learners:
            keep_learner(snapshot, learner, self.strategy)
        maker = self.experience_maker
        snapshot.values["ppo"] = {
            "kl_coef": self.algorithm.kl_coef,
            "limit": vars(self.limit).copy(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "collected": maker.step if isinstance(maker, EngineExperienceMaker) else 0,
        }
        keep_strategy(snapshot, self.strategy)

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept."""
        super().restore(saved)
        for learner in self.learners:
            restore_learner(saved, learner)
        values = saved.values["ppo"]
        self.algorithm.restore_kl(values["kl_coef"])
        self._remember(MicroBatchLimit(**values["limit"]))
        for scheduler, state in zip(self.schedulers, values["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if isinstance(self.experience_maker, EngineExperienceMaker):
            self.experience_maker.step = values["collected"]
        restore_strategy(saved, self.strategy)

    def training_step(self, experience: Experience) -> Metrics:
        """One optimiser step of actor and critic; returns at least actor_loss and critic_loss.

        Advantages are whitened over the whole learn phase; outside of one, over this experience. The first of a learn
        phase, whose policy is still the one that sampled, also tells `rollout/logprob_mismatch`. Raises ValueError
        where that is above `max_logprob_mismatch`, before it has changed any weight.
        """
        whitening = self._whitening or self.algorithm.whitening([experience])
        first = self._whitening is not None and (self.cursor.epoch, self.cursor.batch) == (0, 1)
        own = share_experience(experience, self.strategy.group.share(len(experience)))
        micro_batches = MicroBatches(lambda limit: split_experience(own, limit, self.strategy.group), self.limit)
        metrics = update(
            self.strategy,
            self.learners,
            micro_batches,
            self.algorithm.count,
            lambda batch, total: self.algorithm.losses(batch, total, whitening),
            self.max_norm,
            self._check_mismatch if first else None,
        )
        self._remember(micro_batches.limit)
        return {**metrics, "rollout/logprob_mismatch": metrics[CHANGE]} if first else metrics

    def _remember(self, limit: MicroBatchLimit) -> None:
        """What one forward pass may be given from here on."""
        self.limit = limit
        if isinstance(self.experience_maker, EngineExperienceMaker):
            self.experience_maker.limit = limit

    def _check_mismatch(self, metrics: Metrics) -> None:
        mismatch = metrics[CHANGE]
        if not mismatch <= self.max_logprob_mismatch:  # or not a number
            raise ValueError(
                f"the sampler's log-probabilities are {mismatch:.3g} nats a token away from the trainer's (at most "
                f"{self.max_logprob_mismatch:g} are allowed: max_logprob_mismatch): what is learned from would be "
                "another policy's. Let both compute with the same weights and precision, or use the other engine"
            )

    def _learn(self) -> Metrics:
        buffer = self.replay_buffer
        if not len(buffer):
            raise ValueError("there is no experience to learn from: call collect(prompts) first")
        everything = buffer.collate_fn([buffer[row] for row in range(len(buffer))])
        rollout_metrics = self._rollout_metrics(everything)
        for learner in self.learners:
            learning_mode(learner.model, dropout=False)
        self._whitening = self.algorithm.whitening([everything])
        try:
            metrics = super()._learn()
        finally:
            self._whitening = None
        metrics["value/explained_variance"] = explained_variance(metrics)
        for scheduler in self.schedulers:
            scheduler.step()
        if "rollout/kl" in rollout_metrics:
            self.algorithm.adapt_kl(rollout_metrics["rollout/kl"], len(buffer))
        if self.engine is not None:
            fault("sync")
            self.engine.update_weights(self.actor)
        return {**rollout_metrics, **metrics}

    def _rollout_metrics(self, experience: Experience) -> Metrics:
        """Means over rows, with the KL coefficient these rollouts were penalised with."""
        metrics = {
            f"rollout/{name}": float(number.double().mean())
            for name, number in {**experience.info, "reward": experience.reward}.items()
        }
        squares = float(experience.info["score"].double().square().mean())
        metrics["rollout/score_std"] = max(squares - metrics["rollout/score"] ** 2, 0.0) ** 0.5
        metrics["policy/kl_coef"] = self.algorithm.kl_coef
        return metrics


def _temperature(engine: Engine | None, sampling: SamplingParams | None, generate_kwargs: dict[str, Any]) -> float:
    if (engine is None) != (sampling is None):
        raise ValueError("engine and sampling belong together: give both, or neither")
    if sampling is None:
        _refuse_searching(generate_kwargs)
        return float(generate_kwargs.get("temperature") or 1.0)
    if generate_kwargs:
        raise ValueError(
            f"{', '.join(sorted(generate_kwargs))}: with an engine, generation is set by sampling=SamplingParams(...)"
        )
    if sampling.greedy:
        raise ValueError("sampling.greedy=True gives PPO nothing to learn from: sample instead")
    return sampling.temperature


def _refuse_searching(generate_kwargs: dict[str, Any]) -> None:
    """The policy gradient is an average over the policy's own samples; a search gives something else."""
    for name, sampled in (("do_sample", True), ("num_beams", 1)):
        given = generate_kwargs.get(name, sampled)
        if given != sampled:
            raise ValueError(f"{name}={given} gives PPO nothing to learn from: it needs samples, use {name}={sampled}")


def _check(settings: PPOSettings, temperature: float, critic: nn.Module) -> None:
    if settings.temperature != temperature:
        raise ValueError(
            f"settings.temperature={settings.temperature} but sampling uses {temperature}: log-probabilities would be "
            "those of another policy; give both the same"
        )
    if isinstance(critic, HydraActor) and settings.level != "token":
        raise ValueError(f"settings.level={settings.level!r}: a hydra gives values per token only, use level='token'")
    level = getattr(critic, "level", settings.level)
    if level != settings.level:
        raise ValueError(f"settings.level={settings.level!r} but the critic's is {level!r}: build it with level=...")


def _check_apart(roles: dict[str, Any], optimizers: dict[str, Optimizer]) -> None:
    """Raises ValueError where what one role learns would move another, or a hydra's head would not learn."""
    if roles["critic"] is roles["actor"] and optimizers["critic"] is not optimizers["actor"]:
        raise ValueError("actor and critic are one network, which one optimizer learns: give it as both")
    for learner, optimizer in optimizers.items():
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        for role, model in roles.items():
            if model is roles[learner] or not isinstance(model, nn.Module):
                continue
            if any(id(parameter) in held for parameter in model.parameters()):
                raise ValueError(
                    f"the {learner}'s optimizer would also move the {role}, which holds the same parameters: copy it "
                    "(deepcopy), or freeze what they share before the roles are made"
                )


def _freeze(*models: Any, trained: Sequence[nn.Module]) -> None:
    """No gradients for what is only read, unless a trained model shares it."""
    kept = {id(parameter) for model in trained for parameter in model.parameters()}
    for model in models:
        if isinstance(model, nn.Module):
            if any(model is other for other in trained):
                raise ValueError("initial_model and reward_model must not be the actor or critic itself: deepcopy it")
            for parameter in model.parameters():
                if id(parameter) not in kept:
                    parameter.requires_grad_(False)
