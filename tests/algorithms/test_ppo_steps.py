"""PPO with scores of tokens: where they stand, what they are worth, and that one at the end is what it always was."""

import math

import pytest
import torch
from test_ppo_numbers import ACTIONS, MASK, SCORES, SEQUENCES, make

from prefero.functional import kl
from prefero.trainer.collate import score_tensor
from prefero.types import Experience, Score

LOGPROBS = [[-1.0, -2.0, -3.0], [-1.0, -1.0, 99.0]]
REFERENCE = [[-1.5, -1.0, -3.0], [-1.0, -2.0, -99.0]]
VALUES = [[0.5, 1.0, 2.0], [0.0, -1.0, 77.0]]
STEPS = torch.tensor([[2.0, -1.0, 3.0], [4.0, -6.0, math.nan]], dtype=torch.float64)


def estimate(scores: torch.Tensor, ended: torch.Tensor | None = None, **settings: object) -> Experience:
    values = [0.25, -1.0] if settings.get("level") == "sequence" else VALUES
    ppo = make(LOGPROBS, values, REFERENCE, kl_coef=0.1, gamma=1.0, lam=0.5, **settings)
    return ppo.experience(SEQUENCES, MASK, ACTIONS, scores, ended=ended)


def test_each_score_is_paid_at_its_token() -> None:
    made = estimate(STEPS)
    # rewards: -0.1 * (0.5, -1, 0) + (2, -1, 3); -0.1 * (0, 1) + (4, -6)
    # row 0: d2 = 3 - 2 = 1; d1 = .1 - 1 + 2 - 1 = .1; d0 = -.05 + 2 + 1 - .5 = 2.45
    # row 1: d1 = -6.1 + 1 = -5.1; d0 = 4 - 1 - 0 = 3
    expected = [[2.45 + 0.5 * (0.1 + 0.5), 0.1 + 0.5, 1.0], [3.0 - 2.55, -5.1, 0.0]]
    torch.testing.assert_close(made.advantages, torch.tensor(expected, dtype=torch.float64))
    assert made.reward.tolist() == made.info["score"].tolist() == [4.0, -2.0]


def test_a_score_at_the_end_is_a_score() -> None:
    at_end = torch.tensor([[0.0, 0.0, 1.0], [0.0, -2.0, math.nan]], dtype=torch.float64)
    for settings in ({}, {"score_clip": 0.5}, {"level": "sequence"}):
        one, many = (estimate(scores, **settings) for scores in (SCORES, at_end))
        for name in ("advantages", "values", "reward", "action_log_probs"):
            torch.testing.assert_close(getattr(one, name), getattr(many, name))


def test_what_clips_and_punishes_the_score_falls_on_the_last_token() -> None:
    plain = estimate(STEPS)
    ended = torch.tensor([True, False])
    punished = estimate(STEPS, ended, missing_eos_penalty=3.0, score_clip=1.0)
    assert punished.reward.tolist() == [1.0, -1.0 - 3.0]
    difference = punished.advantages - plain.advantages
    # Row 0 loses 3 at its last token, row 1 loses 2; with lam 0.5 each token before hears half.
    torch.testing.assert_close(difference, torch.tensor([[-0.75, -1.5, -3.0], [-1.0, -2.0, 0.0]], dtype=torch.float64))


def test_scores_of_another_shape_or_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each of their 3 tokens"):
        estimate(torch.zeros(2, 2, dtype=torch.float64))
    broken = STEPS.clone()
    broken[1, 0] = math.inf
    with pytest.raises(ValueError, match="the score of row 1 is inf"):
        estimate(broken)
    with pytest.raises(ValueError, match="give"):
        kl.penalised_rewards(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 3), ACTIONS, 0.1)


def test_scores_become_a_tensor_of_steps_where_there_are_any() -> None:
    plain = [Score(1.0), Score(-2.0)]
    assert score_tensor(plain, ACTIONS).tolist() == [1.0, -2.0]
    steps = [Score(4.0, {}, ((0, 2.0), (0, 1.0))), Score(-2.0)]
    assert score_tensor(steps, ACTIONS).tolist() == [[3.0, 0.0, 1.0], [0.0, -2.0, 0.0]]
