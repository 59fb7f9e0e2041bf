"""A training command from its config file to its report."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import count, takewhile
from pathlib import Path

from prefero.config import (
    KINDS_OF_KEYS,
    PREFERENCE_STAGES,
    Config,
    ConfigError,
    StrategyConfig,
    load_config,
    parse_overrides,
    resolve_key,
    to_dict,
)
from prefero.recipes.ilql import run_ilql
from prefero.recipes.keeper import STOPPED, StoppedError
from prefero.recipes.origin import check_config
from prefero.recipes.pipeline import run_pipeline, run_ppo, run_reward, run_sft
from prefero.recipes.preference import run_preference
from prefero.recipes.preflight import preflight
from prefero.recipes.session import Session, make_strategy, open_session
from prefero.recipes.show import show_result
from prefero.strategies.pulse import BROKEN, BrokenRunError, explained
from prefero.tracking.run_folder import RunFolder
from prefero.tracking.text import for_terminal

STAGES: dict[str, Callable[[Session], None]] = {
    "pipeline": run_pipeline,
    "sft": run_sft,
    "reward": run_reward,
    "ppo": run_ppo,
    **{name: partial(run_preference, name=name) for name in PREFERENCE_STAGES},
    "ilql": run_ilql,
}


@dataclass(frozen=True)
class Asked:
    """What is to be run, and where."""

    stage: str
    config: Config
    folder: Path | None
    default_name: str
    overwrite: bool = False
    resume: bool = False


def run(
    command: str, config: str, overrides: Sequence[str], out: str = "", overwrite: bool = False, resume: bool = False
) -> int:
    """Runs pipeline or the command of an algorithm; quickstart is the pipeline of configs/quickstart.yaml.

    resume: goes on with the run in `out`, or the last one of that name below runs/ that has not ended. Returns the exit
    status: 0, or that of a run that was asked to stop.
    """
    stage = "pipeline" if command == "quickstart" else command
    path = find_config(config)
    settings = load_config(path, overrides, section=stage)
    name = command if command == "quickstart" else f"{path.stem}-{command}"
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite removes it; give one of them")
    folder = Path(out) if out else None
    if resume:
        folder = folder or _interrupted(name)
        _check_same(folder, settings)
    return _run(Asked(stage, settings, folder, name, overwrite, resume))


def resume(folder: str, overrides: Sequence[str]) -> int:
    """Goes on with an interrupted run; overrides: how, e.g. with other processes (strategy, checkpoint)."""
    found = RunFolder.open(folder)
    stage = str(found.summary().get("command", ""))
    if stage not in STAGES:
        raise ConfigError(
            f"{folder} does not say which command made it, so it cannot be resumed; run the command again"
        )
    settings = load_config(found.config_file, [*_forgotten(overrides, stage), *overrides], section=stage)
    _check_same(found.path, settings)
    return _run(Asked(stage, settings, found.path, "", resume=True))


def _forgotten(overrides: Sequence[str], stage: str) -> list[str]:
    """Where a run goes on with a named kind of strategy, the keys that have no effect with it become their defaults."""
    named = {resolve_key(key, section=stage, flag=True): text for key, text in parse_overrides(overrides)}
    kind = named.get(("strategy", "kind"))
    unused = [key for key, kinds in KINDS_OF_KEYS.items() if kind is not None and kind not in kinds]
    return [word for key in unused for word in (f"--strategy.{key}", str(getattr(StrategyConfig(), key)).lower())]


def _run(asked: Asked) -> int:
    sources = preflight(asked.config, asked.stage)
    strategy = make_strategy(asked.config)
    # Rank 0 chooses: the others may look when its folder is there already.
    folder = Path(strategy.group.gather_json([str(asked.folder or free_folder(asked.default_name))])[0])
    if strategy.is_rank_0:
        print(f"run folder: {folder}", file=sys.stderr)
    try:
        # Twice: inside a session SIGTERM, which torchrun sends to all when one has died, cuts no explanation off.
        with explained(strategy.group.pulse), open_session(
            asked.config, folder, strategy, overwrite=asked.overwrite, resume=asked.resume, stage=asked.stage,
            sources=sources,
        ) as session, explained(strategy.group.pulse):  # fmt: skip
            STAGES[asked.stage](session)
            session.report(session.run)
    except BrokenRunError as error:
        told = f"prefero: error: {error}; go on with: prefero resume {shlex.quote(str(folder))}"
        print(for_terminal(told), file=sys.stderr, flush=True)
        if os.environ.get("PREFERO_TRACEBACK"):
            traceback.print_exception(error)
        # At once: whatever else would like to end in order would wait for the lost process as well.
        os._exit(BROKEN)
    except StoppedError:
        if strategy.is_rank_0:
            print(f"stopped and saved; go on with: prefero resume {shlex.quote(str(folder))}", file=sys.stderr)
        return STOPPED
    if strategy.is_rank_0:
        show_result(folder)
    return 0


def _check_same(folder: Path, config: Config) -> None:
    """A run that has not ended goes on with the config it began with."""
    run = RunFolder.open(folder)
    if "seconds" in run.summary():
        raise ConfigError(
            f"{folder} has ended: there is nothing to go on with. `prefero report {folder}` writes its report anew; to "
            "run it again, give another --out"
        )
    check_config(run.config(), to_dict(config), str(folder))


def find_config(name: str) -> Path:
    """A config file: as named, or the one of that name that comes with the package.

    Raises ConfigError listing the configs that exist.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    inside = shipped / path.name
    if path.parent.name in ("", "configs") and inside.is_file():
        return inside
    names = ", ".join(f"configs/{file.name}" for file in sorted(shipped.glob("*.yaml")))
    raise ConfigError(
        f"there is no config file {name} (CONFIG comes first, before any --key value); these come with prefero: {names}"
    )


def shipped_configs() -> Path:
    """The folder of configs: inside the installed package, or beside it in a checkout."""
    package = Path(str(resources.files("prefero")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def free_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, -3, ... when that is taken."""
    return next(folder for folder in _folders(name) if not folder.exists())


def _interrupted(name: str) -> Path:
    """The last of these that is there and has not ended. Raises ConfigError where there is none."""
    there = (RunFolder(folder) for folder in takewhile(Path.exists, _folders(name)))
    begun = [run.path for run in there if run.summary_file.is_file() and "seconds" not in run.summary()]
    if not begun:
        raise ConfigError(
            f"--resume goes on with an interrupted run, and there is none in runs/{name}, runs/{name}-2, ...: name its "
            "folder with --out"
        )
    return begun[-1]


def _folders(name: str) -> Iterator[Path]:
    base = Path("runs") / name
    yield base
    yield from (base.with_name(f"{name}-{number}") for number in count(2))
