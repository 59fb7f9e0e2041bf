"""The real run over several seeds: prints the tables of docs/smollm2.md.

prefero fetch smollm2 minilm rotten-tomatoes
python benchmarks/smollm2.py [--seeds 0 1 2] [--out DIR]

Takes up to half an hour a run on two CPU cores; runs that are finished already are read, not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from runs import examinations, machine, run

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2-sentiment.yaml"
ROWS = (
    ("eval/reward_reward_model/raw", "reward model's score", "+.2f"),
    ("eval/gold", "VADER", "+.3f"),
    ("eval/kl", "KL, nats a completion", ".2f"),
    ("eval/distinct_words", "distinct-word ratio", ".2f"),
)


def line(label: str, kinds: list[dict[str, float]], seconds: Any, accuracy: Any) -> str:
    """One row of the table: every measure for the policy before, after, and best-of-n."""
    cells = []
    for key, _, shape in ROWS:
        names = ("eval/kl_bound" if key == "eval/kl" and "eval/kl_bound" in kind else key for kind in kinds)
        numbers = [kind[name] for kind, name in zip(kinds, names, strict=True)]
        shown = numbers[1:] if key == "eval/kl" else numbers
        cells.append(" → ".join(f"{x:{shape}}" for x in shown[:-1]) + f" ({shown[-1]:{shape}})")
    return f"| {label} | {accuracy:.4f} | {' | '.join(cells)} | {seconds / 60:.1f} |"


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-smollm2"))
    args = parser.parse_args()

    labels = " | ".join(f"{label} (best of 16)" for _, label, _ in ROWS)
    print(f"| seed | RM accuracy | {labels} | minutes |\n|{'---|' * (len(ROWS) + 3)}")
    summaries = []
    for seed in args.seeds:
        s = run(args.out / f"seed-{seed}", "pipeline", str(CONFIG), "--seed", str(seed))
        summaries.append(s)
        print(line(str(seed), [s["before"], s["after"], s["best_of_16"]], s["seconds"], s["rm_accuracy"]), flush=True)
    kinds = [
        {key: fmean(s[name][key] for s in summaries) for key in summaries[0][name]}
        for name in ("before", "after", "best_of_16")
    ]
    means = [fmean(s[name] for s in summaries) for name in ("seconds", "rm_accuracy")]
    print(line("mean", kinds, *means))

    print(f"\n| iteration | {' | '.join(label for _, label, _ in ROWS)} |\n|{'---|' * (len(ROWS) + 1)}")
    for row in examinations(args.out / f"seed-{args.seeds[0]}"):
        print(f"| {row['step']} | " + " | ".join(f"{row[key]:{shape}}" for key, _, shape in ROWS) + " |")
    print(f"\n{machine(summaries[0])}")


if __name__ == "__main__":
    main()
