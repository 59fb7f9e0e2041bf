"""What happens around PPO's loop: numbers and samples logged, the policy examined, weights kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefero.algorithms.ppo import explained_variance
from prefero.faults import fault
from prefero.functional.best_of_n import kl_bound
from prefero.models.base import Actor
from prefero.recipes.evaluation import (
    Evaluation,
    Examination,
    before_after_rows,
    kl_from_reference,
    measure,
    paired_standard_error,
)
from prefero.recipes.session import Session
from prefero.rollout.best_of_n import best_of_n
from prefero.rollout.engine import Engine
from prefero.tracking.base import sample_rows
from prefero.trainer import PPOTrainer
from prefero.trainer.base import mean_metrics
from prefero.trainer.callbacks import Callback
from prefero.trainer.state import Saved, Snapshot
from prefero.types import Experience, Metrics

_SAMPLES = 4
"""Rollouts of a training step kept in samples.jsonl."""


class Watcher(Callback):
    """Logs every iteration, examines the policy before, during and after, exports it at the end.

    trainer must be set before the loop starts (the trainer takes its callbacks first).
    """

    trainer: PPOTrainer
    before: Evaluation
    after: Evaluation

    def __init__(
        self,
        session: Session,
        examination: Examination,
        engine: Engine,
        actor: Actor,
        reference: Actor | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.session = session
        self.examination = examination
        self.engine = engine
        self.actor = actor
        self.reference = reference or actor
        self.tokenizer = tokenizer
        self.best_of: Evaluation | None = None
        self.learned: list[Metrics] = []
        self.rollout: Metrics = {}
        self.samples: list[dict[str, Any]] = []
        self.step = self.examined = 0
        self.stopped_at_kl: float | None = None

    def on_fit_start(self) -> None:
        """The policy as it comes, and best-of-n of it: what PPO has to beat."""
        self.before = self.after = self._examine(0)
        count = self.session.config.evaluate.best_of
        if count:
            exam = self.examination
            with self._sampling():
                best = best_of_n(exam.prompts, self.engine, exam.reward, count, exam.sampling, exam.group)
            self.best_of = measure(best, exam.yardsticks)

    def on_make_experience_end(self, experience: Experience) -> None:
        """Numbers of the rollouts, as the policy was when it sampled them."""
        info = {name: float(values.mean()) for name, values in experience.info.items()}
        self.rollout = {
            "rollout/reward": info["score"],
            "rollout/kl": info.get("kl", 0.0),
            "rollout/kl_coef": self.trainer.algorithm.kl_coef,
            "rollout/length": info["length"],
            "rollout/ended": 1.0 - info.get("truncated", 0.0),
        }
        for name in self.trainer.last_rollouts[0].score.parts:
            parts = [rollout.score.parts[name] for rollout in self.trainer.last_rollouts]
            self.rollout[f"rollout/reward_{name}"] = sum(parts) / len(parts)
        self.samples = sample_rows(self.trainer.last_rollouts[:_SAMPLES])
        budget = self.session.config.ppo.kl_budget
        if budget and self.rollout["rollout/kl"] > budget:
            self.trainer.should_stop = True
            self.stopped_at_kl = self.rollout["rollout/kl"]
            self.session.say(f"a KL of {self.rollout['rollout/kl']:.2f} nats is over ppo.kl_budget {budget}: PPO ends")

    def on_learn_batch_end(self, metrics: Mapping[str, float], experience: Experience) -> None:
        """Keeps the numbers of every optimizer step for the iteration's row."""
        self.learned.append(dict(metrics))

    def on_episode_end(self, episode: int) -> None:
        """One row an iteration; now and then an examination and the weights."""
        step, config = episode + 1, self.session.config.ppo
        learned = mean_metrics(self.learned)
        learned["policy/loss"], learned["value/loss"] = learned.pop("actor_loss"), learned.pop("critic_loss")
        learned["value/explained_variance"] = explained_variance(learned)
        self.learned = []
        self.session.tracker.log(self.rollout | learned, step)
        self.step = step
        if config.eval_every and step % config.eval_every == 0:
            self._examine_now()
        if config.save_every and step % config.save_every == 0 and step < config.steps:
            self.session.export(self.actor, self.session.run.checkpoints / f"step-{step:06d}", self.tokenizer)

    def on_fit_end(self) -> None:
        """The policy as it leaves."""
        if self.examined < self.step:
            self._examine_now()

    def _examine_now(self) -> None:
        self.after = self._examine(self.step)
        self.examined = self.step
        self.session.tracker.log_samples(self.samples, self.step)

    def _examine(self, step: int) -> Evaluation:
        fault("evaluate")
        with self._sampling():
            evaluation = self.examination(self.engine)
        with self.session.strategy.autocast():
            kl = kl_from_reference(evaluation.rollouts, self.reference, self.session.config.ppo.temperature)
        evaluation.metrics["eval/kl"] = sum(kl) / len(kl)
        self.session.tracker.log(evaluation.metrics, step)
        return evaluation

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """As the trainer samples: the policy whole, in the precision of the run."""
        with self.session.strategy.whole(self.actor), self.session.strategy.autocast():
            yield

    def keep(self, snapshot: Snapshot) -> None:
        """Puts the examinations and the iteration's numbers so far into a snapshot."""
        snapshot.values["watcher"] = {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "best_of": None if self.best_of is None else self.best_of.to_json(),
            "learned": self.learned,
            "rollout": self.rollout,
            "samples": self.samples,
            "step": self.step,
            "examined": self.examined,
        }

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept."""
        values = saved.values["watcher"]
        self.before, self.after = Evaluation.from_json(values["before"]), Evaluation.from_json(values["after"])
        self.best_of = None if values["best_of"] is None else Evaluation.from_json(values["best_of"])
        self.learned, self.rollout, self.samples = values["learned"], values["rollout"], values["samples"]
        self.step, self.examined = values["step"], values["examined"]

    def finish(self) -> dict[str, Any]:
        """Exports the model and writes the stage's samples and summary, which it returns."""
        self.session.export(self.actor, self.session.run.model, self.tokenizer)
        self.session.tracker.log_samples(before_after_rows(self.before, self.after), self.step)
        summary = self._summary()
        self.session.finish(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "heldout_reward_before": fmean(self.before.headline),
            "heldout_reward_after": fmean(self.after.headline),
            "heldout_reward_stderr": paired_standard_error(self.before, self.after),
            "heldout_reward_is": self.examination.yardsticks.gold_name if self.after.gold else "reward",
            "kl": self.after.metrics["eval/kl"],
            "before": self.before.metrics,
            "after": self.after.metrics,
        }
        if self.stopped_at_kl is not None:
            summary["stopped_at_kl"] = self.stopped_at_kl
        if self.best_of is not None:
            count = self.session.config.evaluate.best_of
            summary[f"best_of_{count}"] = self.best_of.metrics | {"eval/kl_bound": kl_bound(count)}
        return summary
