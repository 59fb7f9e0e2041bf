"""NaiveStrategy: what prepare takes and gives, steps that survive bad gradients, checkpoints that come back."""

import math
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prefero.models.base import Actor, Critic, RewardModel
from prefero.optimizer import CPUAdam, HybridAdam
from prefero.strategies import NaiveStrategy, Strategy
from prefero.strategies.scaling import LossScale
from prefero.trainer.strategies import NaiveStrategy as Seeds
from tests.models.families import FAMILIES, Family, loud, stir_adapters, tokens
from tests.tiny import tiny_llama


@pytest.fixture
def strategy() -> NaiveStrategy:
    return NaiveStrategy("cpu")


def step(strategy: Strategy, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    strategy.backward(model(tokens(), 4).sum(), model, optimizer)
    return strategy.optimizer_step(optimizer)


def test_prepare_keeps_order_and_unwraps_a_single_argument(strategy: NaiveStrategy) -> None:
    assert Seeds is NaiveStrategy
    actor, critic, reward = Actor(tiny_llama()), Critic(tiny_llama()), RewardModel(tiny_llama())
    actor_optim, critic_optim = HybridAdam(actor.parameters()), HybridAdam(critic.parameters())
    (a, ao), (c, co), r = strategy.prepare((actor, actor_optim), (critic, critic_optim), reward)
    assert (type(a), type(c), type(r)) == (Actor, Critic, RewardModel)
    assert (ao, co) == (actor_optim, critic_optim)
    assert isinstance(strategy.prepare(actor), Actor)
    pair = strategy.prepare((actor, actor_optim))
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    before = a.model.lm_head.weight.detach().clone()
    step(strategy, a, ao)
    assert not torch.equal(before, a.model.lm_head.weight)
    assert Strategy._unwrap_actor(a) is a.model
    assert Strategy._unwrap_model(a) is a


def test_prepare_explains_wrong_arguments(strategy: NaiveStrategy) -> None:
    actor = Actor(tiny_llama())
    optim = HybridAdam(actor.parameters())
    with pytest.raises(ValueError, match="tuple of 3"):
        strategy.prepare((actor, optim, None))
    with pytest.raises(TypeError, match=r"not \(HybridAdam, Actor\)"):
        strategy.prepare((optim, actor))
    with pytest.raises(TypeError, match="not str"):
        strategy.prepare("actor")
    with pytest.raises(TypeError, match="not HybridAdam"):
        strategy.prepare(optim)
    with pytest.raises(ValueError, match="at least one"):
        strategy.prepare()


def test_a_step_returns_the_norm_before_clipping_and_clears_gradients(strategy: NaiveStrategy) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    assert strategy.optimizer_step(optimizer, max_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))
    assert weight.grad is None
    weight.grad = torch.tensor([3.0, 4.0])
    assert strategy.optimizer_step(optimizer) == pytest.approx(5.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-3.6, -4.8]))
    clipping = NaiveStrategy("cpu", max_norm=0.5)
    weight.grad = torch.tensor([3.0, 4.0])
    clipping.optimizer_step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([-3.9, -5.2]))
    assert strategy.skipped_steps == 0
    assert strategy.optimizer_step(optimizer) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_step_with_a_bad_gradient_is_skipped_and_counted(
    strategy: NaiveStrategy, bad: float, max_norm: float
) -> None:
    actor = Actor(tiny_llama())
    optimizer = HybridAdam(actor.parameters(), lr=0.1)
    step(strategy, actor, optimizer)
    before, state = deepcopy(actor.state_dict()), deepcopy(optimizer.state_dict())
    strategy.backward(actor(tokens(), 4).sum(), actor, optimizer)
    actor.model.lm_head.weight.grad[3, 4] = bad
    assert not math.isfinite(strategy.optimizer_step(optimizer, max_norm))
    assert strategy.skipped_steps == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in actor.state_dict().items())
    assert str(optimizer.state_dict()) == str(state)
    assert all(p.grad is None for p in actor.parameters())
    step(strategy, actor, optimizer)
    assert all(p.isfinite().all() for p in actor.parameters())


def test_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with NaiveStrategy("cpu").autocast():
        assert layer(x).dtype == torch.float32
    strategy = NaiveStrategy("cpu", precision="bf16")
    with strategy.autocast():
        assert layer(x).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    actor, critic, reward = Actor(tiny_llama()), loud(Critic(tiny_llama())), loud(RewardModel(tiny_llama()))
    with strategy.autocast():
        for output in (actor(tokens(), 4), critic(tokens(), 4), reward(tokens())):
            assert output.dtype == torch.float32
            assert not torch.equal(output, output.bfloat16().float()), "the head itself is not in half precision"
        half = actor(tokens(), 4)
    torch.testing.assert_close(half, actor(tokens(), 4), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="precision='fp8'"):
        NaiveStrategy("cpu", precision="fp8")  # type: ignore[arg-type]


def test_devices() -> None:
    assert NaiveStrategy().device.type == ("cuda" if torch.cuda.is_available() else NaiveStrategy().device.type)
    with pytest.raises(ValueError, match="device='toaster' is not a device"):
        NaiveStrategy("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not on this machine"):
            NaiveStrategy("cuda")


def test_single_process_sums_are_the_tensor_itself(strategy: NaiveStrategy) -> None:
    assert strategy.sum(torch.tensor(3.0)).item() == 3.0
    assert strategy.is_rank_0
    with strategy.model_init_context():
        assert Actor(tiny_llama())(tokens(), 2).shape == (3, 2)


class _Buffer:
    sample_batch_size = 4

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index

    @staticmethod
    def collate_fn(items: list[int]) -> list[int]:
        return sorted(items)


def test_buffer_batches_are_shuffled_and_leave_no_row_out(strategy: NaiveStrategy) -> None:
    batches = list(strategy.setup_dataloader(_Buffer(11)))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    rows = [item for batch in batches for item in batch]
    assert rows != list(range(11))
    assert sorted(rows) == list(range(11))


# Checkpoints


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_models_come_back(strategy: NaiveStrategy, family: Family, suffix: str, tmp_path: Path) -> None:
    ids = tokens()
    kinds = [(family.actor, (ids, 4)), (family.critic, (ids, 4)), (family.reward_model, (ids,))]
    for kind, arguments in kinds:
        model, path = loud(kind(config=family.config())), tmp_path / f"{kind.__name__}{suffix}"
        strategy.save_model(model, path, only_rank0=True)
        fresh = kind(config=family.config())
        assert not torch.equal(fresh(*arguments), model(*arguments))
        strategy.load_model(fresh, path)
        assert torch.equal(fresh(*arguments), model(*arguments))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [suffix] * 3, "no part files are left"


def test_an_actors_file_is_a_plain_float32_hugging_face_state(strategy: NaiveStrategy, tmp_path: Path) -> None:
    for rank in (0, 2):
        actor = stir_adapters(loud(Actor(tiny_llama(), lora_rank=rank)))
        for parameter in actor.parameters():
            parameter.data = parameter.data.bfloat16().float()
        expected = actor(tokens(), 4)
        for parameter in actor.parameters():
            parameter.data = parameter.data.bfloat16()
        strategy.save_model(actor, tmp_path / "actor.pt")
        state = torch.load(tmp_path / "actor.pt", weights_only=True)
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        plain = tiny_llama()
        plain.load_state_dict(state)
        torch.testing.assert_close(Actor(plain)(tokens(), 4), expected, atol=1e-5, rtol=1e-5)


def test_any_module_can_be_stored_in_float32(strategy: NaiveStrategy, tmp_path: Path) -> None:
    module = nn.Linear(3, 2).bfloat16()
    strategy.save_model(module, tmp_path / "m.pt")
    assert {t.dtype for t in torch.load(tmp_path / "m.pt", weights_only=True).values()} == {torch.float32}
    fresh = nn.Linear(3, 2)
    strategy.load_model(fresh, tmp_path / "m.pt")
    assert torch.equal(fresh.weight, module.weight.float())


@pytest.mark.parametrize("kind", [Actor, Critic, RewardModel])
def test_saving_with_adapters_does_not_end_the_training(
    strategy: NaiveStrategy, kind: type[Actor | Critic | RewardModel], tmp_path: Path
) -> None:
    model = stir_adapters(loud(kind(tiny_llama(), lora_rank=2)))
    arguments = (tokens(),) if kind is RewardModel else (tokens(), 4)
    names, expected = list(model.state_dict()), model(*arguments).detach()
    strategy.save_model(model, tmp_path / "m.pt")
    assert list(model.state_dict()) == names
    assert torch.equal(model(*arguments), expected)
    strategy.load_model(model, tmp_path / "m.pt")  # back into the adapted model itself
    torch.testing.assert_close(model(*arguments), expected, atol=1e-5, rtol=1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad]
    other = stir_adapters(kind(tiny_llama(), lora_rank=3), seed=9)
    strategy.load_model(other, tmp_path / "m.pt")
    torch.testing.assert_close(other(*arguments), expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_stay_tied_and_one_name_is_enough(strategy: NaiveStrategy, tmp_path: Path) -> None:
    actor = loud(Actor(tiny_llama(tie_word_embeddings=True)))
    strategy.save_model(actor, tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "less.pt")
    for file, strict in (("m.pt", True), ("less.pt", True), ("less.pt", False)):
        fresh = Actor(tiny_llama(tie_word_embeddings=True))
        strategy.load_model(fresh, tmp_path / file, strict=strict)
        assert fresh.model.lm_head.weight is fresh.model.model.embed_tokens.weight
        assert torch.equal(fresh(tokens(), 4), actor(tokens(), 4))


def test_optimizers_come_back_and_go_on_alike(strategy: NaiveStrategy, tmp_path: Path) -> None:
    actor = Actor(tiny_llama())
    optimizer = HybridAdam(actor.parameters(), lr=0.01)
    step(strategy, actor, optimizer)
    strategy.save_model(actor, tmp_path / "m.pt")
    strategy.save_optimizer(optimizer, tmp_path / "o.pt", only_rank0=True)
    step(strategy, actor, optimizer)
    other = Actor(tiny_llama())
    other_optimizer = HybridAdam(other.parameters(), lr=0.5)
    strategy.load_model(other, tmp_path / "m.pt", strict=False)
    strategy.load_optimizer(other_optimizer, tmp_path / "o.pt")
    assert other_optimizer.param_groups[0]["lr"] == 0.01
    step(strategy, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), other.parameters(), strict=True))


def test_files_that_do_not_fit_are_named(strategy: NaiveStrategy, tmp_path: Path) -> None:
    actor = Actor(tiny_llama())
    strategy.save_model(Actor(tiny_llama(hidden_size=16)), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"small\.pt does not fit the Actor.*size mismatch"):
        strategy.load_model(actor, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"none\.pt does not exist"):
        strategy.load_model(actor, tmp_path / "none.pt")
    strategy.save_optimizer(HybridAdam(list(actor.parameters())[:2]), tmp_path / "o.pt")
    with pytest.raises(ValueError, match=r"o\.pt does not fit the optimizer"):
        strategy.load_optimizer(HybridAdam(actor.parameters()), tmp_path / "o.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt does not fit the optimizer"):
        strategy.load_optimizer(HybridAdam(actor.parameters()), tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold named tensors"):
        strategy.load_model(actor, tmp_path / "list.pt")


def test_optimizer_states_of_other_shapes_are_refused(strategy: NaiveStrategy, tmp_path: Path) -> None:
    actor = Actor(tiny_llama())
    optimizer = HybridAdam(actor.parameters())
    step(strategy, actor, optimizer)
    state = optimizer.state_dict()
    torch.save(state | {"sharded": {"rank": 1, "world_size": 2}}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="part 1 of 2 of a sharded optimizer"):
        strategy.load_optimizer(HybridAdam(actor.parameters()), tmp_path / "part.pt")
    entry = state["state"][0]
    state["state"][0] = {kind: value[:1] if value.dim() else value for kind, value in entry.items()}
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half\.pt does not fit the optimizer: it holds exp_avg.* of shape"):
        strategy.load_optimizer(HybridAdam(actor.parameters()), tmp_path / "half.pt")


def test_optimizers_with_states_of_shapes_of_their_own_come_back(strategy: NaiveStrategy, tmp_path: Path) -> None:
    actor = Actor(tiny_llama())
    optimizer = torch.optim.Adafactor(actor.parameters())
    step(strategy, actor, optimizer)
    strategy.save_optimizer(optimizer, tmp_path / "o.pt")
    other = torch.optim.Adafactor(actor.parameters())
    strategy.load_optimizer(other, tmp_path / "o.pt")
    for parameter, kept in optimizer.state.items():
        torch.testing.assert_close(other.state[parameter], kept)


def test_a_file_of_something_else_is_refused_also_when_not_strict(strategy: NaiveStrategy, tmp_path: Path) -> None:
    torch.save({"bias": torch.zeros(2)}, tmp_path / "else.pt")
    for model in (Actor(tiny_llama()), Actor(tiny_llama(), lora_rank=2), nn.Embedding(2, 2)):
        with pytest.raises(ValueError, match="it has none of the model's weights"):
            strategy.load_model(model, tmp_path / "else.pt", strict=False)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_torn_files_are_named(strategy: NaiveStrategy, suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    strategy.save_model(Actor(tiny_llama()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=str(path)):
        strategy.load_model(Actor(tiny_llama()), path)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_wants_to_run_code_is_refused(strategy: NaiveStrategy, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": _Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    actor = Actor(tiny_llama())
    with pytest.raises(ValueError, match=r"evil\.pt is refused"):
        strategy.load_model(actor, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is refused"):
        strategy.load_optimizer(HybridAdam(actor.parameters()), tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(
    strategy: NaiveStrategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    strategy.save_model(Actor(tiny_llama()), path)
    before = path.read_bytes()

    def broken(_content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        strategy.save_model(loud(Actor(tiny_llama())), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_only_rank_0_writes(strategy: NaiveStrategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    actor = Actor(tiny_llama())
    strategy.save_model(actor, tmp_path / "m.pt", only_rank0=True)
    strategy.save_optimizer(HybridAdam(actor.parameters()), tmp_path / "o.pt", only_rank0=True)
    assert not list(tmp_path.iterdir())


# Adam


def run_adam(optimizer_of: object, steps: int = 5) -> Iterator[torch.Tensor]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    optimizer = optimizer_of(weights)  # type: ignore[operator]
    for _ in range(steps):
        for weight in weights:
            weight.grad = weight.detach().sin()
        optimizer.step()
    return (weight.detach() for weight in weights)


@pytest.mark.parametrize("kind", [HybridAdam, CPUAdam])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_the_published_rule(kind: type[HybridAdam], decay: float) -> None:
    ours = run_adam(lambda w: kind(w, lr=0.01, weight_decay=decay))
    theirs = run_adam(lambda w: torch.optim.AdamW(w, lr=0.01, weight_decay=decay, foreach=False, fused=False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    coupled = run_adam(lambda w: kind(w, lr=0.01, weight_decay=decay, adamw_mode=False))
    theirs = run_adam(lambda w: torch.optim.Adam(w, lr=0.01, weight_decay=decay, foreach=False, fused=False))
    for a, b in zip(coupled, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_moments_in_main_memory_change_nothing(
    strategy: NaiveStrategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[nn.Parameter] = []
    whole = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *further: Any) -> Any:
        stepped.extend(p for group in self.param_groups for p in group["params"])
        return whole(self, *further)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    plain, away = (Actor(tiny_llama()) for _ in range(2))
    away.load_state_dict(plain.state_dict())
    usual = HybridAdam(plain.parameters(), lr=0.01, weight_decay=0.1)
    kept = HybridAdam(away.parameters(), lr=0.01, weight_decay=0.1, states_on_cpu=True)
    for _ in range(3):
        step(strategy, plain, usual)
        assert {id(p) for p in stepped} == {id(p) for p in plain.parameters()}
        stepped.clear()
        step(strategy, away, kept)
        assert stepped and not {id(p) for p in stepped} & {id(p) for p in away.parameters()}, "these are copies"
        stepped.clear()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), away.parameters(), strict=True))
    assert [id(p) for group in kept.param_groups for p in group["params"]] == [id(p) for p in away.parameters()]
    assert {id(p) for p in kept.state} == {id(p) for p in away.parameters()}
    strategy.save_optimizer(kept, tmp_path / "o.pt")
    strategy.load_optimizer(usual, tmp_path / "o.pt")
    with pytest.raises(ValueError, match="nvme_offload_dir='x' is not supported"):
        HybridAdam(away.parameters(), nvme_offload_dir="x")


def test_a_gradient_is_divided_by_the_factor_it_was_multiplied_with() -> None:
    """Two models behind one loss scale, both backwards before both steps, and the first step lets the scale grow."""
    strategy = NaiveStrategy("cpu", precision="fp16", loss_scale=LossScale(initial_scale=8.0, growth_interval=1))
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    optimizers = [HybridAdam(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        strategy.backward(model.weight.sum(), model, optimizer)
    assert [strategy.optimizer_step(optimizer) for optimizer in optimizers] == [1.0, 1.0]


def test_adam_defaults_and_groups() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = HybridAdam([{"params": [weight], "lr": 0.5}])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.9, 0.999), 1e-8, 0.0)
    assert group["fused"]
    assert group["decoupled_weight_decay"]
    with pytest.raises(ValueError, match="bias_correction=False"):
        HybridAdam([weight], bias_correction=False)
    with pytest.raises(ValueError, match=r"nvme_offload_fraction=0\.5"):
        HybridAdam([weight], nvme_offload_fraction=0.5)
