"""What is done with a trained model: generate, chat, evaluate."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefero.config import Config, RewardPart, load_config
from prefero.data.formats import PromptRow, to_prompts
from prefero.data.sources import read_rows
from prefero.data.tokenize import encode_prompt, encode_prompts
from prefero.functional.best_of_n import kl_bound
from prefero.models.auto import AutoActor
from prefero.models.base import Actor
from prefero.models.ilql import ILQLActor, has_value_heads
from prefero.models.loading import load_tokenizer
from prefero.recipes.rewards import Judging, build_reward, check_part, parts_or_default
from prefero.recipes.session import num_parameters, set_up_machine
from prefero.rewards.base import Reward
from prefero.rollout.best_of_n import best_of_n
from prefero.rollout.engine import SamplingParams
from prefero.rollout.make import make_engine
from prefero.strategies import NaiveStrategy
from prefero.strategies.naive import pick_device
from prefero.tracking.text import for_terminal, visible
from prefero.types import Message, Prompt, Rollout


def load_for_use(
    name: str, device: str = "", trust_remote_code: bool = False, beta: float | None = None
) -> tuple[Actor, PreTrainedTokenizerBase]:
    """A model to sample from (a run, model folder, fetched or hub name) on its device, with its tokenizer.

    beta: how much its value heads guide it (None: as it was trained to). Raises ValueError where it has none.
    """
    place = pick_device(device or None)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    actor: Actor
    if has_value_heads(name):
        actor = ILQLActor.from_pretrained(name, beta, trust_remote_code=trust_remote_code)
    elif beta is not None:
        raise ValueError(f"--beta is {beta}, but {name} has no value heads that could guide it; leave it out")
    else:
        actor = AutoActor(pretrained=name, trust_remote_code=trust_remote_code)
    set_up_machine(num_parameters(actor))
    return actor.requires_grad_(False).to(place), tokenizer


_MAX_NEW_TOKENS = 128


def sampling(args: Namespace, context: int | None, prompt_length: int) -> SamplingParams:
    """The sampling flags as parameters; temperature 0 means greedy, no maximum means what the context leaves."""
    room = _MAX_NEW_TOKENS if context is None else max(1, min(_MAX_NEW_TOKENS, context - prompt_length))
    return SamplingParams(
        max_new_tokens=room if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature or 1.0,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        seed=args.seed,
        greedy=args.temperature == 0,
    )


def generate(args: Namespace) -> None:
    """`prefero generate`: completions of prompts from the command line, a file or standard input."""
    if args.num_samples < 1:
        raise ValueError(f"--num-samples is {args.num_samples}; give 1 or more")
    if args.best_of < 0:
        raise ValueError(f"--best-of is {args.best_of}; give the number of samples to choose from, or 0 for none")
    if args.best_of and args.num_samples > 1:
        raise ValueError("--best-of and --num-samples are both given; --best-of shows one answer of so many; use one")
    if args.reward and not args.best_of:
        raise ValueError(f"--reward is {args.reward}, but nothing is chosen by it; give --best-of N as well")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out is {args.out}, but there is no folder {Path(args.out).parent}; make it first")
    actor, tokenizer = load_for_use(args.model, args.device, args.trust_remote_code, args.beta)
    chat = _was_chat(args.model) if args.chat is None else args.chat
    prompts = encode_prompts(tokenizer, _asked(args), chat=chat)
    params = sampling(args, _context(actor), max(len(prompt.token_ids) for prompt in prompts))
    engine = make_engine(actor, tokenizer)
    if args.best_of:
        reward = _reward(args, tokenizer, prompts)
        best = best_of_n(prompts, engine, reward, args.best_of, params)
        rows = [_row(done) | {"reward": done.score.value, "best_of": args.best_of} for done in best]
        print(f"at most {kl_bound(args.best_of):.3f} nats from the model's own distribution", file=sys.stderr)
    else:
        repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
        completions = engine.generate(repeated, params)
        rows = [_row(Rollout(prompt, done)) for prompt, done in zip(repeated, completions, strict=True)]
    if args.out:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path(args.out).write_text(lines, encoding="utf-8")
        print(f"{len(rows)} completions in {args.out}")
        return
    for row in rows:
        chosen = f"(reward {row['reward']:.4g}, the best of {args.best_of})\n" if args.best_of else ""
        print(f"> {for_terminal(row['prompt'])}\n{for_terminal(row['completion'])}\n{chosen}")


def _row(done: Rollout) -> dict[str, Any]:
    return {
        "id": done.prompt.id,
        "prompt": done.prompt.text,
        "completion": done.completion.text,
        "finish_reason": done.completion.finish_reason,
    }


def _reward(args: Namespace, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Reward:
    """What `--reward` names, as a part of the run's config or as `use`; without it, the reward of the run."""
    run = Path(args.model).expanduser()
    file = run / "config.yaml"
    if not file.is_file() and not args.reward:
        raise ValueError(f"--best-of needs a reward, and {args.model} is no run folder; give --reward USE")
    config = load_config(file) if file.is_file() else Config()
    parts = parts_or_default(config.ppo.rewards)
    if args.reward:
        parts = {"reward": parts.get(args.reward) or RewardPart(use=args.reward)}
    trained = run / "checkpoints" / "reward" / "model"
    how = Judging(
        NaiveStrategy(args.device or None), trained if (trained / "config.json").is_file() else None,
        config.reward.max_length, config.evaluate.batch_size, tokenizer=tokenizer,
    )  # fmt: skip
    for name, part in parts.items():
        check_part(name, part, prompts, trained=how.trained is not None, key="--reward" if args.reward else "")
    return build_reward(parts, how)


def _was_chat(model: str) -> bool:
    """Whether this is the folder of a run that put its prompts through the chat template."""
    file = Path(model).expanduser() / "config.yaml"
    return file.is_file() and load_config(file).data.chat


def _asked(args: Namespace) -> Iterator[PromptRow]:
    if args.prompts and args.prompt:
        raise ValueError("--prompt and --prompts are both given; use one")
    if args.prompts:
        yield from to_prompts(read_rows(args.prompts, max_bad_rows=args.max_bad_rows))
        return
    texts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("there is nothing to continue; give --prompt TEXT, --prompts FILE, or lines on standard input")
    for number, text in enumerate(texts, 1):
        yield PromptRow(f"prompt {number}", _checked(text, f"prompt {number}"))


def _checked(text: str, name: str) -> str:
    """The text itself; bytes that a shell passed on but that are not UTF-8 are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds bytes that are not UTF-8: {text!r:.80}; give it as UTF-8") from None
    return text


def chat(args: Namespace) -> None:
    """`prefero chat`: a conversation in the terminal; models without a chat template continue each line on its own."""
    actor, tokenizer = load_for_use(args.model, args.device, args.trust_remote_code, args.beta)
    engine, context = make_engine(actor, tokenizer), _context(actor)
    templated = bool(tokenizer.chat_template)
    if args.system and not templated:
        raise ValueError(f"--system is given, but {args.model} has no chat template to put it in; leave it out")
    system: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(system)
    note = "" if templated else " This model has no chat template: every line is continued on its own."
    print(f"Chatting with {args.model}. /new starts over, /exit or Ctrl-D leaves.{note}", file=sys.stderr)
    for turn, line in enumerate(_lines()):
        if line == "/new":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": line.encode("utf-8", "replace").decode("utf-8")})
        question: str | Sequence[Message] = messages if templated else line
        try:
            prompt = encode_prompt(tokenizer, question, f"turn {turn}", max_length=context and context - 1)
        except ValueError as error:
            messages.pop()
            print(f"({visible(str(error))}; /new starts over)", file=sys.stderr)
            continue
        answer = _say(engine, prompt, sampling(args, context, len(prompt.token_ids)))
        messages.append({"role": "assistant", "content": answer})


def _context(actor: Actor) -> int | None:
    """The most tokens the model takes at once, where it says so."""
    context = getattr(actor.model.config, "max_position_embeddings", None)
    return None if context is None else int(context)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _say(engine: Any, prompt: Prompt, params: SamplingParams) -> str:
    pieces = []
    for piece in engine.stream(prompt, params):
        pieces.append(piece)
        # Not a terminal command of the model's, whatever it writes; line breaks may stay.
        print(visible(piece), end="", flush=True)
    print()
    return "".join(pieces)
