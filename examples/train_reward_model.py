"""A reward model from comparisons: rm-static, hh-rlhf, summaries, webgpt, or your own prompt/chosen/rejected rows.

python examples/train_reward_model.py --dataset pairs.jsonl --pretrain gpt2 --model gpt2
python examples/train_reward_model.py --dataset pairs.jsonl --tiny --max_len 128
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared import add_model_flags, build, strategy, tokenizer

from prefero.data.sources import read_rows
from prefero.dataset import HhRlhfDataset, RewardDataset
from prefero.optimizer import HybridAdam
from prefero.trainer import RewardModelTrainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ["gpt2", "bloom", "opt", "llama", "deberta"], "bloom")
    parser.add_argument("--model_path", default=None, help="a saved reward model to go on from")
    parser.add_argument("--dataset", default="Dahoas/rm-static", help="a file, a folder of splits or a hub name")
    parser.add_argument("--subset", default=None, help="a folder of the hub data set, as hh-rlhf has them")
    parser.add_argument("--save_path", default="rm_ckpt.pth")
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--loss_fn", choices=["log_sig", "log_exp"], default="log_sig")
    parser.add_argument("--test", action="store_true", help="a trial run on a few rows")
    arguments = parser.parse_args(argv)

    placed = strategy(arguments)
    words = tokenizer(arguments)
    with placed.model_init_context():
        model = build("rm", arguments)
    if arguments.model_path is not None:
        placed.load_model(model, arguments.model_path)
    rows = read_rows(arguments.dataset, data_dir=arguments.subset)
    rows = rows[:64] if arguments.test else rows
    kind = HhRlhfDataset if "prompt" not in rows.columns else RewardDataset
    held_out = max(len(rows) // 10, 1)
    train, held = (kind(part, words, arguments.max_len) for part in (rows[held_out:], rows[:held_out]))
    optimizer = HybridAdam(model.parameters(), lr=arguments.lr)
    trainer = RewardModelTrainer(model, placed, optimizer, train, held, arguments.batch_size, arguments.max_epochs,
                                 loss_fn=arguments.loss_fn)  # fmt: skip
    metrics = trainer.fit(use_lora=arguments.lora_rank)
    print("  ".join(f"{name} {metrics[f'reward/eval_{name}']:.3f}" for name in ("loss", "accuracy", "distance")))
    placed.save_model(trainer.model, arguments.save_path, only_rank0=True)
    if arguments.need_optim_ckpt:
        placed.save_optimizer(optimizer, f"{arguments.save_path}.optim", only_rank0=False)


if __name__ == "__main__":
    main()
