"""BLOOM over packed texts: its attention has no interface of transformers', so it is written down here."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel, _get_alibi_slopes, dropout_add

from prefero.models.packing import Attending, Texts

_usual = BloomAttention.forward


def run(trunk: BloomModel, ids: Tensor, texts: Texts) -> Tensor:
    """The last hidden states [T, D] of packed token ids [T]; texts: who sees whom."""
    hidden = trunk.word_embeddings_layernorm(trunk.word_embeddings(ids.unsqueeze(0)))
    for block in trunk.h:
        # What stands in for the bias goes through the block as it is, to the attention below.
        hidden = block(hidden, alibi=texts, attention_mask=None)[0]
    last: Tensor = trunk.ln_f(hidden)
    return last[0]


def _forward(module: Any, hidden: Tensor, residual: Tensor, alibi: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own, but for packed texts in the place of the bias."""
    if isinstance(alibi, Tensor):
        return _usual(module, hidden, residual, alibi, *args, **kwargs)
    query, key, value = module._reshape(module.query_key_value(hidden))
    dropout = module.attention_dropout.p if module.training else 0.0
    how = Attending(dropout, module.inv_norm_factor, slopes=_get_alibi_slopes(module.num_heads, hidden.device))
    output = module.dense(alibi.attend(module.layer_idx, query, key, value, how).flatten(2))
    return dropout_add(output, residual, module.hidden_dropout, module.training), None


# Of the class, not of one module: a copy of a model would go on calling the module it was copied from.
BloomAttention.forward = _forward
