"""Stage 3: PPO against a reward, with a held-out examination before, during and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefero.algorithms.ppo import PPOSettings
from prefero.config import Config, ConfigError, PPOConfig, RewardPart
from prefero.data.tokenize import TooLongError, encode_prompts
from prefero.functional.kl import AdaptiveCoefficient
from prefero.models.auto import AutoCritic
from prefero.models.base import Actor, Critic
from prefero.models.lora import has_lora
from prefero.models.shared import HydraActor, critic_on, sharing
from prefero.recipes.evaluation import Examination
from prefero.recipes.keeper import Saver
from prefero.recipes.rewards import Judging, build_part, build_reward
from prefero.recipes.session import Session, adamw, load_policy, num_parameters, schedule, set_up_machine
from prefero.recipes.sources import Sources, Split, spread
from prefero.recipes.watcher import Watcher
from prefero.rollout.engine import SamplingParams
from prefero.rollout.make import make_engine
from prefero.strategies import Strategy
from prefero.trainer import PPOTrainer
from prefero.types import Prompt


def train_ppo(session: Session, policy: str, reward_model: Path | None) -> dict[str, Any]:
    """Trains the policy at `policy` (a folder or a name) and exports it; reward_model: what `trained` means.

    Returns what the stage found out.
    """
    config, settings, keeper = session.config, session.config.ppo, session.keeper()
    strategy = session.strategy
    session.tracker.start("ppo", settings.steps)
    with strategy.model_init_context():
        kind = HydraActor if settings.backbone == "hydra" else Actor
        actor, tokenizer = load_policy(config, policy, session.sources, config.model.lora_rank, kind)
        critic = make_critic(config, policy, actor)
    set_up_machine(num_parameters(actor), config.strategy.threads)
    # Without its adapters an actor is what it was, unless these had learned before.
    reference = None if has_lora(actor.model) and not actor.learned_before else frozen_copy(actor)
    backbone = None if settings.backbone == "separate" else (actor, session.say)
    examination = make_examination(config, session.sources, tokenizer, reward_model, strategy, backbone)

    actor_optim = adamw(config, actor, settings.learning_rate, head_rate=settings.critic_learning_rate)
    critic_optim = actor_optim if critic is actor else adamw(config, critic, settings.critic_learning_rate)
    learners: list[Any] = [(actor, actor_optim)]
    if critic is not actor:
        learners.append((critic, critic_optim))
    strategy.prepare(*learners, *([reference] if reference else []))
    engine = make_engine(actor, tokenizer, config.engine, session.say)
    silent = {actor_optim: settings.critic_warmup}
    schedulers = [
        schedule(optimizer, settings.schedule, settings.steps, settings.warmup_fraction, silent.get(optimizer, 0))
        for _, optimizer in learners
    ]
    watcher, saver = Watcher(session, examination, engine, actor, reference, tokenizer), Saver(keeper)
    trainer = PPOTrainer(
        strategy,
        actor,
        critic,
        examination.reward,
        reference,
        actor_optim,
        critic_optim,
        train_batch_size=settings.train_batch_size,
        experience_batch_size=settings.prompts_per_step,
        max_epochs=settings.max_epochs,
        callbacks=[watcher, saver],
        settings=ppo_settings(settings),
        micro_batch_size=settings.micro_batch_size or None,
        micro_batch_tokens=settings.micro_batch_tokens or None,
        engine=engine,
        sampling=sampling_params(config),
        num_samples=settings.num_samples,
        max_logprob_mismatch=settings.max_logprob_mismatch,
        schedulers=schedulers,
    )
    watcher.trainer = trainer
    trainer.shows_progress = False
    prompts = load_prompts(config, session.sources, tokenizer, "train")
    keeper.watch(trainer, watcher, saver)
    trainer.fit(prompts, num_episodes=settings.steps, max_timesteps=1, update_timesteps=1)
    keeper.checkpoints.wait()
    return watcher.finish()


def make_critic(config: Config, policy: str, actor: Actor) -> Critic | HydraActor:
    """A critic like the policy (or its first `ppo.critic_layers` layers), with a head that starts at zero.

    policy: where it is read from; actor: what it shares weights with, or is itself, where `ppo.backbone` says so.
    """
    num_layers = config.ppo.critic_layers or None
    if isinstance(actor, HydraActor):
        return actor
    if config.ppo.backbone == "shared":
        return critic_on(actor, config.model.lora_rank, num_layers, config.ppo.level)
    return AutoCritic(
        pretrained=policy,
        num_layers=num_layers,
        level=config.ppo.level,
        checkpoint=config.model.gradient_checkpointing,
        trust_remote_code=config.model.trust_remote_code,
    )


def frozen_copy(actor: Actor) -> Actor:
    """The reference: what the actor is now, never to change; what is frozen in the actor is not copied."""
    reference = sharing(actor)
    reference.requires_grad_(False)
    reference.eval()
    return reference


def ppo_settings(c: PPOConfig) -> PPOSettings:
    """The algorithm's numbers from the config's."""
    adaptive = AdaptiveCoefficient(c.kl_coef, c.kl_target, c.kl_horizon) if c.kl_target else None
    return PPOSettings(
        level=c.level,
        kl_coef=adaptive or c.kl_coef,
        gamma=c.gamma,
        lam=c.lam,
        clip_low=c.clip,
        clip_high=c.clip_high or None,
        dual_clip=c.dual_clip or None,
        value_clip=c.value_clip,
        whiten_advantages=c.whiten_advantages,
        temperature=c.temperature,
        missing_eos_penalty=c.missing_eos_penalty,
        value_coef=c.value_coef,
    )


def sampling_params(config: Config) -> SamplingParams:
    """How completions are drawn while training."""
    c = config.ppo
    return SamplingParams(
        max_new_tokens=c.max_new_tokens, min_new_tokens=c.min_new_tokens, temperature=c.temperature, seed=config.seed
    )


def load_prompts(config: Config, sources: Sources, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[Prompt]:
    """The split's prompts as token ids, each with its own id."""
    data, rows = config.data, sources.prompts(split)
    try:
        prompts = encode_prompts(
            tokenizer, rows, max_length=data.max_prompt_length, truncate=data.truncate, chat=data.chat
        )
    except TooLongError as error:
        raise ConfigError(f"{error} (the keys data.max_prompt_length and data.truncate)") from None
    return [replace(prompt, id=f"{split}/{prompt.id}") for prompt in prompts]


def make_examination(
    config: Config,
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: Path | None,
    strategy: Strategy,
    backbone: tuple[Actor, Callable[[str], None]] | None = None,
) -> Examination:
    """The held-out prompts with the run's reward and its independent scorer.

    backbone: a policy that the reward may share weights with, and who hears where it cannot.
    """
    how = Judging(strategy, reward_model, config.reward.max_length, config.evaluate.batch_size, tokenizer=tokenizer)
    yardsticks = sources.yardsticks()
    if config.evaluate.gold:
        gold = build_part("gold", RewardPart(use=config.evaluate.gold), how, "evaluate.gold")
        yardsticks = replace(yardsticks, gold=gold, gold_name=config.evaluate.gold)
    return Examination(
        prompts=spread(load_prompts(config, sources, tokenizer, "heldout"), config.evaluate.num_prompts),
        reward=build_reward(
            config.ppo.rewards, replace(how, backbone=backbone[0], say=backbone[1]) if backbone else how
        ),
        yardsticks=yardsticks,
        # A seed of its own: the examination's draws are never those of a training step.
        sampling=replace(sampling_params(config), seed=config.seed + 1_000_003),
        num_samples=config.evaluate.num_samples,
        group=strategy.group,
    )
