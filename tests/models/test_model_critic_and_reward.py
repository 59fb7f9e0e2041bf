"""Critics value the state before each action; reward models read the last real token."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, DebertaV2Config

from prefero.models.base import Critic, RewardModel
from prefero.models.deberta import DebertaCritic, DebertaRM
from prefero.models.gpt import GPTCritic
from prefero.models.llama import LlamaRM
from prefero.models.trunk import left_align
from tests.models.families import FAMILIES, Family, loud, padded, tokens
from tests.models.test_model_actor import PADS
from tests.tiny import gpt2_config, llama_config, tiny_llama


def loud_critic(family: Family, **options: object) -> Critic:
    critic = loud(family.critic(config=family.config(), **options))
    assert isinstance(critic, Critic)
    return critic


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_value_is_the_head_on_the_state_before_the_action(family: Family) -> None:
    critic = loud_critic(family)
    ids = tokens()
    hidden = critic.model(input_ids=ids).last_hidden_state
    expected = critic.value_head(hidden).squeeze(-1)[:, -5:-1]
    torch.testing.assert_close(critic(ids, 4), expected, atol=1e-5, rtol=0)
    assert torch.equal(critic(ids, torch.ones(3, 4, dtype=torch.bool)), critic(ids, 4))
    assert torch.equal(critic(ids, action_mask=torch.ones(3, 4)), critic(ids, 4))
    assert expected.std() > 0.05


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_value_does_not_see_its_own_action(family: Family) -> None:
    critic = loud_critic(family)
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1 - 3) % 29 + 3
    assert torch.equal(critic(ids, 3), critic(changed, 3))
    changed[:, -2] = (changed[:, -2] + 1 - 3) % 29 + 3
    assert not torch.equal(critic(ids, 3), critic(changed, 3))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize(("left", "right", "pad"), PADS)
@pytest.mark.parametrize(
    "options", [{}, {"level": "sequence"}, {"level": "sequence", "use_action_mask": True}], ids=str
)
def test_padding_changes_no_value(family: Family, left: int, right: int, pad: int, options: dict[str, object]) -> None:
    critic = loud_critic(family, **options)
    ids = tokens()
    alone = critic(ids, 4)
    surrounded, mask = padded(ids, left, right, pad)
    # Without a mask of the actions the mean runs over all real positions but the last column: keep that one the same.
    if options.get("level") == "sequence" and "use_action_mask" not in options and right:
        alone = critic(*_with_padding_column(ids))
    together = critic(surrounded, 4 + right, mask)
    torch.testing.assert_close(together[:, :4] if not options else together, alone, atol=1e-5, rtol=0)


def _with_padding_column(ids: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    surrounded, mask = padded(ids, 0, 1, 0)
    return surrounded, 5, mask


def test_sequence_level_is_the_seeds_mean() -> None:
    ids = tokens()
    critic = loud(GPTCritic(config=gpt2_config(), level="sequence"))
    values = critic.value_head(critic.model(input_ids=ids).last_hidden_state).squeeze(-1)
    torch.testing.assert_close(critic(ids), values[:, :-1].mean(1), atol=1e-6, rtol=0)
    critic.use_action_mask = True
    torch.testing.assert_close(critic(ids, torch.ones(3, 4)), values[:, :-4].mean(1), atol=1e-6, rtol=0)


def test_a_new_critic_values_everything_at_zero_and_has_no_language_model_head() -> None:
    critic = GPTCritic(config=gpt2_config())
    assert critic(tokens(), 4).eq(0).all()
    assert type(critic.model).__name__ == "GPT2Model"
    assert Critic(tiny_llama())(tokens(), 4).eq(0).all()


def test_critic_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match="num_actions is missing"):
        GPTCritic(config=gpt2_config())(tokens())
    with pytest.raises(ValueError, match="level='word'"):
        GPTCritic(config=gpt2_config(), level="word")
    with pytest.raises(ValueError, match="out_features=1, not 2"):
        Critic(tiny_llama(), nn.Linear(32, 2))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize(("left", "right", "pad"), [(0, 0, 0), *PADS])
def test_the_reward_is_read_at_the_last_real_token(family: Family, left: int, right: int, pad: int) -> None:
    model = loud(family.reward_model(config=family.config()))
    ids = tokens()
    ids[:, -1] = 2  # texts end with EOS, which may be the pad id too
    expected = model.value_head(model.model(input_ids=ids).last_hidden_state)[:, -1, 0]
    torch.testing.assert_close(model(*padded(ids, left, right, pad)), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05


@pytest.mark.parametrize("left", [False, True])
def test_many_texts_are_judged_in_parts_of_like_length(left: bool) -> None:
    model = loud(LlamaRM(config=llama_config()))
    lengths = [3 + 7 * i % 29 for i in range(40)]
    ids = tokens(40, 32)
    steps = torch.arange(32).expand(40, 32)
    ends = torch.tensor(lengths)[:, None]
    mask = (steps >= 32 - ends if left else steps < ends).long()
    read = 0

    def count(_module: nn.Module, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal read
        read += inputs["input_ids"].numel()

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    together = model(ids, mask)
    assert sum(lengths) < read < 1.3 * sum(lengths) < ids.numel()
    alone = torch.cat([model(row[None, kept.bool()]) for row, kept in zip(ids, mask, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.05


def test_a_fresh_reward_head_has_the_published_spread_and_no_bias() -> None:
    heads = [LlamaRM(config=llama_config(hidden_size=256)).value_head for _ in range(8)]
    weights = torch.cat([head.weight.flatten() for head in heads if isinstance(head, nn.Linear)])
    assert len(weights) == 8 * 256
    assert weights.std().item() == pytest.approx(257**-0.5, rel=0.1)
    assert all(head is not None and head.bias is None for head in heads)


def test_reward_model_from_a_critics_parts_as_in_the_seeds_readme() -> None:
    critic = GPTCritic(config=gpt2_config())
    loud(critic)
    reward_model = RewardModel(deepcopy(critic.model), deepcopy(critic.value_head))
    ids = tokens()
    assert reward_model(ids).shape == (3,)
    # The critic's value of the state after the last token is this model's reward.
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    torch.testing.assert_close(reward_model(ids), critic(longer, 1)[:, 0], atol=1e-6, rtol=0)


def test_reward_mistakes_are_explained() -> None:
    model = LlamaRM(config=llama_config())
    mask = torch.ones(3, 9)
    mask[1] = 0
    with pytest.raises(ValueError, match="without any real token"):
        model(tokens(), mask)
    with pytest.raises(ValueError, match="out_features=1, not 3"):
        RewardModel(tiny_llama().model, nn.Linear(32, 3))
    with pytest.raises(ValueError, match="pooling='mean'"):
        RewardModel(tiny_llama().model, pooling="mean")  # type: ignore[arg-type]


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                      max_position_embeddings=64, num_labels=1)  # fmt: skip


def deberta_config() -> DebertaV2Config:
    return DebertaV2Config(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=64, max_position_embeddings=64, relative_attention=True,
                           pos_att_type=["p2c", "c2p"])  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "deberta", "bare"])
@pytest.mark.parametrize(("left", "right", "pad"), PADS)
def test_encoders_judge_texts_whatever_the_padding(kind: str, left: int, right: int, pad: int) -> None:
    if kind == "bert":
        model = RewardModel(loud(BertForSequenceClassification(bert_config()).eval()))
        assert model.pooling == "cls"
        assert model.value_head is None
    elif kind == "deberta":
        model = loud(DebertaRM(config=deberta_config())).eval()
    else:
        model = RewardModel(loud(BertModel(bert_config()).eval()), pooling="cls")
    ids = tokens()
    alone = model(ids)
    torch.testing.assert_close(model(*padded(ids, left, right, pad)), alone, atol=1e-5, rtol=0)
    if kind == "bert":
        torch.testing.assert_close(alone, model.model(input_ids=ids).logits[:, 0])
    assert alone.std() > 0.01


def test_encoder_adapters_leave_the_classification_head_learning() -> None:
    model = RewardModel(BertForSequenceClassification(bert_config()), lora_rank=2)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"model.classifier.weight", "model.classifier.bias"} <= learning
    assert all(".lora_" in name or "classifier" in name for name in learning)


def test_deberta_critic_is_of_sequences_and_blind_to_the_answer() -> None:
    critic = loud(DebertaCritic(config=deberta_config())).eval()
    ids = tokens()
    changed = ids.clone()
    changed[:, -3:] = (changed[:, -3:] + 1 - 3) % 29 + 3
    assert torch.equal(critic(ids, 3), critic(changed, 3))
    changed[:, 2] = 5
    changed[:, 3] = 6
    assert not torch.equal(critic(ids, 3), critic(changed, 3))
    with pytest.raises(ValueError, match="level='sequence'"):
        Critic(BertModel(bert_config()))


def test_rows_are_rolled_to_the_left() -> None:
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    rolled, rolled_mask = left_align(ids, mask)
    assert rolled.tolist() == [[7, 8, 0, 0], [5, 6, 0, 0]]
    assert rolled_mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
