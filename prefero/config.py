"""Configuration that stops at the door: strict frozen dataclasses; defaults < YAML < command line.

Every key has a type, a default and one sentence; unknown keys are errors that suggest the right one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and the cure."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The policy."""

    path: str = Field(
        default="", description="Model folder, hub name or fetched name (smollm2); empty: the world's own tiny model."
    )
    tokenizer: str = Field(default="", description="Tokenizer folder or hub name; empty: the one beside the model.")
    lora_rank: int = Field(
        default=0, ge=0, description="Rank of LoRA adapters on every linear layer; 0 trains all weights."
    )
    lora_learning_rate_factor: float = Field(
        default=1.0,
        gt=0,
        description="Where adapters train, learning rates are multiplied by this: they bear a far higher one than all "
        "weights do, and with it one config serves both.",
    )
    num_layers_unfrozen: int = Field(
        default=0,
        ge=0,
        description="Train the policy's last so many layers only, and what stands above them; 0: all. "
        "The reference then shares what is frozen.",
    )
    frozen: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description="What the matrices of linear layers below adapters are kept in, in stages that have adapters. "
        "bf16: half the memory, rounded as a run in bf16 does anyway. int8: a quarter, with a scale for each output. "
        "The next stage goes on with the adapter, unmerged.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that ships with a model. Off unless you trust it."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Where rows come from: a built-in world, or files and hub names."""

    world: Literal["grammar", "movies", "files"] = Field(
        default="files", description="Built-in data, or `files` for the paths below."
    )
    sft: str = Field(default="", description="Rows to imitate: a JSONL, CSV or parquet file, or a hub name.")
    preferences: str = Field(default="", description="Comparisons, for KTO also labelled rows, to learn from.")
    prompts: str = Field(default="", description="Prompts the policy practises on.")
    trajectories: str = Field(
        default="", description="Texts with a column `reward` (or scored by `ilql.rewards`) to learn values from."
    )
    sft_heldout: str = Field(default="", description="Rows never imitated; empty: a share of `sft`.")
    preferences_heldout: str = Field(
        default="", description="Comparisons never trained on; empty: a share of `preferences`."
    )
    prompts_heldout: str = Field(default="", description="Prompts never trained on; empty: a share of `prompts`.")
    trajectories_heldout: str = Field(
        default="", description="Rewarded texts never trained on; empty: a share of `trajectories`."
    )
    heldout_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of distinct prompts set aside where no held-out file is given."
    )
    chat: bool = Field(
        default=False, description="Put plain-string prompts into the tokenizer's chat template as a user turn."
    )
    max_prompt_length: int = Field(
        default=256, ge=1, description="Longest prompt in tokens; a longer one is an error unless `truncate` says else."
    )
    truncate: Literal["error", "left", "right", "drop"] = Field(
        default="error", description="What happens to a prompt that is too long."
    )
    max_bad_rows: int = Field(
        default=0, ge=0, description="Corrupt rows tolerated (skipped and counted) before the run stops."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StrategyConfig:
    """Where models live and how numbers are computed."""

    kind: Literal["naive", "ddp", "fsdp"] = Field(
        default="naive",
        description="naive: one process; ddp: a copy of every model in each process of a torchrun launch; fsdp: "
        "models, gradients and optimizer states shared out over them.",
    )
    stage: Literal[1, 2, 3] = Field(
        default=3,
        description="What fsdp shares out: 1 optimizer states, 2 gradients too, 3 parameters too (ZeRO's stages).",
    )
    offload: bool = Field(
        default=False,
        description="fsdp: keep parameters, gradients and optimizer states in main memory, not on the GPU.",
    )
    shard_init: bool = Field(
        default=False,
        description="fsdp: what trains is built a layer at a time, so that no process holds a whole model meanwhile.",
    )
    timeout: float = Field(
        default=600.0, gt=0, description="Seconds a process waits for the others before it ends with an error."
    )
    device: str = Field(default="", description="naive: cpu, cuda, mps; empty: the best one present.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Compute type; auto: bf16 where the hardware has it, else fp32. fp16 scales its loss dynamically.",
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradients are scaled down to this global norm; 0 leaves them."
    )
    max_skipped: int = Field(
        default=5,
        ge=1,
        description="End the run when a loss or gradient was not finite in so many optimizer steps in a row (each is "
        "skipped).",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: one for tiny models, all cores otherwise.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """What a run that is interrupted goes on from (`prefero resume RUN`), below `checkpoints/state/` of each stage."""

    every: int = Field(
        default=0, ge=0, description="Save every so many steps (PPO: iterations); 0: by `minutes` alone."
    )
    minutes: float = Field(
        default=10.0, ge=0, description="Save when so many minutes have passed; 0: by `every` alone."
    )
    keep: int = Field(default=2, ge=1, description="Checkpoints that stay; older ones go once a newer one is verified.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SFTConfig:
    """Stage 1, supervised fine-tuning."""

    skip: bool = Field(default=False, description="Start from `model.path` as it is.")
    steps: int = Field(default=0, ge=0, description="Optimizer steps; 0: `epochs` passes over the rows.")
    epochs: int = Field(default=1, ge=1, description="Passes over the rows when `steps` is 0.")
    max_rows: int = Field(default=0, ge=0, description="Use only this many rows; 0: all.")
    batch_size: int = Field(default=32, ge=1, description="Rows an optimizer step.")
    micro_batch_size: int = Field(
        default=0, ge=0, description="Rows a forward pass; 0: any number. Changes memory, not results."
    )
    micro_batch_tokens: int = Field(
        default=16384, ge=0, description="Tokens a forward pass, each text as long as its longest; 0: any number."
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="The rate after its rise: constant, or falling to zero in a line or a cosine.",
    )
    warmup_fraction: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps during which the rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_length: int = Field(
        default=512, ge=2, description="Longest prompt + completion in tokens; completions are cut there."
    )
    lora_rank: int = Field(default=-1, ge=-1, description="LoRA rank in this stage; -1: `model.lora_rank`.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardConfig:
    """Stage 2, the reward model."""

    skip: bool = Field(default=False, description="Train no reward model; `ppo.rewards` must then name the rewards.")
    model: str = Field(
        default="policy",
        description="Backbone: `policy` (the SFT result), a fetched name (minilm), a folder or a hub name.",
    )
    steps: int = Field(default=0, ge=0, description="Optimizer steps; 0: `epochs` passes over the comparisons.")
    epochs: int = Field(default=1, ge=1, description="Passes over the comparisons when `steps` is 0.")
    max_rows: int = Field(default=0, ge=0, description="Use only this many comparisons; 0: all.")
    batch_size: int = Field(default=32, ge=1, description="Comparisons an optimizer step.")
    micro_batch_size: int = Field(default=0, ge=0, description="Comparisons a forward pass; 0: any number.")
    micro_batch_tokens: int = Field(
        default=16384, ge=0, description="Tokens a forward pass, each text as long as its longest; 0: any number."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="The rate after its rise: constant, or falling to zero in a line or a cosine.",
    )
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps during which the rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_length: int = Field(default=512, ge=2, description="Longest text in the reward model's own tokens.")
    loss: Literal["log_sig", "log_exp"] = Field(
        default="log_sig", description="Bradley-Terry loss as -log sigmoid, or as log(1 + exp)."
    )
    centering: float = Field(
        default=0.0, ge=0, description="Weight of (r_chosen + r_rejected)^2, which keeps scores near zero."
    )
    dropout: bool = Field(default=False, description="Keep the backbone's dropout on while training.")
    lora_rank: int = Field(default=0, ge=0, description="LoRA rank for the backbone; 0 trains all weights.")
    eval_every: int = Field(
        default=0, ge=0, description="Measure held-out accuracy every so many steps; 0: at the end."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardPart:
    """One term of the reward."""

    use: str = Field(
        min_length=1,
        description="trained, model:FOLDER, process:FOLDER, module:function, file.py:function, rule:NAME or vader.",
    )
    weight: float = Field(default=1.0, description="Factor in the sum.")
    clamp: float = Field(default=0.0, ge=0, description="Limit a reward model's score to ± this; 0: no limit.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="What a rule or a process reward takes, by name, e.g. {column: answer}; a function with the option "
        "`separator` scores steps.",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PPOConfig:
    """Stage 3, PPO."""

    skip: bool = Field(default=False, description="Stop after the reward model.")
    steps: int = Field(default=100, ge=1, description="Rollout-and-learn iterations.")
    rewards: dict[str, RewardPart] = Field(
        default_factory=dict, description="Named terms; empty: the trained reward model."
    )
    prompts_per_step: int = Field(default=64, ge=1, description="Prompts drawn an iteration.")
    num_samples: int = Field(default=1, ge=1, description="Completions of each prompt.")
    train_batch_size: int = Field(default=64, ge=1, description="Completions an optimizer step.")
    micro_batch_size: int = Field(default=0, ge=0, description="Completions a forward pass; 0: any number.")
    micro_batch_tokens: int = Field(
        default=16384, ge=0, description="Tokens a forward pass, each text as long as its longest; 0: any number."
    )
    max_epochs: int = Field(default=1, ge=1, description="Passes over the iteration's experience.")
    level: Literal["token", "sequence"] = Field(
        default="token", description="token: critic value per token and GAE. sequence: one action per completion."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="The actor's peak learning rate.")
    critic_learning_rate: float = Field(default=1e-4, gt=0, description="The critic's peak learning rate.")
    backbone: Literal["separate", "shared", "hydra"] = Field(
        default="separate",
        description="separate: the critic is a network of its own, all of which learns. shared: critic, and a reward "
        "model that was trained as adapters on the same weights, hold the policy's frozen weights, with adapters or "
        "unfrozen layers of their own. hydra: the critic is a head on the policy; one forward pass does for both.",
    )
    value_coef: float = Field(default=0.1, gt=0, description="Weight of the value loss beside the policy's in a hydra.")
    critic_layers: int = Field(
        default=0, ge=0, description="Build the critic from the policy's first layers only; 0: all of them."
    )
    critic_warmup: int = Field(default=0, ge=0, description="Iterations in which only the critic learns.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear",
        description="Both rates after their rise: constant, or falling to zero in a line or a cosine.",
    )
    warmup_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the iterations during which the rates rise."
    )
    kl_coef: float = Field(
        default=0.05,
        ge=0,
        description="Price of one nat of KL from the reference, taken from the reward at every token.",
    )
    kl_target: float = Field(
        default=0.0, ge=0, description="Adapt kl_coef to keep this KL per completion (nats); 0: fixed."
    )
    kl_horizon: int = Field(default=10_000, ge=1, description="Completions over which an adaptive coefficient reacts.")
    kl_budget: float = Field(
        default=0.0,
        ge=0,
        description="End the stage with the first policy whose completions are farther than this from the reference "
        "(nats a completion); 0: after `steps`.",
    )
    max_logprob_mismatch: float = Field(
        default=0.1,
        gt=0,
        description="Stop when the log-probabilities of sampler and trainer differ by more (nats a token, mean).",
    )
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda.")
    clip: float = Field(
        default=0.2, gt=0, lt=1, description="PPO's clip range below 1 (and above, unless clip_high is given)."
    )
    clip_high: float = Field(default=0.0, ge=0, description="Clip range above 1; 0: the same as `clip`.")
    dual_clip: float = Field(default=0.0, ge=0, description="Bound on the loss for negative advantages (> 1); 0: off.")
    value_clip: float = Field(default=0.2, gt=0, description="How far a value may move from the one at sampling time.")
    whiten_advantages: bool = Field(
        default=True, description="Give the advantages of an iteration mean 0 and variance 1."
    )
    missing_eos_penalty: float = Field(
        default=0.0, ge=0, description="Taken from the score of a completion that does not end itself."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest completion.")
    min_new_tokens: int = Field(default=0, ge=0, description="No EOS before so many tokens.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature; enters every log-probability.")
    eval_every: int = Field(
        default=20, ge=0, description="Held-out evaluation every so many iterations; 0: at the end only."
    )
    save_every: int = Field(
        default=0, ge=0, description="Weights into checkpoints/ every so many iterations; 0: at the end only."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PreferenceConfig:
    """What the stages that learn from preferences themselves have in common."""

    steps: int = Field(default=0, ge=0, description="Optimizer steps; 0: `epochs` passes over the rows.")
    epochs: int = Field(default=1, ge=1, description="Passes over the rows when `steps` is 0.")
    max_rows: int = Field(default=0, ge=0, description="Use only this many rows; 0: all.")
    batch_size: int = Field(default=64, ge=1, description="Rows an optimizer step.")
    micro_batch_size: int = Field(
        default=0, ge=0, description="Rows a forward pass; 0: any number. Changes memory, not results."
    )
    micro_batch_tokens: int = Field(
        default=16384, ge=0, description="Tokens a forward pass, each text as long as its longest; 0: any number."
    )
    learning_rate: float = Field(default=5e-7, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="The rate after its rise: constant, or falling to zero in a line or a cosine.",
    )
    warmup_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps during which the rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_length: int = Field(
        default=512, ge=2, description="Longest prompt + completion in tokens; completions are cut there."
    )
    beta: float = Field(default=0.1, gt=0, description="What a nat of log-probability is worth in the loss.")
    eval_every: int = Field(default=0, ge=0, description="Measure held-out rows every so many steps; 0: at the end.")
    max_new_tokens: int = Field(default=64, ge=1, description="Longest completion sampled before and after.")
    temperature: float = Field(default=1.0, gt=0, description="Temperature of those samples; the loss has none.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DPOConfig(PreferenceConfig):
    """DPO: a policy from comparisons, kept to a reference."""

    beta: float = Field(default=0.1, gt=0, description="Price of a nat of KL from the reference.")
    kind: Literal["sigmoid", "cdpo", "robust", "hinge", "ipo", "ipo_mean", "apo_zero", "apo_down"] = Field(
        default="sigmoid", description="The loss; `sigmoid` is DPO's own, `ipo` the IPO paper's, `ipo_mean` by length."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong (sigmoid, cdpo, robust)."
    )
    reference: Literal["cached", "adapters"] = Field(
        default="cached",
        description="cached: log-probabilities of the reference are found out once, before training, and kept in the "
        "run folder. adapters: in every step, by the policy with its adapters off.",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class KTOConfig(PreferenceConfig):
    """KTO: a policy from single completions that are to be had or not; comparisons give one of each."""

    beta: float = Field(default=0.1, gt=0, description="How fast gains over the reference saturate, per nat.")
    desirable_weight: float = Field(default=1.0, ge=0, description="Weight of completions to be had.")
    undesirable_weight: float = Field(default=1.0, ge=0, description="Weight of completions not to be had.")
    reference: Literal["cached", "adapters"] = Field(default="cached", description="As `dpo.reference`.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ORPOConfig(PreferenceConfig):
    """ORPO: imitation and preference in one loss, without a reference."""

    batch_size: int = Field(default=32, ge=1, description="Rows an optimizer step.")
    learning_rate: float = Field(default=5e-6, gt=0, description="Peak learning rate of AdamW.")
    beta: float = Field(default=0.1, gt=0, description="Weight of the odds ratio beside the imitation (lambda).")
    nll: Literal["completion", "text"] = Field(
        default="completion", description="What is imitated: the chosen completion, or the prompt as well."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SimPOConfig(PreferenceConfig):
    """SimPO: log-probabilities by the token as reward, with a margin, without a reference."""

    batch_size: int = Field(default=128, ge=1, description="Rows an optimizer step.")
    learning_rate: float = Field(default=6e-7, gt=0, description="Peak learning rate of AdamW.")
    beta: float = Field(default=2.0, gt=0, description="What a nat a token is worth in the loss.")
    gamma: float = Field(
        default=1.0, ge=0, description="By how much the chosen completion must win, in beta times nats a token."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CPOConfig(PreferenceConfig):
    """CPO: DPO without a reference, beside imitation."""

    nll_coef: float = Field(
        default=1.0, ge=0, description="Weight of the chosen completion's negative log-likelihood (nats a token)."
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ILQLConfig:
    """Implicit language Q-learning: `prefero ilql`."""

    rewards: dict[str, RewardPart] = Field(
        default_factory=dict, description="Named terms that score the rows; empty: their own column `reward`."
    )
    standardise: bool = Field(
        default=True, description="Give what the rows were worth mean 0 and standard deviation 1."
    )
    steps: int = Field(default=0, ge=0, description="Optimizer steps; 0: `epochs` passes over the rows.")
    epochs: int = Field(default=1, ge=1, description="Passes over the rows when `steps` is 0.")
    max_rows: int = Field(default=0, ge=0, description="Use only this many rows; 0: all.")
    batch_size: int = Field(default=32, ge=1, description="Rows an optimizer step.")
    micro_batch_size: int = Field(default=0, ge=0, description="Rows a forward pass; 0: any number.")
    micro_batch_tokens: int = Field(
        default=16384, ge=0, description="Tokens a forward pass, each text as long as its longest; 0: any number."
    )
    learning_rate: float = Field(default=2e-5, gt=0, description="Peak learning rate of the language model.")
    head_learning_rate: float = Field(default=5e-4, gt=0, description="Peak learning rate of the value heads.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="Both rates after their rise: constant, or falling to zero in a line or a cosine.",
    )
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps during which the rates rise."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_length: int = Field(default=512, ge=2, description="Longest row in tokens; a longer one is an error.")
    tau: float = Field(
        default=0.9, gt=0, lt=1, description="Expectile of V: 0.5 is the mean of what was done, towards 1 the best."
    )
    gamma: float = Field(default=0.99, ge=0, le=1, description="Discount per token.")
    awac_beta: float = Field(
        default=0.0, ge=0, description="Imitation weighs a token by exp(awac_beta x advantage); 0: all alike."
    )
    awac_scale: float = Field(default=1.0, ge=0, description="Weight of imitation beside the losses of Q and V.")
    cql_scale: float = Field(
        default=0.1, ge=0, description="Weight of the conservative loss, which holds down Q of what nobody said."
    )
    sync_rate: float = Field(default=0.1, gt=0, le=1, description="How far Q's slow copies move towards it at a time.")
    sync_every: int = Field(default=1, ge=1, description="They move every so many steps.")
    beta: float = Field(
        default=1.0,
        ge=0,
        description="How much the values guide the answers, of examinations and of the exported model; 0: not at all.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest answer in examinations.")
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature in examinations.")
    top_k: int = Field(default=0, ge=0, description="Answers are drawn from so many likeliest tokens; 0: all.")
    eval_every: int = Field(default=0, ge=0, description="Held-out evaluation every so many steps; 0: at the end only.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EngineConfig:
    """Who samples: `native` is our own, `hf` takes any Hugging Face model and is slower."""

    kind: Literal["native", "hf"] = Field(default="native", description="native, or hf.")
    slots: int = Field(default=128, ge=1, description="Completions sampled at once.")
    memory: int = Field(default=2**31, ge=1, description="Bytes for the keys and values of those (native).")
    copies: bool = Field(
        default=True,
        description="Sample by copies of the weights, cast and laid out for it (native): quicker, for their memory.",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluateConfig:
    """Held-out evaluation."""

    num_prompts: int = Field(default=64, ge=1, description="Held-out prompts.")
    num_samples: int = Field(default=1, ge=1, description="Completions of each.")
    best_of: int = Field(
        default=0, ge=0, description="Also measure best-of-n of the reference with the same reward; 0: no."
    )
    batch_size: int = Field(default=64, ge=1, description="Completions scored at once.")
    gold: str = Field(
        default="",
        description="Independent scorer, never the reward (as in ppo.rewards.*.use); empty: the world's own.",
    )
    max_pairs: int = Field(default=3000, ge=1, description="Held-out comparisons for the reward model's accuracy.")
    max_demonstrations: int = Field(default=3000, ge=1, description="Held-out texts for the SFT loss.")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Everything a run needs."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides every random number.")
    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    strategy: StrategyConfig = Field(default_factory=lambda: StrategyConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    sft: SFTConfig = Field(default_factory=lambda: SFTConfig())
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig())
    ppo: PPOConfig = Field(default_factory=lambda: PPOConfig())
    dpo: DPOConfig = Field(default_factory=lambda: DPOConfig())
    kto: KTOConfig = Field(default_factory=lambda: KTOConfig())
    orpo: ORPOConfig = Field(default_factory=lambda: ORPOConfig())
    simpo: SimPOConfig = Field(default_factory=lambda: SimPOConfig())
    cpo: CPOConfig = Field(default_factory=lambda: CPOConfig())
    ilql: ILQLConfig = Field(default_factory=lambda: ILQLConfig())
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig())
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig())

    @property
    def sft_lora_rank(self) -> int:
        """The rank of SFT's adapters."""
        return self.model.lora_rank if self.sft.lora_rank < 0 else self.sft.lora_rank

    def __post_init__(self) -> None:
        for problem in _contradictions(self):
            raise ConfigError(problem)


def _contradictions(c: Config) -> Iterator[str]:
    """What each part of the config says against itself or another, with the cure."""
    if c.sft.skip and c.reward.skip and c.ppo.skip:
        yield "sft.skip, reward.skip and ppo.skip are all true, so there is nothing to do; set one to false"
    yield from _about_data(c)
    yield from _about_strategy(c)
    yield from _about_model(c)
    yield from _about_ppo(c)
    yield from _about_rewards(c)
    yield from _about_preferences(c)
    yield from _about_ilql(c)


def _about_data(c: Config) -> Iterator[str]:
    if c.model.tokenizer and not c.model.path:
        yield f"model.tokenizer is {c.model.tokenizer!r} but model.path is empty; give both or neither"
    data, plain = c.data, DataConfig()
    for key in _KEYS_OF_FILES:
        if c.data.world != "files" and getattr(data, key) != getattr(plain, key):
            yield (
                f"data.{key} is {getattr(data, key)!r}, but data.world {data.world!r} brings its own rows; "
                "set data.world to files, or leave the key out"
            )


def _about_strategy(c: Config) -> Iterator[str]:
    s, default = c.strategy, StrategyConfig()
    for key, kinds in KINDS_OF_KEYS.items():
        if getattr(s, key) != getattr(default, key) and s.kind not in kinds:
            yield (
                f"strategy.{key} {getattr(s, key)} has no effect with strategy.kind {s.kind}; leave it out, or set "
                f"strategy.kind to {' or '.join(kinds)}"
            )


def _about_model(c: Config) -> Iterator[str]:
    frozen, of_sft = c.model.frozen, 0 if c.sft.skip else c.sft_lora_rank
    if frozen == "fp32":
        return
    if not (c.model.lora_rank or c.sft.lora_rank > 0 or c.reward.lora_rank):
        yield (
            f"model.frozen {frozen} is for weights below adapters, and no stage has any; set model.lora_rank (or "
            "sft.lora_rank, reward.lora_rank), or model.frozen fp32"
        )
    if c.strategy.kind == "fsdp":
        yield (
            f"model.frozen {frozen} cannot be shared out by strategy.kind fsdp (nor filled in by strategy.shard_init); "
            "use naive or ddp, or model.frozen fp32"
        )
    if of_sft and not c.model.path:
        yield (
            f"model.frozen {frozen} keeps SFT's adapter apart, so later stages read the weights below it again, and "
            "without model.path these are drawn for SFT alone; give model.path, or set sft.lora_rank 0"
        )
    later = {"model.lora_rank": 0 if c.ppo.skip else c.model.lora_rank}
    if c.reward.model == "policy" and not c.reward.skip:
        later["reward.lora_rank"] = c.reward.lora_rank
    for key, rank in later.items():
        if of_sft and rank not in (0, of_sft):
            yield (
                f"{key} is {rank}, but with model.frozen {frozen} the adapter of SFT, of rank {of_sft}, goes on; "
                f"set it to {of_sft}"
            )


def _about_ppo(c: Config) -> Iterator[str]:
    rollouts = c.ppo.prompts_per_step * c.ppo.num_samples
    if c.ppo.train_batch_size > rollouts:
        yield (
            f"ppo.train_batch_size is {c.ppo.train_batch_size} but an iteration has only {rollouts} completions "
            "(prompts_per_step x num_samples); lower the one or raise the others"
        )
    if c.ppo.min_new_tokens > c.ppo.max_new_tokens:
        yield f"ppo.min_new_tokens {c.ppo.min_new_tokens} exceeds ppo.max_new_tokens {c.ppo.max_new_tokens}; lower it"
    if c.ppo.kl_target > 0 and c.ppo.kl_coef == 0:
        yield f"ppo.kl_target {c.ppo.kl_target} needs a starting ppo.kl_coef above 0; set one, or kl_target to 0"
    if c.ppo.kl_target > 0 and c.ppo.kl_horizon <= 0.2 * rollouts:
        yield (
            f"ppo.kl_horizon {c.ppo.kl_horizon} is reached within one iteration of {rollouts} completions, which could "
            f"set the coefficient to 0 for good; raise it to {rollouts} or more"
        )
    yield from _about_backbone(c)
    if 0 < c.ppo.dual_clip <= 1:
        yield f"ppo.dual_clip {c.ppo.dual_clip} must be above 1 (3 is usual), or 0 for off"
    if not c.ppo.skip and c.ppo.critic_warmup >= c.ppo.steps:
        yield (
            f"ppo.critic_warmup is {c.ppo.critic_warmup} but there are only {c.ppo.steps} ppo.steps, "
            "so the actor would never learn; lower the one or raise the other"
        )


def _about_backbone(c: Config) -> Iterator[str]:
    frozen, backbone = c.model.lora_rank or c.model.num_layers_unfrozen, c.ppo.backbone
    if c.model.lora_rank and c.model.num_layers_unfrozen:
        yield (
            f"model.lora_rank {c.model.lora_rank} and model.num_layers_unfrozen {c.model.num_layers_unfrozen} are two "
            "ways to freeze what is below; set one of them to 0"
        )
    if backbone == "shared" and not frozen:
        yield (
            "ppo.backbone shared has nothing to share: all weights of the policy are trained; set model.lora_rank or "
            "model.num_layers_unfrozen, or ppo.backbone to separate"
        )
    if backbone == "hydra":
        for key in ("critic_layers", "critic_warmup"):
            if getattr(c.ppo, key):
                yield (
                    f"ppo.{key} is {getattr(c.ppo, key)}, but in a hydra (ppo.backbone) the critic is a head on the "
                    "policy and learns with it; set it to 0, or ppo.backbone to shared"
                )
        if c.ppo.level != "token":
            yield f"ppo.level {c.ppo.level} has no hydra; set it to token, or ppo.backbone to shared"
    if c.ppo.value_coef != PPOConfig().value_coef and backbone != "hydra":
        yield f"ppo.value_coef {c.ppo.value_coef} has no effect with ppo.backbone {backbone}; leave it out"


def _about_preferences(c: Config) -> Iterator[str]:
    smoothing, kind = c.dpo.label_smoothing, c.dpo.kind
    if smoothing and kind not in ("sigmoid", "cdpo", "robust"):
        yield f"dpo.label_smoothing {smoothing} has no effect with dpo.kind {kind}; set it to 0, or kind to cdpo"
    if not smoothing and kind in ("cdpo", "robust"):
        yield f"dpo.kind {kind} needs a dpo.label_smoothing above 0, e.g. 0.1; give one, or set kind to sigmoid"
    for name, of in (("dpo", c.dpo.reference), ("kto", c.kto.reference)):
        if of == "adapters" and not c.model.lora_rank:
            yield f"{name}.reference is adapters, but model.lora_rank is 0, so there are none; set it to cached"


def _about_rewards(c: Config) -> Iterator[str]:
    if c.reward.skip and not c.ppo.skip and not c.ppo.rewards:
        yield (
            "reward.skip is true and ppo.rewards is empty, so PPO has no reward; "
            "name one, e.g. --ppo.rewards.mine.use my_rewards.py:score"
        )
    if c.reward.skip and any(part.use == "trained" for part in c.ppo.rewards.values()):
        yield "ppo.rewards uses `trained` but reward.skip is true; use model:FOLDER, or set reward.skip to false"
    if c.reward.loss == "log_exp" and c.reward.centering > 0:
        yield f"reward.centering {c.reward.centering} needs reward.loss log_sig; set one of them"
    if c.evaluate.gold == "trained":
        yield "evaluate.gold is `trained`, the reward itself; name an independent scorer, e.g. vader, or leave it empty"
    for name, part in c.ppo.rewards.items():
        if not name.isidentifier():
            yield f"ppo.rewards names a part {name!r}; name it with letters, digits and underscores, a letter first"
        if part.clamp and not part.use.startswith(("trained", "model:")):
            yield f"ppo.rewards.{name}.clamp limits a reward model's score, but `use` is {part.use!r}; remove clamp"
        if part.options and part.use.startswith(("trained", "model:", "vader")):
            yield f"ppo.rewards.{name}.options are for rules and rewards of steps; `use` is {part.use!r}: remove them"
        if part.use and part.use == c.evaluate.gold:
            yield (
                f"evaluate.gold is {part.use!r}, which ppo.rewards.{name} is trained on; "
                "an independent scorer is another one than the reward"
            )


def _about_ilql(c: Config) -> Iterator[str]:
    for name, part in c.ilql.rewards.items():
        if not name.isidentifier():
            yield f"ilql.rewards names a part {name!r}; name it with letters, digits and underscores, a letter first"
        if part.use == "trained":
            yield f"ilql.rewards.{name}.use is `trained`, but no reward model is trained before; use model:FOLDER"
        if part.use and part.use == c.evaluate.gold:
            yield (
                f"evaluate.gold is {part.use!r}, which ilql.rewards.{name} is trained on; "
                "an independent scorer is another one than the reward"
            )


_KEYS_OF_FILES = (
    "sft", "preferences", "prompts", "trajectories", "sft_heldout", "preferences_heldout", "prompts_heldout",
    "trajectories_heldout", "heldout_fraction", "max_bad_rows",
)  # fmt: skip

PREFERENCE_STAGES = ("dpo", "kto", "orpo", "simpo", "cpo")
"""Commands, each with a section of its own, that learn from preferences themselves."""

KINDS_OF_KEYS = {
    "stage": ("fsdp",),
    "offload": ("fsdp",),
    "shard_init": ("fsdp",),
    "timeout": ("ddp", "fsdp"),
    "device": ("naive",),
}
"""The kinds of strategy that a key of `strategy` has an effect with, where it is not all of them."""

_OF_ONE_COMMAND = (*PREFERENCE_STAGES, "ilql")
"""Sections that are read by the command of that name alone: others mean them by the ending of a key only where no
other section has it."""


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, section: str = "") -> Config:
    """Reads defaults < the YAML file < `--key value` overrides into a checked Config.

    A key may be written in full (`--ppo.kl-coef 0`) or by an unambiguous ending (`--kl-coef 0`); among several, the
    one in `section` is meant. Raises ConfigError naming the file or flag, the key, the value and the cure.
    """
    tree: dict[str, Any] = {}
    origin = "the defaults"
    given = " (with the overrides given)" if overrides else ""
    if path is not None:
        origin = str(path)
        _merge(tree, _read_yaml(Path(path)))
    _check_keys(tree, Config, (), origin)
    for key, text in parse_overrides(overrides):
        keys = resolve_key(key, section=section, flag=True)
        _set(tree, keys, _override_value(key, text, _kind_at(keys)))
    try:
        _refuse_truth(tree, Config, ())
        return TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin + given)) from None


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots."""
    keys: dict[str, Any] = {}
    for key, value in settings.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return keys


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, in the order of the documentation."""
    return asdict(config)


class _OnceEach(yaml.SafeLoader):
    """YAML in which a key stands once: the last of two would silently undo the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} stands in line {seen[key.value]} already; merge the two"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _OnceEach(path.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    return tree


def parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Splits `--key value`, `--key=value` and bare `--flag` into (key, text) pairs; the text of a bare flag is None."""
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if not argument.startswith("--") or len(argument) < 3:
            raise ConfigError(f"unexpected argument {argument!r}; overrides are written --key value")
        key, equals, after = argument[2:].partition("=")
        text: str | None = after if equals else None
        index += 1
        if not equals and index < len(arguments) and not arguments[index].startswith("--"):
            text, index = arguments[index], index + 1
        yield key.replace("-", "_"), text


def _kind_at(path: Sequence[str]) -> Any:
    kind: Any = Config
    for name in path:
        kind = _value_type(kind, name)
    return kind


def _override_value(key: str, text: str | None, kind: Any) -> Any:
    """What the text of a flag means for a key of this type: strings stay as they are typed, the rest is YAML."""
    if text is None:
        if kind is not bool:
            raise ConfigError(f"--{key.replace('_', '-')} needs a value; write --{key.replace('_', '-')} VALUE")
        return True
    if kind is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def resolve_key(key: str, *, section: str = "", flag: bool = False) -> tuple[str, ...]:
    """The full path of a key given in full or by an unambiguous ending (the command's own section goes first).

    Raises ConfigError that suggests the right key.
    """
    path = tuple(key.split("."))
    shown = f"--{key.replace('_', '-')}" if flag else key
    found = [full for full in (path, *((item.name, *path) for item in fields(Config))) if _inside(full, Config)]
    # What another algorithm calls its keys does not make those of a pipeline ambiguous.
    visible = [full for full in found if full == path or full[0] == section or full[0] not in _OF_ONE_COMMAND]
    found = visible or found
    own = [full for full in found if full == path or full[0] == section]
    if len(own or found) == 1:
        return (own or found)[0]
    if found:
        options = " or ".join("--" + ".".join(full).replace("_", "-") for full in found)
        raise ConfigError(f"{shown} could mean several keys; write {options}")
    known = [".".join(names) for names, _ in walk(Config)]
    near = difflib.get_close_matches(key, [*known, *(name.rsplit(".", 1)[-1] for name in known)], n=1, cutoff=0.5)
    hint = f"; did you mean {'--' + near[0].replace('_', '-') if flag else near[0]}?" if near else ""
    raise ConfigError(f"unknown key {shown}{hint or '; `prefero config` lists them all'}")


def walk(cls: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf key below a config class as (path, dataclass field)."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        kind = hints[item.name]
        if is_dataclass(kind):
            yield from walk(typing.cast(type, kind), (*prefix, item.name))
        else:
            yield (*prefix, item.name), item


def describe(item: Any) -> tuple[str, str, str]:
    """(type, default, sentence) of a config field, for help texts and the docs."""
    info = item.default if not isinstance(item.default, type(MISSING)) else None
    kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
    default = getattr(info, "default", "")
    shown = "{}" if getattr(info, "default_factory", None) is not None else repr(default)
    return kind, shown, str(getattr(info, "description", "") or "")


def _value_type(cls: Any, name: str) -> Any:
    """The type of `cls.name`, or of a dict's values; None when there is no such key."""
    if typing.get_origin(cls) is dict:
        return typing.get_args(cls)[1]
    if isinstance(cls, type) and is_dataclass(cls):
        return typing.get_type_hints(cls).get(name)
    return None


def _inside(path: Sequence[str], cls: Any) -> bool:
    for name in path:
        cls = _value_type(cls, name)
        if cls is None:
            return False
    return True


def _check_keys(tree: Any, cls: Any, prefix: tuple[str, ...], origin: str) -> None:
    if not isinstance(tree, dict) or isinstance(cls, types.UnionType):
        return
    for name, value in tree.items():
        inner = _value_type(cls, str(name))
        if inner is None:
            if not (isinstance(cls, type) and is_dataclass(cls)):
                return
            here = [item.name for item in fields(cls)]
            everywhere = {path[-1]: ".".join(path) for path, _ in walk(Config)}
            near = difflib.get_close_matches(str(name), here, n=1) or [
                everywhere[n] for n in difflib.get_close_matches(str(name), list(everywhere), n=1)
            ]
            hint = (
                f"did you mean {'.'.join((*prefix, near[0])) if near[0] in here else near[0]}?"
                if near
                else f"known here: {', '.join(here)}"
            )
            raise ConfigError(f"{origin}: unknown key {'.'.join((*prefix, str(name)))}; {hint}")
        _check_keys(value, inner, (*prefix, str(name)), origin)


def _refuse_truth(tree: Mapping[str, Any], cls: Any, prefix: tuple[str, ...]) -> None:
    """Raises ConfigError for true or false where a number belongs: read as 1 or 0 they would hide a slip."""
    for name, value in tree.items():
        kind, path = _value_type(cls, str(name)), (*prefix, str(name))
        if isinstance(value, bool) and kind in (int, float):
            raise ConfigError(f"{'.'.join(path)}: {value} will not do: input should be a number")
        if isinstance(value, Mapping):
            _refuse_truth(value, kind, path)


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        child = tree.get(name)
        tree[name] = dict(child) if isinstance(child, Mapping) else {}
        tree = tree[name]
    tree[path[-1]] = value


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for problem in error.errors():
        context = problem.get("ctx", {})
        if isinstance(context.get("error"), ConfigError):
            lines.append(str(context["error"]))
            continue
        key = ".".join(str(part) for part in problem["loc"]) or "config"
        lines.append(f"{key}: {problem['input']!r} will not do: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return f"{origin}: " + "; ".join(lines)


__all__ = [
    "CPOConfig", "Config", "ConfigError", "DPOConfig", "DataConfig", "EvaluateConfig", "ILQLConfig", "KTOConfig",
    "ModelConfig", "ORPOConfig", "PPOConfig", "PreferenceConfig", "RewardConfig", "RewardPart", "SFTConfig",
    "SimPOConfig", "StrategyConfig", "describe", "load_config", "parse_overrides", "resolve_key", "to_dict", "walk",
]  # fmt: skip
