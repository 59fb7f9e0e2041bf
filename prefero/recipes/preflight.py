"""What would stop a later stage is found before the first one starts, and before a run folder is made."""

from __future__ import annotations

from collections.abc import Iterator

from prefero.config import Config, ConfigError, RewardPart
from prefero.models.loading import LoadOptions, load_config, load_tokenizer
from prefero.recipes.limits import Limits
from prefero.recipes.ppo import load_prompts
from prefero.recipes.rewards import check_part
from prefero.recipes.sources import Sources, Split, open_sources
from prefero.strategies.naive import pick_device

_SPLITS: tuple[Split, ...] = ("train", "heldout")


def preflight(config: Config, command: str) -> Sources:
    """Checks device, models, rows and rewards of every stage that `command` will run; returns the opened rows.

    Reads configurations, tokenizers and rows, but no weights. Raises ValueError as the stages themselves would.
    """
    stages = set(_stages(config, command))
    pick_device(config.strategy.device or None)
    sources = open_sources(config.data, config.seed)
    if not config.model.path:
        _check_policy_known(config, command, stages, sources)
    if "reward" in stages and config.reward.model != "policy":
        load_config(config.reward.model, _trust(config))
    if config.data.world == "files":
        for split in _SPLITS:
            if "sft" in stages:
                sources.sft(split)
            if "reward" in stages:
                sources.preferences(split)
    if "ppo" in stages:
        _check_ppo(config, sources)
    return sources


def _stages(config: Config, command: str) -> Iterator[str]:
    if command != "pipeline":
        yield command
        return
    for name, skip in (("sft", config.sft.skip), ("reward", config.reward.skip), ("ppo", config.ppo.skip)):
        if not skip:
            yield name


def _check_policy_known(config: Config, command: str, stages: set[str], sources: Sources) -> None:
    """Without model.path, only stage 1 of a world that brings a fresh model knows what to start from."""
    if "sft" in stages:
        if sources.scratch() is None:
            raise ConfigError(
                "model.path is empty and the data brings no model of its own; "
                "give a folder, a hub name or a fetched name, e.g. --model.path smollm2"
            )
    elif command == "pipeline":
        raise ConfigError("sft.skip is true and model.path is empty, so there is no model; give model.path")
    elif command == "ppo":
        raise ConfigError("model.path is empty; give --model.path FOLDER, e.g. the export of the sft stage")
    elif config.reward.model == "policy":
        raise ConfigError(
            "reward.model is `policy` but there is no policy, because model.path is empty; "
            "give --model.path FOLDER (the export of the sft stage), or another --reward.model"
        )


def _trust(config: Config) -> LoadOptions:
    return LoadOptions(trust_remote_code=config.model.trust_remote_code)


def _check_ppo(config: Config, sources: Sources) -> None:
    ppo = config.ppo
    for name, part in ppo.rewards.items():
        check_part(name, part)
    if config.evaluate.gold:
        check_part("gold", RewardPart(use=config.evaluate.gold))
    if config.model.path:
        settings = load_config(config.model.path, _trust(config))
        name = config.model.tokenizer or config.model.path
        tokenizer = load_tokenizer(name, trust_remote_code=config.model.trust_remote_code)
    else:
        fresh = sources.scratch()
        assert fresh is not None, "checked before"
        settings, tokenizer = fresh[0].config, fresh[1]
    layers = settings.get_text_config().num_hidden_layers
    if ppo.critic_layers > layers:
        raise ConfigError(f"ppo.critic_layers is {ppo.critic_layers} but the policy has only {layers} layers; lower it")
    limits = Limits.of(settings)
    cure = "shorten or drop the row (data.max_prompt_length with data.truncate), or lower ppo.max_new_tokens"
    for split in _SPLITS:
        for prompt in load_prompts(config, sources, tokenizer, split):
            limits.check(prompt.id, prompt.token_ids, cure, reserve=ppo.max_new_tokens)
