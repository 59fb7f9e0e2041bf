"""Loading: the constructor contract, names and paths, cheap critics, and files that want to run code."""

import json
import os
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
)

from prefero.models.auto import AutoActor, AutoCritic, AutoRM
from prefero.models.base import Actor, Critic, RewardModel
from prefero.models.gpt import GPTActor
from prefero.models.llama import LlamaActor, LlamaCritic, LlamaRM
from prefero.models.loading import LoadOptions, build, load_causal_lm, load_reward_backbone, load_tokenizer, resolve
from tests.models.families import FAMILIES, Family, loud, stir_adapters, tokens
from tests.models.test_model_critic_and_reward import bert_config
from tests.tiny import llama_config, tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    loud(tiny_llama()).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_pretrained_goes_before_config_before_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = llama_config(hidden_size=16)
    assert LlamaActor(pretrained=folder, config=other).model.config.hidden_size == 32
    assert LlamaActor(config=other).model.config.hidden_size == 16
    # The real default has seven billion parameters.
    small = {**llama_config(hidden_size=24).to_dict(), "num_hidden_layers": 1}
    monkeypatch.setattr(LlamaConfig, "__init__", partialmethod(LlamaConfig.__init__, **small))
    assert LlamaActor().model.config.hidden_size == 24
    monkeypatch.undo()
    ids = tokens()
    torch.testing.assert_close(LlamaActor(folder)(ids, 5), Actor(loud(tiny_llama()))(ids, 5), atol=1e-6, rtol=0)


def test_auto_classes_need_to_be_told_which_model(folder: Path) -> None:
    assert type(AutoActor(folder).model).__name__ == "LlamaForCausalLM"
    assert type(AutoCritic(folder).model).__name__ == "LlamaModel"
    assert type(AutoRM(folder).model).__name__ == "LlamaModel"
    with pytest.raises(ValueError, match=r"AutoActor needs pretrained= .* or config="):
        AutoActor()
    with pytest.raises(ValueError, match="GPTActor is for 'gpt2' models, and this is a 'llama'"):
        GPTActor(pretrained=folder)
    with pytest.raises(TypeError, match="colour"):
        AutoActor(folder, colour="red")


def test_the_first_layers_make_a_cheap_critic(folder: Path) -> None:
    critic = LlamaCritic(folder, num_layers=1)
    full = AutoModelForCausalLM.from_pretrained(folder)
    assert critic.model.config.num_hidden_layers == len(critic.model.layers) == 1
    hidden = full.model(tokens(), output_hidden_states=True).hidden_states[1]
    expected = full.model.norm(hidden)
    torch.testing.assert_close(critic.model(tokens()).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="num_layers=5: the model has 2"):
        LlamaCritic(folder, num_layers=5)


def test_options_of_load_causal_lm(folder: Path) -> None:
    model = load_causal_lm(folder, dtype="bf16", lora_rank=2, num_layers=1, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all(kind == (torch.float32 if ".lora_" in name else torch.bfloat16) for name, kind in kinds.items())
    assert Actor(model)(tokens(), 4).isfinite().all()
    with pytest.raises(ValueError, match="dtype='fp12'"):
        load_causal_lm(folder, dtype="fp12")


@pytest.fixture
def gguf_file(folder: Path) -> Path:
    """The folder's model as a GGUF file of float32 tensors."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    for key, value in {"block_count": 2, "context_length": 128, "embedding_length": 32, "feed_forward_length": 64,
                       "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 32,
                       "rope.dimension_count": 8}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def test_gguf_files_become_ordinary_models(gguf_file: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    actor = AutoActor(gguf_file)
    torch.testing.assert_close(actor.model(tokens()).logits, theirs(tokens()).logits)
    actor.save_pretrained(tmp_path / "out")
    assert torch.equal(AutoActor(tmp_path / "out")(tokens(), 4), actor(tokens(), 4))
    critic = AutoActor(gguf_file, num_layers=1)
    assert len(critic.model.model.layers) == critic.model.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="unknown model"):
        load_causal_lm(gguf_file.parent / "none.gguf")


def test_fetched_names_live_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFERO_CACHE", str(folder.parent / "cache"))
    with pytest.raises(ValueError, match=r"run `prefero fetch smollm2`"):
        AutoActor("smollm2")
    target = folder.parent / "cache" / "models" / "smollm2"
    target.parent.mkdir(parents=True)
    folder.rename(target)
    assert resolve("smollm2") == str(target)
    assert load_tokenizer("smollm2").eos_token_id == 2


def test_unknown_models_are_named_with_near_matches_and_a_cure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=r"unknown model 'smolm2'.*did you mean 'smollm2'.*prefero fetch smollm2"):
        load_causal_lm("smolm2")
    with pytest.raises(ValueError, match=r"did you mean '.*/model'"):
        load_tokenizer(f"{folder.parent}/modell")
    with pytest.raises(ValueError, match="unknown model 'someone/nothing-here'"):
        AutoActor("someone/nothing-here")
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_causal_lm("./empty")


def test_a_folder_without_weights_is_not_called_unknown(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*model\.safetensors.*complete the folder"):
        load_causal_lm(folder)


def test_missing_weights_are_an_error_not_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks weights: model\.layers\.2"):
        load_causal_lm(folder)
    with pytest.raises(ValueError, match="lacks weights: layers"):
        AutoCritic(folder)
    with pytest.raises(ValueError, match="lacks weights: model"):
        AutoRM(folder)


SENTINEL = "import pathlib\npathlib.Path({!r}).touch()\nfrom transformers import LlamaForCausalLM as Evil\n"


@pytest.mark.parametrize(
    ("file", "addition"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}),
        ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
        ("config.json", {"_attn_implementation": "someone/kernel"}),
        ("config.json", {"text_config": {"trust_remote_code": True}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ],
)
def test_a_model_that_wants_to_run_code_is_refused(folder: Path, file: str, addition: dict[str, object]) -> None:
    sentinel = folder.parent / "ran"
    (folder / "evil.py").write_text(SENTINEL.format(str(sentinel)))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **addition}))
    key = next(iter(addition))
    key = key if key != "text_config" else "trust_remote_code"
    for load in (load_causal_lm, load_tokenizer, load_reward_backbone, AutoCritic, RewardModel.from_pretrained):
        with pytest.raises(ValueError, match=f"{file}: the key '{key}' makes the model run code of its own"):
            load(folder)
    assert not sentinel.exists()


def test_unreadable_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON"):
        load_causal_lm(folder)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


def test_pickled_weights_that_run_code_are_refused(folder: Path) -> None:
    sentinel = folder.parent / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Payload(str(sentinel))}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):  # transformers' own error is passed on
        load_causal_lm(folder)
    assert not sentinel.exists()


def test_tokenizer_without_pad_uses_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("rank", [0, 2])
def test_reward_models_come_back_from_their_folder(family: Family, rank: int, tmp_path: Path) -> None:
    model = stir_adapters(loud(family.reward_model(config=family.config(), lora_rank=rank)))
    model.save_pretrained(tmp_path, tiny_tokenizer())
    ids = tokens()
    for loaded in (RewardModel.from_pretrained(tmp_path), family.reward_model(tmp_path)):
        torch.testing.assert_close(loaded(ids), model(ids), atol=1e-5, rtol=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1
    torch.testing.assert_close(theirs(ids).logits[:, 0], model(ids), atol=1e-5, rtol=1e-5)


def test_a_head_with_a_bias_keeps_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    critic = loud(Critic(tiny_llama()))
    with torch.no_grad():
        critic.value_head.bias.fill_(0.75)
    model = RewardModel(critic.model, critic.value_head)
    model.save_pretrained(tmp_path, tiny_tokenizer())
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path)(tokens()), model(tokens()), atol=1e-6, rtol=0)
    torch.testing.assert_close(AutoRM(tmp_path)(tokens()), model(tokens()), atol=1e-6, rtol=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)(tokens()).logits[:, 0]
    torch.testing.assert_close(theirs + 0.75, model(tokens()), atol=1e-5, rtol=0)
    with torch.no_grad():
        critic.value_head.bias.zero_()
    model.save_pretrained(tmp_path, tiny_tokenizer())
    assert not (tmp_path / "reward_head_bias.safetensors").exists()


def test_where_pad_is_eos_transformers_own_class_does_not_guess(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = loud(LlamaRM(config=llama_config()))
    model.save_pretrained(tmp_path, tokenizer)
    ids = tokens()
    ids[:, -1] = 2
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids[:1]).logits[:, 0], model(ids[:1]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="padding token"):
        theirs(ids)


def test_encoder_reward_models_come_back_with_their_bias(tmp_path: Path) -> None:
    model = stir_adapters(RewardModel(loud(BertForSequenceClassification(bert_config())), lora_rank=2)).eval()
    with torch.no_grad():
        model.model.classifier.bias.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens()), model(tokens()), atol=1e-5, rtol=1e-5)
    bare = RewardModel(loaded.model.bert, pooling="cls")
    with pytest.raises(ValueError, match="no Hugging Face folder"):
        bare.save_pretrained(tmp_path)


def test_a_critic_may_start_from_a_reward_model(tmp_path: Path) -> None:
    model = loud(LlamaRM(config=llama_config()))
    model.save_pretrained(tmp_path)
    critic = LlamaCritic(tmp_path)
    for name, tensor in critic.model.state_dict().items():
        torch.testing.assert_close(tensor, model.model.state_dict()[name], msg=name)


def test_classifiers_of_several_labels_are_no_reward_models(tmp_path: Path) -> None:
    config = bert_config()
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels=3"):
        RewardModel(BertForSequenceClassification(config))
    with pytest.raises(ValueError, match="cannot be loaded as AutoModelForSequenceClassification"):
        load_reward_backbone(tmp_path)


def test_building_leaves_the_callers_configuration_alone() -> None:
    config = llama_config()
    AutoRM(config=config, num_layers=1)
    build(AutoModelForCausalLM, None, config, LoadOptions(num_layers=1))
    assert config.num_hidden_layers == 2
    assert config.num_labels == 2
