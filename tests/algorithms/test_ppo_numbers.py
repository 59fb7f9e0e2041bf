"""PPO on numbers worked by hand: stub models whose log-probabilities and values are given."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefero.algorithms.ppo import PPO, PPOSettings, explained_variance
from prefero.functional.kl import AdaptiveCoefficient
from prefero.types import Experience


class Given(nn.Module):
    """A model that answers with a given tensor, whatever it is asked."""

    def __init__(self, answer: Any, entropy: float = 0.5) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.as_tensor(answer, dtype=torch.float64))
        self.entropy = entropy
        self.model = nn.Identity()

    def forward(self, *_: Any, return_entropy: bool = False, **__: Any) -> Any:
        return (self.answer, torch.full_like(self.answer, self.entropy)) if return_entropy else self.answer


def make(actor: Any, critic: Any, reference: Any = None, **settings: Any) -> PPO:
    models: list[Any] = [Given(actor), Given(critic), None if reference is None else Given(reference)]
    return PPO(*models, PPOSettings(**settings))


SEQUENCES = torch.tensor([[3, 4, 5, 2], [3, 6, 2, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
ACTIONS = torch.tensor([[True, True, True], [True, True, False]])
SCORES = torch.tensor([1.0, -2.0], dtype=torch.float64)


def estimate(ppo: PPO, ended: Tensor | None = None) -> Experience:
    return ppo.experience(SEQUENCES, MASK, ACTIONS, SCORES, ended=ended)


def test_token_level_advantages_by_hand() -> None:
    logprobs = [[-1.0, -2.0, -3.0], [-1.0, -1.0, 99.0]]
    reference = [[-1.5, -1.0, -3.0], [-1.0, -2.0, -99.0]]
    values = [[0.5, 1.0, 2.0], [0.0, -1.0, 77.0]]
    made = estimate(make(logprobs, values, reference, kl_coef=0.1, gamma=1.0, lam=0.5))
    # rewards: -0.1 * (0.5, -1, 0) with +1 at the end; -0.1 * (0, 1) with -2 at the end
    # row 0: d2 = 1 - 2 = -1; d1 = .1 + 2 - 1 = 1.1; d0 = -.05 + 1 - .5 = .45
    # row 1: d1 = -2.1 + 1 = -1.1; d0 = 0 - 1 - 0 = -1
    expected = [[0.45 + 0.5 * (1.1 - 0.5), 1.1 - 0.5, -1.0], [-1.0 - 0.55, -1.1, 0.0]]
    torch.testing.assert_close(made.advantages, torch.tensor(expected, dtype=torch.float64))
    assert made.values.tolist() == [[0.5, 1.0, 2.0], [0.0, -1.0, 0.0]]
    assert made.info["kl"].tolist() == [-0.5, 1.0]
    assert made.info["length"].tolist() == [3.0, 2.0]
    assert made.reward.tolist() == [1.0, -2.0]


def test_sequence_level_is_a_bandit() -> None:
    logprobs = [[-1.0, -2.0, -3.0], [-1.0, -1.0, 99.0]]
    reference = [[-1.5, -1.0, -3.0], [-1.0, -2.0, -99.0]]
    ppo = make(logprobs, [0.25, 0.5], reference, kl_coef=0.1, level="sequence", clip_low=0.2, value_clip=None)
    made = estimate(ppo)
    expected = [1.0 + 0.05 - 0.25, -2.0 - 0.1 - 0.5]
    torch.testing.assert_close(made.advantages, torch.tensor(expected, dtype=torch.float64))
    made.action_log_probs = made.action_log_probs - math.log(1.5)
    actor, critic = ppo.losses(made, total=2.0)
    # Every ratio is 1.5: the good row is clipped at 1.2, the bad one is not. Rows count alike, whatever their length.
    assert float(actor.value.detach()) == pytest.approx((-1.2 * expected[0] - 1.5 * expected[1]) / 2)
    assert float(critic.value.detach()) == pytest.approx(0.5 * (expected[0] ** 2 + expected[1] ** 2) / 2)
    assert float(ppo.count(made)) == 2.0


def test_token_level_losses_by_hand() -> None:
    ppo = make([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], kl_coef=0.0, value_clip=0.2)
    made = Experience(
        sequences=SEQUENCES, attention_mask=MASK, action_mask=ACTIONS, reward=SCORES,
        action_log_probs=torch.tensor([[0.0, -math.log(2), math.log(2)], [-math.log(2), 0.0, 0.0]]).double(),
        advantages=torch.tensor([[1.0, 1.0, 1.0], [-1.0, 2.0, 50.0]]).double(),
        values=torch.tensor([[1.0, 0.0, 0.5], [1.0, 3.0, 0.0]]).double(),
    )  # fmt: skip
    actor, critic = ppo.losses(made, total=10.0)
    # ratios 1, 2, 1/2, 2, 1
    assert float(actor.value.detach()) == pytest.approx((-1.0 - 1.2 - 0.5 + 2.0 - 2.0) / 10)
    assert float(actor.metrics["policy/clip_fraction"]) == pytest.approx(3 / 10)
    assert float(actor.metrics["policy/approx_kl"]) == pytest.approx(3 * 0.5 * math.log(2) ** 2 / 10)
    assert float(actor.metrics["policy/ratio_max"]) == pytest.approx(2.0)
    assert float(actor.metrics["policy/entropy"]) == pytest.approx(5 * 0.5 / 10)
    # returns 2, 1, 1.5, 0, 5 against value 1; clipped to 1, .2, .7, 1, 2.8
    squares = [1.0, 0.64, 0.64, 1.0, 16.0]
    assert float(critic.value.detach()) == pytest.approx(0.5 * sum(squares) / 10)


def test_whitening_uses_every_row_of_every_batch() -> None:
    ppo = make([[0.0]], [[0.0]], kl_coef=0.0)
    parts = []
    for advantages, mask in (([[1.0, 2.0, 9.0]], [[1, 1, 0]]), ([[6.0]], [[1]])):
        tensor = torch.tensor(advantages, dtype=torch.float64)
        empty = torch.zeros(1, dtype=torch.float64)
        parts.append(Experience(torch.zeros(1, 4), tensor, tensor, empty, tensor, torch.ones(1, 4), torch.tensor(mask)))
    whitening = ppo.whitening(parts)
    assert whitening.shift == pytest.approx(3.0)
    assert 1 / whitening.scale**2 == pytest.approx((4 + 1 + 9) / 3)


def test_an_unfinished_completion_pays_and_scores_are_clipped() -> None:
    ppo = make(torch.zeros(2, 3), torch.zeros(2, 3), kl_coef=0.0, missing_eos_penalty=0.75, score_clip=1.5)
    made = estimate(ppo, ended=torch.tensor([False, True]))
    assert made.reward.tolist() == [0.25, -1.5]
    assert made.info["score"].tolist() == [1.0, -2.0]
    assert made.info["truncated"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"missing_eos_penalty.*ended"):
        estimate(ppo)


def test_the_adaptive_coefficient_moves_the_penalty() -> None:
    coefficient = AdaptiveCoefficient(0.1, target=1.0, horizon=10)
    ppo = make([[0.0, 0.0, 0.0]] * 2, torch.zeros(2, 3), [[-1.0, 0.0, 0.0]] * 2, kl_coef=coefficient, lam=1.0)
    assert float(estimate(ppo).advantages[0, 0]) == pytest.approx(1.0 - 0.1)
    ppo.adapt_kl(5.0, 5)
    assert ppo.kl_coef == pytest.approx(0.11)
    assert float(estimate(ppo).advantages[0, 0]) == pytest.approx(1.0 - 0.11)


def test_kl_is_reported_when_it_costs_nothing() -> None:
    ppo = make([[0.0, 0.0, 0.0]] * 2, torch.zeros(2, 3), [[-1.0, 0.0, 0.0]] * 2, kl_coef=0.0, lam=1.0)
    made = estimate(ppo)
    assert made.info["kl"].tolist() == [1.0, 1.0]
    assert made.advantages[0].tolist() == [1.0, 1.0, 1.0]


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0, 5.0])
    values = torch.tensor([1.0, 1.0, 4.0, 4.0])
    error = returns - values
    pieces = {"value/error": error.square(), "value/bias": error, "value/return": returns,
              "value/return_square": returns.square()}  # fmt: skip
    found = explained_variance({name: float(x.mean()) for name, x in pieces.items()})
    assert found == pytest.approx(float(1 - error.var(correction=0) / returns.var(correction=0)), rel=1e-5)
    assert explained_variance(dict.fromkeys(pieces, 0.0)) == 0.0


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0, math.nan], "row 1 is nan"), ([math.inf, 0.0], "row 0 is inf"), ([1.0], r"\(1,\) scores for 2 completions")],
)
def test_a_bad_score_stops_at_once(scores: list[float], message: str) -> None:
    ppo = make(torch.zeros(2, 3), torch.zeros(2, 3), kl_coef=0.0)
    with pytest.raises(ValueError, match=message):
        ppo.experience(SEQUENCES, MASK, ACTIONS, torch.tensor(scores))


def test_an_empty_completion_is_refused() -> None:
    ppo = make(torch.zeros(2, 3), torch.zeros(2, 3), kl_coef=0.0)
    empty = ACTIONS.clone()
    empty[1] = False
    with pytest.raises(ValueError, match="row 1 is empty"):
        ppo.experience(SEQUENCES, MASK, empty, SCORES)


def test_one_action_cannot_be_whitened() -> None:
    ppo = make(torch.zeros(1, 1), torch.zeros(1, 1), kl_coef=0.0)
    made = ppo.experience(torch.tensor([[3, 4]]), torch.ones(1, 2), torch.tensor([[True]]), torch.ones(1))
    with pytest.raises(ValueError, match="whiten_advantages"):
        ppo.whitening([made])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"level": "word"}, "level='word'"), ({"gamma": 1.5}, "gamma=1.5"), ({"lam": -0.1}, "lam=-0.1"),
        ({"clip_low": 0.0}, "clip_low"), ({"temperature": 0.0}, "temperature"), ({"dual_clip": 0.9}, "dual_clip"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"), ({"score_clip": -2.0}, "score_clip"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        PPOSettings(**settings)


def test_a_penalty_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs a reference"):
        make(torch.zeros(2, 3), torch.zeros(2, 3), kl_coef=0.1)
