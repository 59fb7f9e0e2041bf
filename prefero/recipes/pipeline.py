"""From a pretrained model to an aligned one: each stage's export is the next one's input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from prefero.recipes.ppo import train_ppo
from prefero.recipes.reward import train_reward
from prefero.recipes.session import Session
from prefero.recipes.sft import train_sft


def run_pipeline(session: Session) -> None:
    """SFT, reward model, PPO and evaluation; what a stage found out goes into the run's summary.

    The run's model is the last policy trained, or the reward model where none is.
    """
    config = session.config
    policy, reward_model = config.model.path, None
    last: Path | None = None
    summary: dict[str, Any] = {}
    if not config.sft.skip:
        with session.stage("sft") as stage:
            last = train_sft(stage)
        policy = str(last)
    if not config.reward.skip:
        with session.stage("reward") as stage:
            reward_model, metrics = train_reward(stage, policy)
        last = last or reward_model
        summary["rm_accuracy"] = metrics["reward/eval_accuracy"]
    if not config.ppo.skip:
        with session.stage("ppo") as stage:
            result = train_ppo(stage, policy, reward_model)
        last = result.model
        summary = {**result.summary, **summary}
    assert last is not None, "a config that skips every stage is refused"
    shutil.copytree(last, session.run.model, dirs_exist_ok=True)
    session.finish(summary)


def run_sft(session: Session) -> None:
    """Stage 1 alone."""
    train_sft(session)


def run_reward(session: Session) -> None:
    """Stage 2 alone: `reward.model` or, for the backbone `policy`, `model.path`."""
    train_reward(session, session.config.model.path)


def run_ppo(session: Session) -> None:
    """Stage 3 alone: `model.path` against `ppo.rewards`."""
    train_ppo(session, session.config.model.path, None)
