"""From rows to batches: sources, shapes, chat templates, tokens, padding and a resumable loader."""

from prefero.data.collate import collate_comparisons, collate_examples, left_pad, right_pad
from prefero.data.formats import (
    Comparison,
    Conversation,
    Demonstration,
    PromptRow,
    SFTRow,
    to_preferences,
    to_prompts,
    to_sft,
)
from prefero.data.loader import Loader
from prefero.data.sources import Rows, as_rows, read_rows, require_columns
from prefero.data.spelling import frame, pad_id
from prefero.data.tokenize import (
    EncodedComparison,
    Example,
    TooLongError,
    encode_comparison,
    encode_conversation,
    encode_example,
    encode_prompt,
    encode_prompts,
    encode_rows,
    encode_sft,
    keep_end,
)

__all__ = [
    "Comparison",
    "Conversation",
    "Demonstration",
    "EncodedComparison",
    "Example",
    "Loader",
    "PromptRow",
    "Rows",
    "SFTRow",
    "TooLongError",
    "as_rows",
    "collate_comparisons",
    "collate_examples",
    "encode_comparison",
    "encode_conversation",
    "encode_example",
    "encode_prompt",
    "encode_prompts",
    "encode_rows",
    "encode_sft",
    "frame",
    "keep_end",
    "left_pad",
    "pad_id",
    "read_rows",
    "require_columns",
    "right_pad",
    "to_preferences",
    "to_prompts",
    "to_sft",
]
