"""Losses that turn preferences straight into a policy: DPO and its variants, KTO, ORPO, SimPO, CPO.

All speak of whole completions: a log-probability is that of a completion given its prompt, summed over its tokens or
averaged over them, as each loss says. They return one loss a pair (or a row), so that the caller divides their sum by
what the whole optimizer step counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from prefero.functional import _checks


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """DPO's loss of each pair, by its kind; h is the difference of log(policy / reference) of chosen and rejected.

    All tensors: [N]; log-probabilities are summed over the completion's tokens, `*_lengths` count those ("ipo_mean"
    only). Returns [N]; the references get no gradient. `kind`:
    - "sigmoid": -log sigmoid(beta h) (arXiv:2305.18290, eq. 7);
    - "cdpo": the same where a share `label_smoothing` of the labels is wrong, -(1-e) log sigmoid(beta h) - e log
      sigmoid(-beta h) (Mitchell 2023); "sigmoid" with label_smoothing is this too;
    - "robust": the unbiased form of that (arXiv:2403.00409, eq. 11), which needs label_smoothing above 0;
    - "hinge": max(0, 1 - beta h) (SLiC's, arXiv:2309.06657);
    - "ipo": (h - 1 / (2 beta))² (arXiv:2310.12036, eq. 17);
    - "ipo_mean": the same with each side's log-ratio divided by its number of tokens;
    - "apo_zero", "apo_down": the chosen one rises and the rejected one falls; both fall, the chosen one less
      (arXiv:2408.06266).
    ValueError for an unknown kind, beta <= 0, a label_smoothing outside [0, 0.5) or with a kind that has none, missing
    lengths, no pairs or shapes that differ.
    """
    check_dpo(beta, kind, label_smoothing)
    _checks.same_shape(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps, ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )  # fmt: skip
    chosen = _log_ratio(chosen_logps, ref_chosen_logps)
    rejected = _log_ratio(rejected_logps, ref_rejected_logps)
    if kind == "ipo_mean":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError('kind="ipo_mean" divides by lengths; give chosen_lengths and rejected_lengths')
        chosen, rejected = _per_token(chosen, chosen_lengths), _per_token(rejected, rejected_lengths)
    return DPO_KINDS[kind](chosen, rejected, beta, label_smoothing)


def kto_reference_point(unrelated_logps: Tensor, ref_unrelated_logps: Tensor) -> Tensor:
    """KTO's z0: the mean of log(policy / reference) over completions of other prompts, at least 0, without gradient.

    unrelated_logps, ref_unrelated_logps: [N], summed over tokens, of all rows of the optimizer step. Returns a scalar,
    an estimate of the KL that leans to 0. ValueError for no rows or shapes that differ. Source: arXiv:2402.01306,
    section 4.1.
    """
    _checks.same_shape(unrelated_logps=unrelated_logps, ref_unrelated_logps=ref_unrelated_logps)
    return _log_ratio(unrelated_logps, ref_unrelated_logps).mean().clamp_min(0.0).detach()


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO's loss of each labelled completion: weight (1 - sigmoid(±beta (log(policy / reference) - z0))).

    logps, ref_logps: [N], summed over tokens. desirable: [N], true where the completion is to be had (+), false where
    it is not (-). z0: `kto_reference_point` of the whole optimizer step; it gets no gradient. Returns [N]. ValueError
    for beta <= 0, negative weights, no rows or shapes that differ. Source: arXiv:2402.01306, eq. 7 and 8.
    """
    _checks.above("beta", beta, 0.0)
    _checks.at_least("desirable_weight", desirable_weight, 0.0)
    _checks.at_least("undesirable_weight", undesirable_weight, 0.0)
    _checks.same_shape(logps=logps, ref_logps=ref_logps, desirable=desirable)
    baseline = z0.detach() if isinstance(z0, Tensor) else z0
    gain = beta * (_log_ratio(logps, ref_logps) - baseline)
    wanted = desirable.bool()
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where x is large.
    return torch.where(wanted, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def orpo(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> Tensor:
    """ORPO's odds-ratio term of each pair, -beta log sigmoid(log odds(chosen) - log odds(rejected)).

    chosen_logps, rejected_logps: [N], *averaged* over the completion's tokens; odds(p) = p / (1 - p). Returns [N]; the
    whole loss adds the negative log-likelihood of the chosen completion. ValueError for beta <= 0, no pairs or shapes
    that differ. Source: arXiv:2403.07691, eq. 4, 6 and 7 (beta is its lambda).
    """
    _checks.above("beta", beta, 0.0)
    chosen, rejected = _pairs(chosen_logps, rejected_logps)
    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO's loss of each pair, -log sigmoid(beta (chosen - rejected) - gamma), without a reference.

    chosen_logps, rejected_logps: [N], *averaged* over the completion's tokens. gamma: the margin by which the chosen
    one must win (other projects ask for gamma / beta). Returns [N]. ValueError for beta <= 0, a negative gamma, no
    pairs or shapes that differ. Source: arXiv:2405.14734, eq. 6.
    """
    _checks.above("beta", beta, 0.0)
    _checks.at_least("gamma", gamma, 0.0)
    chosen, rejected = _pairs(chosen_logps, rejected_logps)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def cpo(chosen_logps: Tensor, rejected_logps: Tensor, beta: float) -> Tensor:
    """CPO's preference term of each pair, -log sigmoid(beta (chosen - rejected)): DPO under a uniform reference.

    chosen_logps, rejected_logps: [N], summed over the completion's tokens. Returns [N]; the whole loss adds the
    negative log-likelihood of the chosen completion. ValueError for beta <= 0, no pairs or shapes that differ. Source:
    arXiv:2401.08417, eq. 3 to 5.
    """
    _checks.above("beta", beta, 0.0)
    chosen, rejected = _pairs(chosen_logps, rejected_logps)
    return -F.logsigmoid(beta * (chosen - rejected))


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, exact on both ends; where p rounds to 1 it is held at the last number below."""
    # Of 1 - p only what p lacks is left: each branch keeps digits where the other one loses them.
    below = logps.clamp_max(-torch.finfo(logps.dtype).eps)
    near = below > -math.log(2.0)
    lacking = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, below, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )
    return below - lacking


def check_dpo(beta: float, kind: str, label_smoothing: float) -> None:
    """Refuses what `dpo` refuses of these: an unknown kind, beta <= 0, a label_smoothing that makes no sense."""
    if kind not in DPO_KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(map(repr, DPO_KINDS))}")
    _checks.above("beta", beta, 0.0)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing!r} is out of range; use a number from 0 to below 0.5")
    if label_smoothing and kind not in ("sigmoid", "cdpo", "robust"):
        raise ValueError(f"label_smoothing={label_smoothing!r} means nothing for kind={kind!r}; use 0")
    if not label_smoothing and kind in ("cdpo", "robust"):
        raise ValueError(f"kind={kind!r} with label_smoothing=0 is plain DPO; use a number above 0, or kind='sigmoid'")


def _log_ratio(logps: Tensor, ref_logps: Tensor) -> Tensor:
    _checks.not_empty(logps=logps)
    return _checks.at_least_float32(logps) - _checks.at_least_float32(ref_logps.detach())


def _pairs(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    _checks.same_shape(chosen_logps=chosen, rejected_logps=rejected)
    _checks.not_empty(chosen_logps=chosen)
    return _checks.at_least_float32(chosen), _checks.at_least_float32(rejected)


def _per_token(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    _checks.same_shape(log_ratio=log_ratio, lengths=lengths)
    if not bool((lengths > 0).all()):
        raise ValueError("lengths holds a completion without a token; give 1 or more for each")
    return log_ratio / lengths


def _sigmoid(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    h = beta * (chosen - rejected)
    return -(1.0 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


def _robust(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    h = beta * (chosen - rejected)
    return (smoothing * F.logsigmoid(-h) - (1.0 - smoothing) * F.logsigmoid(h)) / (1.0 - 2.0 * smoothing)


def _hinge(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.relu(1.0 - beta * (chosen - rejected))


def _ipo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return (chosen - rejected - 1.0 / (2.0 * beta)).square()


def _apo_zero(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def _apo_down(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


DPO_KINDS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "cdpo": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "ipo_mean": _ipo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""Log-ratios of chosen and rejected, beta and label smoothing to losses, by kind."""
