"""Weights below adapters in few bytes: what is computed, what learns, what is saved."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from prefero.deferral import defer_weights
from prefero.models.auto import AutoActor, AutoCritic, AutoRM
from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.frozen import FrozenLinear, keep_frozen, rounded, widened
from prefero.models.lora import lora_layers
from prefero.models.shared import NotSharedError, backbone_of, critic_on, reward_on, save_reward_adapter, sharing
from prefero.rollout.engine import SamplingParams
from prefero.rollout.native.engine import Bounds, NativeEngine
from prefero.strategies import NaiveStrategy
from prefero.types import Prompt
from tests.models.families import loud, stir_adapters
from tests.tiny import gpt2_config, llama_config, tiny_tokenizer

IDS = torch.tensor([[3, 1, 2, 5, 4, 6], [7, 2, 2, 3, 1, 1]])
CONFIGS = {"llama": llama_config, "gpt2": gpt2_config}
BOTH = pytest.mark.parametrize("family", sorted(CONFIGS))
FEW = pytest.mark.parametrize("kind", ["bf16", "int8"])


def actor_of(family: str, kind: str, train_bias: str = "none") -> Actor:
    network = loud(AutoModelForCausalLM.from_config(CONFIGS[family]()))
    actor: Actor = stir_adapters(Actor(network, lora_rank=4, lora_train_bias=train_bias)).eval()
    keep_frozen(actor, kind)
    return actor


def twin_of(actor: Actor) -> Actor:
    """The same numbers in float32 layers of the usual kind."""
    twin = deepcopy(actor)
    for layer in lora_layers(twin):
        base = layer.get_base_layer()
        wide = base.matrix(torch.float32)
        if base.turned:
            usual: nn.Module = Conv1D(base.out_features, base.in_features)
        else:
            usual = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        usual.weight, usual.bias = nn.Parameter(wide.t() if base.turned else wide, requires_grad=False), base.bias
        layer.base_layer = usual
    return twin


def loss(actor: Actor, precision: str) -> torch.Tensor:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.autocast("cpu", dtype, enabled=precision != "fp32"):
        logprobs: torch.Tensor = actor(IDS, 4)
    return (logprobs * torch.linspace(0.5, 2, 8).view(2, 4)).sum()


def learned(actor: Actor) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in actor.named_parameters() if parameter.requires_grad}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def test_a_matrix_is_rounded_by_its_outputs() -> None:
    weight = torch.randn(5, 300) * torch.tensor([[1e-30], [1.0], [50.0], [0.0], [1e30]])
    small, scale = rounded(weight)
    assert small.dtype is torch.int8 and scale.dtype is torch.float32 and scale.shape == (5, 1)
    far = (widened(small, scale, torch.float32) - weight).abs()
    assert bool((far <= 1.0001 * weight.abs().amax(1, keepdim=True) / 254).all())
    assert small.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite cannot be rounded"):
            rounded(torch.tensor([[1.0, value]]))


def test_matrices_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(48, 40)
    layer, inputs = FrozenLinear(linear, "int8"), torch.randn(2, 3, 48, requires_grad=True)
    found = []
    for piece in (1 << 20, 100, 1):
        monkeypatch.setattr("prefero.models.frozen._PIECE", piece)
        inputs.grad = None
        product = layer(inputs)
        product.square().sum().backward()
        found.append((product.detach(), inputs.grad, layer.matrix(torch.float64)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@BOTH
@FEW
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("train_bias", ["none", "lora_only"])
def test_what_is_computed_and_learned_is_that_of_float32_twins(
    family: str, kind: str, precision: str, train_bias: str
) -> None:
    actor = actor_of(family, kind, train_bias)
    twin = twin_of(actor)
    losses = [loss(one, precision) for one in (actor, twin)]
    tight = 1e-5 if precision == "fp32" else 1e-3
    torch.testing.assert_close(*losses, rtol=tight, atol=0)
    for one in losses:
        one.backward()
    ours, theirs = learned(actor), learned(twin)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("bias") for name in ours) is (family == "gpt2" and train_bias == "lora_only")
    far = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    assert max(far.values()) <= (1e-5 if precision == "fp32" else 2e-2), far
    full = actor_of(family, "fp32", train_bias)
    if not (kind == "bf16" and precision == "bf16"):
        assert float(loss(full, precision).detach() - losses[0].detach()) != 0, "it is rounded"


@BOTH
def test_bf16_changes_nothing_that_is_computed_in_bf16(family: str) -> None:
    full, half = actor_of(family, "fp32"), actor_of(family, "bf16")
    losses = [loss(actor, "bf16") for actor in (full, half)]
    assert torch.equal(*losses)
    for one in losses:
        one.backward()
    assert learned(full).keys() == learned(half).keys()
    for name, gradient in learned(full).items():
        assert torch.equal(gradient, learned(half)[name]), name


def test_scales_too_small_for_half_precision_are_kept() -> None:
    linear = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight.mul_(1e-4)
    layer = FrozenLinear(linear, "int8")
    scale = layer.int8_scale
    assert bool(((scale.half().float() - scale).abs() > 0.1 * scale).all()), "float16 would change them"
    inputs = torch.full((3, 64), 1e3).half()
    torch.testing.assert_close(layer(inputs).float(), linear(inputs.float()), rtol=2e-2, atol=2e-3)


@BOTH
def test_the_bytes_are_what_is_claimed_and_all_else_stays_what_it_was(family: str) -> None:
    full = actor_of(family, "fp32")
    numbers = sum(layer.get_base_layer().weight.numel() for layer in lora_layers(full))
    outputs = sum(layer.out_features for layer in lora_layers(full))

    def size(actor: Actor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*actor.parameters(), *actor.buffers()))

    rest = size(full) - 4 * numbers
    assert size(actor_of(family, "bf16")) == rest + 2 * numbers
    assert size(actor_of(family, "int8")) == rest + numbers + 4 * outputs
    whole, kept = full.state_dict(), actor_of(family, "int8").state_dict()
    others = {name for name in whole if not name.endswith("base_layer.weight")}
    assert others == {name for name in kept if not name.endswith(("base_layer.weight", "int8_scale"))}
    assert all(torch.equal(whole[name], kept[name]) and whole[name].dtype is torch.float32 for name in others)


@FEW
def test_a_model_is_read_a_layer_at_a_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loud(LlamaForCausalLM(llama_config(num_hidden_layers=4))).save_pretrained(tmp_path)
    filled: list[int] = []
    usual = Actor.fill
    monkeypatch.setattr(
        Actor,
        "fill",
        lambda self, part: (filled.append(sum(p.numel() for p in part.parameters() if p.is_meta)), usual(self, part))[
            1
        ],
    )
    actor = AutoActor(tmp_path, lora_rank=2, frozen=kind)
    assert len(filled) == 5 and len(set(filled[:4])) == 1 and filled[0] < sum(filled) / 4
    at_once = Actor(AutoModelForCausalLM.from_pretrained(tmp_path), lora_rank=2)
    keep_frozen(at_once, kind)
    own, other = actor.state_dict(), at_once.state_dict()
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert ".lora_A." in name or torch.equal(tensor, other[name]), name
        assert tensor.dtype is other[name].dtype
    assert bool(torch.isfinite(actor(IDS, 4)).all()) and actor.model.lm_head.weight.requires_grad is False


def test_where_weights_cannot_be_read_in_parts_they_are_read_as_a_whole(tmp_path: Path) -> None:
    model = loud(LlamaForCausalLM(llama_config()))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    actor = AutoActor(tmp_path, lora_rank=2, frozen="int8")
    base = actor.model.model.layers[0].mlp.up_proj.get_base_layer()
    assert torch.equal(base.weight, rounded(model.model.layers[0].mlp.up_proj.weight)[0])


@pytest.mark.parametrize("make", [AutoActor, AutoCritic, AutoRM])
def test_families_read_it_so(make: type, tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    for given in ({"pretrained": tmp_path}, {"config": llama_config()}):
        kinds = {name: p.dtype for name, p in make(**given, lora_rank=2, frozen="int8").named_parameters()}
        assert {dtype for name, dtype in kinds.items() if "base_layer" in name} == {torch.int8}
        assert {dtype for name, dtype in kinds.items() if "base_layer" not in name} == {torch.float32}


def test_a_judge_that_does_not_learn_needs_no_adapters(tmp_path: Path) -> None:
    judge = RewardModel(loud(LlamaForCausalLM(llama_config())))
    judge.save_pretrained(tmp_path, tiny_tokenizer())
    small = RewardModel.from_pretrained(tmp_path, frozen="int8")
    kept = [part for part in small.modules() if isinstance(part, FrozenLinear)]
    assert len(kept) == 7 * 2 and all(part.weight.dtype is torch.int8 for part in kept)
    assert isinstance(small.value_head, nn.Linear) and not isinstance(small.value_head, FrozenLinear)
    scores, wanted = small(IDS), RewardModel.from_pretrained(tmp_path)(IDS)
    torch.testing.assert_close(scores, wanted, rtol=0.2, atol=0.2)
    assert not torch.equal(scores, wanted)
    small.save_pretrained(tmp_path / "again", tiny_tokenizer())
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path / "again")(IDS), scores, rtol=1e-5, atol=1e-5)


@BOTH
@FEW
@pytest.mark.parametrize("copies", [True, False], ids=["copies", "no copies"])
def test_the_engine_samples_what_the_trainer_computes(family: str, kind: str, copies: bool) -> None:
    actor = actor_of(family, kind)
    prompts = [Prompt(f"p{i}", tuple(row), "") for i, row in enumerate(IDS.tolist())]
    engine = NativeEngine(actor, tiny_tokenizer(), Bounds(slots=2, copies=copies), ())
    for completion, prompt in zip(engine.generate(prompts, SamplingParams(8)), prompts, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        wanted = actor(ids, len(completion.token_ids))[0]
        torch.testing.assert_close(torch.tensor(completion.logprobs).float(), wanted, atol=1e-5, rtol=0)


@BOTH
@FEW
def test_the_export_is_base_and_adapter_in_float32(family: str, kind: str, tmp_path: Path) -> None:
    actor = actor_of(family, kind)
    actor.save_pretrained(tmp_path, tiny_tokenizer())
    plain = type(actor.model).from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(Actor(plain)(IDS, 4), actor(IDS, 4), rtol=1e-4, atol=1e-4)
    wanted = twin_of(actor).to_checkpoint(twin_of(actor).state_dict())
    found = plain.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_are_kept_apart_and_go_on(tmp_path: Path) -> None:
    actor = actor_of("llama", "int8")
    strategy = NaiveStrategy("cpu")
    strategy.save_model(actor, tmp_path / "merged.safetensors")
    with pytest.raises(ValueError, match="would lose what adapters have learned; use save_adapter and load_adapter"):
        strategy.load_model(actor, tmp_path / "merged.safetensors")
    actor.save_adapter(tmp_path / "adapter")
    again = actor_of("llama", "int8")
    stir_adapters(again, seed=9)
    assert not torch.equal(again(IDS, 4), actor(IDS, 4)) and not again.learned_before
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again(IDS, 4), actor(IDS, 4)) and again.learned_before
    with pytest.raises(ValueError, match="had learned before"), again.reference():
        pass
    critic = Critic(backbone_of(actor, with_adapters=True))
    stir_adapters(critic, seed=9)
    critic.load_adapter(tmp_path / "adapter")  # of the network around this trunk
    assert torch.equal(critic.model(IDS).last_hidden_state, actor.model.model(IDS).last_hidden_state)
    with pytest.raises(ValueError, match=r"rank 4 and alpha 4, the model's 2 and 2: use lora_rank=4 and lora_alpha=4"):
        Actor(LlamaForCausalLM(llama_config()), lora_rank=2).load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="the adapter is for other layers"):
        actor_of("gpt2", "int8").load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not describe an adapter"):
        again.load_adapter(tmp_path)


@FEW
def test_roles_share_what_is_kept_so(kind: str) -> None:
    actor = actor_of("gpt2", kind)
    reference, critic = sharing(actor), critic_on(actor, 3)
    own = {id(layer.get_base_layer().weight) for layer in lora_layers(actor)}
    for other in (reference, critic):
        assert {id(layer.get_base_layer().weight) for layer in lora_layers(other)} == own
    stir_adapters(critic)
    merged = critic.to_checkpoint(critic.state_dict())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    plain = Critic(type(critic.model)(critic.model.config), deepcopy(critic.value_head))
    plain.load_state_dict(merged, strict=False)
    hidden = [one.eval().model(IDS).last_hidden_state for one in (plain, critic)]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_a_critic_begins_with_adapters_that_had_learned(tmp_path: Path) -> None:
    actor = actor_of("llama", "int8")
    actor.save_adapter(tmp_path)
    actor.load_adapter(tmp_path)
    critic = critic_on(actor, 4)
    assert torch.equal(critic.model(IDS).last_hidden_state, actor.model.model(IDS).last_hidden_state)
    critic.save_adapter(tmp_path / "critic")
    learns = {id(p) for p in critic.parameters() if p.requires_grad}
    assert len(learns) == 2 + 2 * 7 * 2 and not learns & {id(p) for p in actor.parameters()}


def test_a_reward_model_stands_on_the_same_rounded_weights_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = loud(LlamaForCausalLM(llama_config()))
    judge = stir_adapters(RewardModel(deepcopy(network).model, lora_rank=4))
    keep_frozen(judge, "int8")
    save_reward_adapter(judge, tmp_path, judge.state_dict())
    policies = {kind: Actor(deepcopy(network), lora_rank=4) for kind in ("int8", "fp32")}
    for kind, actor in policies.items():
        keep_frozen(actor, kind)
    assert torch.equal(reward_on(policies["int8"], tmp_path)(IDS), judge(IDS))
    with pytest.raises(NotSharedError, match="other weights"):
        reward_on(policies["fp32"], tmp_path)


def test_layers_with_ways_of_their_own_are_left_alone() -> None:
    class Loud(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(inputs)

    network = LlamaForCausalLM(llama_config())
    network.model.layers[0].mlp.down_proj = Loud(64, 32, bias=False)
    actor = Actor(network, lora_rank=2)
    keep_frozen(actor, "int8")
    kept = [type(layer.mlp.down_proj.get_base_layer()) for layer in actor.model.model.layers]
    assert kept == [Loud, FrozenLinear]


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="frozen='int4': choose one of fp32, bf16, int8"):
        AutoActor(config=llama_config(), lora_rank=2, frozen="int4")
    with pytest.raises(ValueError, match="give a lora_rank"):
        AutoActor(config=llama_config(), frozen="int8")
    with defer_weights(), pytest.raises(ValueError, match="leave shard_init off, or use fp32"):
        AutoActor(config=llama_config(), lora_rank=2, frozen="int8")
