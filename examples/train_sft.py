"""Supervised fine-tuning on Alpaca or self-instruct rows, or your own prompt/completion rows.

python examples/train_sft.py --dataset alpaca.json --pretrain gpt2
python examples/train_sft.py --dataset rows.jsonl --tiny
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from shared import add_model_flags, build, strategy, tokenizer
from torch.utils.data import DataLoader

from prefero.dataset import AlpacaDataCollator, AlpacaDataset
from prefero.optimizer import HybridAdam
from prefero.trainer import SFTTrainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ["gpt2", "bloom", "opt", "llama"], "gpt2")
    parser.add_argument("--dataset", required=True, help="a JSON, JSONL, CSV or parquet file, or a hub name")
    parser.add_argument("--save_path", default="sft_ckpt.pt")
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--log_interval", type=int, default=100)
    arguments = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    placed = strategy(arguments)
    words = tokenizer(arguments)
    with placed.model_init_context():
        model = build("actor", arguments)
    optimizer = HybridAdam(model.parameters(), lr=arguments.lr)
    model, optimizer = placed.prepare((model, optimizer))
    data = AlpacaDataset(arguments.dataset, words, max_length=arguments.max_len)
    loader = DataLoader(data, arguments.batch_size, shuffle=True, collate_fn=AlpacaDataCollator(words))
    trainer = SFTTrainer(model, placed, optimizer, loader, max_epochs=arguments.max_epochs)
    metrics = trainer.fit(logging.getLogger("sft"), arguments.lora_rank, arguments.log_interval)
    print(f"loss {metrics['sft/loss']:.3f}")
    placed.save_model(model, arguments.save_path, only_rank0=True)
    if arguments.need_optim_ckpt:
        placed.save_optimizer(optimizer, f"{arguments.save_path}.optim", only_rank0=False)


if __name__ == "__main__":
    main()
