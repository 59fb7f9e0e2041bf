"""Proximal policy optimisation with a critic, per token (Ziegler et al., arXiv:1909.08593) or per sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefero.algorithms.base import OnlineAlgorithm
from prefero.functional import advantages as advantage_formulas
from prefero.functional import kl as kl_formulas
from prefero.functional import masked, policy, value
from prefero.models.base import Actor, Critic
from prefero.models.lora import has_lora
from prefero.models.shared import HydraActor
from prefero.models.trunk import evaluating
from prefero.types import Experience, Loss


@dataclass(frozen=True)
class PPOSettings:
    """The numbers of PPO.

    level: "token" is GAE with a value and a KL penalty per token; "sequence" treats the completion as one action
    with one value (a bandit), advantage = score - kl_coef * KL - value. kl_coef: weight of the KL penalty in the
    reward, a number or an adaptive controller; 0 switches it off. The penalty is the plain log-ratio (k1): of
    the estimators only that one, taken from the reward, has the gradient of the KL. gamma, lam: of GAE.
    clip_low, clip_high: the ratio stays in [1 - clip_low, 1 + clip_high] (clip_high defaults to clip_low).
    dual_clip: bound on the loss of negative advantages. value_clip: how far a value may move (None: anywhere).
    whiten_advantages: to mean 0 and variance 1 over the whole learn phase. temperature: the sampling temperature,
    used in every log-probability. missing_eos_penalty: subtracted from the score of completions that did not end.
    score_clip: scores are clamped to [-score_clip, score_clip]. value_coef: weight of the value loss where one network
    is actor and critic (`HydraActor`).
    """

    level: Literal["token", "sequence"] = "token"
    kl_coef: float | kl_formulas.AdaptiveCoefficient = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    whiten_advantages: bool = True
    temperature: float = 1.0
    missing_eos_penalty: float = 0.0
    score_clip: float | None = None
    value_coef: float = 0.1

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level={self.level!r} is unknown: use 'token' or 'sequence'")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("clip_low", "clip_high", "value_clip", "score_clip", "temperature", "value_coef"):
            number = getattr(self, name)
            if number is not None and not number > 0.0:
                raise ValueError(f"{name}={number} must be positive")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(
                f"dual_clip={self.dual_clip} must be greater than 1 (3 is usual), or None to switch it off"
            )
        if not isinstance(self.kl_coef, kl_formulas.AdaptiveCoefficient) and math.isnan(self.kl_coef):
            raise ValueError(f"kl_coef={self.kl_coef} is no number: give 0 or less for no penalty, or a price per nat")
        if self.missing_eos_penalty < 0.0:
            raise ValueError(f"missing_eos_penalty={self.missing_eos_penalty} is subtracted: give it as 0 or more")


@dataclass(frozen=True)
class Whitening:
    """(x - shift) * scale: the same for every minibatch of a learn phase."""

    shift: float = 0.0
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.scale


NO_WHITENING = Whitening()
CHANGE = "policy/logprob_change"
"""The metric that says how far, in nats a token, log-probabilities are from those that were sampled with."""


class PPO(OnlineAlgorithm):
    """PPO over an actor and a critic, which may be one network: the same `HydraActor` given as both.

    reference: the model the KL penalty is measured against. Without one, an actor with LoRA is its own reference
    (adapters off), and any other actor needs kl_coef=0.
    """

    def __init__(
        self,
        actor: Actor,
        critic: Critic | HydraActor,
        reference: Actor | None = None,
        settings: PPOSettings | None = None,
    ) -> None:
        if isinstance(critic, HydraActor) and critic is not actor:
            raise ValueError("the critic is a HydraActor, but not the actor itself: give one network as both")
        self.actor = actor
        self.critic = critic
        self.reference = reference
        self.settings = settings or PPOSettings()
        if self.kl_coef > 0.0 and not self.has_reference:
            raise ValueError(
                f"kl_coef={self.kl_coef} needs a reference model: give one, use a LoRA actor (it is its own "
                "reference with the adapters off), or set kl_coef=0"
            )

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty now; 0 or less in the settings is no penalty."""
        coefficient = self.settings.kl_coef
        now = coefficient.value if isinstance(coefficient, kl_formulas.AdaptiveCoefficient) else coefficient
        return max(now, 0.0)  # a negative price would reward drifting away

    @property
    def has_reference(self) -> bool:
        """Whether there is something to measure the KL against."""
        return self.reference is not None or has_lora(self.actor.model)

    def adapt_kl(self, mean_kl: float, num_samples: int) -> None:
        """Moves an adaptive KL coefficient by what was observed; a fixed one stays."""
        if isinstance(self.settings.kl_coef, kl_formulas.AdaptiveCoefficient):
            self.settings.kl_coef.update(mean_kl, num_samples)

    def restore_kl(self, coefficient: float) -> None:
        """Puts an adaptive KL coefficient back to where it stood; a fixed one is what the settings say."""
        if isinstance(self.settings.kl_coef, kl_formulas.AdaptiveCoefficient):
            self.settings.kl_coef.value = coefficient

    def count(self, batch: Experience) -> Tensor:
        """Action tokens at the token level, rows that have any at the sequence level."""
        if self.settings.level == "sequence":
            return batch.action_mask.any(dim=1).sum().float()
        return batch.action_mask.sum().float()

    @torch.no_grad()
    def experience(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor,
        scores: Tensor,
        old_logprobs: Tensor | None = None,
        ended: Tensor | None = None,
    ) -> Experience:
        """Values, log-probabilities, penalised rewards and advantages of rollouts.

        sequences, attention_mask: [B, S]; action_mask: [B, A], the last A columns; scores: [B], or [B, A] where tokens
        have scores of their own (process rewards), whose sum is then the row's score. old_logprobs:
        [B, A] at the settings' temperature, where the sampler kept them (saves a forward). ended: [B], true where
        the completion ended with EOS; needed for the missing-EOS penalty. Raises ValueError naming the row for a
        completion without tokens or a score that is not finite.
        """
        mask = action_mask.bool()
        _refuse_bad_rows(mask, scores)
        per_token = scores if scores.dim() == 2 else None
        scores = scores if per_token is None else masked.sum(per_token, mask, dim=1)
        with evaluating(self.actor, self.critic, self.reference):
            if isinstance(self.critic, HydraActor):
                values = self.critic.values(sequences, mask, attention_mask)
            else:
                values = self.critic(sequences, mask, attention_mask)
            if old_logprobs is None:
                old_logprobs = self._logprobs(self.actor, sequences, mask, attention_mask)
            reference_logprobs = self._reference_logprobs(sequences, mask, attention_mask)
        # A sampler's own may come with more digits than the models compute with.
        old_logprobs = old_logprobs.to(values.dtype)
        old_logprobs = masked.fill(old_logprobs, mask)
        info = {"score": scores.to(old_logprobs.dtype), "length": mask.sum(1).to(old_logprobs.dtype)}
        if reference_logprobs is not None:
            info["kl"] = masked.sum(kl_formulas.estimate(old_logprobs, reference_logprobs, kind="k1"), mask, dim=1)
        if ended is not None:
            info["truncated"] = (~ended.bool()).to(old_logprobs.dtype)
        reward = self._final_score(info["score"], ended)
        values, advantages = self._advantages(reward, old_logprobs, reference_logprobs, values, mask, per_token)
        return Experience(
            sequences=sequences,
            action_log_probs=old_logprobs,
            values=values,
            reward=reward,
            advantages=advantages,
            attention_mask=attention_mask,
            action_mask=mask,
            info=info,
        )

    def _logprobs(self, model: Actor, sequences: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
        logprobs: Tensor = model(
            sequences, mask.shape[1], attention_mask, temperature=self.settings.temperature, action_mask=mask
        )
        return logprobs

    def _reference_logprobs(self, sequences: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Also computed when kl_coef is 0, because how far the policy drifted is worth knowing then most of all."""
        if self.reference is not None:
            logprobs = self._logprobs(self.reference, sequences, mask, attention_mask)
        elif has_lora(self.actor.model):
            with self.actor.reference():
                logprobs = self._logprobs(self.actor, sequences, mask, attention_mask)
        else:
            return None
        return masked.fill(logprobs, mask)

    def _final_score(self, scores: Tensor, ended: Tensor | None) -> Tensor:
        settings = self.settings
        if settings.score_clip is not None:
            scores = scores.clamp(-settings.score_clip, settings.score_clip)
        if settings.missing_eos_penalty > 0.0:
            if ended is None:
                raise ValueError(
                    f"missing_eos_penalty={settings.missing_eos_penalty} needs to know which completions ended: "
                    "pass `ended` (the trainer does when it knows the EOS token, e.g. eos_token_id=...)"
                )
            scores = scores - settings.missing_eos_penalty * (~ended.bool()).to(scores.dtype)
        return scores

    def _advantages(
        self,
        reward: Tensor,
        logprobs: Tensor,
        reference: Tensor | None,
        values: Tensor,
        mask: Tensor,
        per_token: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Values with zeros behind the mask, and raw advantages: both [B, A], or [B] at the sequence level.

        per_token: scores that tokens have of their own; what the row's reward has beyond their sum is its last token's.
        """
        settings = self.settings
        coefficient = self.kl_coef if reference is not None else 0.0
        reference = logprobs if reference is None else reference
        if settings.level == "sequence":
            penalty = masked.sum(kl_formulas.estimate(logprobs, reference, kind="k1"), mask, dim=1)
            return values, reward - coefficient * penalty - values
        values = masked.fill(values, mask)
        if per_token is not None:
            per_token = masked.fill(per_token.to(reward.dtype), mask)
            rest = reward - per_token.sum(dim=1)  # what clipping and a missing EOS have changed
            reward = per_token + masked.fill(rest[:, None].expand_as(per_token), kl_formulas.last_actions(mask))
        rewards = kl_formulas.penalised_rewards(reward, logprobs, reference, mask, coefficient)
        advantages, _ = advantage_formulas.gae(rewards, values, mask, settings.gamma, settings.lam)
        return values, advantages

    def whitening(self, experiences: Sequence[Experience]) -> Whitening:
        """The shift and scale that whiten the advantages of all these experiences together.

        The variance is the biased one. Raises ValueError when there are fewer than two units.
        """
        if not self.settings.whiten_advantages:
            return NO_WHITENING
        kept = torch.cat([self._kept_advantages(experience) for experience in experiences])
        if len(kept) < 2:
            raise ValueError(
                "whiten_advantages needs two or more actions to learn from: collect more rollouts or "
                "set whiten_advantages=False"
            )
        shift = float(kept.mean())
        variance = float((kept - shift).square().mean())
        return Whitening(shift, 1.0 / math.sqrt(variance + 1e-8))

    def _kept_advantages(self, experience: Experience) -> Tensor:
        if self.settings.level == "sequence":
            return experience.advantages
        return experience.advantages[experience.action_mask.bool()]

    def losses(self, batch: Experience, total: float, whitening: Whitening = NO_WHITENING) -> Iterator[Loss]:
        """The actor's loss, then the critic's; each a sum over the batch divided by `total`.

        Where one network is both, one loss from one forward pass: the actor's + value_coef * the critic's.
        """
        if isinstance(self.critic, HydraActor):
            logprobs, entropy, values = self._read(batch, return_values=True)
            policy_loss = self._actor_loss(batch, total, whitening, logprobs, entropy)
            value_loss = self._critic_loss(batch, total, values)
            apart = {"actor_loss": policy_loss.value.detach(), "critic_loss": value_loss.value.detach()}
            joint = policy_loss.value + self.settings.value_coef * value_loss.value
            yield Loss("actor", joint, apart | policy_loss.metrics | value_loss.metrics)
        else:
            yield self._actor_loss(batch, total, whitening, *self._read(batch))
            values = self.critic(batch.sequences, batch.action_mask.bool(), batch.attention_mask)
            yield self._critic_loss(batch, total, values)

    def _read(self, batch: Experience, **also: bool) -> tuple[Tensor, ...]:
        read: tuple[Tensor, ...] = self.actor(
            batch.sequences, batch.num_actions, batch.attention_mask, temperature=self.settings.temperature,
            return_entropy=True, action_mask=batch.action_mask.bool(), **also,
        )  # fmt: skip
        return read

    def _actor_loss(
        self, batch: Experience, total: float, whitening: Whitening, logprobs: Tensor, entropy: Tensor
    ) -> Loss:
        settings = self.settings
        mask = batch.action_mask.bool()
        old_logprobs = masked.fill(batch.action_log_probs, mask)
        advantages = whitening(batch.advantages)
        if settings.level == "sequence":
            advantages = advantages[:, None].expand_as(logprobs)
        clip_high = settings.clip_low if settings.clip_high is None else settings.clip_high
        per_token = policy.ppo_clip(
            masked.fill(logprobs, mask), old_logprobs, masked.fill(advantages, mask),
            settings.clip_low, clip_high, dual_clip=settings.dual_clip,
        )  # fmt: skip
        clip_fraction, approx_kl = policy.ppo_clip_stats(
            logprobs, old_logprobs, mask, settings.clip_low, clip_high, norm=total, how=self._how
        )
        with torch.no_grad():
            metrics = {
                "policy/clip_fraction": clip_fraction,
                "policy/approx_kl": approx_kl,
                "policy/entropy": self._average(entropy, mask, total),
                CHANGE: self._average((masked.fill(logprobs, mask) - old_logprobs).abs(), mask, total),
                "policy/ratio_max": (masked.fill(logprobs, mask) - old_logprobs).max().exp(),
            }
        return Loss("actor", self._average(per_token, mask, total), metrics)

    def _average(self, per_token: Tensor, mask: Tensor, total: float) -> Tensor:
        """Sum over tokens / total tokens; at the sequence level sum of the rows' token means / total rows."""
        return masked.aggregate(per_token, mask, how=self._how, norm=total)

    @property
    def _how(self) -> str:
        return "sequence_mean" if self.settings.level == "sequence" else "token_mean"

    def _critic_loss(self, batch: Experience, total: float, values: Tensor) -> Loss:
        mask = batch.action_mask.bool()
        kept = mask.any(dim=1) if self.settings.level == "sequence" else mask
        values = masked.fill(values, kept)
        old_values = masked.fill(batch.values, kept)
        returns = old_values + masked.fill(batch.advantages, kept)
        clip = math.inf if self.settings.value_clip is None else self.settings.value_clip
        loss = masked.aggregate(value.clipped(values, old_values, returns, clip), kept, norm=total)
        with torch.no_grad():
            error = returns - values
            sums = {
                "value/error": error.square(), "value/bias": error, "value/return": returns,
                "value/return_square": returns.square(),
            }  # fmt: skip
            metrics = {name: masked.aggregate(x, kept, norm=total) for name, x in sums.items()}
        return Loss("critic", loss, metrics)


def explained_variance(metrics: dict[str, float]) -> float:
    """1 - Var(return - value) / Var(return), from the critic's metrics; 0 where the returns do not vary."""
    variance = metrics["value/return_square"] - metrics["value/return"] ** 2
    if variance <= 1e-12:
        return 0.0
    return 1.0 - (metrics["value/error"] - metrics["value/bias"] ** 2) / variance


def _refuse_bad_rows(mask: Tensor, scores: Tensor) -> None:
    """Stops at once for what would silently poison an update."""
    if scores.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"the reward gave {tuple(scores.shape)} scores for {mask.shape[0]} completions: one number each is needed, "
            f"or one for each of their {mask.shape[1]} tokens"
        )
    bad = (~torch.isfinite(masked.fill(scores, mask) if scores.dim() == 2 else scores)).nonzero().tolist()
    if bad:
        value = float(scores[tuple(bad[0])])
        raise ValueError(f"the score of row {bad[0][0]} is {value}: a reward must be a finite number")
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the completion of row {empty[0]} is empty: generate at least one token (EOS counts)")
