"""What a model can read, checked before it reads: its vocabulary and its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefero.config import ConfigError


@dataclass(frozen=True)
class Limits:
    """Token ids below `vocabulary`, and at most `context` of them at once (None: as many as memory holds)."""

    vocabulary: int
    context: int | None

    @classmethod
    def of(cls, config: Any) -> Limits:
        """The limits that a transformers configuration states."""
        text = config.get_text_config()
        context = getattr(text, "max_position_embeddings", None)
        return cls(int(text.vocab_size), None if context is None else int(context))

    def check(self, row: str, token_ids: Sequence[int], cure: str, reserve: int = 0) -> None:
        """Raises ConfigError naming the row when its ids, and `reserve` further ones, are not for this model."""
        if max(token_ids) >= self.vocabulary:
            raise ConfigError(
                f"{row}: holds token id {max(token_ids)}, but the model's vocabulary has {self.vocabulary}; "
                "use the tokenizer that belongs to this model (model.tokenizer)"
            )
        if self.context is not None and len(token_ids) + reserve > self.context:
            further = f" and {reserve} new ones" if reserve else ""
            raise ConfigError(
                f"{row}: its {len(token_ids)} tokens{further} are more than the model's context of {self.context}; "
                f"{cure}"
            )

    def shorten(self, max_length: int) -> int:
        """`max_length`, or the context where that is shorter."""
        return max_length if self.context is None else min(max_length, self.context)
