"""A training command from its config file to its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from prefero.config import ConfigError, load_config
from prefero.recipes.pipeline import run_pipeline, run_ppo, run_reward, run_sft
from prefero.recipes.preflight import preflight
from prefero.recipes.session import Session, open_session
from prefero.recipes.show import show_result
from prefero.tracking.report import write_report

_STAGES: dict[str, Callable[[Session], None]] = {
    "pipeline": run_pipeline,
    "sft": run_sft,
    "reward": run_reward,
    "ppo": run_ppo,
}


def run(command: str, config: str, overrides: Sequence[str], out: str = "", overwrite: bool = False) -> None:
    """Runs pipeline, sft, reward or ppo; quickstart is the pipeline of configs/quickstart.yaml."""
    stage = "pipeline" if command == "quickstart" else command
    path = find_config(config)
    settings = load_config(path, overrides, section=stage)
    sources = preflight(settings, stage)
    folder = Path(out) if out else free_folder(command if command == "quickstart" else f"{path.stem}-{command}")
    print(f"run folder: {folder}", file=sys.stderr)
    with open_session(settings, folder, overwrite=overwrite, stage=stage, sources=sources) as session:
        _STAGES[stage](session)
        write_report(session.run.path)
    show_result(folder)


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
    base = Path("runs") / name
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
