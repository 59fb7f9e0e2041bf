"""The peer TRL: python trl_steps.py MODEL '{work}' - its trainers with their own defaults where nothing is said.

SFT and reward model: TRL 1.16. PPO: TRL 1.12, the last that has it.
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from typing import Any, ClassVar

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from work import given, tell

folder, work = given()
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(folder)
size = len(tokenizer)
half = work.dtype == "bf16"


class Clock(TrainerCallback):
    """When every optimizer step ended."""

    ends: ClassVar[list[float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def causal() -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def judge() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def steps(rows_of: Any) -> list[Any]:
    """Rows of all steps, in order: those that are not timed first."""
    return [row for number in range(work.steps + work.warm) for row in rows_of(number)]


common: dict[str, Any] = {
    "output_dir": tempfile.mkdtemp(), "learning_rate": 1e-5, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": work.rows, "seed": 0, "bf16": half,
    "gradient_checkpointing": False, "dataloader_pin_memory": False,
}  # fmt: skip


def sft() -> list[int]:
    texts = [work.texts(size, number) for number in range(work.steps + work.warm)]
    rows = Dataset.from_dict({"input_ids": [text for some in texts for text in some]})
    config = trl.SFTConfig(
        **common, max_steps=work.steps + work.warm, max_length=work.prompt + work.new, shuffle_dataset=False
    )
    trl.SFTTrainer(causal(), args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()]).train()
    return [sum(map(len, some)) for some in texts]


def reward() -> list[int]:
    pairs = [(work.texts(size, number), work.texts(size, number, kind=1)) for number in range(work.steps + work.warm)]
    columns = {
        name: [text for pair in pairs for text in pair[side]]
        for side, name in enumerate(("chosen_ids", "rejected_ids"))
    }
    config = trl.RewardConfig(**common, max_steps=work.steps + work.warm, max_length=work.prompt + work.new)
    trl.RewardTrainer(
        judge(), args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, callbacks=[Clock()]
    ).train()
    return [sum(map(len, one)) + sum(map(len, other)) for one, other in pairs]


def ppo() -> list[int]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    rows = Dataset.from_dict({"input_ids": steps(lambda number: work.texts(size, number))})
    config = PPOConfig(
        **common, total_episodes=work.rows * (work.steps + work.warm), num_ppo_epochs=1, num_mini_batches=1,
        response_length=work.new, stop_token=None, num_sample_generations=0,
        local_rollout_forward_batch_size=work.rows, temperature=1.0, kl_coef=0.05,
    )  # fmt: skip
    policy = causal()
    policy.generation_config.eos_token_id = None
    PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=causal(), reward_model=judge(),
        value_model=judge(), train_dataset=rows, eval_dataset=rows.select(range(2)), callbacks=[Clock()],
    ).train()  # fmt: skip
    return [work.rows] * (work.steps + work.warm)


did = {"sft": sft, "reward": reward, "ppo": ppo}[work.kind]()
ends = Clock.ends
assert len(ends) == work.steps + work.warm + 1, f"{len(ends) - 1} steps of {work.steps + work.warm}"
usual = round(sum(did) / len(did))  # it shuffles its rows, so only the mean of a step is known
tell([(after - before, usual) for before, after in pairwise(ends[work.warm :])], trl.__version__)
