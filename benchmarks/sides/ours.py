"""Our side: python ours.py MODEL '{work}' - the engine and the trainers as a recipe sets them up."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoTokenizer
from work import EOS, Work, given, tell, timed

import prefero
from prefero.algorithms.ppo import PPOSettings
from prefero.models.auto import AutoActor, AutoCritic, AutoRM
from prefero.models.base import RewardModel
from prefero.models.shared import backbone_of, critic_on, sharing
from prefero.optimizer import HybridAdam
from prefero.recipes.session import num_parameters, set_up_machine
from prefero.rollout.engine import SamplingParams
from prefero.rollout.native.engine import Bounds, NativeEngine
from prefero.strategies import NaiveStrategy
from prefero.trainer import PPOTrainer, RewardModelTrainer, SFTTrainer
from prefero.types import PreferenceBatch, Prompt, TokenBatch

folder, work = given()
strategy = NaiveStrategy("cpu", precision=work.dtype)  # type: ignore[arg-type]
tokenizer = AutoTokenizer.from_pretrained(folder)


def adam(model: Any) -> HybridAdam:
    return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def batch(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts padded on the right, and the mask of what is real."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    return ids, mask


def prompts(step: int, vocabulary: int) -> list[Prompt]:
    texts = work.texts(vocabulary, step)
    return [Prompt(f"{step}-{row}", tuple(text), f"{row}") for row, text in enumerate(texts)]


PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                  "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "optimizer": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_norm"),
    "memory moved": ("aten::copy_", "aten::fill_", "aten::cat", "aten::index_select", "aten::index_copy_",
                     "aten::index_add_", "aten::clone", "aten::_index_put_impl_"),
}  # fmt: skip


def parts(work: Work, step: Any) -> list[tuple[str, float]]:
    """Seconds of one step by kind of operation; the rest of its time is Python's, and our own kernels'."""
    from torch.profiler import ProfilerActivity, profile

    for number in range(work.warm):
        step(number)
    began = time.perf_counter()
    step(work.warm)
    whole = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step(work.warm)
    found = dict.fromkeys([*PARTS, "other operations"], 0.0)
    for event in seen.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "other operations")
        found[part] += event.self_cpu_time_total / 1e6
    return [("whole", whole), *found.items()]


def told(work: Work, step: Any) -> Any:
    return parts(work, step) if work.profile else timed(work, step)


def decode(work: Work) -> Any:
    actor = strategy.prepare(AutoActor(folder))
    set_up_machine(num_parameters(actor))
    size = actor.model.config.vocab_size
    geometric = work.lengths == "geometric"
    engine = NativeEngine(actor, tokenizer, Bounds(), None if geometric else ())

    def step(number: int) -> int:
        bias = {EOS: ends_after(30, size)} if geometric else {}
        params = SamplingParams(work.new, logit_bias=bias, step=number)
        with strategy.autocast():
            found = engine.generate([p for p in prompts(number, size) for _ in range(work.samples)], params)
        return sum(len(completion.token_ids) for completion in found)

    return told(work, step)


def ends_after(mean: int, vocabulary: int) -> float:
    """What to add to one of so many nearly even logits for its token to be drawn once in `mean` times."""
    return float(torch.tensor(vocabulary / (mean - 1)).log())


def sft(work: Work) -> Any:
    actor = AutoActor(folder)
    set_up_machine(num_parameters(actor))
    size = actor.model.config.vocab_size
    trainer = SFTTrainer(actor, strategy, adam(actor), [], max_norm=1.0, scheduler="constant")

    def step(number: int) -> int:
        ids, mask = batch(work.texts(size, number))
        trainer.training_step(TokenBatch(ids, mask, mask))
        return int(mask.sum())

    return told(work, step)


def reward(work: Work) -> Any:
    model = AutoRM(folder)
    set_up_machine(num_parameters(model))
    size = model.model.config.vocab_size

    def comparisons(number: int) -> PreferenceBatch:
        ids, mask = batch(work.texts(size, number) + work.texts(size, number, kind=1))
        rows = torch.arange(work.rows)
        return PreferenceBatch(ids, mask, rows, rows + work.rows, torch.zeros(work.rows), torch.ones(work.rows).bool())

    trainer = RewardModelTrainer(
        model, strategy, adam(model), [comparisons(0)], None, max_norm=1.0, scheduler="constant"
    )

    def step(number: int) -> int:
        given = comparisons(number)
        trainer.training_step(given)
        return int(given.attention_mask.sum())

    return told(work, step)


def ppo(work: Work) -> Any:
    actor = AutoActor(folder, lora_rank=16 if work.lora else 0)
    set_up_machine(num_parameters(actor))
    size = actor.model.config.vocab_size
    if work.lora:
        critic, reference = critic_on(actor, 16), None
        judge = RewardModel(backbone_of(actor), lora_rank=16)
    else:
        critic, reference, judge = AutoCritic(folder), sharing(actor).requires_grad_(False), AutoRM(folder)
    optimizers = adam(actor), adam(critic)
    roles = [(actor, optimizers[0]), (critic, optimizers[1]), judge.requires_grad_(False)]
    strategy.prepare(*roles, *([reference] if reference else []))
    trainer = PPOTrainer(
        strategy, actor, critic, judge, reference, *optimizers,
        train_batch_size=work.rows, experience_batch_size=work.rows, max_norm=1.0,
        settings=PPOSettings(kl_coef=0.05), engine=NativeEngine(actor, tokenizer, Bounds(), ()),
        sampling=SamplingParams(work.new), micro_batch_tokens=16384,
    )  # fmt: skip

    def step(number: int) -> int:
        trainer.step(prompts(number, size))
        return work.rows

    return told(work, step)


if __name__ == "__main__":
    tell({"decode": decode, "sft": sft, "reward": reward, "ppo": ppo}[work.kind](work), prefero.__version__)
