"""The compiled steps of decoding do what torch does, and layers take them only where that is known."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prefero.models.trunk import trunk_of
from prefero.rollout.engine import SamplingParams
from prefero.rollout.native import kernels
from prefero.rollout.native.fused import fused
from prefero.rollout.native.slots import Decode, Slots
from tests.rollout.test_engines import peaked, prompts, same
from tests.rollout.test_native_batch import SIZES, native

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def test_they_are_here() -> None:
    """What follows would otherwise compare nothing with nothing."""
    assert kernels.available(torch.device("cpu"), torch.float32)
    assert not kernels.available(torch.device("cpu"), torch.float16)
    assert not kernels.available(torch.device("meta"), torch.float32)


def turned(heads, turn):
    """Rotary embeddings as in arXiv:2104.09864, halves of a head apart."""
    first, second = heads.float().chunk(2, -1)
    cosine, sine = (part.unsqueeze(1) for part in turn)
    return (heads.float() * cosine + torch.cat((-second, first), -1) * sine).to(heads.dtype)


@TYPES
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rotary", [True, False], ids=["turned", "as it is"])
def test_attention_of_new_tokens_is_that_of_torch(dtype, dim, window, rotary) -> None:
    torch.manual_seed(0)
    texts, heads, kept, room = 5, 6, 2, 40
    projected = torch.randn(texts, (heads + 2 * kept) * dim).to(dtype)  # rows of heads that lie apart
    query, key, value = (
        part.unflatten(-1, (-1, dim)) for part in projected.split([heads * dim, kept * dim, kept * dim], -1)
    )
    keys, values = (torch.randn(texts + 2, kept, room, dim).to(dtype) for _ in range(2))
    lengths = torch.tensor([0, 3, 39, 17, 5])
    angles = torch.randn(texts, dim // 2)
    turn = (torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)) if rotary else None
    wanted_keys, wanted_values, rows = keys.clone(), values.clone(), torch.arange(texts)
    wanted_keys[rows, :, lengths] = turned(key, turn) if turn else key
    wanted_values[rows, :, lengths] = value
    found = kernels.decode(query, key, value, turn, keys, values, lengths, 0.3, window)
    close = {"rtol": 0.01, "atol": 0.01} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(keys, wanted_keys, **close)
    assert torch.equal(values, wanted_values)
    columns = torch.arange(room)
    seen = (columns <= lengths[:, None]) & (columns > lengths[:, None] - (window or room))
    asked = (turned(query, turn) if turn else query).unflatten(1, (kept, -1))
    wanted = functional.scaled_dot_product_attention(
        asked.double(), wanted_keys[:texts].double(), wanted_values[:texts].double(), seen[:, None, None], scale=0.3
    )
    torch.testing.assert_close(found.double(), wanted.flatten(1), **close)


@TYPES
def test_norms_and_gates_round_where_torch_does(dtype) -> None:
    torch.manual_seed(0)
    x, weight, both = torch.randn(3, 7, 48) * 4, torch.rand(48), (torch.randn(9, 128) * 4).to(dtype)
    wanted = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    close = {"rtol": 0.01, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(kernels.norm(x, weight, 1e-5, dtype), wanted.to(dtype), **close)
    gates, through = both.chunk(2, -1)
    wanted = functional.silu(gates) * through
    found = kernels.gate(gates, through)
    if dtype is torch.bfloat16:
        assert torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, **close)


@TYPES
def test_what_is_not_a_number_stays_none(dtype) -> None:
    poisoned = torch.randn(2, 8)
    poisoned[1, 3] = torch.nan
    assert kernels.norm(poisoned, torch.ones(8), 1e-5, dtype).isnan().any(1).tolist() == [False, True]
    assert kernels.gate(poisoned.to(dtype), torch.ones(2, 8).to(dtype)).isnan().any(1).tolist() == [False, True]
    heads = poisoned.to(dtype).unsqueeze(1)
    pools = [torch.zeros(2, 1, 4, 8, dtype=dtype) for _ in range(2)]
    found = kernels.decode(heads, heads, heads, None, *pools, torch.tensor([0, 2]), 1.0, None)
    assert found.isnan().any(1).tolist() == [False, True]
    large = torch.tensor([[200.0, -200.0, torch.inf, -torch.inf]]).to(dtype)
    assert kernels.gate(large, torch.ones(1, 4).to(dtype)).tolist()[0][:3] == pytest.approx([200.0, 0.0, torch.inf])


FITS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}


@pytest.mark.parametrize("family", sorted(FITS))
@TYPES
def test_layers_of_this_kind_sample_the_same_in_few_steps(family, dtype, monkeypatch) -> None:
    torch.manual_seed(1)
    model = peaked(AutoModelForCausalLM.from_config(FITS[family]()))
    other = deepcopy(model)
    monkeypatch.setattr("prefero.rollout.native.engine.fused", lambda trunk: [])
    with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        theirs = native(other).generate(prompts(), SamplingParams(8, seed=3))
        monkeypatch.undo()
        ours = native(model).generate(prompts(), SamplingParams(8, seed=3))
    assert len(fused(trunk_of(model))) == SIZES["num_hidden_layers"]
    if dtype is torch.float32:
        same(ours, theirs)
    else:
        alike = [pair for pair in zip(ours, theirs, strict=True) if pair[0].token_ids == pair[1].token_ids]
        assert len(alike) > len(ours) / 2, "rounded otherwise, now and then another token is drawn"
        for one, another in alike:
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(another.logprobs), atol=0.05, rtol=0)


class Louder(torch.nn.Module):
    """An activation that calls itself SiLU."""

    def forward(self, x):
        return 1.01 * functional.silu(x)


def test_layers_that_do_something_else_keep_their_own_way() -> None:
    torch.manual_seed(1)
    for config in (Qwen3Config(**SIZES), MistralConfig(**SIZES, sliding_window=4)):
        model = AutoModelForCausalLM.from_config(config)
        native(model)
        assert not fused(trunk_of(model))
    odd = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    Louder.__name__ = "SiLUActivation"
    odd.model.layers[1].mlp.act_fn = Louder()
    assert native(odd).generate(prompts(), SamplingParams(4, seed=3))
    assert not fused(trunk_of(odd)), "what the trial has shown"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_go_their_own_way(dtype) -> None:
    torch.manual_seed(1)
    model = peaked(AutoModelForCausalLM.from_config(FITS["llama"]()))
    assert native(model).generate(prompts(), SamplingParams(2, seed=3))
    if dtype is torch.float64:
        assert native(model.double()).generate(prompts(), SamplingParams(4, seed=3))
    else:
        with torch.autocast("cpu", dtype):
            assert native(model).generate(prompts(), SamplingParams(4, seed=3))


def test_what_cpp_would_read_is_looked_at_before() -> None:
    heads, pools, lengths = torch.ones(2, 1, 8), [torch.ones(2, 1, 4, 8) for _ in range(2)], torch.tensor([0, 2])
    wrong = [
        (heads, heads, heads.bfloat16(), None, *pools, lengths, 1.0, None),
        (heads, heads, heads, None, *pools, lengths.int(), 1.0, None),
        (heads, heads, heads, None, pools[0], pools[1][..., :6], lengths, 1.0, None),
        (heads, heads, heads, (torch.ones(2, 4), torch.ones(2, 4)), *pools, lengths, 1.0, None),
        (torch.ones(3, 1, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8), None, *pools, torch.ones(3).long(), 1.0, None),
    ]
    for given in wrong:
        with pytest.raises(ValueError, match="give "):
            kernels.decode(*given)
    with pytest.raises(ValueError, match="give float32 rows"):
        kernels.norm(torch.ones(2, 8), torch.ones(8).bfloat16(), 1e-5, torch.float32)
    with pytest.raises(ValueError, match="give gates"):
        kernels.gate(torch.ones(2, 8), torch.ones(2, 7))
    with pytest.raises(ValueError, match="give more room"):
        Decode(Slots(2, 4), torch.tensor([1, 4]))


def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(tmp_path))
    code = "import torch; from prefero.rollout.native import kernels; " \
           "print(kernels.available(torch.device('cpu'), torch.float32))"  # fmt: skip

    def found() -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    assert found() == "True"
    (library,) = tmp_path.rglob("*.so")
    assert library.parent.stat().st_mode & 0o777 == 0o700
    library.write_bytes(b"not a library")
    library.chmod(0o666)
    assert found() == "True", "it is made anew"
    assert library.stat().st_size > 1000
    library.parent.chmod(0o777)
    library.write_bytes(b"not a library")
    assert found() == "True", "it is made elsewhere"
    assert library.read_bytes() == b"not a library"


@pytest.mark.parametrize("missing", [{"CXX": "no-such-compiler"}, {"CXX": "false"}, {"PREFERO_KERNELS": "0"}])
def test_without_a_compiler_torch_does_it(missing, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(tmp_path))
    for name, value in missing.items():
        monkeypatch.setenv(name, value)
    code = "import torch; from prefero.rollout.native import kernels; " \
           "print(kernels.available(torch.device('cpu'), torch.float32))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
    assert not list(tmp_path.rglob("*.so"))
