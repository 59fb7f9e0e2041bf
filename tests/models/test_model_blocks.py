"""Attention by blocks: what torch's own gives for each text alone, forward and backward, however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prefero.models import blocks
from prefero.models.packing import Packing

LENGTHS = (3, 40, 41, 1, 97, 9, 60)


def mask_of(lengths=LENGTHS):
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


def heads(count: int, dtype=torch.float64, heads=(6, 2), dims=(8, 8)):
    torch.manual_seed(0)
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1]))
    query, key, value, gradient = (torch.randn(count, *shape, dtype=dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), gradient


def alone(packing: Packing, query, key, value, scale: float):
    """Every text by itself, by torch's own attention in the plainest form."""
    width = packing.index.shape[1]
    attended = torch.zeros(len(query), query.shape[1], value.shape[2], dtype=query.dtype)
    for text, (row, length) in enumerate(zip(packing.index, packing.lengths.tolist(), strict=True)):
        q, k, v = (part[row[:length]].transpose(0, 1) for part in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=packing.causal, scale=scale, enable_gqa=True
        ).transpose(0, 1)
        own = packing.place // width == text
        attended = attended.index_copy(0, own.nonzero().squeeze(1), out[packing.place[own] % width])
    return attended


def both(packing: Packing, parts, scale: float = 0.3):
    """(attended, three gradients) by blocks, and as `alone`."""
    query, key, value, gradient = parts
    results = []
    texts = blocks.alike(packing.index, packing.place, packing.lengths, causal=packing.causal)
    for attended in (
        blocks.attend(query, key, value, texts, scale, shared=packing.shared),
        alone(packing, query, key, value, scale),
    ):
        results.append((attended.detach(), *torch.autograd.grad(attended, (query, key, value), gradient)))
    return results


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [2**16, 200, 1])
@pytest.mark.parametrize("dims", [(8, 8), (6, 10)])
def test_each_text_attends_to_itself_however_it_is_cut(monkeypatch, causal, most, dims) -> None:
    monkeypatch.setattr(blocks, "_SCORES", most)
    monkeypatch.setattr(blocks, "_MOST", most)
    packing = Packing.of(mask_of(), causal=causal)
    ours, theirs = both(packing, heads(len(packing.source), dims=dims))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [2**16, 60])
def test_beginnings_in_common_get_the_sum_of_their_gradients(monkeypatch, most) -> None:
    monkeypatch.setattr(blocks, "_SCORES", most)
    monkeypatch.setattr(blocks, "_MOST", most)
    ids = torch.randint(5, 9, (7, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids[1, :30] = ids[2, :30] = ids[4, :30]
    ids[6] = ids[4]  # the whole of it is the beginning of another
    packing = Packing.of(mask_of()).deduplicated(ids)
    assert packing.shared
    ours, theirs = both(packing, heads(len(packing.source)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_torchs_own(dtype) -> None:
    packing = Packing.of(mask_of())
    wide = heads(len(packing.source), heads=(4, 4))
    parts = [part.detach().to(dtype).requires_grad_() for part in wide]
    exact = both(packing, [part.detach().double().requires_grad_() for part in parts])[1]
    for ours, theirs, true in zip(*both(packing, parts), exact, strict=True):
        assert ours.dtype == dtype
        far, usual = ((x.double() - true).norm() / true.norm() for x in (ours, theirs))
        assert float(far) < max(1.2 * float(usual), torch.finfo(dtype).eps / 2)


def test_under_autocast_it_computes_in_that_type_and_keeps_scores_wide() -> None:
    packing = Packing.of(mask_of())
    query, key, value, _ = heads(len(packing.source), torch.float32)
    texts = blocks.alike(packing.index, packing.place, packing.lengths, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = blocks.attend(query, key, value, texts, 0.3, shared=False)
    by_hand = blocks.attend(*(x.bfloat16() for x in (query, key, value)), texts, 0.3, shared=False)
    assert under.dtype == torch.bfloat16 and torch.equal(under, by_hand)


def test_texts_of_unlike_length_are_not_padded_to_each_other() -> None:
    packing = Packing.of(mask_of((300, 10, 12, 11, 290)))
    texts = blocks.alike(packing.index, packing.place, packing.lengths, causal=True)
    assert sorted(tuple(some.lengths.tolist()) for some in texts) == [(10, 11, 12), (290,), (300,)]


def test_a_second_derivative_is_refused() -> None:
    packing = Packing.of(mask_of((3, 2)))
    query, key, value, _ = heads(5)
    texts = blocks.alike(packing.index, packing.place, packing.lengths, causal=True)
    attended = blocks.attend(query, key, value, texts, 1.0, shared=False)
    with pytest.raises(ValueError, match="create_graph"):
        torch.autograd.grad(attended.sum(), query, create_graph=True)
