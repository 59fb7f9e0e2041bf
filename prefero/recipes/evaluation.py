"""Held-out evaluation: the same prompts and the same random draws for every policy, so differences are the policy's."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from prefero.functional import best_of_n, kl, masked
from prefero.models.base import Actor
from prefero.models.lora import has_lora
from prefero.models.trunk import device_of, evaluating
from prefero.rewards.base import Reward, checked_scores
from prefero.rollout.collect import collect, completion_of, score_of
from prefero.rollout.engine import Engine, SamplingParams
from prefero.strategies.group import Group
from prefero.trainer.collate import collate_rollouts
from prefero.types import Metrics, Prompt, Rollout, ScoredRollout

Judge = Callable[[str, str], bool]


@dataclass(frozen=True)
class Yardsticks:
    """What a policy is measured by besides its reward: an independent scorer, and whether an answer is on topic."""

    gold: Reward | None = None
    gold_name: str = "gold"
    on_topic: Judge | None = None


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one policy on the held-out prompts, with the answers they came from.

    headline: the gold score of each rollout where there is a gold scorer, else its reward.
    """

    metrics: Metrics
    rollouts: list[ScoredRollout]
    headline: list[float]
    gold: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain values; of a prompt only its id and text stay."""
        answers = [
            [r.prompt.id, r.prompt.text, asdict(r.completion), asdict(r.score)] for r in self.rollouts
        ]  # fmt: skip
        return {"metrics": self.metrics, "rollouts": answers, "headline": self.headline, "gold": self.gold}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave."""
        rollouts = [
            ScoredRollout(Prompt(id, (), text), completion_of(completion), score_of(score))
            for id, text, completion, score in plain["rollouts"]
        ]
        return cls(dict(plain["metrics"]), rollouts, list(plain["headline"]), list(plain["gold"]))


@dataclass(frozen=True)
class Examination:
    """The held-out prompts and everything they are judged by; the same for every policy of a run."""

    prompts: Sequence[Prompt]
    reward: Reward
    yardsticks: Yardsticks
    sampling: SamplingParams
    num_samples: int
    group: Group

    def __call__(self, engine: Engine) -> Evaluation:
        """Samples every prompt from the policy that the engine runs and measures the answers."""
        rollouts = collect(self.prompts, engine, self.reward, self.sampling, self.num_samples, self.group)
        return measure(rollouts, self.yardsticks)


def measure(rollouts: list[ScoredRollout], yardsticks: Yardsticks) -> Evaluation:
    """The numbers of rollouts already scored (section `eval/`)."""
    rewards = [rollout.score.value for rollout in rollouts]
    metrics = {
        "eval/reward": statistics.fmean(rewards),
        "eval/length": statistics.fmean(len(r.completion.token_ids) for r in rollouts),
        "eval/ended": statistics.fmean(r.completion.finish_reason == "stop" for r in rollouts),
        "eval/distinct_words": distinct_words(rollouts),
        "eval/distinct_completions": len({r.completion.text for r in rollouts}) / len(rollouts),
    }
    for name in rollouts[0].score.parts:
        metrics[f"eval/reward_{name}"] = statistics.fmean(r.score.parts[name] for r in rollouts)
    gold = [] if yardsticks.gold is None else [score.value for score in yardsticks.gold(rollouts)]
    if gold:
        metrics["eval/gold"] = statistics.fmean(gold)
    if yardsticks.on_topic is not None:
        judge = yardsticks.on_topic
        metrics["eval/on_topic"] = statistics.fmean(judge(r.prompt.text, r.completion.text) for r in rollouts)
    return Evaluation(metrics, rollouts, gold or rewards, gold)


def distinct_words(rollouts: Sequence[ScoredRollout]) -> float:
    """Different words over words, in one answer to each prompt (1 when nothing repeats).

    With several answers to each prompt it is the mean over the first answers, the second ones and so on: the ratio
    falls with the number of texts, and would otherwise depend on how many were sampled.
    """
    answered: Counter[str] = Counter()
    rounds: dict[int, list[str]] = {}
    for rollout in rollouts:
        rounds.setdefault(answered[rollout.prompt.id], []).extend(rollout.completion.text.lower().split())
        answered[rollout.prompt.id] += 1
    return statistics.fmean(len(set(words)) / len(words) if words else 0.0 for words in rounds.values())


def paired_standard_error(before: Evaluation, after: Evaluation) -> float:
    """Standard error of the mean headline difference after - before, over prompts.

    Samples of one prompt are averaged first, because they are not independent; infinite for a single prompt.
    """
    differences: dict[str, list[float]] = {}
    for old, new, rollout in zip(before.headline, after.headline, after.rollouts, strict=True):
        differences.setdefault(rollout.prompt.id, []).append(new - old)
    means = [statistics.fmean(values) for values in differences.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf


def before_after_rows(before: Evaluation, after: Evaluation, count: int = 8) -> list[dict[str, Any]]:
    """The first answers to the same prompts by both policies, as rows for the sample log."""
    rows, seen = [], set()
    for index, (old, new) in enumerate(zip(before.rollouts, after.rollouts, strict=True)):
        if old.prompt.id in seen:
            continue
        seen.add(old.prompt.id)
        row = {"prompt": old.prompt.text, "before": old.completion.text, "after": new.completion.text}
        kind = "gold" if after.gold else "reward"
        rows.append(row | {f"{kind}_before": before.headline[index], f"{kind}_after": after.headline[index]})
        if len(rows) == count:
            break
    return rows


def best_of_curve(rollouts: Sequence[ScoredRollout], yardsticks: Yardsticks, num_samples: int) -> dict[str, Metrics]:
    """What choosing the best of 1, 2, 4, ... `num_samples` would give, all estimated from the same samples.

    rollouts: `num_samples` of each prompt, side by side. Keys are best_of_1, best_of_2, ...; each has the reward of the
    chosen one, its gold score where there is a gold scorer, how far choosing moves the policy in nats by the ties among
    the samples (`eval/kl_chosen`), and the bound on that. Means over prompts.
    """
    scores = torch.tensor([rollout.score.value for rollout in rollouts], dtype=torch.float64).view(-1, num_samples)
    gold = None
    if yardsticks.gold is not None:
        judged = checked_scores(yardsticks.gold, rollouts, yardsticks.gold_name)
        gold = torch.tensor([score.value for score in judged], dtype=torch.float64).view_as(scores)
    curve: dict[str, Metrics] = {}
    for n in sorted({*(2**k for k in range(num_samples.bit_length())), num_samples}):
        metrics = {"eval/reward": float(best_of_n.expected(scores, n).mean())}
        if gold is not None:
            metrics["eval/gold"] = float(best_of_n.expected(scores, n, gold).mean())
        metrics["eval/kl_chosen"] = statistics.fmean(best_of_n.sampled_kl(row, n) for row in scores)
        metrics["eval/kl_bound"] = best_of_n.kl_bound(n)
        curve[f"best_of_{n}"] = metrics
    return curve


@torch.no_grad()
def kl_from_reference(
    rollouts: Sequence[Rollout], reference: Actor, temperature: float, batch_size: int = 64
) -> list[float]:
    """log p_policy - log p_reference summed over each completion's tokens: its mean estimates the KL in nats.

    The policy's log-probabilities are those kept when sampling. A LoRA actor is measured against itself with its
    adapters off by giving that actor; one whose adapters had learned before needs a copy from then.
    """
    differences: list[float] = []
    device = device_of(reference)
    without_adapters = has_lora(reference.model) and not reference.learned_before
    with evaluating(reference), reference.reference() if without_adapters else nullcontext():
        for start in range(0, len(rollouts), batch_size):
            batch = collate_rollouts(rollouts[start : start + batch_size], device)
            assert batch.logprobs is not None, "an engine keeps the log-probability of every token"
            theirs = reference(
                batch.sequences, batch.action_mask.shape[1], batch.attention_mask, temperature=temperature
            )
            ours = kl.estimate(batch.logprobs, theirs, kind="k1")
            differences += masked.sum(ours, batch.action_mask, dim=1).tolist()
    return differences
