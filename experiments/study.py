"""A study: agents x envs x seeds from one YAML file, run by as many processes as there are cores, and never twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tether.envs.datasets import ogbench
from tether.envs.envpool_vec import available_cores

from .catalogue import OFFLINE, OFFLINE_TO_ONLINE, TAKE_DATASETS, canonical_name
from .diagnostics import export_diagnostics
from .errors import UsageError, nearest
from .interrupts import stoppable
from .manifest import write_json
from .presets import read_yaml
from .run_config import RunConfig
from .starting import sha256_of_model
from .train import check_environment


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1 and value == int(value)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_mapping_of_mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _is_datasets(value: Any) -> bool:
    def fits(one: Any) -> bool:
        return isinstance(one, str) or (isinstance(one, dict) and set(one) <= {"steps", "seed", "train_steps", "behaviours"})

    return isinstance(value, dict) and all(map(fits, value.values()))


# What each key of a study must be, in words and as a check.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a word", lambda value: isinstance(value, str)),
    "agents": ("a list of agents", _is_list_of(str)),
    "envs": ("a list of environment ids", _is_list_of(str)),
    "seeds": ("the number of seeds or a list of seeds", lambda value: _is_whole(value) or _is_list_of(int)(value)),
    "steps": ("a whole number above 0", _is_whole),
    "online_steps": ("a whole number above 0", _is_whole),
    "init_from": ("a path, in which {env}, {seed} and {agent} may stand", lambda value: isinstance(value, str)),
    "n_envs": ("a whole number above 0", _is_whole),
    "backend": ("a word", lambda value: isinstance(value, str)),
    "eval_every": ("a whole number above 0", _is_whole),
    "eval_episodes": ("a whole number above 0", _is_whole),
    "env_kwargs": ("a mapping of arguments of the environments", lambda value: isinstance(value, dict)),
    "datasets": ("a mapping of environments to files, or to what of `tether collect` to set", _is_datasets),
    "train_share": ("a number above 0, and 1 at most", lambda value: isinstance(value, float) and 0.0 < value <= 1.0),
    "hp": ("a mapping of agents to mappings of arguments", _is_mapping_of_mappings),
}
KEYS = tuple(KINDS)


@dataclass(frozen=True)
class Study:
    """A matrix of runs.

    :param name: of the folder below ``results/measured``
    :param seeds: how many, from 0, or the seeds themselves
    :param steps: of every run; where there are ``online_steps``, gradient steps on the data
    :param online_steps: env steps of the agents that go online, and all that those have that learn online alone; these then
        begin with the data, where they can
    :param init_from: path of the models that offline agents begin with
    :param datasets: environment -> file, or arguments of ``tether collect``, for offline agents; one of OGBench's serves all
        of its tasks
    :param train_share: of the datasets' episodes that agents learn from
    :param hp: agent -> constructor arguments that override its presets
    """

    name: str
    agents: tuple[str, ...]
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    n_envs: int | None = None
    backend: str = "auto"
    eval_every: int | None = None
    eval_episodes: int = 10
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    hp: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[str, Any] = field(default_factory=dict)
    train_share: float = 1.0
    online_steps: int = 0
    init_from: str | None = None

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read and check a study.

        :raises UsageError: naming the file and the key
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The study {path} cannot be read ({error}): name a YAML file.") from error
        data = read_yaml(text, f"The study {path}")
        if not isinstance(data, dict):
            raise UsageError(f"The study {path} must be a mapping with the keys {', '.join(KEYS[:5])}.")
        _check_keys(data, path)
        seeds = data["seeds"]
        agents = tuple(map(canonical_name, data["agents"]))
        overrides = {canonical_name(agent): arguments for agent, arguments in data.get("hp", {}).items()}
        for agent in overrides:
            if agent not in agents:
                raise UsageError(f"The study {path} has 'hp' for {agent}, which is not among its agents.")
        lists = {
            "agents": agents,
            "envs": tuple(data["envs"]),
            "seeds": tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
        }
        whole = {key: int(data.get(key, 0)) for key in ("steps", "online_steps")}
        return cls(**{"name": path.stem, **data, **lists, **whole, "hp": overrides})

    def jobs(self, runs: Path) -> Iterator[Job]:
        """All runs, seed by seed, so that an interrupted study is complete for its first seeds.

        :param runs: folder below which the study's own lies, with its run folders: two studies may train the same agent
        """
        for seed in self.seeds:
            for env in self.envs:
                for agent in self.agents:
                    yield Job(self, self._config(agent, env, seed, runs))

    def _config(self, agent: str, env: str, seed: int, runs: Path) -> RunConfig:
        offline = agent in OFFLINE
        with_data = offline or (agent in TAKE_DATASETS and self.online_steps > 0)
        return RunConfig(
            agent, env, self.steps if offline else self.online_steps or self.steps, seed, self.n_envs, self.backend,
            self.env_kwargs, self.hp.get(agent, {}), eval_every=self.eval_every, eval_episodes=self.eval_episodes,
            out=runs / self.name, dataset=str(self.dataset(env, runs)) if with_data else None,
            train_share=self.train_share if with_data else 1.0,
            online_steps=self.online_steps if agent in OFFLINE_TO_ONLINE else 0,
            init_from=self.init_from if offline else None,
        )  # fmt: skip

    def dataset(self, env: str, runs: Path) -> Path | str:
        """What offline agents learn from in an environment: the study's file, or where a collected one lies.

        :raises UsageError: if the study says nothing about it
        """
        wanted = self._wanted(env)
        if wanted is None:
            sentence = f"The study {self.name} has agents that learn from data, and 'datasets' says nothing about {env}."
            raise UsageError(sentence)
        if isinstance(wanted, str):
            return wanted
        from .behaviours import BEHAVIOURS, SCRIPTED, recipe

        name = _ogbench_name(env)
        content = [wanted] if name else [wanted, BEHAVIOURS, SCRIPTED, recipe(env, self.env_kwargs)]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        return runs / "datasets" / (f"{name}-{digest}.npz" if name else f"{env.replace('/', '--')}-{digest}.hdf5")

    def _wanted(self, env: str) -> Any:
        """What ``datasets`` says of an environment; those of OGBench may also be named by their data, without the task."""
        return self.datasets.get(env, self.datasets.get(_ogbench_name(env) or ""))

    def collect(self, runs: Path, envs: Iterable[str]) -> None:
        """Make the datasets of these environments that are to be collected and are not there."""
        from .collect import CollectConfig, collect

        for env in envs:
            wanted, path = self._wanted(env), Path(self.dataset(env, runs))
            if isinstance(wanted, dict) and not path.is_file():
                print(f"  collecting the dataset of {env}", flush=True)
                name = _ogbench_name(env)  # whose data take no arguments of the environment
                kwargs = {"env_kwargs": {} if name else self.env_kwargs, **wanted}
                kwargs["behaviours"] = tuple(kwargs.get("behaviours", ()))
                collect(CollectConfig(name or env, path, cache=runs / "behaviours", **kwargs), f"tether study, {self.name}")


def _ogbench_name(env: str) -> str | None:
    """The name of the data that belong to a task of OGBench; None for another suite's."""
    address = ogbench.address(env)
    return None if address is None else Path(address[0]).stem


def _check_keys(data: dict[str, Any], path: Path) -> None:
    for key, value in data.items():
        if key not in KEYS:
            raise UsageError(f"The study {path} has an unknown key '{key}'.{nearest(str(key), KEYS)}")
        words, fits = KINDS[key]
        if not fits(value):
            raise UsageError(f"In the study {path} '{key}' must be {words}, not {value!r}.")
    for key in ("agents", "envs", "seeds", "steps"):
        if key not in data:
            raise UsageError(f"The study {path} lacks '{key}'.")


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    study: Study
    config: RunConfig

    @property
    def label(self) -> str:
        """Short name for messages."""
        return f"{self.config.agent} {self.config.env} seed {self.config.seed}"

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.config.folder / "log.txt"

    def exported(self, measured: Path) -> Path:
        """The CSV that a finished run leaves in ``results/measured``."""
        return replace(self.config, out=measured / self.study.name).folder.with_suffix(".csv")

    def command(self) -> list[str]:
        """The ``tether train`` call, as words."""
        c = self.config
        words = ["train", c.agent, "--env", c.env, "--steps", str(c.steps), "--seed", str(c.seed)]
        words += ["--out", str(c.out), "--backend", c.backend, "--eval-episodes", str(c.eval_episodes)]
        words += ["--env-kwargs", *(f"{k}={_yaml_word(v)}" for k, v in c.env_kwargs.items())] if c.env_kwargs else []
        words += ["--online-steps", str(c.online_steps)] if c.online_steps else []
        words += ["--init-from", c.init_from] if c.init_from else []
        words += ["--n-envs", str(c.n_envs)] if c.n_envs else []
        words += ["--dataset", c.dataset] if c.dataset else []
        words += ["--train-share", str(c.train_share)] if c.train_share != 1.0 else []
        words += ["--eval-every", str(c.eval_every)] if c.eval_every else []
        return words + (["--hp", *(f"{k}={_yaml_word(v)}" for k, v in c.hp.items())] if c.hp else [])


def export(folder: Path, target: Path, study: str) -> None:
    """Copy a finished run's evaluations to ``target`` (a CSV), its manifest and diagnostics beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    export_diagnostics(folder, target)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_json(target.with_suffix(".json"), {**manifest, "study": study})
    for name, place in (("drift.csv", target.with_suffix(".drift.csv")), ("evaluations.csv", target)):
        if (folder / name).is_file():
            beside = place.with_name(f".{place.name}.new")
            shutil.copyfile(folder / name, beside)
            beside.replace(place)


def run_study(path: Path, *, engine: str = "local", jobs: int | None = None, runs: Path, measured: Path) -> int:
    """Run what is missing of a study; finished runs are exported at once and counted as done ever after.

    :param engine: "local"; "ray" is for more than one machine
    :param jobs: processes at a time (None: one per core)
    :return: number of runs that failed
    :raises UsageError: for a file that cannot be run
    """
    if engine == "ray":
        raise UsageError("The Ray engine is not part of this release: use --engine local, which takes every core.")
    study = Study.read(path)
    all_jobs = list(study.jobs(runs))
    todo = [job for job in all_jobs if not _is_done(job, measured)]
    for env in dict.fromkeys(job.config.env for job in todo):
        check_environment(next(job.config for job in todo if job.config.env == env))
    for job in todo:
        sha256_of_model(job.config.resolve()[0])
    study.collect(runs, dict.fromkeys(job.config.env for job in todo if job.config.dataset is not None))
    print(f"study {study.name}: {len(all_jobs)} runs, {len(all_jobs) - len(todo)} done before", flush=True)
    with stoppable():
        return _run_local(todo, jobs or available_cores(), measured)


def _is_done(job: Job, measured: Path) -> bool:
    """Whether a run was exported; what cannot be run, or was run with another budget, is said before anything runs."""
    config, _ = job.config.resolve()
    target = job.exported(measured)
    if not target.is_file():
        return False
    manifest = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
    source = (manifest.get("dataset") or {}).get("source")
    if config.dataset is not None and source != Path(config.dataset).name:
        raise UsageError(
            f"{target} learnt from {source}, the study now asks for {Path(config.dataset).name}: give the study another name, "
            "or delete that file."
        )
    was, asked = _budget(manifest.get("steps"), manifest.get("online_steps")), _budget(config.steps, config.online_steps)
    if was != asked:
        raise UsageError(
            f"{target} was run for {was}, the study now asks for {asked}: give the study another name, or delete that file."
        )
    return True


def _budget(steps: int | None, online_steps: int | None) -> str:
    return f"{steps or 0:,} steps" + (f" and {online_steps:,} online" if online_steps else "")


def _run_local(todo: list[Job], width: int, measured: Path) -> int:
    """Run the jobs, ``width`` at a time.

    :return: number of runs that failed
    """
    queue, slots, failed = list(todo), list(range(width)), 0
    running: dict[subprocess.Popen[bytes], tuple[Job, float, int]] = {}
    try:
        while queue or running:
            while queue and slots:
                job, slot = queue.pop(0), slots.pop(0)
                running[_start(job, slot if width <= available_cores() else None)] = (job, time.monotonic(), slot)
                print(f"  started   {job.label}", flush=True)
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, begun, slot = running.pop(process)
                slots.append(slot)
                if process.returncode == 0:
                    export(job.config.folder, job.exported(measured), job.study.name)
                    print(f"  finished  {job.label} in {time.monotonic() - begun:.0f} s", flush=True)
                else:
                    failed += 1
                    print(f"  FAILED    {job.label} (exit code {process.returncode}); its log: {job.log}", flush=True)
    except KeyboardInterrupt:
        print(f"  stopping  {len(running)} runs, which save themselves; the same command goes on", flush=True)
        raise
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def _start(job: Job, core: int | None) -> subprocess.Popen[bytes]:
    """Start a run; ``core`` is the one it keeps to, so that neighbours do not take turns on each other's."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # One thread each: as many processes as cores, so a second thread would only take from a neighbour.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(job.log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tether", *job.command()],
            stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {sorted(os.sched_getaffinity(0))[core]})
    return process


def _yaml_word(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
