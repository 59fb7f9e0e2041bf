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
    """SFT, reward model, PPO and evaluation; what a stage found out goes into the run's summary."""
    config = session.config
    policy, reward_model = config.model.path, None
    summary: dict[str, Any] = {}
    if not config.sft.skip:
        with session.stage("sft") as stage:
            policy = str(train_sft(stage))
    if not config.reward.skip:
        with session.stage("reward") as stage:
            reward_model, metrics = train_reward(stage, policy)
        summary["rm_accuracy"] = metrics["reward/eval_accuracy"]
    if config.ppo.skip:
        _export(Path(policy), session.run.model)
    else:
        with session.stage("ppo") as stage:
            result = train_ppo(stage, policy, reward_model)
        _export(result.model, session.run.model)
        summary = {**result.summary, **summary}
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


def _export(source: Path, target: Path) -> None:
    """The last stage's model is the run's model."""
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)
