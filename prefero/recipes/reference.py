"""The reference of every config key, as docs/configuration.md has it, made from the config classes themselves."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from prefero.config import Config, RewardPart, describe

_HEAD = """# Every key of a config

Written by `prefero config --markdown`. A config is a YAML file; what it leaves out has the default given here, and any
key may be overridden on the command line: `--ppo.kl-coef 0.1`, or `--kl-coef 0.1` where only one section has such a key
(the command's own section goes first: `prefero sft CONFIG --steps 100` means `sft.steps`). Dashes and underscores are
the same. A bare `--flag` is `true`. Unknown keys, wrong types and options that contradict each other are errors that
name the key, the value and the cure, before anything is trained.
"""


def config_markdown() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_section("(top level)", Config), *_sections()]) + "\n"


def _sections() -> Iterator[str]:
    hints = typing.get_type_hints(Config)
    for item in fields(Config):
        if is_dataclass(hints[item.name]):
            yield from _section(f"`{item.name}`", hints[item.name])
    yield from _section("`ppo.rewards.NAME`", RewardPart)


def _section(title: str, cls: Any) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    yield f"## {title}\n"
    if cls is not Config:
        yield f"{inspect.getdoc(cls)}\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            continue
        _, default, sentence = describe(item)
        # As YAML writes it: no quotes, and true, not True.
        plain = default.strip("'") if default not in ("True", "False") else default.lower()
        shown = "required" if default == "PydanticUndefined" else f"`{plain}`" if plain else "empty"
        yield f"| `{item.name}` | {_kind(hints[item.name])} | {shown} | {sentence.replace('|', chr(92) + '|')} |"
    yield ""


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return "named values" if typing.get_args(hint)[1] is Any else "named parts"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]
