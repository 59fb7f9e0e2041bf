"""Drawing tokens: random numbers that depend on a key only, and exact inverse-CDF sampling."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256  # tokens summed together first: one pass over the vocabulary instead of a running sum over all of it
_PREFILTER = 512  # a nucleus is looked for among this many likeliest tokens before everything is sorted
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Draw:
    """One token a row, all tensors [B].

    logprobs: log p under the temperature alone, the number trainers recompute. sampling_logprobs: log p under the
    distribution that was really drawn from (after other logits, forbidden tokens, top-k, top-p and min-p); equal to the
    former where there are none of these, 0 where nothing was drawn (greedy).
    """

    token_ids: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number: torch has no arithmetic on uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def stream_key(seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """The int64 that names one completion's stream of random numbers: a hash of what the completion is, not where."""
    numbers = struct.pack("<qqq", seed, step, sample_index)
    digest = hashlib.blake2b(numbers + prompt_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64 (torch's own copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """Float64 uniforms strictly between 0 and 1, one a row, from stream keys and token positions alone.

    keys: [B] int64 from `stream_key`. position: the index of the token in its completion, one for all or [B].
    Entry `position` of the SplitMix64 generator whose state starts at the key (Steele, Lea and Flood 2014,
    https://doi.org/10.1145/2660193.2660195), so a number needs neither its predecessors nor its neighbours.
    """
    state = keys + (torch.as_tensor(position, dtype=torch.int64, device=keys.device) + 1) * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shifted(state, 31)
    # 52 bits and a half: both 2^-53 and 1 - 2^-53 are float64 numbers, 0 and 1 cannot come out.
    return (_shifted(state, 12).double() + 0.5) * 2.0**-52


def _locate(ends: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the first entry of rising sums `ends` [B, N] above `target` [B], and how far into it the target lies."""
    target = torch.minimum(target, torch.nextafter(ends[:, -1], torch.zeros_like(target)))
    index = torch.searchsorted(ends, target.unsqueeze(-1), right=True)
    before = torch.where(index > 0, ends.gather(-1, (index - 1).clamp_min(0)), 0.0)
    return index.squeeze(-1), (target - before.squeeze(-1)).clamp_min(0.0)


def _block_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, V] as blocks [B, N, block], and the float64 running sums [B, N] of what the blocks hold."""
    blocks = F.pad(weights, (0, -weights.shape[-1] % _BLOCK)) if weights.shape[-1] % _BLOCK else weights
    blocks = blocks.reshape(weights.shape[0], -1, _BLOCK)
    return blocks, blocks.sum(-1).cumsum(-1, dtype=torch.float64)


def _pick(blocks: Tensor, ends: Tensor, uniform: Tensor) -> Tensor:
    block, rest = _locate(ends, uniform * ends[:, -1])
    inside = blocks[torch.arange(len(block), device=block.device), block].cumsum(-1, dtype=torch.float64)
    index, _ = _locate(inside, rest)
    return block * _BLOCK + index


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws index i of each row with probability weights[i] / sum(weights), exactly and with one random number.

    weights: [B, V], not negative, a positive sum each. uniform: [B] float64 in (0, 1). Returns [B] int64; an index
    of weight zero is never returned. Running sums are float64, so no small weight is lost in a large sum.
    """
    return _pick(*_block_sums(weights), uniform.to(weights.device))


def _nucleus_floor(weights: Tensor, mass: Tensor, top_p: float) -> Tensor:
    """The smallest weight [B, 1] inside the smallest set of likeliest tokens that holds `top_p` of the mass [B]."""

    def floor(values: Tensor, wanted: Tensor) -> Tensor:
        before = values.cumsum(-1, dtype=torch.float64) - values
        count = (before < wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp_min(1)
        return values.gather(-1, count - 1)

    wanted = mass * top_p
    likeliest = weights.topk(min(_PREFILTER, weights.shape[-1]), dim=-1).values
    result = floor(likeliest, wanted)
    short = likeliest.sum(-1, dtype=torch.float64) < wanted
    if likeliest.shape[-1] < weights.shape[-1] and bool(short.any()):
        result[short] = floor(weights[short].sort(dim=-1, descending=True).values, wanted[short])
    return result


def _truncated(weights: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Weights [B, V] with everything outside top-k, then top-p, then min-p, at zero; ties at the edge stay in.

    Keeping ties makes the kept set depend on the row's values only, not on how a sort happens to order equals.
    """
    if 0 < top_k < weights.shape[-1]:
        weights = weights.masked_fill(weights < weights.topk(top_k, dim=-1).values[:, -1:], 0.0)
    if top_p < 1.0:
        floor = _nucleus_floor(weights, _block_sums(weights)[1][:, -1], top_p)
        weights = weights.masked_fill(weights < floor, 0.0)
    if min_p > 0.0:
        weights = weights.masked_fill(weights < min_p * weights.amax(-1, keepdim=True), 0.0)
    return weights


def _exponentials(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scaled - max) [B, V] and the max [B] in float64."""
    peak = scaled.amax(-1, keepdim=True)
    return (scaled - peak).exp_(), peak.squeeze(-1).double()


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,
    instead: Tensor | None = None,
) -> Draw:
    """Chooses one token a row from softmax(logits / temperature), truncated as asked.

    logits: [B, V]. uniform: [B] float64 in (0, 1), or None for the likeliest token (top_k, top_p and min_p then mean
    nothing). top_k: 0 keeps all. top_p: 1 keeps all. min_p: drops what is less likely than that part of the likeliest
    (arXiv:2407.01082), 0 nothing. instead: [B, V], logits to draw from in the place of the model's (after penalties).
    allowed: bool, broadcastable to [B, V]; False forbids a token. Order: temperature, forbidden tokens, top-k, top-p,
    min-p.
    Raises ValueError when a row's logits hold NaN or plus infinity, or no token is left.
    """
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    weights, peak = _exponentials(scaled)
    blocks, ends = _block_sums(weights)
    normaliser = ends[:, -1].log() + peak
    if not bool(normaliser.isfinite().all()):
        row = int((~normaliser.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"logits of row {row} are not finite (their softmax sums to {float(ends[row, -1])}): the model's weights "
            "have probably diverged; lower the learning rate, clip gradients, or go back to an earlier checkpoint"
        )
    left = scaled if instead is None else instead.float() / temperature
    if allowed is not None:
        left = left.masked_fill(~allowed.to(left.device), -torch.inf)
    if left is not scaled:
        weights, peak = _exponentials(left)
        if not bool(peak.isfinite().all()):
            raise ValueError("min_new_tokens forbids the only token the model gives any probability: set it to 0")
    if uniform is None:
        chosen = left.argmax(-1)
    else:
        if left is not scaled or top_k > 0 or top_p < 1.0 or min_p > 0.0:
            blocks, ends = _block_sums(_truncated(weights, top_k, top_p, min_p))
        chosen = _pick(blocks, ends, uniform.to(ends.device))
    own, drawn = (found.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).double() for found in (scaled, left))
    chances = torch.zeros_like(own) if uniform is None else drawn - peak - ends[:, -1].log()
    return Draw(chosen, own - normaliser, chances)


def penalised(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [B, V] in which each row's tokens seen are less likely (Keskar et al., arXiv:1909.05858, equation 1).

    Positive ones are divided by the penalty and negative ones multiplied, as everyone does since.
    """
    rows = torch.tensor([row for row, ids in enumerate(seen) for _ in ids], dtype=torch.int64, device=logits.device)
    columns = torch.tensor([token for ids in seen for token in ids], dtype=torch.int64, device=logits.device)
    found = logits[rows, columns].float()
    changed = torch.where(found > 0, found / penalty, found * penalty)
    return logits.float().index_put((rows, columns), changed)
