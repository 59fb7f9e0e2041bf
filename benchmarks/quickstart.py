"""The quickstart over several seeds, and once without the KL penalty: prints the tables of the docs.

python benchmarks/quickstart.py [--seeds 0 1 2 3 4] [--out DIR]

Takes about two minutes a run on two CPU cores; runs that are finished already are read, not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runs import examinations, machine, run


def main() -> None:
    """Runs what is missing and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quickstart"))
    args = parser.parse_args()

    print("| seed | gold before | gold after | standard error | in standard errors | on topic | KL | RM accuracy | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        s = run(args.out / f"seed-{seed}", "quickstart", "--seed", str(seed))
        gain, error = s["heldout_reward_after"] - s["heldout_reward_before"], s["heldout_reward_stderr"]
        topic = f"{s['before']['eval/on_topic']:.3f} → {s['after']['eval/on_topic']:.3f}"
        print(
            f"| {seed} | {s['heldout_reward_before']:+.3f} | {s['heldout_reward_after']:+.3f} | {error:.3f} "
            f"| {gain / error:.1f} | {topic} | {s['kl']:.2f} | {s['rm_accuracy']:.3f} | {s['seconds']:.0f} |",
            flush=True,
        )

    first = args.seeds[0]
    kept = run(args.out / f"seed-{first}", "quickstart", "--seed", str(first))
    free = args.out / f"seed-{first}-kl-0"
    loose = run(free, "quickstart", "--seed", str(first), "--kl-coef", "0")
    print(f"\n| seed {first} | supervised model | default (`--kl-coef 0.2`) | `--kl-coef 0` |\n|---|---|---|---|")
    for key, label in (
        ("eval/reward", "reward, by the reward model"),
        ("eval/gold", "gold, by the hidden taste"),
        ("eval/on_topic", "on topic"),
        ("eval/kl", "KL, nats a completion"),
        ("eval/distinct_words", "distinct-word ratio"),
        ("eval/length", "length, tokens"),
    ):
        columns = (kept["before"][key], kept["after"][key], loose["after"][key])
        print(f"| {label} | " + " | ".join(f"{abs(c) if key == 'eval/kl' else c:.3f}" for c in columns) + " |")
    peak = max(examinations(free), key=lambda row: row["eval/gold"])
    print(f"\nHighest gold on the way, without the penalty: {peak['eval/gold']:.3f} at iteration {peak['step']}.")
    print(f"\n{machine(kept)}")


if __name__ == "__main__":
    main()
