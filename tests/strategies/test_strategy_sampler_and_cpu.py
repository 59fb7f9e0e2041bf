"""Prompt shares that never overlap, and the choices made for this CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefero.strategies import DistributedSampler, NaiveStrategy, cpu


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.lists(st.integers(0, 9), max_size=12))
def test_shares_are_disjoint_and_nothing_repeats_before_all_was_drawn(
    size: int, replicas: int, seed: int, draws: list[int]
) -> None:
    if size < replicas:
        with pytest.raises(ValueError, match="fewer than"):
            DistributedSampler(range(size), replicas, 0, seed)
        return
    share = size // replicas
    drawn: list[list[int]] = []
    for rank in range(replicas):
        sampler = DistributedSampler(range(size), replicas, rank, seed)
        drawn.append([item for num in draws for item in sampler.sample(num)])
    assert all(len(items) == sum(draws) for items in drawn)
    for start in range(0, sum(draws), share):
        shown = [item for items in drawn for item in items[start : start + share]]
        assert len(set(shown)) == len(shown)


def test_rounds_are_reshuffled_and_repeatable() -> None:
    first, again, other = (DistributedSampler(list("abcdefgh"), seed=s) for s in (0, 0, 1))
    rounds = [first.sample(8) for _ in range(3)]
    assert [again.sample(8) for _ in range(3)] == rounds
    assert rounds[0] != rounds[1]
    assert other.sample(8) != rounds[0]
    assert all(sorted(r) == list("abcdefgh") for r in rounds)


def test_drawing_goes_on_from_a_saved_state() -> None:
    sampler = NaiveStrategy("cpu").setup_sampler(list(range(10)))
    sampler.sample(13)
    state = sampler.state_dict()
    expected = sampler.sample(20)
    fresh = DistributedSampler(list(range(10)))
    fresh.load_state_dict(state)
    assert fresh.sample(20) == expected


def test_ranks_are_checked() -> None:
    with pytest.raises(ValueError, match="rank=2 must be between 0 and num_replicas - 1 = 1"):
        DistributedSampler([1, 2, 3], 2, 2)


def test_bf16_is_worth_using_only_with_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (({"avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16", "avx"}, True), (set(), False)):
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert cpu.supports_bf16() is expected
        assert NaiveStrategy("cpu", precision="auto").precision == ("bf16" if expected else "fp32")


def test_threads_suit_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "usable_cores", lambda: 2)
    assert cpu.set_threads(100_000) == 1 == torch.get_num_threads()
    assert cpu.set_threads(100_000_000) == 2 == torch.get_num_threads()
    assert cpu.set_threads(100_000_000, threads=1) == 1 == torch.get_num_threads()
    with pytest.raises(ValueError, match="threads=0"):
        cpu.set_threads(1, 0)


def route() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_onednn_is_used_only_where_it_is_exact_and_known_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    before = route()
    maker = ["AuthenticAMD"]
    errors = {"ieee": 5e-7, "bf16": 8e-7}
    monkeypatch.delenv("PREFERO_ONEDNN", raising=False)
    monkeypatch.setattr(cpu, "cpu_maker", lambda: maker[0])
    monkeypatch.setattr(cpu, "matmul_error", errors.__getitem__)
    try:
        assert not cpu.prefer_onednn_fp32(enabled=False)
        errors["bf16"] = 4e-3  # a CPU with AMX really computes in bf16
        assert not cpu.prefer_onednn_fp32()
        errors["bf16"] = 8e-7
        maker[0] = "GenuineIntel"
        assert not cpu.prefer_onednn_fp32()
        maker[0] = "AuthenticAMD"
        monkeypatch.setenv("PREFERO_ONEDNN", "0")
        assert not cpu.prefer_onednn_fp32()
        assert route() == before
        monkeypatch.delenv("PREFERO_ONEDNN")
        assert cpu.prefer_onednn_fp32()
        assert route() == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_measuring_leaves_no_trace_and_tells_bf16_from_fp32() -> None:
    before = route()
    assert cpu.matmul_error("ieee") < 2e-5
    assert route() == before
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 512, generator=generator), torch.randn(512, 512, generator=generator)
    exact = left.double() @ right.double()
    rounded = (left.bfloat16().double() @ right.bfloat16().double() - exact).abs().max() / exact.abs().max()
    assert rounded > 2e-5 * 10
