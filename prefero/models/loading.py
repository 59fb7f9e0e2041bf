"""Pretrained models and tokenizers from a folder, a fetched name, a GGUF file or the hub; none of their code runs."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from prefero.cache import cache_root
from prefero.deferral import weights_deferred
from prefero.models import footprint
from prefero.models.frozen import check_kind
from prefero.models.later import build_without_weights, drawn, store, stored_in_parts
from prefero.models.lora import apply_lora
from prefero.models.trunk import disable_dropout, head_width

FETCHED = ("smollm2", "minilm")
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines", "_attn_implementation_internal"})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadOptions:
    """How a pretrained model is read.

    num_layers keeps the first layers only (a cheap critic); dropout=True keeps the model's own dropout, which is off
    otherwise; lora_alpha scales an adapter's update (default: the rank, i.e. a scale of 1). frozen: what the weights
    below adapters are kept in; where it is not "fp32", the model is built without weights, which are read or drawn a
    layer at a time by `frozen.keep_frozen`.
    """

    dtype: torch.dtype | str = torch.float32
    num_layers: int | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    dropout: bool = False
    lora_alpha: float | None = None
    frozen: str = "fp32"


def resolve(name_or_path: str | Path) -> str:
    """The folder or file of a fetched name or a path (a run folder stands for its export), or the hub name as it is.

    Raises ValueError, naming near matches and the cure, when it is none of these.
    """
    name = str(name_or_path)
    fetched = cache_root() / "models" / name
    if name in FETCHED:
        if not (fetched / "config.json").is_file():
            raise ValueError(f"model {name!r} is not in {fetched.parent}: run `prefero fetch {name}` first")
        return str(fetched)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path)
    if path.is_dir():
        for folder in (path, path / "model"):  # the export inside a run folder
            if (folder / "config.json").is_file():
                return str(folder)
        if (path / "metrics.jsonl").is_file():
            raise ValueError(
                f"model {name!r}: the run in this folder has not finished and has no model yet; let it end, or name "
                "another model"
            )
        raise ValueError(f"model {name!r}: the folder holds no config.json, so it is not a Hugging Face model")
    if path.suffix == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise ValueError(_unknown(name))
    return name


def _unknown(name: str) -> str:
    path = Path(name).expanduser()
    neighbours = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, [*FETCHED, *neighbours], n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return (
        f"unknown model {name!r}: not a folder with a config.json, not a fetched model and not found on the hub{hint} "
        f"(fetch one with `prefero fetch {near[0] if near and near[0] in FETCHED else FETCHED[0]}`, "
        "or give the path of a Hugging Face folder)"
    )


def _unreadable(name: str, source: str, error: OSError) -> str:
    """What to say of a model that transformers could not read: of a folder why, of anything else that it is unknown."""
    why = " ".join(str(error).split())
    if Path(source).exists():
        return f"model {name!r} cannot be read: {why}; complete the folder, or name another model"
    return f"{_unknown(name)}; the hub's answer was: {why[:300]}"


def check_no_code(name_or_path: str, trust_remote_code: bool) -> None:
    """Refuses a model whose configuration asks to run code of its own, unless the user trusts it.

    Reads config.json and tokenizer_config.json before anything else does. Raises ValueError naming file and key.
    """
    if trust_remote_code or name_or_path.endswith(".gguf"):
        return
    for name in ("config.json", "tokenizer_config.json"):
        file = _file_of(name_or_path, name)
        if file is None:
            continue
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{file}: not readable as JSON ({error})") from error
        for key in _code_keys(content):
            raise ValueError(
                f"{file}: the key {key!r} makes the model run code of its own. Read that code, and if you trust it "
                "pass trust_remote_code=True (--model.trust-remote-code for a run, --trust-remote-code for generate "
                "and chat); otherwise choose another model"
            )


def _file_of(name_or_path: str, file: str) -> str | None:
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return str(path) if path.is_file() else None
    found: str | None = cached_file(
        name_or_path,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return found


def _code_keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            # A slash in the attention implementation means a kernel to be downloaded and run.
            kernel = "attn_implementation" in key and isinstance(value, str) and "/" in value
            if (key in _CODE_KEYS and value) or kernel:
                yield key
            yield from _code_keys(value)
    elif isinstance(node, list):
        for value in node:
            yield from _code_keys(value)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself, "fp32", "bf16", "fp16" or torch's own name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = _DTYPES.get(dtype) or getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(_DTYPES)}")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its warnings and progress bars inside, as it was after."""
    # Missing weights are our own, stricter check; progress bars of two seconds only break the live output.
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_config(name_or_path: str | Path, options: LoadOptions | None = None, **changes: Any) -> Any:
    """The model's configuration, checked not to run code, with `options.num_layers` and `changes` applied."""
    options = options or LoadOptions()
    source = resolve(name_or_path)
    check_no_code(source, options.trust_remote_code)
    where = _where(source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(**where, trust_remote_code=options.trust_remote_code, **changes)
    except OSError as error:
        raise ValueError(_unreadable(str(name_or_path), source, error)) from error
    return keep_layers(config, options.num_layers)


def _where(source: str) -> dict[str, str]:
    path = Path(source)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": source}


def keep_layers(config: Any, num_layers: int | None) -> Any:
    """`config` itself, changed to its first `num_layers` layers; None keeps all."""
    if num_layers is None:
        return config
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers={num_layers}: the model has {config.num_hidden_layers}, choose 1 to that")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    return config


def build(
    auto_class: Any, pretrained: str | Path | None, config: Any, options: LoadOptions, new_head: bool = False
) -> Any:
    """A model of a transformers auto class: pretrained weights if named, else random ones of `config`.

    new_head allows a head of one output to be missing from the weights; it is then drawn from N(0, 1/(D+1)) with a
    zero bias. Raises ValueError when any other weight is missing.
    """
    changes = {"num_labels": 1} if new_head else {}
    dtype, kept = dtype_of(options.dtype), options.frozen != "fp32"
    check_kind(options.frozen)
    if kept and weights_deferred():
        raise ValueError(
            f"frozen={options.frozen!r}, but weights are filled in by a strategy that shares them out: leave "
            "shard_init off, or use fp32"
        )
    extra: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.attn_implementation:
        extra["attn_implementation"] = options.attn_implementation
    if (short := footprint.current()) and pretrained is not None:
        whole = load_config(pretrained, replace(options, num_layers=None), **changes)
        config = short.shorten(whole, options.num_layers)
        pretrained, options = None, replace(options, num_layers=None)
    if pretrained is None:
        config = keep_layers(deepcopy(config), options.num_layers)
        for key, value in changes.items():
            setattr(config, key, value)
        if kept or weights_deferred():
            model = build_without_weights(auto_class, config, dtype=dtype, **extra)
        else:
            model = auto_class.from_config(config, dtype=dtype, **extra)
        missing: set[str] | None = None
    else:
        config = load_config(pretrained, options, **changes)
        found = None
        if weights_deferred() or (kept and stored_in_parts(resolve(pretrained))):
            found = _without_weights(auto_class, str(pretrained), config, dtype, extra, new_head)
        model, missing = found or _load_weights(auto_class, str(pretrained), config, dtype, extra)
    if new_head:
        _draw_head(model, missing)
        missing = missing and {name for name in missing if not name.startswith(_head_names(model))}
    if missing:
        raise ValueError(f"model {str(pretrained)!r} lacks weights: {', '.join(sorted(missing)[:5])}")
    return model if options.dropout else disable_dropout(model)


def _without_weights(
    auto_class: Any, pretrained: str, config: Any, dtype: torch.dtype, extra: dict[str, Any], new_head: bool
) -> tuple[Any, set[str]] | None:
    """The model that knows where its weights lie; None where they have to be read as a whole, and may be."""
    model = build_without_weights(auto_class, config, dtype=dtype, **extra)
    missing = store(model, resolve(pretrained))
    if not {name for name in missing if not (new_head and name.startswith(_head_names(model)))}:
        return model, missing
    if not weights_deferred():
        return None
    if new_head:
        return model, missing
    raise ValueError(
        f"model {pretrained!r} lacks weights, or names them in an older way that cannot be read part by part: "
        f"{', '.join(sorted(missing)[:5])}; leave shard_init off"
    )


def _load_weights(
    auto_class: Any, pretrained: str, config: Any, dtype: torch.dtype, extra: dict[str, Any]
) -> tuple[Any, set[str]]:
    source = resolve(pretrained)
    where = _where(source)
    if "gguf_file" not in where:
        where = {**where, "config": config}
    try:
        with quiet():
            model, info = auto_class.from_pretrained(**where, dtype=dtype, output_loading_info=True, **extra)
    except OSError as error:
        raise ValueError(_unreadable(pretrained, source, error)) from error
    except RuntimeError as error:
        raise ValueError(f"model {pretrained!r} cannot be loaded as {auto_class.__name__}: {error}") from error
    if "gguf_file" in where:
        return _clean_copy(model, config.num_hidden_layers), set()
    return model, set(info["missing_keys"])


def _clean_copy(model: Any, num_layers: int) -> Any:
    # A GGUF file is read into ordinary weights but flagged as quantised, which forbids saving and fine-tuning.
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        config.pop(key, None)
    copy = type(model)(keep_layers(type(model.config)(**config), num_layers)).to(model.dtype)
    state = model.state_dict()
    copy.load_state_dict({name: state[name] for name in copy.state_dict()})
    return copy


def _head_names(model: Any) -> tuple[str, ...]:
    # Everything that stands beside the trunk, and the summary layer that some encoders' text models leave out.
    prefix = model.base_model_prefix
    return (*(name for name, _ in model.named_children() if name != prefix), f"{prefix}.pooler", "pooler")


def _draw_head(model: Any, missing: set[str] | None) -> None:
    for name, part in model.named_modules():
        is_new = missing is None or f"{name}.weight" in missing
        if isinstance(part, nn.Linear) and part.out_features == 1 and is_new:
            drawn(part, init_reward_head)


def init_reward_head(head: nn.Linear) -> nn.Linear:
    """Weights from N(0, 1/(D+1)) (arXiv 2009.01325), bias zero; in place."""
    nn.init.normal_(head.weight, std=1.0 / math.sqrt(head.in_features + 1))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


def new_reward_head(config: Any) -> nn.Linear:
    """A fresh reward head without a bias: preferences do not determine one, and exported decoders cannot hold one."""
    return init_reward_head(nn.Linear(head_width(config), 1, bias=False))


def enable_checkpointing(model: Any) -> Any:
    """Gradient checkpointing: activations are computed twice instead of kept."""
    # transformers renamed the method on its way to version 6.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    if renamed is not None:
        renamed(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_causal_lm(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    lora_rank: int = 0,
    checkpoint: bool = False,
    num_layers: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A Hugging Face causal language model, dropout off, with adapters if `lora_rank` > 0.

    Raises ValueError for an unknown model, one that wants to run its own code, or one with missing weights.
    """
    options = LoadOptions(dtype, num_layers, attn_implementation, trust_remote_code)
    model = apply_lora(build(AutoModelForCausalLM, name_or_path, None, options), lora_rank)
    return enable_checkpointing(model) if checkpoint else model


def load_reward_backbone(name_or_path: str | Path, **options: Any) -> Any:
    """A Hugging Face sequence-classification model of one output; a missing head is drawn anew.

    options: those of `LoadOptions`. Raises ValueError as `load_causal_lm` does.
    """
    return build(AutoModelForSequenceClassification, name_or_path, None, LoadOptions(**options), new_head=True)


def load_token_classifier(name_or_path: str | Path, **options: Any) -> Any:
    """A Hugging Face token-classification model, such as a process reward model; nothing in it is drawn anew.

    options: those of `LoadOptions`. Raises ValueError as `load_causal_lm` does.
    """
    return build(AutoModelForTokenClassification, name_or_path, None, LoadOptions(**options))


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; a missing pad token becomes the EOS token (padding is told by masks, never by id)."""
    source = resolve(name_or_path)
    check_no_code(source, trust_remote_code)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**_where(source), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(_unreadable(str(name_or_path), source, error)) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"tokenizer {str(name_or_path)!r} has neither a pad nor an EOS token: add one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
