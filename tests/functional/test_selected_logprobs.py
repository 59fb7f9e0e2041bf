"""Log-probabilities straight from hidden states: equal to the naive table, and the table is never made."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefero.functional import logprobs

Case = tuple[Tensor, Tensor, Tensor | None, Tensor]


def case(seed: int = 0, shape: tuple[int, ...] = (3, 5), width: int = 4, vocab: int = 11, bias: bool = True) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, vocab, shape, generator=generator)
    return normal(*shape, width), normal(vocab, width), normal(vocab) if bias else None, ids


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(-1, ids[..., None]).squeeze(-1), -(table.exp() * table).sum(-1)


def leaves(inputs: Case, frozen_head: bool) -> Case:
    hidden, weight, bias, ids = inputs
    hidden = hidden.detach().clone().requires_grad_()
    weight = weight.detach().clone().requires_grad_(not frozen_head)
    bias = None if bias is None else bias.detach().clone().requires_grad_(not frozen_head)
    return hidden, weight, bias, ids


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 20),
    st.sampled_from([0.5, 0.7, 1.0, 1.3]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_equal_to_the_naive_table(
    seed: int, chunk: int, temperature: float, bias: bool, frozen: bool, with_entropy: bool
) -> None:
    inputs = case(seed, bias=bias)
    upstream = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upstream[:, 1] = 0  # a masked-out row
    outcomes = []
    for ours in (True, False):
        hidden, weight, head_bias, ids = leaves(inputs, frozen)
        if ours:
            chosen, entropies = logprobs.selected(hidden, weight, head_bias, ids, temperature, chunk, with_entropy)
            assert (entropies is not None) == with_entropy
        else:
            chosen, entropies = naive(hidden, weight, head_bias, ids, temperature)
        loss = (upstream[0] * chosen).sum()
        if with_entropy and entropies is not None:
            loss = loss + (upstream[1] * entropies).sum()
        wanted = [x for x in (hidden, weight, head_bias) if x is not None and x.requires_grad]
        kept = [chosen, entropies] if with_entropy else [chosen]
        outcomes.append([*kept, *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_against_finite_differences(frozen: bool, bias: bool) -> None:
    hidden, weight, head_bias, ids = leaves(case(bias=bias), frozen)
    wanted = tuple(x for x in (hidden, weight, head_bias) if x is not None and x.requires_grad)
    assert torch.autograd.gradcheck(
        lambda *_: logprobs.selected(hidden, weight, head_bias, ids, 0.7, 4, with_entropy=True), wanted
    )


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_each_part_of_the_head_may_learn_alone(learns: str) -> None:
    hidden, weight, bias, ids = case()
    part = weight if learns == "weight" else bias
    assert part is not None
    part.requires_grad_()
    (ours,) = torch.autograd.grad(logprobs.selected(hidden, weight, bias, ids)[0].sum(), part)
    (expected,) = torch.autograd.grad(naive(hidden, weight, bias, ids, 1.0)[0].sum(), part)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_entropy_alone_may_be_descended() -> None:
    for frozen in (True, False):
        hidden, weight, bias, ids = leaves(case(), frozen)
        entropies = logprobs.selected(hidden, weight, bias, ids, 1.3, 4, with_entropy=True)[1]
        assert entropies is not None
        (ours,) = torch.autograd.grad(entropies.sum(), hidden)
        (expected,) = torch.autograd.grad(naive(hidden, weight, bias, ids, 1.3)[1].sum(), hidden)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_agrees_with_token_logprobs() -> None:
    hidden, weight, bias, _ = case(shape=(2, 6))
    assert bias is not None
    ids = torch.randint(0, 11, (2, 7))
    logits = torch.cat([hidden @ weight.t() + bias, torch.zeros(2, 1, 11, dtype=torch.float64)], 1)
    torch.testing.assert_close(
        logprobs.selected(hidden, weight, bias, ids[:, 1:], 0.7)[0], logprobs.token_logprobs(logits, ids, 0.7)[:, 1:]
    )


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation has put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("frozen", [True, False])
def test_never_holds_the_whole_table(frozen: bool) -> None:
    rows, width, vocab, chunk = 64, 4, 50, 8
    hidden, weight, bias, ids = leaves(case(shape=(rows,), width=width, vocab=vocab), frozen)
    with Largest() as largest:
        chosen, entropies = logprobs.selected(hidden, weight, bias, ids, 0.7, chunk, with_entropy=True)
        assert entropies is not None
        (chosen.sum() + entropies.sum()).backward()
    assert largest.numel <= 2 * rows * width < rows * vocab / 4
    assert largest.numel >= chunk * vocab
    with Largest() as largest:
        naive(hidden, weight, bias, ids, 0.7)
    assert largest.numel == rows * vocab


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_poisoned_states_of_masked_tokens(poison: float, frozen: bool) -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    outcomes = []
    for dirty in (False, True):
        inputs = case()
        if dirty:
            inputs[0][~mask] = poison
        hidden, weight, bias, ids = leaves(inputs, frozen)
        chosen, entropies = logprobs.selected(hidden, weight, bias, ids, 0.7, 4, with_entropy=True)
        assert entropies is not None
        loss = torch.where(mask, chosen + 0.1 * entropies, 0.0).sum()
        wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        outcomes.append([loss, *torch.autograd.grad(loss, wanted)])
    for clean, poisoned in zip(*outcomes, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("frozen", [True, False])
def test_half_precision_states_meet_float32_logits(frozen: bool) -> None:
    hidden64, weight64, _, ids = case(shape=(4, 8), width=32, vocab=300, bias=False)
    half = (4 * hidden64.bfloat16()).requires_grad_(), weight64.bfloat16().requires_grad_(not frozen)
    exact = [x.detach().double().requires_grad_() for x in half]
    chosen, _ = logprobs.selected(*half, None, ids)
    expected, _ = naive(*exact, None, ids, 1.0)
    assert chosen.dtype == torch.float32
    # bfloat16 logits would be off by more than 0.1 here.
    torch.testing.assert_close(chosen.double(), expected, rtol=1e-5, atol=1e-4)
    chosen.sum().backward()
    expected.sum().backward()
    assert half[0].grad is not None and half[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(half[0].grad.double(), exact[0].grad, rtol=1e-2, atol=1e-2)
    if not frozen:
        assert half[1].grad is not None and half[1].grad.dtype == torch.bfloat16
        torch.testing.assert_close(half[1].grad.double(), exact[1].grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_does_not_blur_the_logits(frozen: bool) -> None:
    inputs = tuple(x.float() if x is not None and x.is_floating_point() else x for x in case(width=32, vocab=100))
    outcomes = []
    for on in (False, True):
        hidden, weight, bias, ids = leaves(inputs, frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            chosen, _ = logprobs.selected(hidden, weight, bias, ids)
            (gradient,) = torch.autograd.grad(chosen.sum(), hidden)
        outcomes.append((chosen, gradient))
    for plain, cast in zip(*outcomes, strict=True):
        assert cast.dtype == torch.float32
        torch.testing.assert_close(cast, plain, rtol=1e-6, atol=1e-6)


def test_strided_states_of_the_last_tokens() -> None:
    hidden, weight, bias, _ = case(shape=(3, 9))
    ids = torch.randint(0, 11, (3, 4))
    strided = hidden[:, 4:8]
    assert not strided.is_contiguous()
    (ours,) = torch.autograd.grad(logprobs.selected(strided.requires_grad_(), weight, bias, ids)[0].sum(), strided)
    dense = strided.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(naive(dense, weight, bias, ids, 1.0)[0].sum(), dense)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tokens_and_one_token(frozen: bool) -> None:
    for shape in ((0,), (2, 0), (1, 1), ()):
        hidden, weight, bias, ids = leaves(case(shape=shape), frozen)
        chosen, entropies = logprobs.selected(hidden, weight, bias, ids, with_entropy=True)
        assert entropies is not None
        assert chosen.shape == shape == entropies.shape
        (chosen.sum() + entropies.sum()).backward()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, bias, ids = leaves(case(), frozen_head=True)
    with torch.no_grad():
        chosen, _ = logprobs.selected(hidden, weight, bias, ids)
    assert not chosen.requires_grad
    torch.testing.assert_close(chosen, naive(hidden, weight, bias, ids, 1.0)[0].detach())


def test_tied_head_and_embedding_gather_both_gradients() -> None:
    _, table, _, ids = case(width=4)
    outcomes = []
    for ours in (True, False):
        weight = table.clone().requires_grad_()
        hidden = torch.tanh(weight[ids])
        chosen = (logprobs.selected(hidden, weight, None, ids) if ours else naive(hidden, weight, None, ids, 1.0))[0]
        outcomes.append(torch.autograd.grad(chosen.sum(), weight)[0])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("token_ids holds 11.*0..10", {"ids": torch.full((3, 5), 11)}),
        ("token_ids holds -100.*mask", {"ids": torch.full((3, 5), -100)}),
        ("token_ids has dtype torch.bool", {"ids": torch.zeros(3, 5, dtype=torch.bool)}),
        (r"token_ids has shape \[3, 4\]", {"ids": torch.zeros(3, 4, dtype=torch.long)}),
        (r"hidden has shape \[3, 5, 4\] beside head_weight \[11, 3\]", {"weight": torch.zeros(11, 3)}),
        (r"head_bias has shape \[10\]", {"bias": torch.zeros(10)}),
        ("temperature=0", {"temperature": 0}),
        ("temperature=nan", {"temperature": math.nan}),
        ("chunk_size=0", {"chunk_size": 0}),
    ],
)
def test_refusals(message: str, changes: dict[str, Any]) -> None:
    hidden, weight, bias, ids = case()
    call = {"hidden": hidden, "weight": weight, "bias": bias, "ids": ids, "temperature": 1.0, "chunk_size": 4} | changes
    with pytest.raises(ValueError, match=message):
        logprobs.selected(*call.values())


def test_an_entropy_that_is_only_reported_has_the_same_value_and_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    token_ids = torch.tensor([0, 6, 3, 2, 5])
    hidden.requires_grad_()
    chosen, learned = logprobs.selected(hidden, weight, None, token_ids, with_entropy=True)
    (expected,) = torch.autograd.grad(chosen.sum(), hidden)
    chosen, reported = logprobs.selected(hidden, weight, None, token_ids, with_entropy=True, entropy_gradient=False)
    assert reported is not None and learned is not None
    assert not reported.requires_grad
    assert torch.equal(reported, learned.detach())
    (gradient,) = torch.autograd.grad(chosen.sum(), hidden)
    torch.testing.assert_close(gradient, expected)
