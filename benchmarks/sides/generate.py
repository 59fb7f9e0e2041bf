"""The peer transformers: python generate.py MODEL '{work}' - `generate` on one batch, as users of it sample."""

from __future__ import annotations

import math

import torch
import transformers
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from work import EOS, given, tell, timed

folder, work = given()
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(folder, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[work.dtype])
size = model.config.vocab_size
geometric = work.lengths == "geometric"


class EndsAfter(LogitsProcessor):
    """Adds to the end token's logit, as the other side does, so that lengths are geometric."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, EOS] += math.log(size / 29)
        return scores


def step(number: int) -> int:
    ids = torch.tensor(work.texts(size, number))
    torch.manual_seed(number)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new, do_sample=True, top_k=0, pad_token_id=0,
        eos_token_id=EOS if geometric else None, num_return_sequences=work.samples,
        logits_processor=LogitsProcessorList([EndsAfter()] if geometric else []),
    )[:, work.prompt :]  # fmt: skip
    if not geometric:
        assert found.shape[1] == work.new
        return int(found.numel())
    ended = (found == EOS).int().cumsum(1)
    return int(((ended == 0) | ((ended == 1) & (found == EOS))).sum())


with torch.inference_mode():
    tell(timed(work, step), transformers.__version__)
