"""What PPO's four roles take beside SFT, on one backbone and apart: prints a table of docs/ppo.md.

prefero fetch smollm2
python benchmarks/one_backbone.py [--rounds N] [--only NAME ...]

SmolLM2-135M on 8 rows of 256 tokens (in PPO 128 of prompt and 128 answered), LoRA of rank 16 unless it says otherwise.
The reward model of PPO is adapters of rank 16 on the same weights. Each cell is `prefero sft` or `prefero ppo` in a
process of its own; the cells take turns for `rounds` rounds (default 3). Memory is the highest resident set; the ratio
is of what lies above the imports, to SFT with LoRA of the same round, and medians are shown. "Foretold" is what
`prefero plan` says of the highest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from prefero.cli import ENVIRONMENT
from runs import this_machine

ROWS, PROMPT, ANSWER = 8, 128, 128
LORA = ["--model.lora-rank", "16"]
CELLS = {
    "SFT, LoRA": ["sft", *LORA],
    "PPO, LoRA, hydra": ["ppo", *LORA, "--backbone", "hydra"],
    "PPO, LoRA, one backbone": ["ppo", *LORA, "--backbone", "shared"],
    "PPO, LoRA, separate": ["ppo", *LORA, "--backbone", "separate"],
    "SFT, all weights": ["sft"],
    "PPO, upper 6 layers, one backbone": ["ppo", "--model.num-layers-unfrozen", "6", "--backbone", "shared"],
    "PPO, all weights": ["ppo"],
}
BASE = "SFT, LoRA"
CONFIG = f"""
model: {{path: smollm2}}
data: {{sft: rows.jsonl, preferences: pairs.jsonl, prompts: prompts.jsonl, max_prompt_length: {PROMPT}, truncate: left}}
sft: {{steps: 3, batch_size: {ROWS}, max_length: {PROMPT + ANSWER}}}
reward: {{steps: 1, batch_size: {ROWS}, max_length: {PROMPT + ANSWER}, lora_rank: 16}}
ppo:
  steps: 3
  prompts_per_step: {ROWS}
  train_batch_size: {ROWS}
  max_new_tokens: {ANSWER}
  min_new_tokens: {ANSWER}
  eval_every: 0
  rewards: {{judge: {{use: "model:judge"}}}}
evaluate: {{num_prompts: {ROWS}, max_demonstrations: {ROWS}, batch_size: {ROWS}}}
"""


def prepare(folder: Path) -> None:
    """Rows, a config and the reward model."""
    words = "the film was long and warm , and nobody in it said a word that one could have left out ;".split()  # noqa: SIM905
    # No two begin alike: what texts have in common is computed once.
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=280)) for _ in range(200)]
    files = {
        "rows": [{"prompt": text[:400], "completion": text[400:]} for text in texts],
        "pairs": [{"prompt": text[:60], "chosen": text[60:120], "rejected": text[300:340]} for text in texts],
        "prompts": [{"prompt": text} for text in texts],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    measure(["reward"], folder, "judge")


def foretell(command: list[str], folder: Path) -> float:
    """What the plan says, MB."""
    whole = [sys.executable, "-m", "prefero", "plan", "config.yaml", "--stage", *command, "--json", "plan.json"]
    subprocess.run(whole, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=1800)  # noqa: S603
    return float(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["peak_mb"])


def measure(command: list[str], folder: Path, out: str) -> tuple[float, float]:
    """The highest resident set, and that of the imports, MB."""
    whole = [sys.executable, str(Path(__file__).resolve()), "--worker", *command[:1], "config.yaml", *command[1:]]
    done = subprocess.run(  # noqa: S603
        [*whole, "--out", out, "--overwrite"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=1800,
        env={**ENVIRONMENT, **os.environ},
    )  # fmt: skip
    highest, imports = done.stdout.strip().splitlines()[-1].split()
    return float(highest), float(imports)


def worker(command: list[str]) -> None:
    """Runs the command line here and prints what it took."""
    from prefero.cli import main as prefero
    from prefero.recipes import run as _imports  # noqa: F401

    def highest() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = highest()
    if status := prefero(command):
        raise SystemExit(status)
    print(highest(), before)


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS), help="beside SFT with LoRA")
    args = parser.parse_args()
    names = [name for name in CELLS if name in (BASE, *args.only)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        foretold = {name: foretell(CELLS[name], Path(scratch)) for name in names}
        for _ in range(args.rounds):
            for name in names:
                found[name].append(measure(CELLS[name], Path(scratch), "out"))
    print(f"| run | peak, MB | foretold | above imports, of {BASE}'s |\n|---|---|---|---|")
    for name, peaks in found.items():
        ratio = median(
            (own - before) / (base - then) for (own, before), (base, then) in zip(peaks, found[BASE], strict=True)
        )
        peak = median(own for own, _ in peaks)
        print(f"| {name} | {peak:.0f} | {foretold[name]:.0f} ({foretold[name] / peak - 1:+.0%}) | {ratio:.2f} |")
    print(f"\n{this_machine()} Medians of {args.rounds} round{'s' * (args.rounds > 1)}.")


if __name__ == "__main__":
    main()
