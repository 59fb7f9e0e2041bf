"""Rows to imitate as the seed's supervised trainer takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from prefero.data.formats import SFTRow, Table, to_sft
from prefero.data.sources import read_rows
from prefero.data.spelling import pad_id
from prefero.data.tokenize import Example, encode_rows, encode_sft
from prefero.dataset.utils import padded, report_left_out, tolerant_rows
from prefero.models.loss import IGNORED


class SFTDataset(Dataset[dict[str, Tensor]]):
    """Rows of prompt and completion (or any other shape to imitate), the loss on the completion and its EOS alone.

    dataset: any sequence of rows. max_length: tokens; longer rows lose their end (and the EOS with it). Items:
    input_ids, labels (-100 where no loss counts) and attention_mask, each [max_length], padded on the right.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int = 512) -> None:
        super().__init__()
        self.max_length, self.pad_id = max_length, pad_id(tokenizer)
        self.examples = encode_rows(
            _table(dataset), lambda row: encode_sft(tokenizer, row, max_length, truncate="right"), drop=True
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        return {
            "input_ids": padded(example.token_ids, self.max_length, self.pad_id),
            "labels": padded(_labels(example), self.max_length, IGNORED),
            "attention_mask": padded([1] * len(example.token_ids), self.max_length, 0),
        }


class AlpacaDataset(Dataset[dict[str, Tensor]]):
    """Alpaca or self-instruct rows (instruction, input, output) behind the standard prompt.

    data_path: a file `read_rows` reads, or a sequence of rows. max_length: tokens; longer rows are left out. Items:
    input_ids and labels (-100 on the prompt), unpadded; batch them with AlpacaDataCollator.
    """

    def __init__(
        self, data_path: str | Path | Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int | None = None
    ) -> None:
        super().__init__()
        rows = read_rows(data_path) if isinstance(data_path, (str, Path)) else data_path
        self.examples = encode_rows(_table(rows), lambda row: encode_sft(tokenizer, row, max_length), drop=True)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        return {"input_ids": torch.tensor(example.token_ids), "labels": torch.tensor(_labels(example))}


@dataclass
class AlpacaDataCollator:
    """Pads rows of input_ids and labels on the right; the attention mask comes from their lengths.

    Not from `input_ids != pad`: where the padding token is the EOS, that hides the EOS and the model never stops.
    """

    tokenizer: Any

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        masks = [row.get("attention_mask", torch.ones_like(row["input_ids"])) for row in instances]
        return {
            "input_ids": _stack([row["input_ids"] for row in instances], pad_id(self.tokenizer)),
            "labels": _stack([row["labels"] for row in instances], IGNORED),
            "attention_mask": _stack(masks, 0).bool(),
        }


def _table(rows: Iterable[Mapping[str, Any]]) -> Table[SFTRow]:
    checked, budget = tolerant_rows(rows)
    table = to_sft(checked, max_bad_rows=budget)
    report_left_out(table)
    return table


def _labels(example: Example) -> list[int]:
    return [t if learn else IGNORED for t, learn in zip(example.token_ids, example.loss_mask, strict=True)]


def _stack(rows: list[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
