"""Who turns prompts into experience: through the actor's own `generate`, or through an engine and a reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prefero.algorithms.base import OnlineAlgorithm
from prefero.algorithms.ppo import PPO, PPOSettings
from prefero.faults import fault
from prefero.models.base import Actor, Critic
from prefero.models.generation import eos_ids
from prefero.models.shared import HydraActor
from prefero.models.trunk import device_of, evaluating
from prefero.rewards.base import Reward
from prefero.rollout.buffer import make_experience_batch, split_experience_batch
from prefero.rollout.collect import collect
from prefero.rollout.engine import Engine, SamplingParams
from prefero.strategies.group import ALONE, Group
from prefero.trainer.collate import collate_rollouts, score_tensor
from prefero.trainer.gather import gather_experience
from prefero.trainer.split import NO_LIMIT, MicroBatchLimit
from prefero.types import Experience, Prompt, Rollout, Score, ScoredRollout

RolloutT = TypeVar("RolloutT", bound=Rollout)


class ExperienceMaker(ABC):
    """Makes experience with four models: the actor answers, the reward model scores, critic and reference judge."""

    def __init__(
        self,
        actor: Actor,
        critic: Critic | HydraActor,
        reward_model: Any,
        initial_model: Actor | None,
        kl_coef: float = 0.1,
        group: Group = ALONE,
    ) -> None:
        self.actor = actor
        self.critic = critic
        self.reward_model = reward_model
        self.initial_model = initial_model
        self.kl_coef = kl_coef
        self.group = group

    @abstractmethod
    def make_experience(self, input_ids: Any, **generate_kwargs: Any) -> Experience:
        """Experience from prompts, the same for all processes of `group`: each makes its share of the rows."""


class NaiveExperienceMaker(ExperienceMaker):
    """Generates with the actor itself.

    algorithm: what estimates advantages; PPO with default settings, `kl_coef` and the temperature in the generation
    arguments when None.
    """

    def __init__(
        self,
        actor: Actor,
        critic: Critic | HydraActor,
        reward_model: nn.Module,
        initial_model: Actor | None,
        kl_coef: float = 0.1,
        algorithm: OnlineAlgorithm | None = None,
        group: Group = ALONE,
    ) -> None:
        super().__init__(actor, critic, reward_model, initial_model, kl_coef, group)
        self.algorithm = algorithm

    @torch.no_grad()
    def make_experience(self, input_ids: Tensor, **generate_kwargs: Any) -> Experience:
        """Answers the prompts input_ids [B, P] (padded on the left; pass attention_mask) and judges the answers."""
        temperature = float(generate_kwargs.get("temperature") or 1.0)
        settings = PPOSettings(kl_coef=self.kl_coef, temperature=temperature)
        algorithm = self.algorithm or PPO(self.actor, self.critic, self.initial_model, settings)
        share = self.group.share(len(input_ids))
        if self.group.world_size > 1:
            generate_kwargs = {
                name: value[share.rows] if isinstance(value, Tensor) and len(value) == len(input_ids) else value
                for name, value in generate_kwargs.items()
            }
            input_ids = input_ids[share.rows]
        with evaluating(self.actor, self.critic, self.reward_model, self.initial_model):
            with _own_draws(self.group):
                sequences, attention_mask, action_mask = self.actor.generate(
                    input_ids, return_action_mask=True, **generate_kwargs
                )
            # Generation fills up to max_length; nobody needs to judge columns that no answer reaches.
            width = sequences.shape[1] - action_mask.shape[1] + int(action_mask.sum(1).max())
            sequences, attention_mask = sequences[:, :width], attention_mask[:, :width]
            action_mask = action_mask[:, : width - input_ids.shape[1]]
            scores = self.reward_model(sequences, attention_mask)
            ended = _ended(sequences, action_mask, eos_ids(self.actor.model, generate_kwargs.get("eos_token_id")))
            part = algorithm.experience(sequences, attention_mask, action_mask, checked(scores), ended=ended)
        return gather_experience(self.group, part, share.num_real)


@contextmanager
def _own_draws(group: Group) -> Iterator[None]:
    """Inside, each of several processes draws numbers of its own: all are seeded alike, but their rows differ."""
    if group.world_size == 1:
        yield
        return
    number = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([group.device] if group.device.type == "cuda" else []):
        torch.manual_seed(number + group.rank)
        yield


def checked(scores: Any) -> Tensor:
    """The scores of a reward model, which must be a tensor of numbers."""
    if not isinstance(scores, Tensor):
        raise ValueError(f"the reward model returned {type(scores).__name__}, not a tensor with one score a completion")
    return scores.float() if not scores.is_floating_point() else scores


def _ended(sequences: Tensor, action_mask: Tensor, eos_token_ids: list[int]) -> Tensor | None:
    if not eos_token_ids:
        return None
    actions = sequences[:, -action_mask.shape[1] :]
    last = (action_mask.long().sum(1) - 1).clamp(min=0)
    token = actions.gather(1, last[:, None]).squeeze(1)
    return torch.isin(token, torch.tensor(eos_token_ids, device=token.device))


class EngineExperienceMaker(ExperienceMaker):
    """Generates with an engine and scores with any reward.

    reward_model: a `Reward` over rollouts, or a reward model that reads the policy's own token ids. num_samples:
    completions a prompt. limit: what is judged at a time. After `make_experience`,
    `last_rollouts` holds what happened, in the order of the experience's rows.
    """

    def __init__(
        self,
        algorithm: PPO,
        engine: Engine,
        reward_model: Reward | nn.Module,
        sampling: SamplingParams,
        num_samples: int = 1,
        limit: MicroBatchLimit = NO_LIMIT,
        group: Group = ALONE,
    ) -> None:
        super().__init__(algorithm.actor, algorithm.critic, reward_model, algorithm.reference, algorithm.kl_coef, group)
        self.algorithm = algorithm
        self.engine = engine
        self.sampling = sampling
        self.num_samples = num_samples
        self.limit = limit
        self.step = 0
        self.last_rollouts: list[ScoredRollout] = []

    @torch.no_grad()
    def make_experience(self, input_ids: Sequence[Prompt], **generate_kwargs: Any) -> Experience:
        """Answers the prompts and judges the answers; the random numbers depend on the count of earlier calls."""
        assert not generate_kwargs, "generation through an engine is set by SamplingParams"
        params = replace(self.sampling, step=self.sampling.step + self.step)
        self.step += 1
        by_model = isinstance(self.reward_model, nn.Module)
        with evaluating(self.actor):
            reward = self._score_ids if by_model else self.reward_model
            self.last_rollouts = collect(
                input_ids, self.engine, reward, params, self.num_samples, self.group, in_step=by_model
            )
        fault("judge")
        share = self.group.share(len(self.last_rollouts))
        rollouts = [self.last_rollouts[row] for row in share.rows]
        parts = [self._judge(part) for part in self._micro_batches(rollouts)]
        if len(parts) > 1:
            parts = [make_experience_batch([item for part in parts for item in split_experience_batch(part)])]
        return gather_experience(self.group, parts[0], share.num_real)

    def _micro_batches(self, rollouts: Sequence[RolloutT]) -> Iterator[Sequence[RolloutT]]:
        """What is judged at a time."""
        lengths = torch.tensor([len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rollouts])
        return (rollouts[rows] for rows in self.limit.slices(lengths, group=self.group))

    def _judge(self, rollouts: Sequence[ScoredRollout]) -> Experience:
        device = device_of(self.actor)
        batch = collate_rollouts(rollouts, device)
        scores = score_tensor([rollout.score for rollout in rollouts], batch.action_mask)
        return self.algorithm.experience(
            batch.sequences, batch.attention_mask, batch.action_mask, scores, batch.logprobs, batch.ended
        )

    def _score_ids(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Scores of a reward model that reads the policy's own token ids."""
        model = self.reward_model
        scores: list[Score] = []
        with evaluating(model):
            for part in self._micro_batches(rollouts):
                batch = collate_rollouts(part, device_of(model))
                scores.extend(Score(float(score)) for score in checked(model(batch.sequences, batch.attention_mask)))
        return scores
