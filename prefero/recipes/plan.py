"""`prefero plan CONFIG`: memory, speed and time of a run before any weight is read.

Every stage is run for a few steps with networks of one layer, then once for each depth with two layers in those. What
was alive, and how long it took, is followed along the line through both to the network's real depth.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from prefero import faults
from prefero.config import PREFERENCE_STAGES, Config, ConfigError, PreferenceConfig, load_config
from prefero.models.footprint import Alive, Shortened, shortened
from prefero.models.trunk import trunk_of
from prefero.recipes.preflight import preflight
from prefero.recipes.run import STAGES, find_config
from prefero.recipes.session import make_strategy, open_session
from prefero.recipes.sources import Sources
from prefero.strategies import Strategy
from prefero.strategies.cpu import release_memory
from prefero.tracking.base import Trackers

_STEPS = 3  # the first makes optimizer states, the second is the one whose memory counts, the third is timed
_PHASES = {"rollout": "sample", "score": "judge", "judge": "judge", "learn": "learn", "backward": "learn",
           "step": "learn", "evaluate": "evaluate", "export": "export", "load": "load"}  # fmt: skip
MB = 1 << 20
_KEPT = 0.5
"""Of what comes and goes, the part more that the C library's heap takes, in pieces that fit nothing: so that
benchmarks/one_backbone.py comes true."""


@dataclass
class Trial:
    """One run with short networks: a tracker that notes what was alive in every phase, and how long a step took.

    numbers: by "stage/phase peak", "stage seconds" and "stage role kind".
    """

    alive: Alive
    stage: str = ""
    phase: str = "load"
    numbers: dict[str, float] = field(default_factory=dict)
    _step: int = 0
    _began: float = 0.0
    _examined: float = 0.0
    _placed: dict[int, weakref.ref[nn.Parameter]] = field(default_factory=dict)

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins."""
        release_memory()
        self._close()
        self.stage, self.phase, self._step, self.alive.counting = stage, "learn", 0, True

    def enter(self, phase: str) -> None:
        """The run is about to do something else."""
        if phase in _PHASES:
            self._close()
            self.phase = _PHASES[phase]
        if phase == "evaluate":
            self._examined = time.perf_counter()

    def _close(self) -> None:
        peak, key = self.alive.mark(), f"{self.stage or 'start'}/{self.phase} peak"
        self.numbers[key] = max(self.numbers.get(key, 0.0), peak)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A step of training ended, or something else was measured."""
        now = time.perf_counter()
        if "eval/kl" in metrics:
            self.numbers[f"{self.stage} evaluation"] = now - self._examined
        if not any(name.endswith("gradient_norm_max") for name in metrics):
            return
        self._close()
        self._step += 1
        if self._step == _STEPS - 1:
            self.alive.counting, self._began = False, now
        elif self._step == _STEPS:
            self.numbers[f"{self.stage} seconds"] = now - self._began
            self.alive.counting = True

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Samples are not looked at."""

    def close(self) -> None:
        """The run has ended."""
        self._close()

    def placed(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """A role's own weights, those it shares with one placed before, and what its learning adds."""
        role = f"{self.stage or 'start'} {type(model).__name__}"
        for parameter in model.parameters():
            size = parameter.numel() * parameter.element_size()
            known = self._placed.get(id(parameter))
            self._add(f"{role} {'weights' if known is None or known() is not parameter else 'shared'}", size)
        if optimizer is not None:
            learned = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
            self._add(f"{role} learning", 3 * learned)  # gradient and Adam's two moments
            embeddings = trunk_of(getattr(model, "model", model)).get_input_embeddings()
            embeddings.register_forward_hook(lambda _, given, __: self._read(role, given[0].numel()))
        self._placed |= {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}

    def _read(self, role: str, tokens: int) -> None:
        if self._step == _STEPS - 1 and self.phase == "learn":
            self._add(f"{role} tokens", tokens)

    def _add(self, key: str, size: float) -> None:
        self.numbers[key] = self.numbers.get(key, 0.0) + size


def plan(name: str, overrides: Sequence[str], command: str = "pipeline", ranks: int = 1, file: str = "") -> None:
    """Prints what a run of this config will take, and what to change where it does not fit; also as JSON into `file`.

    ranks: the processes that share it.
    """
    config = load_config(find_config(name), overrides, section=command)
    if ranks < 1 or (ranks > 1 and config.strategy.kind == "naive"):
        raise ConfigError(f"--ranks {ranks} with strategy.kind {config.strategy.kind}: give 1, or ddp or fsdp as kind")
    forecast = foretell(config, command, ranks)
    room = memory_here()
    for line in forecast.lines(room):
        print(line)
    tried = [] if forecast.peak <= room else list(_cures(config, command, ranks, room))
    for change, peak in tried:
        told = "fits" if peak <= room else "not enough"
        print(f"  with {change}: {peak / MB:,.0f} MB ({told})")
    if file:
        cures = [{"change": change, "peak_mb": peak / MB} for change, peak in tried]
        told_all = forecast.to_json() | {"room_mb": room / MB, "fits": forecast.peak <= room, "changes": cures}
        Path(file).write_text(json.dumps(told_all, indent=2) + "\n", encoding="utf-8")


def _cures(config: Config, command: str, ranks: int, room: int) -> Iterator[tuple[str, float]]:
    """Changes that take less memory, one upon the other, up to the first with which the run fits.

    A change that the rest of the config does not allow is left out.
    """
    model, samples = config.model, command == "ppo" or (command == "pipeline" and not config.ppo.skip)
    stages: tuple[str, ...] = ("ilql",) if command == "ilql" else ("sft", "reward", "ppo")
    if command in PREFERENCE_STAGES:
        stages = ("sft", command)
    large = [stage for stage in stages if not 0 < getattr(config, stage).micro_batch_tokens <= 2048]
    changes: list[list[tuple[str, str, Any]]] = [
        [(stage, "micro_batch_tokens", 2048) for stage in large],
        [("engine", "slots", 16)] if config.engine.slots > 16 else [],
        [] if model.gradient_checkpointing else [("model", "gradient_checkpointing", True)],
        [] if model.lora_rank or model.num_layers_unfrozen else [("model", "lora_rank", 16)],
        [("ppo", "backbone", "shared")] if config.ppo.backbone == "separate" and "ppo" in stages else [],
        [("engine", "copies", False)] if samples and config.engine.kind == "native" and config.engine.copies else [],
        [("model", "frozen", "bf16")] if model.frozen == "fp32" else [],
        [("model", "frozen", "int8")] if model.frozen != "int8" else [],
    ]
    told: dict[str, Any] = {}
    for change in filter(None, changes):
        changed = config
        try:
            for section, key, value in change:
                changed = replace(changed, **{section: replace(getattr(changed, section), **{key: value})})
            peak = foretell(changed, command, ranks).peak
        except (ConfigError, ValidationError):
            continue
        config = changed
        told |= {f"{section}.{key.replace('_', '-')}": str(value).lower() for section, key, value in change}
        yield " ".join(f"--{key} {value}" for key, value in told.items()), peak
        if peak <= room:
            return


def foretell(config: Config, command: str = "pipeline", ranks: int = 1) -> Forecast:
    """What `command` with this config will take. Raises ValueError as the run itself would before it starts."""
    sources = preflight(config, command)
    least = _least(config)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        first, depths = _try(config, command, sources, {}, ranks, run)
        release_memory()
        baseline = resident()  # with the libraries that a first step loads
        numbers = dict(first)
        for whole in depths:
            if whole > least:
                deeper, _ = _try(config, command, sources, {whole: least + 1}, ranks, run)
                for key, number in first.items():
                    # A deeper network takes no less; what seems so is noise.
                    numbers[key] += max(0.0, deeper.get(key, number) - number) * (whole - least)
    stages = [key.removesuffix(" seconds") for key in numbers if key.endswith(" seconds")]
    return Forecast(config, ranks, baseline, numbers, {stage: _steps(config, sources, stage) for stage in stages})


def _least(config: Config) -> int:
    """The fewest layers a short network may have: where lower ones are frozen, all that learn and one that does not."""
    return config.model.num_layers_unfrozen + 1 if config.model.num_layers_unfrozen else 1


def _steps(config: Config, sources: Sources, stage: str) -> int:
    """How many optimizer steps (PPO: iterations) a stage has."""
    if stage == "ppo" or (steps := getattr(config, stage).steps):
        return config.ppo.steps if stage == "ppo" else int(steps)
    settings = getattr(config, stage)
    of = {"sft": sources.sft, "kto": sources.labelled, "ilql": sources.trajectories}.get(stage, sources.preferences)
    count = len(of("train"))
    return int(settings.epochs * math.ceil(min(count, settings.max_rows or count) / settings.batch_size))


def _try(
    config: Config, command: str, sources: Sources, depths: Mapping[int, int], ranks: int, run: Path
) -> tuple[dict[str, float], set[int]]:
    """A few steps of every stage with networks of so many layers (one, where nothing is said); their real depths."""
    ppo, evaluate = config.ppo, config.evaluate

    def share(rows: int) -> int:
        return math.ceil(rows / ranks)

    few: dict[str, Any] = {name: _few_steps(getattr(config, name), share) for name in PREFERENCE_STAGES}
    short = replace(
        config,
        checkpoint=replace(config.checkpoint, every=0, minutes=1e6),
        strategy=replace(config.strategy, kind="naive", stage=3, offload=False, shard_init=False, timeout=600.0),
        sft=replace(config.sft, steps=_STEPS, batch_size=share(config.sft.batch_size)),
        reward=replace(config.reward, steps=_STEPS, eval_every=0, batch_size=share(config.reward.batch_size)),
        ppo=replace(
            ppo, steps=_STEPS, eval_every=0, save_every=0, critic_warmup=0, kl_budget=0.0,
            prompts_per_step=share(ppo.prompts_per_step), train_batch_size=share(ppo.train_batch_size),
        ),
        **few,
        ilql=replace(config.ilql, steps=_STEPS, eval_every=0, batch_size=share(config.ilql.batch_size)),
        evaluate=replace(
            evaluate, num_prompts=share(evaluate.num_prompts), max_pairs=min(64, evaluate.max_pairs),
            max_demonstrations=min(64, evaluate.max_demonstrations), best_of=0,
        ),
    )  # fmt: skip
    alive, network = Alive(), Shortened(depths, _least(config))
    trial, strategy = Trial(alive), make_strategy(short)
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(shortened(network))
        stack.enter_context(_watching(strategy, trial))
        session = stack.enter_context(
            open_session(short, run, strategy, overwrite=True, stage=command, sources=sources, stoppable=False)
        )
        stack.enter_context(alive)
        STAGES[command](replace(session, tracker=Trackers([trial])))
        trial.close()
    return trial.numbers, network.whole


def _few_steps(settings: PreferenceConfig, share: Callable[[int], int]) -> PreferenceConfig:
    """A stage that learns from preferences, short: with just the rows it needs, since the reference reads them all."""
    batch_size = share(settings.batch_size)
    rows = _STEPS * batch_size if not settings.max_rows else min(settings.max_rows, _STEPS * batch_size)
    return replace(settings, steps=_STEPS, eval_every=0, batch_size=batch_size, max_rows=rows)


@contextmanager
def _watching(strategy: Strategy, trial: Trial) -> Iterator[None]:
    """Every model that is placed, and every phase a run comes to, told to the trial."""
    usual = strategy.prepare

    def prepare(*given: Any) -> Any:
        for one in given:
            model, optimizer = one if isinstance(one, tuple) else (one, None)
            trial.placed(model, optimizer)
        return usual(*given)

    with faults.watched(trial.enter):
        strategy.prepare = prepare  # type: ignore[method-assign]
        yield


@dataclass(frozen=True)
class Forecast:
    """What a run will take; all sizes in bytes, of one rank.

    baseline: what the process holds before it builds anything. numbers: those of `Trial`, at the networks' real depth.
    """

    config: Config
    ranks: int
    baseline: float
    numbers: Mapping[str, float]
    steps: Mapping[str, int]

    @property
    def stages(self) -> list[str]:
        """The stages that will run, in order."""
        return list(self.steps)

    def roles(self, stage: str) -> dict[str, dict[str, float]]:
        """For each network of a stage: its own weights, those it shares with another, and gradients and states."""
        return {
            name: {kind: size * self._part(kind) for kind, size in kinds.items()}
            for name, kinds in self._whole_roles(stage).items()
        }

    def _whole_roles(self, stage: str) -> dict[str, dict[str, float]]:
        """As if one process held them."""
        found: dict[str, dict[str, float]] = {}
        for key, number in self.numbers.items():
            of, _, rest = key.partition(" ")
            name, _, kind = rest.rpartition(" ")
            if name and of == stage and kind in ("weights", "shared", "learning"):
                found.setdefault(name, {})[kind] = number
        return found

    def _part(self, kind: str) -> float:
        """The part of weights, or of gradients and states, that each rank holds."""
        s = self.config.strategy
        if s.kind != "fsdp" or self.ranks == 1:
            return 1.0
        of_learning = {1: (1 + 2 / self.ranks) / 3, 2: 1 / self.ranks, 3: 1 / self.ranks}
        return of_learning[s.stage] if kind == "learning" else (1 / self.ranks if s.stage == 3 else 1.0)

    def phases(self, stage: str) -> dict[str, float]:
        """The most that is held in each phase of a stage, the process itself included."""
        kinds = [kind for role in self._whole_roles(stage).values() for kind in role.items() if kind[0] != "shared"]
        held = sum(size for _, size in kinds)
        spared = sum(size * (1 - self._part(kind)) for kind, size in kinds)
        found = {}
        for key, number in self.numbers.items():
            of, _, phase = key.removesuffix(" peak").partition("/")
            if key.endswith(" peak") and of == stage:
                passing = max(0.0, number - held)
                found[phase] = self.baseline + number - spared + _KEPT * passing
        return found

    @property
    def peak(self) -> float:
        """The most that one process will ever hold."""
        return max(size for stage in self.stages for size in self.phases(stage).values())

    def seconds(self, stage: str) -> float:
        """All steps of a stage, and its examinations."""
        often = getattr(self.config, stage).eval_every if stage in ("ppo", "ilql") else None
        examined = 0 if often is None else 2 + (self.steps[stage] // often if often else 0)
        every = self.numbers[f"{stage} seconds"] * self.steps[stage]
        return every + examined * self.numbers.get(f"{stage} evaluation", 0.0)

    def speed(self, stage: str) -> float:
        """Tokens computed to learn from, a second: beginnings that texts share count once."""
        tokens = [n for key, n in self.numbers.items() if key.startswith(f"{stage} ") and key.endswith(" tokens")]
        return max(tokens, default=0.0) / self.numbers[f"{stage} seconds"]

    def lines(self, room: int) -> Iterator[str]:
        """The forecast as text."""
        for stage in self.stages:
            step = self.numbers[f"{stage} seconds"]
            yield (
                f"{stage}: {self.steps[stage]} steps of {step:.2f} s, {self.speed(stage):,.0f} tokens/s, "
                f"{self.seconds(stage) / 3600:.2f} hours"
            )
            for role, kinds in self.roles(stage).items():
                told = ", ".join(f"{kind} {size / MB:,.0f} MB" for kind, size in kinds.items() if size)
                yield f"  {role}: {told}"
            yield "  " + ", ".join(f"{phase} {size / MB:,.0f} MB" for phase, size in self.phases(stage).items())
        whose = "of this machine" if self.ranks == 1 else "a rank"
        fits = "fits" if self.peak <= room else "does not fit"
        hours = sum(self.seconds(stage) for stage in self.stages) / 3600
        yield f"peak {self.peak / MB:,.0f} MB {whose} ({room / MB:,.0f} MB): {fits}; {hours:.2f} hours in all"

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain values; sizes in MB."""
        stages = {
            stage: {
                "steps": self.steps[stage],
                "seconds_per_step": self.numbers[f"{stage} seconds"],
                "tokens_per_second": self.speed(stage),
                "hours": self.seconds(stage) / 3600,
                "roles_mb": {n: {k: b / MB for k, b in kinds.items()} for n, kinds in self.roles(stage).items()},
                "phases_mb": {phase: size / MB for phase, size in self.phases(stage).items()},
            }
            for stage in self.stages
        }
        return {"peak_mb": self.peak / MB, "baseline_mb": self.baseline / MB, "ranks": self.ranks, "stages": stages}


def resident() -> int:
    """This process's resident set, in bytes; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else 0


def memory_here() -> int:
    """The main memory this process may use, in bytes: the machine's, or its container's share."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(text)) if text.isdigit() else whole
