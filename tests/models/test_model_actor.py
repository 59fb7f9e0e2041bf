"""The actor's log-probabilities are the Hugging Face model's, whatever the padding."""

from copy import deepcopy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from prefero.functional.logprobs import selected
from prefero.models import base
from prefero.models.base import Actor
from prefero.models.lora import apply_lora
from prefero.models.trunk import disable_dropout, freeze, full_precision_head, head_is_plain, replaced
from tests.models.families import FAMILIES, Family, loud, padded, tokens
from tests.tiny import gpt2_config, llama_config, tiny_llama

PADS = [(0, 4, 0), (3, 0, 0), (2, 3, 0), (5, 1, 2)]  # left, right, pad id (2 is the EOS)


def by_hand(model: torch.nn.Module, ids: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    logs = torch.log_softmax(model(ids).logits.double()[:, :-1] / temperature, dim=-1)
    return logs.gather(-1, ids[:, 1:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_logprobs_and_entropies_are_those_of_the_hugging_face_model(family: Family) -> None:
    actor = loud(family.actor(config=family.config()))
    ids = tokens()
    logprobs, entropy = actor(ids, 5, temperature=0.7, return_entropy=True)
    expected, expected_entropy = by_hand(actor.model, ids, 0.7)
    assert logprobs.shape == (3, 5)
    torch.testing.assert_close(logprobs.double(), expected[:, -5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy[:, -5:], atol=1e-5, rtol=0)
    assert expected_entropy.min() < 2.5, "a nearly uniform model proves nothing"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_language_model_scores_every_token(family: Family) -> None:
    model = loud(family.lm(config=family.config()))
    ids = tokens()
    logprobs = model(ids)
    torch.testing.assert_close(logprobs[:, 1:].double(), by_hand(model.model, ids)[0], atol=1e-5, rtol=0)
    assert logprobs[:, 0].eq(0).all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize(("left", "right", "pad"), PADS)
def test_padding_changes_no_logprob(family: Family, left: int, right: int, pad: int) -> None:
    actor = loud(family.actor(config=family.config()))
    ids = tokens()
    alone = actor(ids, 4)
    surrounded, mask = padded(ids, left, right, pad)
    together = actor(surrounded, 4 + right, mask)
    torch.testing.assert_close(together[:, :4], alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_rows_of_one_batch_do_not_see_each_other(family: Family) -> None:
    actor = loud(family.actor(config=family.config()))
    long, short = tokens(1, 9), tokens(1, 6, seed=5)
    padded_short, mask = padded(short, 3, 0, 2)
    both = actor(torch.cat([long, padded_short]), 3, torch.cat([torch.ones_like(long), mask]))
    torch.testing.assert_close(both, torch.cat([actor(long, 3), actor(short, 3)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_gradients_are_those_of_the_full_logits(family: Family) -> None:
    actor = loud(family.actor(config=family.config()))
    ids = tokens()
    actor(ids, 5).sum().backward()
    ours = {name: p.grad.clone() for name, p in actor.model.named_parameters() if p.grad is not None}
    actor.zero_grad()
    by_hand(actor.model, ids)[0][:, -5:].sum().backward()
    assert ours
    for name, parameter in actor.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_the_head_is_applied_to_the_masked_in_positions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = loud(Actor(tiny_llama()))
    ids, mask = tokens(), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    rows: list[int] = []

    def counting(hidden: torch.Tensor, *arguments: object, **options: object) -> object:
        rows.append(len(hidden))
        return selected(hidden, *arguments, **options)

    monkeypatch.setattr(base.lp, "selected", counting)
    logprobs, entropy = actor(ids, 4, return_entropy=True, action_mask=mask)
    whole, whole_entropy = actor(ids, 4, return_entropy=True)
    assert rows == [4, 12]
    assert not logprobs[~mask].any() and not entropy[~mask].any()
    torch.testing.assert_close(logprobs[mask], whole[mask])
    torch.testing.assert_close(entropy[mask], whole_entropy[mask])
    partly = torch.autograd.grad(logprobs.sum(), list(actor.parameters()))
    for one, other in zip(partly, torch.autograd.grad(whole[mask].sum(), list(actor.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    nothing = actor(ids, 4, action_mask=torch.zeros_like(mask))
    assert nothing.shape == mask.shape and not nothing.any()
    nothing.sum().backward()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_may_have_its_head_on_the_response_only(family: Family) -> None:
    assert head_is_plain(loud(family.actor(config=family.config()).model))


@pytest.mark.parametrize(("cap", "is_loud"), [(2.0, True), (30.0, True), (30.0, False)])
def test_soft_capped_logits_take_the_long_way_and_are_right(cap: float, is_loud: bool) -> None:
    config = Gemma2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=cap, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    network = Gemma2ForCausalLM(config).eval()
    actor = Actor(loud(network) if is_loud else network)
    ids = tokens()
    with replaced(full_precision_head(network)):  # whoever holds the head's forward gets it back
        held = vars(network.lm_head)["forward"]
        assert not head_is_plain(actor.model)
        assert vars(network.lm_head)["forward"] is held
    assert not head_is_plain(actor.model) and "forward" not in vars(network.lm_head)
    logprobs, entropy = actor(ids, 4, return_entropy=True)
    expected, expected_entropy = by_hand(actor.model, ids)
    torch.testing.assert_close(logprobs.double(), expected[:, -4:], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy[:, -4:], atol=1e-5, rtol=0)
    mask = torch.tensor([[True, False, True, True]] * 3)
    for given, whole in zip(actor(ids, 4, return_entropy=True, action_mask=mask), (logprobs, entropy), strict=True):
        assert torch.equal(given, torch.where(mask, whole, 0.0))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_training_mode_is_no_different_because_dropout_is_off(family: Family) -> None:
    actor = loud(family.actor(config=family.config())).train()
    ids = tokens()
    assert torch.equal(actor(ids, 5), actor(ids, 5))
    assert torch.equal(actor(ids, 5), actor.eval()(ids, 5))


def test_dropout_stays_when_asked_for() -> None:
    from prefero.models.gpt import GPTActor

    actor = GPTActor(config=gpt2_config(), dropout=True).train()
    ids = tokens()
    assert not torch.equal(actor(ids, 5), actor(ids, 5))
    assert torch.equal(disable_dropout(actor)(ids, 5), actor(ids, 5))


def test_deepcopy_is_independent_also_with_adapters() -> None:
    ids = tokens()
    for rank in (0, 2):
        actor = Actor(loud(tiny_llama()), lora_rank=rank)
        copy = deepcopy(actor)
        before = copy(ids, 4).detach()
        with torch.no_grad():
            for parameter in actor.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        assert torch.equal(copy(ids, 4), before)
        assert not torch.equal(actor(ids, 4), before)


def test_frozen_actor_learns_nothing_and_gives_a_contiguous_input_to_its_head() -> None:
    actor = freeze(Actor(tiny_llama()))
    seen: list[torch.Tensor] = []
    head = actor.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    head(torch.randn(2, 6, 32)[:, 1:4])
    assert seen[0].is_contiguous()
    assert not any(p.requires_grad for p in actor.parameters())
    assert not actor.training


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from prefero.models.llama import LlamaActor

    plain = loud(LlamaActor(config=llama_config())).train()
    saving = LlamaActor(config=llama_config(), checkpoint=True).train()
    saving.load_state_dict(plain.state_dict())
    passes = {plain: 0, saving: 0}
    for actor in (plain, saving):

        def count(*_: object, actor: object = actor) -> None:
            passes[actor] += 1

        actor.model.model.layers[0].input_layernorm.register_forward_hook(count)
        actor(tokens(), 5).sum().backward()
    # The first call of an actor also tries its head; the extra pass of the saving one is the recomputation.
    assert passes[saving] == passes[plain] + 1
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_explained() -> None:
    actor = Actor(tiny_llama())
    with pytest.raises(ValueError, match="num_actions=9 must be between 1 and 8"):
        actor(tokens(), 9)
    with pytest.raises(ValueError, match=r"130 tokens does not fit the model's context of 128"):
        actor(tokens(1, 130), 3)
    with pytest.raises(ValueError, match="no language-model head"):
        Actor(tiny_llama().model)
    with pytest.raises(ValueError, match="lora_train_bias='some'"):
        apply_lora(tiny_llama(), 2, "some")


def test_padding_beyond_the_context_is_not_text() -> None:
    actor = Actor(loud(tiny_llama()))
    ids = tokens()
    surrounded, mask = padded(ids, 125, 0, 0)
    torch.testing.assert_close(actor(surrounded, 4, mask), actor(ids, 4), atol=1e-5, rtol=0)
