"""Sampling, greedy and beam generation under the seed's signature, by transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefero.models.trunk import evaluating


def generate(
    model: Any,
    input_ids: Tensor,
    max_length: int | None = None,
    num_beams: int = 1,
    do_sample: bool = True,
    early_stopping: bool = False,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Continues left-padded prompts [B, P] and returns prompts and continuations [B, S].

    Sampling when do_sample, else greedy, or beam search with num_beams > 1. S is max_length (prompt included; or give
    max_new_tokens): finished rows are filled with pad, unless early_stopping cuts the columns that nobody needs.
    No top_k, top_p or temperature means plain sampling from the model, whatever its own generation settings say; no
    eos_token_id means the model's own. Without an attention_mask a leading run of pad_token_id is taken for padding.
    model_kwargs go to `transformers.GenerationMixin.generate`. Raises ValueError when no length is given, when the
    prompt leaves no room, or for the seed's input hooks, which are automatic here.
    """
    for hook in ("prepare_inputs_fn", "update_model_kwargs_fn"):
        if model_kwargs.pop(hook, None) is not None:
            raise ValueError(f"{hook} is not needed: the cache, masks and positions are handled by the model itself")
    width = input_ids.shape[1]
    total = _total_length(width, max_length, max_new_tokens)
    settings = model.generation_config
    eos = settings.eos_token_id if eos_token_id is None else eos_token_id
    pad = _pad_id(pad_token_id, settings.pad_token_id, eos)
    if attention_mask is None:
        attention_mask = leading_padding_mask(input_ids, pad_token_id)
    choice: dict[str, float | None]
    if do_sample:
        choice = {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
        choice["temperature"] = 1.0 if temperature is None else temperature
    else:
        choice = {"top_k": None, "top_p": None, "temperature": None}
    with torch.no_grad(), evaluating(model):
        sequences: Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            max_length=total,
            num_beams=num_beams,
            do_sample=do_sample,
            early_stopping=early_stopping if num_beams > 1 else False,
            eos_token_id=eos,
            pad_token_id=pad,
            **{"repetition_penalty": 1.0, "use_cache": True, **choice, **model_kwargs},
        )
    if not early_stopping:
        sequences = F.pad(sequences, (0, total - sequences.shape[1]), value=pad)
    return sequences


def _total_length(width: int, max_length: int | None, max_new_tokens: int | None) -> int:
    if (max_length is None) == (max_new_tokens is None):
        raise ValueError("give either max_length (prompt included) or max_new_tokens")
    total = width + max_new_tokens if max_new_tokens is not None else max_length
    assert total is not None
    if total <= width:
        raise ValueError(f"max_length={total} leaves no room after a prompt of {width} tokens: raise it")
    return total


def _pad_id(given: int | None, own: int | None, eos: int | list[int] | None) -> int:
    if given is not None:
        return given
    if own is not None:
        return own
    if isinstance(eos, list):
        return eos[0]
    return 0 if eos is None else eos


def leading_padding_mask(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """1 on real tokens [B, P]: only the run of `pad_token_id` at the start of a row is padding (pad may equal EOS)."""
    if pad_token_id is None:
        return torch.ones_like(input_ids)
    mask = (input_ids != pad_token_id).long().cumsum(dim=1) > 0
    # A prompt of nothing but pads keeps its last token, for something must be continued.
    mask[:, -1] = True
    return mask.long()


def eos_ids(model: Any, eos_token_id: int | list[int] | None) -> list[int]:
    """The ids that end a response: those given, else the model's own."""
    ids = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [int(ids)]


def action_mask_of(actions: Tensor, ends: list[int]) -> Tensor:
    """True [B, A] up to and including the first end token of each response [B, A]; without one, everywhere."""
    if not ends:
        return torch.ones_like(actions, dtype=torch.bool)
    is_end = torch.isin(actions, torch.tensor(ends, device=actions.device)).long()
    return is_end.cumsum(dim=1) - is_end == 0
