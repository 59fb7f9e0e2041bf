"""Generation: left-padded equals alone, greedy and beam equal transformers, masks are told by position."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefero.models.base import Actor
from prefero.models.generation import action_mask_of, generate, leading_padding_mask
from tests.models.families import FAMILIES, Family, loud, padded, tokens
from tests.tiny import llama_config, tiny_llama

EOS, PAD = 2, 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_left_padded_prompts_continue_as_alone(family: Family, beams: int, pad: int) -> None:
    actor = loud(family.actor(config=family.config()))
    settings = {"do_sample": False, "num_beams": beams, "eos_token_id": EOS, "pad_token_id": pad, "max_new_tokens": 6}
    short, long = tokens(1, 4), tokens(1, 8, seed=6)
    alone = actor.generate(short, **settings)[0][:, 4:]
    prompt, mask = padded(short, 4, 0, pad)
    together, full_mask, _ = actor.generate(
        torch.cat([prompt, long]), attention_mask=torch.cat([mask, torch.ones_like(long)]), **settings
    )
    assert torch.equal(together[:1, 8:], alone)
    assert full_mask[0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("beams", [1, 4])
def test_greedy_and_beam_are_those_of_transformers(beams: int) -> None:
    model = loud(tiny_llama())
    ids = tokens()
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, max_length=15, early_stopping=True
    )
    ours = generate(model, ids, 15, num_beams=beams, do_sample=False, early_stopping=True, eos_token_id=EOS)
    assert torch.equal(ours, theirs)
    if beams > 1:
        assert not torch.equal(ours, generate(model, ids, ours.shape[1], do_sample=False, eos_token_id=EOS))


def test_greedy_takes_the_most_likely_token_of_a_full_forward_pass() -> None:
    model = loud(tiny_llama())
    rows = tokens()
    sequences = generate(model, rows, 13, do_sample=False, eos_token_id=31, pad_token_id=0, early_stopping=True)
    for position in range(9, sequences.shape[1]):
        best = model(sequences[:, :position]).logits[:, -1].argmax(-1)
        running = ~(sequences[:, 9:position] == 31).any(1)
        assert torch.equal(sequences[running, position], best[running])


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    model = loud(tiny_llama(128), seed=3)
    prompt = tokens(1, 4).repeat(3000, 1)
    logits = model(prompt[:1]).logits[0, -1].detach()
    for settings in ({"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.6}, {}):
        expected = (logits / settings.get("temperature", 1.0)).softmax(-1)
        order = expected.argsort(descending=True)
        kept = int(settings.get("top_k", 128))
        if "top_p" in settings:
            kept = int((expected[order].cumsum(0) < settings["top_p"]).sum()) + 1
        expected = torch.zeros(128).scatter(0, order[:kept], expected[order[:kept]])
        expected /= expected.sum()
        drawn = generate(model, prompt, 5, eos_token_id=EOS, pad_token_id=PAD, **settings)[:, -1]
        observed = torch.bincount(drawn, minlength=128) / 3000
        assert (observed - expected).abs().max() < 0.035, settings
        assert observed[order[kept:]].sum() == 0
        if "temperature" in settings:  # transformers' own default would keep fifty tokens only
            assert expected[order[50:]].sum() > 0.1
            assert (observed[order[50:]].sum() - expected[order[50:]].sum()).abs() < 0.035


def test_the_models_own_generation_settings_do_not_leak_in() -> None:
    model = loud(tiny_llama(), seed=3)
    plain = [generate(model, tokens(), 15, eos_token_id=EOS, pad_token_id=PAD) for _ in [torch.manual_seed(1)]]
    for name, value in {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0}.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(1)
    assert torch.equal(generate(model, tokens(), 15, eos_token_id=EOS, pad_token_id=PAD), plain[0])


def test_rows_run_to_max_length_unless_stopped_early() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 1.0
        model.lm_head.weight[EOS] *= model.model(tokens(1, 4)).last_hidden_state[0, -1].sign()
    settings = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    assert generate(model, tokens(1, 4), 9, early_stopping=True, **settings).tolist()[0][4:] == [EOS]
    assert generate(model, tokens(1, 4), 9, **settings).tolist()[0][4:] == [EOS, PAD, PAD, PAD, PAD]


def test_action_mask_ends_with_the_first_eos() -> None:
    actions = torch.tensor([[5, EOS, EOS, EOS], [EOS, 5, 6, 7], [5, 6, 7, 8], [5, 9, 6, EOS]])
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert action_mask_of(actions, [EOS]).int().tolist() == expected
    assert action_mask_of(actions, [EOS, 9])[3].int().tolist() == [1, 1, 0, 0]
    assert action_mask_of(actions, []).all()


def test_masks_of_an_answer_when_pad_is_eos() -> None:
    actor = Actor(loud(tiny_llama()))
    prompt, mask = padded(tokens(4, 4), 2, 0, EOS)
    prompt[0, 3] = EOS  # a real EOS in the middle of the prompt is text
    torch.manual_seed(0)
    sequences, full, actions = actor.generate(
        prompt, attention_mask=mask, max_length=40, eos_token_id=EOS, pad_token_id=EOS, temperature=3.0
    )
    assert full[0, :6].tolist() == [0, 0, 1, 1, 1, 1]
    ended = 0
    for row, kept in zip(sequences[:, 6:].tolist(), actions.tolist(), strict=True):
        length = row.index(EOS) + 1 if EOS in row else len(row)
        ended += EOS in row
        assert kept == [True] * length + [False] * (len(row) - length)
    assert ended >= 2
    assert torch.equal(full[:, 6:].bool(), actions)


def test_without_a_mask_only_the_leading_run_of_pads_is_padding() -> None:
    ids = torch.tensor([[2, 2, 5, 2, 6], [2, 2, 2, 2, 2], [5, 6, 7, 8, 2]])
    assert leading_padding_mask(ids, 2).tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert leading_padding_mask(ids, None).all()
    actor = Actor(loud(tiny_llama()))
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": EOS, "pad_token_id": PAD}
    prompt, mask = padded(tokens(1, 4), 3, 0, PAD)
    assert torch.equal(actor.generate(prompt, **settings)[0], actor.generate(prompt, True, mask, **settings)[0])
    assert len(actor.generate(prompt, return_action_mask=False, **settings)) == 2


def test_generation_uses_the_cache_in_training_mode_and_restores_that_mode() -> None:
    from prefero.models.llama import LlamaActor

    actor = loud(LlamaActor(config=llama_config(attention_dropout=0.5), checkpoint=True, dropout=True)).train()
    settings = {"max_length": 14, "eos_token_id": 31, "pad_token_id": 0, "do_sample": False}
    expected = deepcopy(actor).eval().generate(tokens(), **settings)[0]
    widths: list[int] = []
    actor.model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: widths.append(inputs[0].shape[1]))
    assert torch.equal(actor.generate(tokens(), **settings)[0], expected)
    assert widths[0] == 9
    assert set(widths[1:]) == {1}
    assert all(module.training for module in actor.modules())


def test_generation_mistakes_are_explained() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="either max_length"):
        generate(model, tokens())
    with pytest.raises(ValueError, match="max_length=9 leaves no room after a prompt of 9"):
        generate(model, tokens(), 9)
    with pytest.raises(ValueError, match="prepare_inputs_fn is not needed"):
        generate(model, tokens(), 12, prepare_inputs_fn=lambda: None)


def test_generation_after_export_is_the_same(tmp_path: object) -> None:
    actor = Actor(loud(tiny_llama()))
    actor.save_pretrained(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    settings = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    assert torch.equal(generate(loaded, tokens(), 15, **settings), generate(actor.model, tokens(), 15, **settings))
