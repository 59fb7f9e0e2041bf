"""What every network here is made of: a Hugging Face trunk that turns token ids into hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

Module = TypeVar("Module", bound=nn.Module)

_PARTS, _ROWS_A_PART = 4, 8
_LOUD = 1e6


def trunk_of(model: Any) -> Any:
    """The part of a Hugging Face model below its head: `LlamaForCausalLM` gives its `LlamaModel`, a trunk itself."""
    return getattr(model, "base_model", model)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where its parameters are, or visit while they wait in main memory (FSDP's offload).

    The CPU for a model without parameters.
    """
    parameter = next(model.parameters(), torch.empty(0))
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != parameter.device.type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def head_width(config: Any) -> int:
    """The width of a trunk's last hidden state (OPT projects it to `word_embed_proj_dim`)."""
    for name in ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model"):
        width = getattr(config, name, None)
        if width is not None:
            return int(width)
    raise ValueError(f"{type(config).__name__} names no hidden width: pass a value_head of your own")


def is_bidirectional(config: Any) -> bool:
    """Whether the trunk is an encoder (BERT, DeBERTa, ...), whose every position sees the whole text."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, S] that count real tokens only, so that the amount and side of padding do not matter."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


@lru_cache(maxsize=64)
def _accepted(trunk_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(trunk_class.forward).parameters)  # type: ignore[attr-defined]


def model_inputs(
    model: Any, token_ids: Tensor, attention_mask: Tensor | None, logits_to_keep: int = 0
) -> dict[str, Any]:
    """The keyword arguments of one uncached forward pass, position ids included where the model takes them.

    token_ids, attention_mask: [B, S]; no mask means that every token is real. logits_to_keep: the head is wanted at
    the last positions only, where the model can do that (0: at all). Raises ValueError for a text longer
    than a table of learned positions.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(token_ids)
    check_length(model, token_ids, attention_mask)
    inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": attention_mask.long()}
    model_class: type = type(model)
    accepted = _accepted(model_class)
    # An encoder is fed left-aligned rows and numbers them itself (RoBERTa starts at 2, DeBERTa has no numbers at all).
    if "position_ids" in accepted and not is_bidirectional(model.config):
        inputs["position_ids"] = positions(attention_mask)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if logits_to_keep and "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = logits_to_keep
    return inputs


def check_length(model: Any, token_ids: Tensor, attention_mask: Tensor) -> None:
    """Raises ValueError for a text longer than a table of learned positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or token_ids.shape[1] <= limit:
        return
    longest = int(attention_mask.sum(dim=1).max())
    if longest > limit:
        raise ValueError(
            f"a text of {longest} tokens does not fit the model's context of {limit} (max_position_embeddings): "
            "shorten the prompts or max_new_tokens"
        )


def padded_hidden_states(trunk: Any, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last hidden states [B, S, D] of `token_ids` [B, S] under `attention_mask` [B, S], padding computed too."""
    output: Tensor = trunk(**model_inputs(trunk, token_ids, attention_mask)).last_hidden_state
    return output


def left_align(token_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rolls every row so that its first real token stands in column 0 (encoders read their summary there)."""
    start = attention_mask.long().argmax(dim=1, keepdim=True)
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    order = (columns + start) % token_ids.shape[1]
    return token_ids.gather(1, order), attention_mask.gather(1, order)


def by_length(attention_mask: Tensor) -> list[Tensor]:
    """Row numbers in parts of like length, so that the short need not be padded to the longest [B, S].

    Four parts, longest first, or all rows in their order where there are too few for that to pay.
    """
    rows = torch.arange(len(attention_mask), device=attention_mask.device)
    if len(rows) < _PARTS * _ROWS_A_PART:
        return [rows]
    return list(attention_mask.long().sum(dim=1).argsort(descending=True, stable=True).tensor_split(_PARTS))


def cropped(token_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, S] without the columns at either end in which none of them has a real token."""
    used = attention_mask.bool().any(dim=0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return token_ids[:, columns], attention_mask[:, columns]


def contiguous_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a head: on a CPU a *frozen* head is up to 28 times slower on a sliced hidden state."""
    return (inputs[0].contiguous(), *inputs[1:])


Forwards = list[tuple[nn.Module, Callable[..., Tensor]]]
"""Modules, and what stands in for their `forward`."""


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """These forwards in the place of the modules' own inside; what was there before comes back after."""
    before = [(module, vars(module).get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            # The attribute hides the class's method until it is deleted. Set past the module's own slow way.
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def full_precision_head(model: Any) -> Forwards:
    """The output head of a causal model in float32 (or better), whatever autocast or the weights say.

    As `functional.logprobs.selected` applies it: bf16 logits between 16 and 32 are 0.125 apart, and a sampler that
    rounds where the trainer does not would be another policy.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return []
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(dtype).contiguous(), weight, bias)

    return [(head, forward)]


@torch.no_grad()
def head_is_plain(model: Any) -> bool:
    """Whether a causal model's logits are its output head on its trunk's last hidden state, and nothing more.

    Some families scale or soft-cap their logits (Gemma 2, Cohere, Granite): for those the head may not be applied to
    response positions alone. Found out by trial on a three-token text, whatever the family, with a head a million times
    as loud: a cap far above the logits of today changes those of tomorrow.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    probe = torch.tensor([[0, 1, 0]], device=head.weight.device)
    usual = head.forward
    with evaluating(model), replaced([(head, lambda hidden: usual(hidden) * _LOUD)]):
        ours = head(padded_hidden_states(trunk_of(model), probe, None))
        theirs = model(**model_inputs(model, probe, None)).logits
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-4))


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, every submodule's own mode restored after; None stands for no model."""
    trained = [part for model in models if model is not None for part in model.modules() if part.training]
    for part in trained:
        part.training = False
    try:
        yield
    finally:
        for part in trained:
            part.training = True


def disable_dropout(model: Module) -> Module:
    """Sets every dropout probability of a model to zero in place and returns it.

    Covers `nn.Dropout` modules and the plain numbers that Hugging Face layers keep (`attention_dropout`, OPT's
    `layerdrop`, ...). The configuration keeps its values, so an export still names the original ones.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        # DeBERTa's own dropout class keeps its probability under another name.
        if type(module).__name__ == "StableDropout" and hasattr(module, "drop_prob"):
            setattr(module, "drop_prob", 0.0)  # noqa: B010 - typed as a submodule otherwise
    return model


def drops_out(model: nn.Module) -> bool:
    """Whether a model drops anything out while it trains."""
    return any(
        value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (name == "p" or "drop" in name)
    )


def freeze(model: Module) -> Module:
    """Stops all learning of a model in place (no gradients, evaluation mode) and returns it."""
    model.requires_grad_(False)
    return model.eval()


def score_hidden(head: nn.Module, hidden: Tensor) -> Tensor:
    """A one-output head in its own precision: [..., D] -> [...], at least float32, also under autocast."""
    parameter = next(head.parameters())
    with torch.autocast(hidden.device.type, enabled=False):
        scores: Tensor = head(hidden.to(parameter.dtype).contiguous())
    scores = scores.squeeze(-1).clone()  # no view: what watches a module's output would be lost with one
    return scores if scores.dtype == torch.float64 else scores.float()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that an allocation failed, on an accelerator or in main memory."""
    said = ("out of memory", "can't allocate memory", "not enough memory")
    return any(words in str(error) for words in said)
