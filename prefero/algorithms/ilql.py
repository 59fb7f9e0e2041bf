"""Implicit language Q-learning (ILQL): values learned from rewarded texts, to guide a policy that imitates them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefero.algorithms.base import Algorithm
from prefero.functional import ilql, masked
from prefero.models.ilql import ILQLActor
from prefero.types import Loss, TrajectoryBatch


@dataclass(frozen=True)
class ILQLSettings:
    """The numbers of ILQL (Snell et al., arXiv:2206.11871).

    tau: expectile of V: 0.5 is the mean of what was done, towards 1 the best of it. gamma: discount a token.
    awac_beta: imitation weighs tokens by exp(awac_beta * advantage); 0: all alike. cql_scale, awac_scale: weights of
    those losses beside those of Q and V. sync_rate: how far the slow copies of Q are moved towards it, every sync_every
    optimiser steps. Raises ValueError for numbers that mean nothing.
    """

    tau: float = 0.7
    gamma: float = 0.99
    awac_beta: float = 0.0
    cql_scale: float = 0.1
    awac_scale: float = 1.0
    sync_rate: float = 0.1
    sync_every: int = 1

    def __post_init__(self) -> None:
        for name, number in (("tau", self.tau), ("sync_rate", self.sync_rate)):
            if not 0.0 < number <= 1.0 or (name == "tau" and number == 1.0):
                raise ValueError(f"{name}={number} must lie between 0 and 1")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma} must lie in [0, 1]")
        for name in ("awac_beta", "cql_scale", "awac_scale"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.sync_every < 1:
            raise ValueError(f"sync_every={self.sync_every} must be 1 or more")


class ILQL(Algorithm[TrajectoryBatch]):
    """The four losses of ILQL on the actions of rewarded texts; one network, one pass."""

    def __init__(self, actor: ILQLActor, settings: ILQLSettings | None = None) -> None:
        self.actor = actor
        self.settings = settings or ILQLSettings()

    def count(self, batch: TrajectoryBatch) -> Tensor:
        """Actions; the first token of a row is chosen by nothing and never counts."""
        return batch.loss_mask[:, 1:].bool().sum().float()

    def losses(self, batch: TrajectoryBatch, total: float) -> Iterator[Loss]:
        """One loss: see `functional.ilql.losses`; sums over actions divided by `total`."""
        s, mask = self.settings, batch.loss_mask[:, 1:].bool()
        read = self.actor(batch.token_ids, mask.shape[1], batch.attention_mask, action_mask=mask, return_readings=True)
        found = ilql.losses(
            read.logprobs, read.qs, read.q_logprobs, read.target_qs, read.values, batch.rewards[:, 1:], mask,
            tau=s.tau, gamma=s.gamma, beta=s.awac_beta, cql_scale=s.cql_scale, awac_scale=s.awac_scale, norm=total,
        )  # fmt: skip
        with torch.no_grad():
            advantages = torch.minimum(*read.target_qs) - read.values
            means = {
                "value": read.values, "q": torch.minimum(*read.qs), "advantage": advantages,
                "advantage_positive": (advantages > 0).float(), "token_probability": read.logprobs.exp(),
            }  # fmt: skip
            metrics = {f"ilql/{name}": masked.aggregate(x, mask, norm=total) for name, x in means.items()}
        parts = {f"ilql/{name}_loss": getattr(found, name) for name in ("q", "v", "cql", "awac")}
        yield Loss("actor", found.total, parts | metrics)

    def stepped(self, num_steps: int) -> None:
        """After an optimiser step: moves the slow copies when it is time."""
        if num_steps % self.settings.sync_every == 0:
            self.actor.heads.sync(self.settings.sync_rate)
