"""PPO on prompts of random tokens: does everything fit and run?

python examples/train_dummy.py --tiny --num_episodes 2 --max_timesteps 2 --update_timesteps 2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy

import torch
from shared import add_model_flags, build, strategy

from prefero.models.base import RewardModel
from prefero.optimizer import HybridAdam
from prefero.trainer import PPOTrainer
from prefero.trainer.callbacks import SaveCheckpoint


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ["gpt2", "bloom", "opt", "llama"], "gpt2")
    parser.add_argument("--save_path", default="actor_checkpoint_dummy.pt")
    parser.add_argument("--num_episodes", type=int, default=50)
    parser.add_argument("--max_timesteps", type=int, default=10)
    parser.add_argument("--update_timesteps", type=int, default=10)
    parser.add_argument("--max_epochs", type=int, default=5)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--experience_batch_size", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=128, help="of prompt and completion together")
    parser.add_argument("--save_ckpt_path", default=None, help="also save checkpoints under this folder")
    parser.add_argument("--save_ckpt_interval", type=int, default=1, help="... every so many episodes")
    arguments = parser.parse_args(argv)

    placed = strategy(arguments)
    with placed.model_init_context():
        actor, critic = build("actor", arguments), build("critic", arguments)
        initial_model = deepcopy(actor)
        reward_model = RewardModel(deepcopy(critic.model))
    actor_optim, critic_optim = HybridAdam(actor.parameters(), lr=5e-6), HybridAdam(critic.parameters(), lr=5e-6)
    (actor, actor_optim), (critic, critic_optim), reward_model, initial_model = placed.prepare(
        (actor, actor_optim), (critic, critic_optim), reward_model, initial_model
    )
    vocabulary = actor.get_base_model().config.vocab_size
    prompts = torch.randint(vocabulary, (1000, arguments.prompt_length), device=placed.device)
    callbacks = []
    if arguments.save_ckpt_path is not None:
        callbacks.append(
            SaveCheckpoint(
                arguments.save_ckpt_path, arguments.save_ckpt_interval, placed, actor, critic, actor_optim, critic_optim
            )
        )
    trainer = PPOTrainer(
        placed, actor, critic, reward_model, initial_model, actor_optim, critic_optim,
        max_epochs=arguments.max_epochs, train_batch_size=arguments.train_batch_size,
        experience_batch_size=arguments.experience_batch_size, callbacks=callbacks,
        max_length=arguments.max_length, do_sample=True, temperature=1.0, top_k=50,
    )  # fmt: skip
    trainer.fit(prompts, num_episodes=arguments.num_episodes, max_timesteps=arguments.max_timesteps,
                update_timesteps=arguments.update_timesteps)  # fmt: skip
    placed.save_model(actor, arguments.save_path, only_rank0=True)
    if arguments.need_optim_ckpt:
        placed.save_optimizer(actor_optim, f"{arguments.save_path}.optim", only_rank0=False)


if __name__ == "__main__":
    main()
