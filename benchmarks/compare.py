"""Ours beside its peers, in turn on one machine: prints the tables of docs/compared.md.

python benchmarks/compare.py [--only NAME ...] [--rounds N] [--json FILE] [--peers DIR] [--profile]

Every side is a process of its own (benchmarks/sides/) that is given the same model (SmolLM2-135M's shape, random
weights), the same texts and lengths, and tells the seconds of its steps and its peak memory. Sides take turns for
`rounds` rounds (default 3); the ratio of a round is of its two speeds, and medians are shown. Peers are installed from
the package registry into environments of their own below `--peers` (default ~/.cache/prefero/peers). "Of the limit" is
the time that the matrix products, or in decoding the reading of weights, would take at the rates measured in the same
run, as a part of our time. Needs 8 GB.
"""

# ruff: noqa: S106 - tokens of a vocabulary, not secrets

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from prefero.cli import ENVIRONMENT
from runs import this_machine
from sides.work import Work

SIDES = Path(__file__).parent / "sides"
BODY, TABLE = 106.2e6, 28.3e6  # weights of the layers, and of embeddings, which are the output head too
PINS = ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"]


@dataclass(frozen=True)
class Peer:
    """A program to compare with: its script, and what is installed for it (nothing: our own environment has it)."""

    script: str
    packages: tuple[str, ...] = ()


PEERS = {
    "transformers generate": Peer("generate.py"),
    "TRL 1.16": Peer("trl_steps.py", ("trl==1.16.0",)),
    "TRL 1.12": Peer("trl_steps.py", ("trl==1.12.0",)),
}
WORKS: dict[str, tuple[Work, str]] = {
    "decode, batch 32": (Work("decode", 32, 64, 128), "transformers generate"),
    "decode, batch 8": (Work("decode", 8, 64, 128), "transformers generate"),
    "decode, geometric lengths": (Work("decode", 64, 64, 128, lengths="geometric"), "transformers generate"),
    "decode, 8 answers of a prompt": (Work("decode", 4, 256, 64, samples=8), "transformers generate"),
    "decode, batch 32, fp32": (Work("decode", 32, 64, 64, dtype="fp32"), "transformers generate"),
    "PPO, all weights": (Work("ppo", 8, 64, 64), "TRL 1.12"),
    "PPO, LoRA on one backbone": (Work("ppo", 8, 64, 64, lora=True), "TRL 1.12"),
    "PPO, all weights, fp32": (Work("ppo", 8, 64, 64, dtype="fp32"), "TRL 1.12"),
    "SFT, ragged": (Work("sft", 8, 32, 256, lengths="ragged"), "TRL 1.16"),
    "SFT, ragged, fp32": (Work("sft", 8, 32, 256, lengths="ragged", dtype="fp32"), "TRL 1.16"),
    "reward model, ragged": (Work("reward", 8, 32, 256, lengths="ragged"), "TRL 1.16"),
    "reward model, ragged, fp32": (Work("reward", 8, 32, 256, lengths="ragged", dtype="fp32"), "TRL 1.16"),
}


def make_model(folder: Path) -> None:
    """The model both sides load: random weights and a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, 49152)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def python_of(name: str, folder: Path) -> str:
    """The interpreter of a peer's environment, made where it is missing."""
    packages = PEERS[name].packages
    if not packages:
        return sys.executable
    home = folder / "_".join(packages).replace("==", "-")
    if not (home / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)  # noqa: S603
        subprocess.run([str(home / "bin/pip"), "install", "-q", *PINS, *packages], check=True)  # noqa: S603
        (home / "ready").touch()
    return str(home / "bin/python")


def side(python: str, script: str, model: Path, work: Work) -> dict[str, Any]:
    """What one side told."""
    command = [python, str(SIDES / script), str(model), json.dumps(asdict(work))]
    env = {**os.environ, **(ENVIRONMENT if script == "ours.py" else {})}  # every side as its users start it
    done = subprocess.run(  # noqa: S603
        command, check=False, capture_output=True, text=True, timeout=3600, cwd=model, env=env
    )
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def speed(told: dict[str, Any]) -> float:
    """Tokens or samples a second: of all timed steps together, whose lengths differ."""
    return sum(did for _, did in told["steps"]) / sum(seconds for seconds, _ in told["steps"])


def limits() -> dict[str, float]:
    """FLOP/s of large products in both precisions, and bytes read a second."""
    import torch

    from prefero.strategies.cpu import prefer_onednn_fp32

    prefer_onednn_fp32()

    def best(call: Any, repeats: int = 9) -> float:
        call()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return min(times)

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        found[name] = 2 * 2048**3 / best(lambda left=left, right=right: left @ right)
    data = torch.ones(1 << 27)
    found["bytes"] = 4 * len(data) / best(lambda: data.sum())
    return found


def least_seconds(work: Work, did: int, rates: dict[str, float]) -> float:
    """What `did` tokens or samples of a work take at the machine's own rates."""
    rate, size = rates[work.dtype], {"bf16": 2, "fp32": 4}[work.dtype]
    prompts = 2 * BODY * work.rows * work.prompt
    if work.kind == "decode":
        steps = did / (work.rows * work.samples)  # at least: where answers end together
        reading = steps * size * (BODY + TABLE) / rates["bytes"]
        return max(reading, 2 * (BODY + TABLE) * did / rate) + prompts / rate
    if work.kind in ("sft", "reward"):
        return 6 * (BODY + (TABLE if work.kind == "sft" else 0)) * did / rate
    answers, texts = did * work.new, did * (work.prompt + work.new)
    sample = max(work.new * size * (BODY + TABLE) / rates["bytes"], 2 * (BODY + TABLE) * answers / rate)
    judge = 3 * 2 * BODY * texts + 2 * TABLE * answers  # critic, reward model, reference
    learn = (4 if work.lora else 6) * (2 * BODY * texts + TABLE * answers)
    return sample + (prompts + judge + learn) / rate


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORKS), default=list(WORKS), help="these works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="no peers: where the time of one step of ours goes")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "prefero" / "peers")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        make_model(model)
        if args.profile:
            profile(args.only, model)
            return
        pythons = {name: python_of(name, args.peers) for name in {WORKS[name][1] for name in args.only}}
        print("| work | peer | ours | theirs | ratio | memory | of the limit |\n|---|---|---|---|---|---|---|")
        for name in args.only:
            rows.append(compare(name, *WORKS[name], model, pythons, args.rounds))
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    rates = limits()
    print(
        f"\n{this_machine()} Limits: {rates['fp32'] / 1e9:.0f} GFLOP/s fp32, {rates['bf16'] / 1e9:.0f} bf16, "
        f"{rates['bytes'] / 1e9:.0f} GB/s. Medians of {args.rounds} round{'s' * (args.rounds > 1)}."
    )


def profile(names: list[str], model: Path) -> None:
    """A table of where our time goes, in parts of a step's seconds measured without the profiler."""
    heads: list[str] = []
    for name in names:
        told = side(sys.executable, "ours.py", model, replace(WORKS[name][0], profile=True))
        parts = dict(told["steps"])
        whole = parts.pop("whole")
        if not heads:
            heads = list(parts)
            print(f"| work | seconds | {' | '.join(heads)} | the rest |\n|{'---|' * (len(heads) + 3)}")
        shares = [parts[head] / whole for head in heads]
        cells = " | ".join(f"{share:.0%}" for share in [*shares, max(0.0, 1 - sum(shares))])
        print(f"| {name} | {whole:.2f} | {cells} |", flush=True)
    print(f"\n{this_machine()}")


def compare(name: str, work: Work, peer: str, model: Path, pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """One row of the table."""
    ours, theirs, parts = [], [], []
    for _ in range(rounds):
        rates = limits()
        ours.append(side(sys.executable, "ours.py", model, work))
        theirs.append(side(pythons[peer], PEERS[peer].script, model, work))
        parts.append(sum(least_seconds(work, did, rates) / seconds for seconds, did in ours[-1]["steps"]) / work.steps)
    row = {
        "work": name,
        "peer": peer,
        "version": theirs[0]["version"],
        "ours": median(map(speed, ours)),
        "theirs": median(map(speed, theirs)),
        "ratio": median(speed(own) / speed(other) for own, other in zip(ours, theirs, strict=True)),
        "memory_ratio": median(own["peak_mb"] / other["peak_mb"] for own, other in zip(ours, theirs, strict=True)),
        "limit_fraction": median(parts),
    }
    unit = "samples/s" if work.kind == "ppo" else "tokens/s"
    print(
        f"| {name} | {peer} | {row['ours']:.3g} {unit} | {row['theirs']:.3g} | {row['ratio']:.2f} | "
        f"{row['memory_ratio']:.2f} | {row['limit_fraction']:.2f} |",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
