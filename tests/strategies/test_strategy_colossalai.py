"""The older system's sharded strategy: every argument has an effect, or an error that says what does its job."""

import json
import subprocess
import sys

GONE = {"search_range_mb": 64, "hidden_dim": 128, "min_chunk_size_mb": 8, "gpu_margin_mem_ratio": 0.5,
        "reduce_bucket_size": 1, "overlap_communication": False, "placement_policy": "disk", "stage": 4}  # fmt: skip
TRY = """
import json, sys, warnings
import torch
from transformers import LlamaConfig
from prefero.models.llama import LlamaActor
from prefero.strategies import ColossalAIStrategy
told = {}
for name, value in json.loads(sys.argv[1]).items():
    try:
        ColossalAIStrategy(**{name: value})
    except ValueError as error:
        told[name] = str(error)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always", UserWarning)
    ColossalAIStrategy(placement_policy="cpu", seed=3)
    told["usual"] = [str(w.message) for w in heard]
    half = ColossalAIStrategy(precision="fp16", initial_scale=8, growth_interval=1, growth_factor=4, max_scale=64,
                              hysteresis=2, min_scale=2, backoff_factor=0.25)
    told["fp16"] = [str(w.message) for w in heard]
    ColossalAIStrategy(precision="fp32", initial_scale=8)
    told["fp32"] = [str(w.message) for w in heard]
scale, told["course"] = half.loss_scale, []
for finite in (True, True, True, False, False, False, False):
    scale.update(finite)
    told["course"].append(scale.scale)
given = ColossalAIStrategy(stage=2, seed=9, pin_memory=False, max_norm=2.0, norm_type=1.0, precision="bf16")
told["given"] = [given.stage, torch.initial_seed(), given.max_norm, given.norm_type, given.precision]
for force in (False, True):
    strategy = ColossalAIStrategy(precision="bf16", force_outputs_fp32=force)
    small = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    actor = strategy.prepare(LlamaActor(config=small))
    layer = actor.model.model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: told.update({f"gives {force}": str(output.dtype)}))
    actor(torch.zeros(1, 4, dtype=torch.long), 2)
print(json.dumps(told))
"""


def test_arguments_have_an_effect_or_an_error() -> None:
    """In a process of its own, for it joins a process group."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps(GONE)], check=True, capture_output=True, text=True, timeout=120
    )
    told = json.loads(done.stdout)
    for name, value in GONE.items():
        assert name in told[name] and str(value) in told[name], told
    assert told["usual"] == told["fp16"] == []
    assert told["fp32"] == ["the loss is scaled in fp16 only, and this run computes in fp32"]
    assert told["given"] == [2, 9, 2.0, 1.0, "bf16"]
    assert (told["gives False"], told["gives True"]) == ("torch.bfloat16", "torch.float32")
    # Four times larger after each good step up to the greatest; after the second bad one a quarter, down to the least.
    assert told["course"] == [32.0, 64.0, 64.0, 64.0, 16.0, 4.0, 2.0]
