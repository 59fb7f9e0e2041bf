"""A reward model as a reward: its own tokenizer, the training's tokenisation, any batch."""

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaModel

from prefero.data.formats import Comparison
from prefero.data.tokenize import encode_comparison
from prefero.models.base import RewardModel
from prefero.rewards.model import ModelReward
from prefero.types import Completion, Prompt, Rollout
from tests.tiny import WORDS, llama_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer([*reversed(WORDS), "yes", "no"])  # not the policy's


def row(prompt, completion, id="p", **columns):
    return Rollout(Prompt(id, (5, 6), prompt, columns), Completion((4,), (-1.0,), completion, "length"))


ROWS = [
    row("how was the movie ?", " the movie was good ."),
    row("how was the hotel ?", " bad"),
    row("tell me about it", ""),
    row("how was the movie ?", " great great great great great great !"),
    row("", " good"),
    row("", ""),
]


@pytest.fixture
def model():
    config: LlamaConfig = llama_config()
    model = RewardModel(LlamaModel(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def one_by_one(model, texts):
    """Each text alone, unpadded, ending in the end token."""
    return [float(model(torch.tensor([[*TOKENIZER(text).input_ids, 2]])).detach()) for text in texts]


def values(scores):
    return [score.value for score in scores]


@pytest.mark.parametrize("batch_size", [1, 2, 6, 50])
def test_scores_are_those_of_each_text_alone(model, batch_size):
    texts = [r.prompt.text + r.completion.text for r in ROWS]
    reward = ModelReward(model, TOKENIZER, batch_size=batch_size)
    assert values(reward(ROWS)) == pytest.approx(one_by_one(model, texts), abs=1e-5)
    assert values(reward(ROWS[::-1])) == pytest.approx(one_by_one(model, texts)[::-1], abs=1e-5)
    assert reward.num_truncated == 0
    assert len(set(values(reward(ROWS)))) == len(ROWS)


def test_texts_are_read_as_comparisons_are_in_training(model):
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    rollouts = [r for r in ROWS if r.prompt.text and r.completion.text]
    ModelReward(model, TOKENIZER, batch_size=1)(rollouts)
    expected = [
        encode_comparison(TOKENIZER, Comparison("", r.prompt.text, r.completion.text, "x")).chosen for r in rollouts
    ]
    assert sorted(tuple(args[0][0].tolist()) for args in seen) == sorted(expected)


def test_shift_scale_and_clamp(model):
    raw = values(ModelReward(model, TOKENIZER)(ROWS))
    scores = ModelReward(model, TOKENIZER, shift=0.1, scale=2.0)(ROWS)
    assert values(scores) == pytest.approx([(x - 0.1) / 2 for x in raw], abs=1e-6)
    assert [score.parts["raw"] for score in scores] == pytest.approx(raw)
    limit = sorted(map(abs, raw))[2]
    assert values(ModelReward(model, TOKENIZER, clamp=limit)(ROWS)) == pytest.approx(
        [max(-limit, min(limit, x)) for x in raw]
    )


def test_a_broken_model_is_not_hidden_by_the_clamp(model):
    model.value_head.weight.data[:] = torch.nan
    assert all(map(math.isnan, values(ModelReward(model, TOKENIZER, clamp=3.0)(ROWS))))


def test_a_long_text_loses_its_beginning_and_is_counted(model):
    reward = ModelReward(model, TOKENIZER, max_length=5)
    rollouts = [row("a b c the movie was", " good ."), row("was", " good .")]
    assert values(reward(rollouts)) == pytest.approx(one_by_one(model, ["movie was good .", "was good ."]), abs=1e-5)
    assert reward.num_truncated == 1
    reward(rollouts)
    assert reward.num_truncated == 2


def test_truncation_keeps_the_framing_token(model):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    ModelReward(model, tokenizer, max_length=4)([row("the movie was", " good .")])
    good, stop = tokenizer.convert_tokens_to_ids(["good", "."])
    assert seen == [[[1, good, stop, 2]]]


def test_modes_and_gradients_are_left_alone(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ModelReward(model, TOKENIZER)(ROWS)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_chat_reads_the_messages_through_the_template(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}<eos>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()[0]))
    asked = row("user how ? assistant ", "good .", messages=[{"role": "user", "content": "how ?"}])
    ModelReward(model, tokenizer)([asked])
    assert seen.pop() == tokenizer("user how ? assistant good . <eos>").input_ids
    # The very ids that a comparison of this prompt is trained on.
    trained = encode_comparison(tokenizer, Comparison("c", asked.prompt.columns["messages"], "good .", "bad ."))
    ModelReward(model, tokenizer)([asked])
    assert seen.pop() == list(trained.chosen)
    # A tokenizer without a template reads the rendered text.
    ModelReward(model, tiny_tokenizer())([asked])
    assert seen.pop() == [*tiny_tokenizer()("user how ? assistant good .").input_ids, 2]


def test_an_output_that_is_no_score_a_text_is_refused():
    wrong = torch.nn.Module()
    wrong.forward = lambda ids, mask: ids.float()
    with pytest.raises(ValueError, match=r"shape \[6, \d+\] for 6 texts"):
        ModelReward(wrong, TOKENIZER)(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1}, "max_length is 1.*2 or more"),
        ({"scale": 0.0}, "scale is 0.0.*above 0"),
        ({"shift": math.inf}, "shift is inf"),
        ({"clamp": -1.0}, "clamp is -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        ModelReward(model, TOKENIZER, **change)


def test_no_rollouts_no_scores(model):
    assert ModelReward(model, TOKENIZER)([]) == []
