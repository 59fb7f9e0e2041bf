"""PPO on real prompts, the column `prompt` of a CSV, JSONL or parquet file.

python examples/train_prompts.py prompts.csv --pretrain gpt2 --rm_path rm_ckpt.pth
python examples/train_prompts.py prompts.csv --tiny --num_episodes 1
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from copy import deepcopy

import torch
from shared import add_model_flags, build, strategy, tokenizer

from prefero.data.sources import read_rows, require_columns
from prefero.optimizer import HybridAdam
from prefero.trainer import PPOTrainer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt_path", help="a file with a column `prompt`, or the name of a hub data set")
    add_model_flags(parser, ["gpt2", "bloom", "opt", "llama"], "gpt2")
    parser.add_argument("--rm_path", default=None, help="a reward model that train_reward_model.py saved")
    parser.add_argument("--sft_path", default=None, help="an actor that train_sft.py saved, to start from")
    parser.add_argument("--save_path", default="actor_checkpoint_prompts.pt")
    parser.add_argument("--num_episodes", type=int, default=10)
    parser.add_argument("--max_timesteps", type=int, default=10)
    parser.add_argument("--update_timesteps", type=int, default=10)
    parser.add_argument("--max_epochs", type=int, default=5)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--experience_batch_size", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=96, help="longer prompts lose their end")
    parser.add_argument("--max_length", type=int, default=128, help="of prompt and completion together")
    arguments = parser.parse_args(argv)

    placed = strategy(arguments)
    words = tokenizer(arguments)
    with placed.model_init_context():
        actor, critic, reward_model = (build(role, arguments) for role in ("actor", "critic", "rm"))
    if arguments.sft_path is not None:
        placed.load_model(actor, arguments.sft_path)
    if arguments.rm_path is None:
        warnings.warn("no --rm_path: the rewards are those of an untrained reward model, good for a trial run only",
                      stacklevel=1)  # fmt: skip
    else:
        placed.load_model(reward_model, arguments.rm_path)
    initial_model = deepcopy(actor)
    actor_optim, critic_optim = HybridAdam(actor.parameters(), lr=5e-6), HybridAdam(critic.parameters(), lr=5e-6)
    (actor, actor_optim), (critic, critic_optim), reward_model, initial_model = placed.prepare(
        (actor, actor_optim), (critic, critic_optim), reward_model, initial_model
    )
    rows = read_rows(arguments.prompt_path)
    require_columns(rows, ["prompt"])

    def encode(texts: list[str]) -> dict[str, torch.Tensor]:
        batch = words(texts, return_tensors="pt", padding=True, padding_side="left", truncation=True,
                      max_length=arguments.prompt_length)  # fmt: skip
        return {
            "input_ids": batch["input_ids"].to(placed.device),
            "attention_mask": batch["attention_mask"].to(placed.device),
        }

    trainer = PPOTrainer(
        placed, actor, critic, reward_model, initial_model, actor_optim, critic_optim,
        max_epochs=arguments.max_epochs, train_batch_size=arguments.train_batch_size,
        experience_batch_size=arguments.experience_batch_size, tokenizer=encode, max_length=arguments.max_length,
        do_sample=True, temperature=1.0, top_k=50, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    trainer.fit([str(row["prompt"]) for row in rows], num_episodes=arguments.num_episodes,
                max_timesteps=arguments.max_timesteps, update_timesteps=arguments.update_timesteps)  # fmt: skip
    placed.save_model(actor, arguments.save_path, only_rank0=True)
    if arguments.need_optim_ckpt:
        placed.save_optimizer(actor_optim, f"{arguments.save_path}.optim", only_rank0=False)


if __name__ == "__main__":
    main()
