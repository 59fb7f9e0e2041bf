"""What would stop a later stage is found before the first one starts, and before a run folder is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from prefero.config import PREFERENCE_STAGES, Config, ConfigError, RewardPart
from prefero.data import encode_comparison
from prefero.models.loading import LoadOptions, load_config, load_tokenizer
from prefero.recipes.ilql import check_trajectories
from prefero.recipes.limits import Limits
from prefero.recipes.ppo import load_prompts
from prefero.recipes.preference import heldout_prompts, read_preference_rows
from prefero.recipes.reward import read_comparisons
from prefero.recipes.rewards import check_part, parts_or_default
from prefero.recipes.sft import read_demonstrations
from prefero.recipes.sources import Sources, Split, open_sources, tell_dropped
from prefero.recipes.start import start_of
from prefero.strategies.naive import pick_device

_SPLITS: tuple[Split, ...] = ("train", "heldout")


def preflight(config: Config, command: str) -> Sources:
    """Checks device, models, rows and rewards of every stage that `command` will run; returns the opened rows.

    Reads configurations, tokenizers and rows, but no weights. Raises ValueError as the stages themselves would.
    """
    stages = set(_stages(config, command))
    pick_device(config.strategy.device or None)
    sources = open_sources(config.data, config.seed)
    policy = _check_policy(config, command, stages, sources)
    if policy is not None:
        _check_unfrozen(config, policy.settings.get_text_config().num_hidden_layers)
    _check_starts(config, stages)
    if "sft" in stages:
        _check_demonstrations(config, sources, policy)
    if "reward" in stages:
        _check_comparisons(config, sources, policy)
    if "ppo" in stages:
        _check_ppo(config, sources, policy, trained="reward" in stages)
    if command in PREFERENCE_STAGES:
        _check_preferences(config, sources, policy, command)
    if "ilql" in stages:
        assert policy is not None, "checked before"
        check_trajectories(config, sources, policy.tokenizer, Limits.of(policy.settings))
    return sources


def _stages(config: Config, command: str) -> Iterator[str]:
    if command != "pipeline":
        if command in PREFERENCE_STAGES and not config.sft.skip:
            yield "sft"
        yield command
        return
    for name, skip in (("sft", config.sft.skip), ("reward", config.reward.skip), ("ppo", config.ppo.skip)):
        if not skip:
            yield name


class _Policy(NamedTuple):
    """What is known of a policy before its weights are read."""

    settings: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


def _check_policy(config: Config, command: str, stages: set[str], sources: Sources) -> _Policy | None:
    """The policy that the stages start from; without model.path, only a world's stage 1 has one."""
    trust = config.model.trust_remote_code
    if config.model.path:
        settings = load_config(config.model.path, LoadOptions(trust_remote_code=trust))
        return _Policy(settings, load_tokenizer(config.model.tokenizer or config.model.path, trust_remote_code=trust))
    if stages & {"sft", "ilql"} or command == "orpo":  # which imitates, too
        fresh = sources.scratch()
        if fresh is None:
            raise ConfigError(
                "model.path is empty and the data brings no model of its own; "
                "give a folder, a hub name or a fetched name, e.g. --model.path smollm2"
            )
        return _Policy(fresh[0].config, fresh[1])
    if command == "pipeline":
        raise ConfigError("sft.skip is true and model.path is empty, so there is no model; give model.path")
    if command == "ppo" or command in PREFERENCE_STAGES:
        raise ConfigError("model.path is empty; give --model.path FOLDER, e.g. the export of the sft stage")
    if config.reward.model == "policy":
        raise ConfigError(
            "reward.model is `policy` but there is no policy, because model.path is empty; "
            "give --model.path FOLDER (the export of the sft stage), or another --reward.model"
        )
    return None


def _check_unfrozen(config: Config, layers: int) -> None:
    if (unfrozen := config.model.num_layers_unfrozen) >= layers:
        raise ConfigError(
            f"model.num_layers_unfrozen is {unfrozen} but the policy has {layers} layers; lower it, or set it to 0 to "
            "train all"
        )


def _check_starts(config: Config, stages: set[str]) -> None:
    """That what the first stages begin with can be kept as `model.frozen` says."""
    frozen = config.model.frozen
    ranks = {"sft": config.sft_lora_rank, **dict.fromkeys(("ppo", *PREFERENCE_STAGES), config.model.lora_rank)}
    for stage, rank in ranks.items():
        if config.model.path and stage in stages and (stage == "sft" or "sft" not in stages):
            start_of(config.model.path, frozen, rank, "model.lora_rank")
    backbone = config.model.path if config.reward.model == "policy" else config.reward.model
    if backbone and "reward" in stages and ("sft" not in stages or config.reward.model != "policy"):
        start_of(backbone, frozen, config.reward.lora_rank, "reward.lora_rank")


def _check_demonstrations(config: Config, sources: Sources, policy: _Policy | None) -> None:
    """That every row can be read by the tokenizer and fits; of a world, whose rows are known, that it is there."""
    assert policy is not None, "checked before"
    if config.data.world != "files":
        sources.sft("heldout")
        return
    for split in _SPLITS:
        read_demonstrations(config, sources, policy.tokenizer, split, Limits.of(policy.settings))


def _check_comparisons(config: Config, sources: Sources, policy: _Policy | None) -> None:
    """The reward model's backbone, and that its tokenizer can read every comparison (a chat needs its template)."""
    if config.reward.model == "policy":
        assert policy is not None, "checked before"
        settings, tokenizer = policy
    else:
        trust = config.model.trust_remote_code
        settings = load_config(config.reward.model, LoadOptions(trust_remote_code=trust))
        tokenizer = load_tokenizer(config.reward.model, trust_remote_code=trust)
    if config.data.world != "files":
        encode_comparison(tokenizer, sources.preferences("heldout")[0], chat=config.data.chat)
        return
    for split in _SPLITS:
        read_comparisons(config, sources, tokenizer, split, Limits.of(settings))


def _check_preferences(config: Config, sources: Sources, policy: _Policy | None, command: str) -> None:
    """That the tokenizer can read every row and prompt; of a world, whose rows are known, a few of each."""
    assert policy is not None, "checked before"
    settings, tokenizer = policy
    limits, stage = Limits.of(settings), getattr(config, command)
    if config.evaluate.gold:
        check_part("gold", RewardPart(use=config.evaluate.gold), [], trained=False, key="evaluate.gold")
    for prompt in heldout_prompts(config, sources, tokenizer):
        cure = f"shorten or drop the row, or lower {command}.max_new_tokens"
        limits.check(prompt.id, prompt.token_ids, cure, reserve=stage.max_new_tokens)
    if config.data.world != "files":
        few = replace(config, evaluate=replace(config.evaluate, max_pairs=8))
        read_preference_rows(few, sources, tokenizer, "heldout", limits, command)
        return
    for split in _SPLITS:
        read_preference_rows(config, sources, tokenizer, split, limits, command)


def _check_ppo(config: Config, sources: Sources, policy: _Policy | None, *, trained: bool) -> None:
    ppo = config.ppo
    assert policy is not None, "checked before"
    settings, tokenizer = policy
    layers = settings.get_text_config().num_hidden_layers
    if ppo.critic_layers > layers:
        raise ConfigError(f"ppo.critic_layers is {ppo.critic_layers} but the policy has only {layers} layers; lower it")
    limits = Limits.of(settings)
    cure = "shorten or drop the row (data.max_prompt_length with data.truncate), or lower ppo.max_new_tokens"
    for split in _SPLITS:
        prompts = load_prompts(config, sources, tokenizer, split)
        if config.data.truncate == "drop":
            left_out = len(sources.prompts(split)) - len(prompts)
            tell_dropped(left_out, f"prompts ({split})", f"data.max_prompt_length {config.data.max_prompt_length}")
        for prompt in prompts:
            limits.check(prompt.id, prompt.token_ids, cure, reserve=ppo.max_new_tokens)
        for name, part in parts_or_default(ppo.rewards).items():
            check_part(name, part, prompts, trained=trained)
        if config.evaluate.gold:
            check_part("gold", RewardPart(use=config.evaluate.gold), prompts, trained=False, key="evaluate.gold")
