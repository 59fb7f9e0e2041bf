"""Public names with their arguments and defaults: the seed's, and the snapshot of all of them.

    python tests/test_public_surface.py --regenerate

rewrites the snapshot, to be done only when the surface is meant to change; say so in the changelog.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SNAPSHOT = Path(__file__).with_name("public_surface.json")

MODULES = (
    "algorithms", "algorithms.base", "dataset", "experience_maker", "functional.advantages",
    "functional.best_of_n", "functional.ilql", "functional.kl", "functional.logprobs", "functional.masked",
    "functional.policy", "functional.preference", "functional.reward", "functional.supervised",
    "functional.value", "models", "models.auto", "models.base", "models.bloom", "models.deberta",
    "models.generation", "models.gpt", "models.ilql", "models.llama", "models.loading", "models.lora",
    "models.loss", "models.opt", "models.utils", "optimizer", "replay_buffer", "replay_buffer.utils",
    "rewards.base", "rewards.combined", "rewards.functions", "rewards.model", "rewards.process",
    "rewards.rules", "rewards.verified", "rollout.best_of_n", "rollout.collect", "rollout.engine", "rollout.hf",
    "strategies", "strategies.sampler", "trainer", "trainer.callbacks", "trainer.strategies",
    "trainer.strategies.sampler", "types", "utils",
)  # fmt: skip

# What a script of the seed system says, by position and with these defaults; further arguments may follow.
FAMILY = "pretrained=None, config=None, checkpoint=False, lora_rank=0, lora_train_bias='none'"
SEED = {
    "models.base": {
        "Actor": "model, lora_rank=0, lora_train_bias='none'",
        "Critic": "model, value_head=None, lora_rank=0, lora_train_bias='none', use_action_mask=False",
        "RewardModel": "model, value_head=None, lora_rank=0, lora_train_bias='none'",
        "LM": "model, lora_rank=0, lora_train_bias='none'",
        "Actor.forward": "self, sequences, num_actions, attention_mask=None",
        "RewardModel.forward": "self, sequences, attention_mask=None",
        "Actor.get_base_model": "self",
        "Actor.generate": "self, input_ids, return_action_mask=True",
    },
    "models.gpt": dict.fromkeys(("GPTActor", "GPTCritic", "GPTRM", "GPTLM"), FAMILY),
    "models.opt": dict.fromkeys(("OPTActor", "OPTCritic", "OPTRM", "OPTLM"), FAMILY),
    "models.bloom": dict.fromkeys(("BLOOMActor", "BLOOMCritic", "BLOOMRM", "BLOOMLM"), FAMILY),
    "models.llama": dict.fromkeys(("LlamaActor", "LlamaCritic", "LlamaRM", "LlamaLM"), FAMILY),
    "models.deberta": dict.fromkeys(("DebertaCritic", "DebertaRM"), FAMILY),
    "models.generation": {
        "generate": "model, input_ids, max_length=None, num_beams=1, do_sample=True, early_stopping=False, "
        "eos_token_id=None, pad_token_id=None, top_k=None, top_p=None, temperature=None"
    },
    "models.lora": {"LoRAModule": "model, lora_rank=0, lora_train_bias='none'"},
    "models.loss": {
        "GPTLMLoss": "",
        "PolicyLoss": "clip_eps=0.2",
        "ValueLoss": "clip_eps=0.4",
        "PPOPtxActorLoss": "policy_clip_eps=0.2, pretrain_coef=0.0, pretrain_loss_fn=None",
        "PairWiseLoss": "",
        "LogSigLoss": "",
        "LogExpLoss": "",
    },
    "models.utils": {
        "compute_approx_kl": "log_probs, log_probs_base, action_mask=None",
        "compute_reward": "r, kl_coef, log_probs, log_probs_base, action_mask=None",
        "log_probs_from_logits": "logits, labels",
        "masked_mean": "tensor, mask, dim=1",
        "masked_normalize": "tensor, mask, dim=1, eps=1e-08",
        "normalize": "tensor, dim=0, eps=1e-08",
    },
    "dataset": {
        "RewardDataset": "dataset, tokenizer, max_length",
        "RmStaticDataset": "dataset, tokenizer, max_length, special_token=None",
        "HhRlhfDataset": "dataset, tokenizer, max_length, special_token=None",
        "SFTDataset": "dataset, tokenizer, max_length=512",
        "AlpacaDataset": "data_path, tokenizer, max_length=None",
        "AlpacaDataCollator": "tokenizer",
        "is_rank_0": "",
    },
    "experience_maker": {
        "Experience": "sequences, action_log_probs, values, reward, advantages, attention_mask, action_mask",
        "ExperienceMaker": "actor, critic, reward_model, initial_model, kl_coef=0.1",
        "NaiveExperienceMaker": "actor, critic, reward_model, initial_model, kl_coef=0.1",
        "NaiveExperienceMaker.make_experience": "self, input_ids, **generate_kwargs",
    },
    "replay_buffer": {
        "ReplayBuffer": "sample_batch_size, limit=0",
        "NaiveReplayBuffer": "sample_batch_size, limit=0, cpu_offload=True",
    },
    "replay_buffer.utils": {
        "BufferItem": "sequences, action_log_probs, values, reward, advantages, attention_mask, action_mask",
        "split_experience_batch": "experience",
        "make_experience_batch": "items",
        "zero_pad_sequences": "sequences, side='left'",
    },
    "trainer": {
        "Trainer": "strategy, experience_maker, replay_buffer, experience_batch_size=8, max_epochs=1, tokenizer=None, "
        "sample_replay_buffer=False, dataloader_pin_memory=True, callbacks=(), **generate_kwargs",
        "PPOTrainer": "strategy, actor, critic, reward_model, initial_model, actor_optim, critic_optim, kl_coef=0.1, "
        "train_batch_size=8, buffer_limit=0, buffer_cpu_offload=True, eps_clip=0.2, value_clip=0.4, "
        "experience_batch_size=8, max_epochs=1, tokenizer=None, sample_replay_buffer=False, "
        "dataloader_pin_memory=True, callbacks=()",
        "PPOTrainer.fit": "self, prompts, num_episodes=50000, max_timesteps=500, update_timesteps=5000",
        "PPOTrainer.training_step": "self, experience",
        "RewardModelTrainer": "model, strategy, optim, train_dataset, eval_dataset, batch_size=1, max_epochs=2",
        "RewardModelTrainer.fit": "self, use_lora=0",
        "SFTTrainer": "model, strategy, optim, train_dataloader, eval_dataloader=None, sampler=None, batch_size=1, "
        "max_epochs=2",
        "SFTTrainer.fit": "self, logger=None, use_lora=0, log_interval=10",
    },
    "trainer.callbacks": {
        "PerformanceEvaluator": "actor_num_params, critic_num_params, initial_model_num_params, "
        "reward_model_num_params, enable_grad_checkpoint=False, ignore_episodes=0",
        "SaveCheckpoint": "path, interval, strategy, actor=None, critic=None, actor_optim=None, critic_optim=None",
        "Callback.on_fit_start": "self",
        "Callback.on_fit_end": "self",
        "Callback.on_episode_start": "self, episode",
        "Callback.on_episode_end": "self, episode",
        "Callback.on_make_experience_start": "self",
        "Callback.on_make_experience_end": "self, experience",
        "Callback.on_learn_epoch_start": "self, epoch",
        "Callback.on_learn_epoch_end": "self, epoch",
        "Callback.on_learn_batch_start": "self",
        "Callback.on_learn_batch_end": "self, metrics, experience",
    },
    "trainer.strategies": {
        "NaiveStrategy": "",
        "Strategy.backward": "self, loss, model, optimizer",
        "Strategy.optimizer_step": "self, optimizer",
        "Strategy.setup_distributed": "self",
        "Strategy.setup_model": "self, model",
        "Strategy.setup_optimizer": "self, optimizer, model",
        "Strategy.setup_dataloader": "self, replay_buffer, pin_memory=False",
        "Strategy.setup_sampler": "self, dataset",
        "Strategy.model_init_context": "self",
        "Strategy.prepare": "self, *models_or_pairs",
        "Strategy._unwrap_model": "model",
        "Strategy._unwrap_actor": "actor",
        "Strategy.save_model": "self, model, path, only_rank0=False",
        "Strategy.load_model": "self, model, path, map_location=None, strict=True",
        "Strategy.save_optimizer": "self, optimizer, path, only_rank0=False",
        "Strategy.load_optimizer": "self, optimizer, path, map_location=None",
    },
    "trainer.strategies.sampler": {"DistributedSampler": "dataset, num_replicas=1, rank=0"},
    "optimizer": dict.fromkeys(
        ("HybridAdam", "CPUAdam"), "model_params, lr=0.001, bias_correction=True, betas=(0.9, 0.999), eps=1e-08, "
        "weight_decay=0.0, adamw_mode=True, nvme_offload_fraction=0.0",
    ),
    "utils": {
        "smart_tokenizer_and_embedding_resize": "special_tokens_dict, tokenizer, model",
        "prepare_llama_tokenizer_and_embedding": "tokenizer, model, special_tokens_dict=None",
    },
}  # fmt: skip


def arguments(thing: Any) -> list[str]:
    """Names, defaults and kinds of the arguments, without the types: those may be written in other words."""
    if inspect.isclass(thing) and thing.__init__ is object.__init__:
        return []
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    written = []
    keyword_only = False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            written.append("*")
        default = "" if parameter.default is parameter.empty else f"={_plain(parameter.default)}"
        written.append(marks.get(parameter.kind, "") + parameter.name + default)
    return written


def _plain(default: object) -> str:
    # The repr of a function holds its address.
    text = default.__qualname__ if inspect.isfunction(default) else repr(default)
    return "<factory>" if "<factory>" in text else text


def find(module: str, name: str) -> Any:
    thing: Any = importlib.import_module(f"prefero.{module}")
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def surface(module: str) -> dict[str, Any]:
    """What a module gives away under its own name: functions, and classes with their public methods."""
    loaded = importlib.import_module(f"prefero.{module}")
    names = getattr(loaded, "__all__", None) or [
        name for name, thing in vars(loaded).items() if getattr(thing, "__module__", "") == loaded.__name__
    ]
    public = {}
    for name in sorted(name for name in names if not name.startswith("_")):
        thing = getattr(loaded, name)
        if inspect.isclass(thing):
            methods = {
                method: ", ".join(arguments(function))
                for method, function in sorted(vars(thing).items())
                # torch wraps an optimizer class's `step` in place once one of it has been made
                if not method.startswith("_")
                and inspect.isfunction(function)
                and not (method == "step" and issubclass(thing, torch.optim.Optimizer))
            }
            public[name] = {"()": ", ".join(arguments(thing)), **methods}
        else:
            public[name] = ", ".join(arguments(thing)) if callable(thing) else repr(thing)
    return public


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in SEED.items() for n in names])
def test_the_seeds_scripts_find_what_they_call(module: str, name: str) -> None:
    wanted = SEED[module][name]
    given = arguments(find(module, name))
    if inspect.isclass(find(module, name)) and given == ["*args", "**kwargs"]:
        given = []  # a plain torch module without an __init__ of its own
    # Tuples hold commas of their own, so the written form is compared, up to its own length.
    text = ", ".join(given)
    assert text == wanted or not wanted or text.startswith(f"{wanted}, "), text


@pytest.mark.parametrize("module", MODULES)
def test_the_public_surface_is_what_it_was(module: str) -> None:
    assert surface(module) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))[module]


def test_the_snapshot_holds_these_modules_and_no_others() -> None:
    assert sorted(json.loads(SNAPSHOT.read_text(encoding="utf-8"))) == sorted(MODULES)


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit(__doc__)
    SNAPSHOT.write_text(json.dumps({m: surface(m) for m in MODULES}, indent=1) + "\n", encoding="utf-8")
