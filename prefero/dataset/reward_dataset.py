"""Preference pairs as the seed's reward model trainer takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from prefero.data.formats import Comparison, Demonstration, to_preferences
from prefero.data.sources import require_columns
from prefero.data.spelling import encode_plain, frame, pad_id
from prefero.data.tokenize import TooLongError, encode_sft
from prefero.dataset.utils import padded, report_left_out, tolerant_rows


class RewardDataset(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Rows of prompt, chosen and rejected, each answer ending in one end token; also any other preference shape.

    dataset: any sequence of rows. max_length: tokens; a longer pair loses the beginning of its prompt, so that the end
    token that the reward is read from stays; an answer too long by itself is cut before it. special_token: what
    answers end with; None takes the tokenizer's EOS. Items: chosen ids and mask, rejected ids and mask, each
    [max_length], padded on the right. Bad rows (empty or equal answers) are left out with a warning; ValueError when
    they are more than one in a hundred.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        max_length: int,
        special_token: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end = self._end_ids(special_token)
        rows, budget = tolerant_rows(dataset)
        if not {"summaries", "answer_0"} & set(rows.columns):
            require_columns(rows, self.columns)
        table = to_preferences(rows, max_bad_rows=budget)
        report_left_out(table)
        self.pairs = [(self._encode(row, row.chosen), self._encode(row, row.rejected)) for row in table]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen, rejected = self.pairs[index]
        fill = pad_id(self.tokenizer)
        return (
            padded(chosen, self.max_length, fill),
            padded([1] * len(chosen), self.max_length, 0),
            padded(rejected, self.max_length, fill),
            padded([1] * len(rejected), self.max_length, 0),
        )

    def _end_ids(self, special_token: str | None) -> list[int]:
        if special_token is None:
            return [frame(self.tokenizer)[1]]
        known = self.tokenizer.get_vocab().get(special_token)
        return [known] if known is not None else encode_plain(self.tokenizer, special_token)

    def _encode(self, row: Comparison, answer: str) -> list[int]:
        demonstration = Demonstration(row.id, row.prompt, answer)
        room = self.max_length + 1 - len(self.end)  # the tokenizer's EOS is swapped for self.end
        try:
            ids = list(encode_sft(self.tokenizer, demonstration, room, truncate="left").token_ids)
        except TooLongError:
            whole = encode_sft(self.tokenizer, demonstration)
            spoken = whole.token_ids[whole.loss_mask.index(1) :]
            ids = [*spoken[: room - 1], spoken[-1]]
        return ids[:-1] + self.end


class RmStaticDataset(RewardDataset):
    """Dahoas/rm-static: prompt, response, chosen, rejected."""


class HhRlhfDataset(RewardDataset):
    """Anthropic/hh-rlhf: two transcripts, cut into prompt and answers at the last turn they share."""

    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
