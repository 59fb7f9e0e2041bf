"""Log-probabilities of given tokens and entropies, without ever normalising a whole [tokens, vocabulary] table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefero.functional import _checks

CHUNK_SIZE = 256


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log p(token t | tokens before t) under softmax(logits / temperature); this is where the shift by one lives.

    logits: [B, T, V], logits[:, t] predicts token t+1; token_ids: [B, T]. Returns [B, T] in nats, at least float32;
    entry 0, which nothing predicts, is 0. ValueError for ids outside the vocabulary, a temperature that is not
    positive or shapes that do not fit.
    """
    _checks.above("temperature", temperature, 0.0)
    if logits.dim() != 3 or logits.shape[:2] != token_ids.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)} beside token_ids {list(token_ids.shape)}; give [B, T, V] and [B, T]"
        )
    _checks.token_ids_within(token_ids, logits.shape[-1])
    # Shifting the ids, not the logits, spares a copy of the logits; the last position's result is dropped.
    targets = token_ids.long().roll(-1, dims=1)
    logprobs, _ = _from_logits(logits, targets, temperature, with_entropy=False)
    return torch.cat([torch.zeros_like(logprobs[:, :1]), logprobs[:, :-1]], dim=1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The entropy of softmax(logits / temperature), not shifted: entry t is that of the choice *after* token t.

    logits: [..., V]. Returns [...] in nats, at least float32. A logit of -inf is a choice that is never made.
    ValueError for a temperature that is not positive or logits without a vocabulary.
    """
    _checks.above("temperature", temperature, 0.0)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; give [..., V] with V > 0")
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    _, entropies = _from_logits(logits, targets, temperature, with_entropy=True)
    assert entropies is not None
    return entropies


def selected(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    token_ids: Tensor,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of given tokens from hidden states, holding at most `chunk_size` rows of logits at a time.

    hidden: [..., D], already aligned: hidden[..., j, :] predicts token_ids[..., j]; head_weight: [V, D]; head_bias:
    [V] or None; token_ids: [...]. Returns (logprobs, entropy), both [...] in nats; entropy is None unless
    `with_entropy`, and carries no gradient without `entropy_gradient` (cheaper where it is only reported).
    Equal to log_softmax((hidden @ head_weight.T + head_bias) / temperature) with logits in float32 even where hidden
    or head are half precision, autocast included; differentiable (once) in hidden, head_weight and head_bias. A frozen
    head costs no second pass over the vocabulary in backward. ValueError for ids outside the vocabulary, a
    temperature or chunk_size that is not positive, or shapes that do not fit.
    """
    _checks.above("temperature", temperature, 0.0)
    _checks.at_least("chunk_size", chunk_size, 1)
    if head_weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} beside head_weight {list(head_weight.shape)}; "
            "give [..., D] and [V, D]"
        )
    if hidden.shape[:-1] != token_ids.shape:
        raise ValueError(
            f"token_ids has shape {list(token_ids.shape)} beside hidden {list(hidden.shape)}; give one id a vector"
        )
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ValueError(f"head_bias has shape {list(head_bias.shape)}; give [{head_weight.shape[0]}] or None")
    _checks.token_ids_within(token_ids, head_weight.shape[0])
    # A sliced (strided) input to the head's product can be many times slower than a contiguous one.
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    learns_entropy = with_entropy and entropy_gradient
    settings = _Settings(float(temperature), int(chunk_size), with_entropy, torch.is_grad_enabled(), learns_entropy)
    logprobs, entropies = _FromHidden.apply(  # type: ignore[no-untyped-call]
        rows, head_weight, head_bias, token_ids.reshape(-1).long(), settings
    )
    shape = token_ids.shape
    return logprobs.view(shape), entropies.view(shape) if with_entropy else None


class _Settings(NamedTuple):
    temperature: float
    chunk_size: int
    with_entropy: bool
    grad_enabled: bool
    learns_entropy: bool


class _Rows(NamedTuple):
    """What a chunk of rows leaves behind for its backward pass: scalars per row, nothing as wide as the vocabulary."""

    logprobs: Tensor
    normaliser: Tensor
    entropy: Tensor

    def take(self, index: Tensor | slice) -> _Rows:
        return _Rows(self.logprobs[index], self.normaliser[index], self.entropy[index])


def _read(scores: Tensor, token_ids: Tensor, with_entropy: bool) -> _Rows:
    """Log-probabilities, log-normalisers and entropies of rows of logits that are already divided by temperature."""
    normaliser = torch.logsumexp(scores, dim=-1)
    logprobs = scores.gather(1, token_ids[:, None]).squeeze(1) - normaliser
    if not with_entropy:
        return _Rows(logprobs, normaliser, normaliser.new_zeros(normaliser.shape))
    return _Rows(logprobs, normaliser, -_expected(scores - normaliser[:, None]))


# As few tables as wide as the vocabulary as can be: a fresh one costs the system more to give than it costs to fill.


def _expected(logs: Tensor) -> Tensor:
    """Σ p log p, where a choice of probability 0 (log p = -inf) adds 0 and not NaN; overwrites `logs`."""
    return logs.exp().mul_(_floor_(logs)).sum(-1)


def _floor_(logs: Tensor) -> Tensor:
    return logs.clamp_min_(torch.finfo(logs.dtype).min)


def _slope(scores: Tensor, token_ids: Tensor, rows: _Rows, wanted: Tensor | None, spread: Tensor | None) -> Tensor:
    """Gradient with respect to `scores` when the upstream ones are `wanted` (log-probs) and `spread` (entropy).

    Overwrites `scores`.
    """
    logs = scores.sub_(rows.normaliser[:, None])
    factor = scores.new_zeros((len(scores), 1)) if wanted is None else -wanted[:, None]
    if spread is None:
        slope = logs.exp_().mul_(factor)
    else:
        slope = logs.exp()
        slope.mul_(_floor_(logs).add_(rows.entropy[:, None]).mul_(-spread[:, None]).add_(factor))
    return slope if wanted is None else slope.scatter_add_(1, token_ids[:, None], wanted[:, None])


def _heard(rows: _Rows, *gradients: Tensor | None) -> Tensor:
    """Rows with any upstream gradient: a masked-out row must not be multiplied by its 0, for 0 * NaN is NaN."""
    heard = torch.zeros_like(rows.normaliser, dtype=torch.bool)
    for gradient in gradients:
        if gradient is not None:
            heard |= gradient != 0
    return heard.nonzero().squeeze(1)


def _take(gradient: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if gradient is None else gradient[index]


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Holds autocast off: it would hand back products of float32 tensors in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _from_logits(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    settings = _Settings(float(temperature), CHUNK_SIZE, with_entropy, torch.is_grad_enabled(), with_entropy)
    rows = logits.reshape(-1, logits.shape[-1])
    logprobs, entropies = _FromLogits.apply(rows, targets.reshape(-1), settings)  # type: ignore[no-untyped-call]
    shape = targets.shape
    return logprobs.view(shape), entropies.view(shape) if with_entropy else None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _gather(parts: list[_Rows], like: Tensor) -> _Rows:
    if not parts:
        return _Rows(like, like.clone(), like.clone())
    return _Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _FromLogits(torch.autograd.Function):
    """Keeps the caller's logits and a few numbers a row; the gradient is written chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        parts = [
            _read(_FromLogits.scores(logits[part], settings), token_ids[part], settings.with_entropy)
            for part in _slices(len(logits), settings.chunk_size)
        ]
        rows = _gather(parts, _checks.at_least_float32(logits.new_zeros(0)))
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, token_ids, *rows)
        return rows.logprobs, rows.entropy

    @staticmethod
    def scores(logits: Tensor, settings: _Settings) -> Tensor:
        return _checks.at_least_float32(logits) / settings.temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor | None, spread: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, token_ids, *saved = ctx.saved_tensors
        rows = _Rows(*saved)
        gradient = torch.zeros_like(logits)
        heard = _heard(rows, wanted, spread)
        for part in _slices(len(heard), ctx.settings.chunk_size):
            index = heard[part]
            scores = _FromLogits.scores(logits[index], ctx.settings)
            slope = _slope(scores, token_ids[index], rows.take(index), _take(wanted, index), _take(spread, index))
            gradient[index] = (slope / ctx.settings.temperature).to(gradient.dtype)
        return gradient, None, None


class _FromHidden(torch.autograd.Function):
    """Logits live for one chunk. Backward makes them again, or, for a frozen head, was prepared in forward.

    The prepared form: a row's gradient in the hidden state is its upstream scalar times a vector that forward can
    already know, so [tokens, D] numbers are kept instead of a second pass over the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        ahead = settings.grad_enabled and ctx.needs_input_grad[:3] == (True, False, False)
        parts: list[_Rows] = []
        slopes: list[Tensor] = []
        head = _Head(weight, bias, hidden, settings.temperature)
        with _full_precision(hidden):
            for part in _slices(len(hidden), settings.chunk_size):
                scores = head.scores(hidden[part])
                parts.append(_read(scores, token_ids[part], settings.with_entropy))
                if ahead:
                    slopes.append(_FromHidden.unit_slopes(head, scores, token_ids[part], parts[-1], settings))
            rows = _gather(parts, hidden.new_zeros(0, dtype=head.dtype))
            ahead_slopes = torch.cat(slopes, dim=1) if slopes else hidden.new_zeros((2, 0, hidden.shape[1]))
        ctx.settings = settings
        ctx.ahead = ahead
        ctx.set_materialize_grads(False)
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(*((ahead_slopes,) if ahead else (hidden, weight, bias, token_ids, *rows)))
        if not settings.learns_entropy:
            ctx.mark_non_differentiable(rows.entropy)
        return rows.logprobs, rows.entropy

    @staticmethod
    def unit_slopes(head: _Head, scores: Tensor, token_ids: Tensor, rows: _Rows, settings: _Settings) -> Tensor:
        """[1 or 2, n, D]: how log-probabilities (and entropies) change with the hidden states; overwrites `scores`."""
        ones = torch.ones_like(rows.normaliser)
        other = scores.clone() if settings.learns_entropy else None
        slopes = [head.pull_back(_slope(scores, token_ids, rows, ones, None))]
        if other is not None:
            slopes.append(head.pull_back(_slope(other, token_ids, rows, None, ones)))
        return torch.stack(slopes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor | None, spread: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.settings.learns_entropy:
            spread = None
        return _FromHidden.prepared(ctx, wanted, spread) if ctx.ahead else _FromHidden.again(ctx, wanted, spread)

    @staticmethod
    def prepared(ctx: Any, wanted: Tensor | None, spread: Tensor | None) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        total = torch.zeros_like(slopes[0])
        for upstream, slope in zip((wanted, spread), slopes, strict=False):
            if upstream is not None:
                total += torch.where((upstream == 0)[:, None], 0.0, upstream[:, None] * slope)
        return total.to(ctx.hidden_dtype), None, None, None, None

    @staticmethod
    def again(ctx: Any, wanted: Tensor | None, spread: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, *saved = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        rows = _Rows(*saved)
        heard = _heard(rows, wanted, spread)
        head = _Head(weight, bias, hidden, ctx.settings.temperature)
        with _full_precision(hidden):
            to_hidden = torch.zeros_like(hidden) if need_hidden else None
            to_weight = torch.zeros_like(weight, dtype=head.dtype) if need_weight else None
            to_bias = weight.new_zeros(len(weight), dtype=head.dtype) if need_bias else None
            for part in _slices(len(heard), ctx.settings.chunk_size):
                index = heard[part]
                states = hidden[index].to(head.dtype)
                slope = _slope(
                    head.scores(states), token_ids[index], rows.take(index), _take(wanted, index), _take(spread, index)
                )
                if to_hidden is not None:
                    to_hidden[index] = head.pull_back(slope).to(to_hidden.dtype)
                slope /= ctx.settings.temperature
                if to_weight is not None:
                    to_weight.addmm_(slope.t(), states)
                if to_bias is not None:
                    to_bias += slope.sum(0)
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None or bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


class _Head:
    """The output layer in float32 or better, over a temperature."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor, temperature: float) -> None:
        self.dtype = torch.promote_types(torch.promote_types(weight.dtype, hidden.dtype), torch.float32)
        self.temperature = temperature
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def scores(self, states: Tensor) -> Tensor:
        """Logits over temperature, [n, V]."""
        states = states.to(self.dtype)
        logits = states @ self.weight.t() if self.bias is None else torch.addmm(self.bias, states, self.weight.t())
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def pull_back(self, slope: Tensor) -> Tensor:
        """The gradient in the states, [n, D], of a gradient in the scores."""
        return (slope @ self.weight).div_(self.temperature)
