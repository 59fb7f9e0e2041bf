"""The reference's log-probabilities on disk: found out once before training, found again when a run goes on.

The file names what it belongs to (the reference's weights, the texts) and the digest of its own numbers; where any of
these is another, it is not believed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prefero.data.tokenize import Example
from prefero.models.base import Actor
from prefero.models.shared import fingerprint
from prefero.strategies.base import Strategy
from prefero.tracking.files import write_atomic
from prefero.trainer.reference import reference_logprobs
from prefero.trainer.split import MicroBatchLimit

_NUMBERS = "logprobs"


def cached_references(
    file: Path,
    actor: Actor,
    texts: Iterable[Example],
    strategy: Strategy,
    limit: MicroBatchLimit,
    say: Callable[[str], None],
) -> dict[Example, float]:
    """What the actor, as it begins (with LoRA: without its adapters, unless these had learned), makes of each text.

    From the file where that is of this model and these texts, else by one pass over them, whose numbers are written
    there. Every process must call this; rank 0 reads and writes. Raises ValueError as `reference_logprobs` does.
    """
    different = sorted(set(texts))
    state = strategy.whole_state(actor, only_rank0=True)
    group, found, facts = strategy.group, None, {}
    if strategy.is_rank_0:
        model = fingerprint(actor.model.config, state)
        if actor.learned_before:
            model += _adapters(state)
        facts = {"model": model, "texts": _digest_of(different), "precision": strategy.precision}
        found = _read(file, facts, say)
    del state
    if group.agreed(int(found is not None)):
        numbers = torch.zeros(len(different)) if found is None else found
        group.broadcast([numbers])
        return dict(zip(different, numbers.tolist(), strict=True))
    table = reference_logprobs(actor, different, strategy, limit)
    if strategy.is_rank_0:
        numbers = torch.tensor([table[text] for text in different])
        write_atomic(file, save({_NUMBERS: numbers}, {**facts, "sha256": _sha256(numbers)}))
    group.wait()
    return table


def _read(file: Path, facts: dict[str, str], say: Callable[[str], None]) -> Tensor | None:
    """The file's numbers; None where there is no file, or it is damaged or of something else, which is said."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as content:
            told, numbers = content.metadata() or {}, content.get_tensor(_NUMBERS)
    except (SafetensorError, OSError) as error:
        say(f"{file} cannot be read ({error}): the reference is asked again")
        return None
    other = [name for name, fact in facts.items() if told.get(name) != fact]
    if other:
        say(f"{file} belongs to another {' and other '.join(other)}: the reference is asked again")
        return None
    if told.get("sha256") != _sha256(numbers):
        say(f"{file} is damaged: the reference is asked again")
        return None
    found: Tensor = numbers
    return found


def _adapters(state: Mapping[str, Tensor]) -> str:
    """Tells adapters from others, which `fingerprint` leaves out."""
    found = hashlib.sha256()
    for name in sorted(name for name in state if ".lora_" in name):
        found.update(name.encode() + state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _digest_of(texts: Sequence[Example]) -> str:
    found = hashlib.sha256()
    for text in texts:
        for numbers in text:
            found.update(array("q", (len(numbers), *numbers)).tobytes())
    return found.hexdigest()


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().tobytes()).hexdigest()
