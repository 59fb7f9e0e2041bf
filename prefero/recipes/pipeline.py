"""From a pretrained model to an aligned one: each stage's export is the next one's input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prefero.recipes.ppo import train_ppo
from prefero.recipes.reward import train_reward
from prefero.recipes.session import Session
from prefero.recipes.sft import train_sft
from prefero.recipes.start import adapter_of


def run_pipeline(session: Session) -> None:
    """SFT, reward model, PPO and evaluation; what a stage found out goes into the run's summary.

    The run's model is the last policy trained, or the reward model where none is.
    """
    config = session.config
    policy, reward_model = config.model.path, None
    last: Path | None = None
    summary: dict[str, Any] = {}
    if not config.sft.skip:
        if session.done("sft") is None:
            with session.stage("sft") as stage:
                train_sft(stage)
        last = _model_of(session, "sft")
        policy = str(last)
    if not config.reward.skip:
        if (found := session.done("reward")) is None:
            with session.stage("reward") as stage:
                found = train_reward(stage, policy)
        reward_model = _model_of(session, "reward")
        last = last or reward_model
        summary["rm_accuracy"] = found["reward/eval_accuracy"]
    if not config.ppo.skip:
        if (found := session.done("ppo")) is None:
            with session.stage("ppo") as stage:
                found = train_ppo(stage, policy, reward_model)
        last = _model_of(session, "ppo")
        summary = {**found, **summary}
    assert last is not None, "a config that skips every stage is refused"
    if session.strategy.is_rank_0:
        shutil.copytree(last, session.run.model, dirs_exist_ok=True)
        if (adapter := adapter_of(str(last))) is not None:
            shutil.copytree(adapter, session.run.checkpoints / "adapter", dirs_exist_ok=True)
    session.finish(summary)


def _model_of(session: Session, stage: str) -> Path:
    return session.run.checkpoints / stage / "model"


def run_sft(session: Session) -> None:
    """Stage 1 alone."""
    train_sft(session)


def run_reward(session: Session) -> None:
    """Stage 2 alone: `reward.model` or, for the backbone `policy`, `model.path`."""
    train_reward(session, session.config.model.path)


def run_ppo(session: Session) -> None:
    """Stage 3 alone: `model.path` against `ppo.rewards`."""
    train_ppo(session, session.config.model.path, None)
