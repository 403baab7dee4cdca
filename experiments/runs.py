"""Reading runs back: run folders, exported results and TensorBoard logs, all as `Run` objects."""

import csv
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .diagnostics import Series, read_diagnostics
from .errors import UsageError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

EXPORTED = re.compile(r"(seed-\d+)\.(csv|json)")  # what lies beside them, such as diagnostics, has longer names
SEED_FOLDER = re.compile(r"seed-(\d+)")
SB3_FOLDER = re.compile(r"(.+)_(\d+)")  # SB3 names TensorBoard folders PPO_1, PPO_2, ...

# Evaluations are worth more than training returns, which the exploration noise and the policies of the past blur.
LOGGED = (
    ("eval/mean_reward", "eval/mean_cost", "eval/success_rate", "evaluation"),
    ("rollout/ep_rew_mean", "rollout/ep_cost_mean", "rollout/success_rate", "training"),
)

ENV_KWARGS = "env_kwargs."  # how the settings that are arguments of the environment begin
# What a configuration holds beside the experiment itself: two runs that differ only here are seeds of one row.
NOT_SETTINGS = {
    *(
        "agent",
        "env",
        "seed",
        "steps",
        "device",
        "backend",
        "threads",
        "verbose",
        "progress_bar",
        "tensorboard_log",
        "out",
    ),
    *("eval_every", "eval_episodes", "checkpoint_every", "on_nonfinite"),
}


class RunError(UsageError):
    """A run that cannot be read; the message is one sentence that names the file."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training run and its curve; all arrays have length T, the number of evaluations."""

    agent: str
    env: str
    seed: int
    timesteps: IntArray
    """(T,) training steps at each evaluation, increasing."""
    mean_reward: FloatArray
    """(T,) undiscounted return, mean over the episodes of the evaluation."""
    mean_cost: FloatArray
    """(T,) undiscounted cost likewise; nan where the environment has none."""
    success_rate: FloatArray
    """(T,) share of the episodes whose last step is a success; nan where the environment does not say."""
    episodes: FloatArray
    """(T,) episodes per evaluation; nan where unknown."""
    finished: bool
    manifest: dict[str, Any] = field(repr=False)
    path: Path
    source: str = "evaluation"
    """`"evaluation"`, or `"training"` where only the returns of training episodes were logged."""
    unseen_reward: FloatArray = field(default_factory=lambda: np.empty(0))
    """(T,) return on the levels that training does not see, as `mean_reward`; (0,) where there are none."""

    @property
    def diagnostics(self) -> Series:
        """What was logged about the trust region, `timesteps` and others (U,) each; empty where nothing was."""
        return read_diagnostics(self.path)

    @property
    def steps(self) -> int:
        """The budget of the run in steps, of both phases; without a manifest, the last step logged, to two digits."""
        if "steps" in self.manifest:
            return int(self.manifest["steps"]) + int(self.manifest.get("online_steps", 0))
        return round(float(f"{self.reached:.1e}"))

    @property
    def switch(self) -> int | None:
        """Where gradient steps on data end and env steps begin; None where there is one phase."""
        return int(self.manifest["steps"]) if self.manifest.get("online_steps") else None

    @property
    def reached(self) -> int:
        """Training steps at the last evaluation, 0 before the first."""
        return int(self.timesteps[-1]) if len(self.timesteps) else 0

    @property
    def steps_per_second(self) -> float:
        """Training steps per second of wall time, nan where the manifest does not tell."""
        seconds = float(self.manifest.get("wall_seconds") or 0)
        before = (self.manifest.get("init_from") or {}).get("timesteps", 0)  # of the model that it began with
        return float((self.manifest.get("timesteps") or 0) - before) / seconds if seconds > 0 else float("nan")

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as far as it makes another experiment: dotted names, without seed, device and the like."""
        settings = dict(_flatten(self.manifest.get("config") or {}))
        if "init_from" in self.manifest:  # each seed begins with a file of its own, of one agent
            settings["init_from"] = self.manifest["init_from"]["agent"]
        return settings


@dataclass(frozen=True, eq=False)
class Row:
    """What belongs together in a table: the runs of one agent on one environment, of equal budget and settings."""

    agent: str
    label: str
    """The agent, with the settings that tell this row from the agent's other rows on this environment, and with the arguments
    of the environment that others there do not have."""
    env: str
    steps: int
    source: str
    """As `Run.source`."""
    runs: list[Run]
    """The finished runs by seed; if none has finished, those that have been evaluated at all."""
    left_out: list[Run]
    """The unfinished runs that are not among `runs`."""

    @property
    def task(self) -> tuple[str, int, str]:
        """Environment, budget and the environment's arguments: what rows must have alike to be compared."""
        world = _world(self.runs[0].settings) if self.runs else {}
        return self.env, self.steps, json.dumps(world, sort_keys=True, default=str)

    @property
    def finished(self) -> bool:
        """Whether `runs` are finished runs."""
        return any(run.finished for run in self.runs)

    @property
    def returns(self) -> FloatArray:
        """(R,) return of each run at its last evaluation, which for a finished run is that of the final policy."""
        return np.array([run.mean_reward[-1] for run in self.runs])

    @property
    def unseen_returns(self) -> FloatArray:
        """(R,) return of each run on unseen levels at its last evaluation, or (0,) if a run has none."""
        return np.array([run.unseen_reward[-1] for run in self.runs if len(run.unseen_reward)] or np.empty(0))

    @property
    def costs(self) -> FloatArray:
        """(R,) cost of each run at its last evaluation, or (0,) if a run has none."""
        costs = np.array([run.mean_cost[-1] for run in self.runs])
        return costs if np.isfinite(costs).all() else np.empty(0)

    @property
    def successes(self) -> FloatArray:
        """(R,) success rate of each run at its last evaluation, or (0,) if a run has none."""
        rates = np.array([run.success_rate[-1] for run in self.runs])
        return rates if np.isfinite(rates).all() else np.empty(0)


class _Curve(NamedTuple):
    rows: FloatArray
    """(T, 6) timesteps, mean_reward, mean_cost, episodes, unseen_mean_reward, success_rate; nan for the last four where
    unknown."""
    source: str


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs at or below the paths, each counted once, in the order in which they are found.

    A path is any of: a run folder (`manifest.json` with `evaluations.csv`), an exported run (`seed-<k>.csv` with
    `seed-<k>.json`), a folder of Stable-Baselines3's logger (`progress.csv`, or TensorBoard events as in `tb/PPO_1`),
    or a folder that holds any of these at any depth. Without a manifest, agent, environment and seed come from the
    names of the folders (`<env>/<agent>/seed-<k>` or `<env>/<agent>_<k>`), and the run counts as finished.

    Of several copies of a run (same environment, agent, seed, steps and settings) the finished and longest one stays,
    the first among equals: a run and its export count once.

    :raises RunError: if a path holds no run, or a file of a run is missing or damaged
    """
    copies: dict[str, list[Run]] = {}
    for path in map(Path, paths):
        places = list(_find(path))
        if not places:
            raise RunError(f"{path} holds no run: give a run folder, a folder of runs, or exported results.")
        for place in places:
            run = _read(place)
            identity = json.dumps([run.env, run.agent, run.seed, run.steps, run.settings], sort_keys=True, default=str)
            copies.setdefault(identity, []).append(run)
    return [max(runs, key=lambda run: (run.finished, run.reached)) for runs in copies.values()]


def group(runs: Iterable[Run]) -> list[Row]:
    """The rows of the tables: runs of different budgets, settings or kinds of returns are never mixed in one row."""
    alike: dict[tuple[str, str, int], list[Run]] = {}
    there: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.env, run.agent, run.steps, run.seed)):
        alike.setdefault((run.env, run.agent, run.steps), []).append(run)
        there.setdefault(run.env, []).append(run)
    worlds = {env: set(_varied(_world(run.settings) for run in of if run.manifest.get("config"))) for env, of in there.items()}
    return [row for (env, *_), members in alike.items() for row in _rows(members, worlds[env])]


def _rows(runs: Sequence[Run], worlds: set[str]) -> Iterator[Row]:
    """The rows of one agent on one environment under one budget; labels name the settings in which they differ.

    :param worlds: settings in which runs of other agents there differ
    """
    varied = sorted({*_varied(run.settings for run in runs if run.settings), *worlds})
    rows: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        marks = [f"{name.rpartition('.')[2]}={run.settings[name]}" for name in varied if name in run.settings]
        marks += ["training"] if run.source == "training" else []
        label = f"{run.agent} ({', '.join(marks)})" if marks else run.agent
        rows.setdefault((label, run.source), []).append(run)
    for (label, source), members in rows.items():
        evaluated = [run for run in members if len(run.timesteps)]
        usable = [run for run in evaluated if run.finished] or evaluated
        left_out = [run for run in members if run not in usable]
        yield Row(members[0].agent, label, members[0].env, members[0].steps, source, usable, left_out)


def _world(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the environment; a False says what is so without it."""
    return {k: v for k, v in settings.items() if k.startswith(ENV_KWARGS) and v is not False}


def _varied(known: Iterable[Mapping[str, Any]]) -> list[str]:
    """The settings that differ between those of several runs."""
    known = list(known)
    names = sorted({name for settings in known for name in settings})
    return [n for n in names if len({json.dumps(of.get(n), sort_keys=True, default=str) for of in known}) > 1]


def _find(path: Path) -> Iterator[Path]:
    """Run folders, and the CSV files of exported runs."""
    if path.is_file() and EXPORTED.fullmatch(path.name):
        yield path.with_suffix(".csv")
        return
    for folder, subfolders, files in os.walk(path):
        here = Path(folder)
        if {"manifest.json", "evaluations.csv", "progress.csv"} & set(files) or _has_events(files):
            subfolders.clear()  # a run's checkpoints have manifests of their own
            yield here
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (here / f"{stem}.csv" for stem in sorted({m[1] for m in map(EXPORTED.fullmatch, files) if m}))


def _read(place: Path) -> Run:
    """One run from its folder or its exported CSV."""
    if place.suffix == ".csv":
        manifest, curve = _read_manifest(place.with_suffix(".json")), _read_evaluations(place)
    else:
        manifest = _read_manifest(place / "manifest.json") if (place / "manifest.json").exists() else {}
        curve = _read_curve(place)
    agent, env, seed = _identity(manifest, place)
    _check(curve, place)
    last = np.diff(curve.rows[:, 0], append=np.inf) > 0  # of several evaluations at one step, the last
    timesteps, mean_reward, mean_cost, episodes, unseen, success_rate = curve.rows[last].T
    return Run(
        agent=agent,
        env=env,
        seed=seed,
        timesteps=timesteps.astype(np.int64),
        mean_reward=mean_reward,
        mean_cost=mean_cost,
        success_rate=success_rate,
        episodes=episodes,
        finished=manifest.get("status", "finished") == "finished",
        manifest=manifest,
        path=place,
        source=curve.source,
        unseen_reward=unseen if np.isfinite(unseen).all() else np.empty(0),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: it belongs beside {path.with_suffix('.csv').name}.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not readable JSON ({error}): restore it or remove the run.") from None
    missing = [key for key in ("agent", "env", "seed") if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise RunError(f"{path} does not name {', '.join(missing)}: it is not the manifest of a run.")
    return manifest


def _identity(manifest: Mapping[str, Any], place: Path) -> tuple[str, str, int]:
    """Agent, environment and seed, from the manifest or from the names of the folders."""
    if manifest:
        return str(manifest["agent"]), str(manifest["env"]), int(manifest["seed"])
    *_, grandparent, parent, name = ("", "", *place.absolute().parts)
    if seed := SEED_FOLDER.fullmatch(name):
        return parent, grandparent.replace("--", "/"), int(seed[1])
    if numbered := SB3_FOLDER.fullmatch(name):
        return numbered[1], parent.replace("--", "/"), int(numbered[2])
    return name, parent.replace("--", "/"), 0


def _read_curve(folder: Path) -> _Curve:
    """The best record in a run folder: its evaluations, else what SB3's logger wrote."""
    if (folder / "evaluations.csv").exists():
        curve = _read_evaluations(folder / "evaluations.csv")
        if len(curve.rows):
            return curve
    if (folder / "progress.csv").exists():
        return _read_progress(folder / "progress.csv")
    if _has_events(os.listdir(folder)):
        return _read_events(folder)
    return _Curve(np.empty((0, 6)), "evaluation")


def _read_evaluations(path: Path) -> _Curve:
    names = ("timesteps", "mean_reward", "mean_cost", "episodes", "unseen_mean_reward", "success_rate")
    columns = read_columns(path, names)
    for name in names[:2]:
        if name not in columns:
            raise RunError(f"{path} has no column {name}: it does not hold the evaluations of a run.")
    unknown = np.full_like(columns["timesteps"], np.nan)
    return _Curve(np.column_stack([columns.get(name, unknown) for name in names]), "evaluation")


def _read_progress(path: Path) -> _Curve:
    """SB3's progress.csv: every row fills only the columns that were logged at that moment."""
    columns = read_columns(path, ("time/total_timesteps", *(name for *names, _ in LOGGED for name in names)))
    timesteps = columns.pop("time/total_timesteps", np.empty(0))
    series = {}
    for name, column in columns.items() if len(timesteps) else ():
        logged = np.isfinite(timesteps) & np.isfinite(column)
        series[name] = dict(zip(timesteps[logged].tolist(), column[logged].tolist(), strict=True))
    return _logged_curve(series)


def _read_events(folder: Path) -> _Curve:
    """TensorBoard events, as SB3 writes them for `tensorboard_log`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow, and rarely needed

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    names = {name for *names, _ in LOGGED for name in names if name in tags}
    return _logged_curve({name: {event.step: event.value for event in events.Scalars(name)} for name in names})


def _logged_curve(series: Mapping[str, Mapping[float, float]]) -> _Curve:
    """The curve in SB3's log, given as values by step for each name; empty if no return was logged."""
    *names, source = next((names for names in LOGGED if series.get(names[0])), LOGGED[0])
    rewards, costs, successes = (series.get(name, {}) for name in names)
    unknown = np.nan
    rows = [(step, rewards[step], costs.get(step, unknown), unknown, unknown, successes.get(step, unknown))
            for step in sorted(rewards)]  # fmt: skip
    return _Curve(np.array(rows, dtype=np.float64).reshape(-1, 6), source)


def read_columns(path: Path, names: Container[str]) -> dict[str, FloatArray]:
    """The named columns as far as the file has them, nan where a cell is empty."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file, strict=True)) or [[]]
    except FileNotFoundError:
        raise RunError(f"{path} is missing: it belongs beside {path.with_suffix('.json').name}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path} is not readable CSV ({error}): restore it or remove the run.") from None
    wanted = [column for column, name in enumerate(header) if name in names]
    table = np.empty((len(rows), len(wanted)))
    for number, row in enumerate(rows):
        try:
            table[number] = [float(row[column] or "nan") for column in wanted]
        except (IndexError, ValueError):
            raise RunError(f"{path} is damaged in line {number + 2}: restore it or remove the run.") from None
    return dict(zip((header[column] for column in wanted), table.T, strict=True))


def _check(curve: _Curve, place: Path) -> None:
    if not np.isfinite(curve.rows[:, :2]).all():
        raise RunError(f"{place} has an evaluation whose timesteps or return is not finite: remove it.")
    if (np.diff(curve.rows[:, 0]) < 0).any():
        raise RunError(f"{place} has evaluations whose timesteps go back: two runs were written into one file.")


def _has_events(files: Iterable[str]) -> bool:
    return any("events.out.tfevents" in name for name in files)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in NOT_SETTINGS:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
