"""One answer of a trained actor.

python examples/inference.py --pretrain gpt2 --model_path actor_checkpoint_prompts.pt --input "How are you?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from shared import add_model_flags, build, strategy, tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ["gpt2", "bloom", "opt", "llama"], "gpt2")
    parser.add_argument("--model_path", default=None, help="an actor that a training script saved")
    parser.add_argument("--input", default="Question: How are you ? Answer:")
    parser.add_argument("--max_length", type=int, default=100, help="of prompt and completion together")
    arguments = parser.parse_args(argv)

    placed = strategy(arguments)
    words = tokenizer(arguments)
    actor = placed.prepare(build("actor", arguments))
    if arguments.model_path is not None:
        placed.load_model(actor, arguments.model_path)
    input_ids = torch.tensor([words(arguments.input)["input_ids"]], device=placed.device)
    sequences, _, actions = actor.generate(
        input_ids, max_length=arguments.max_length, do_sample=True, top_k=50, top_p=0.95,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, early_stopping=True,
    )  # fmt: skip
    answer = sequences[0, input_ids.shape[1] :][actions[0]]
    print(arguments.input + words.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
