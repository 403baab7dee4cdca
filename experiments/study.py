"""A study: agents x envs x seeds from one YAML file, run by as many processes as there are cores, and never twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.envs.envpool_vec import available_cores

from .catalogue import canonical_name
from .errors import UsageError, nearest
from .manifest import write_json
from .presets import check_arguments, merge, preset, read_yaml

KEYS = ("name", "agents", "envs", "seeds", "steps", "n_envs", "backend", "eval_every", "eval_episodes", "hp")


@dataclass(frozen=True)
class Study:
    """A matrix of runs.

    :param name: of the folder below ``results/measured``
    :param seeds: how many, from 0, or the seeds themselves
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
    hp: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        for key in data:
            if key not in KEYS:
                raise UsageError(f"The study {path} has an unknown key '{key}'.{nearest(str(key), KEYS)}")
        for key in ("agents", "envs", "seeds", "steps"):
            if not data.get(key):
                raise UsageError(f"The study {path} lacks '{key}'.")
        seeds = data["seeds"]
        return cls(
            **{
                **data,
                "name": str(data.get("name", path.stem)),
                "agents": tuple(canonical_name(str(a)) for a in data["agents"]),
                "envs": tuple(map(str, data["envs"])),
                "seeds": tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
                "steps": int(data["steps"]),
                "hp": data.get("hp") or {},
            }
        )

    def jobs(self) -> Iterator[Job]:
        """All runs, seed by seed, so that an interrupted study is complete for its first seeds."""
        for seed in self.seeds:
            for env in self.envs:
                for agent in self.agents:
                    yield Job(self, agent, env, seed)

    def check(self) -> None:
        """Check every agent's arguments before anything runs."""
        for agent in self.agents:
            for env in self.envs:
                check_arguments(agent, merge(preset(agent, env), self.hp.get(agent, {})))


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    study: Study
    agent: str
    env: str
    seed: int

    @property
    def label(self) -> str:
        """Short name for messages."""
        return f"{self.agent} {self.env} seed {self.seed}"

    def exported(self, measured: Path) -> Path:
        """The CSV that a finished run leaves in ``results/measured``."""
        return measured / self.study.name / self.env.replace("/", "--") / self.agent / f"seed-{self.seed}.csv"

    def command(self, runs: Path) -> list[str]:
        """The ``tether train`` call, as words."""
        s = self.study
        words = ["train", self.agent, "--env", self.env, "--steps", str(s.steps), "--seed", str(self.seed)]
        words += ["--out", str(runs), "--backend", s.backend, "--eval-episodes", str(s.eval_episodes)]
        words += ["--n-envs", str(s.n_envs)] if s.n_envs else []
        words += ["--eval-every", str(s.eval_every)] if s.eval_every else []
        if self.study.hp.get(self.agent):
            words += ["--hp", *(f"{k}={_yaml_word(v)}" for k, v in self.study.hp[self.agent].items())]
        return words


def export(folder: Path, target: Path, study: str) -> None:
    """Copy a finished run's evaluations and manifest to ``target`` (a CSV) and the JSON beside it."""
    import json

    target.parent.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    write_json(target.with_suffix(".json"), {**manifest, "study": study})
    beside = target.with_name(f".{target.name}.new")
    shutil.copyfile(folder / "evaluations.csv", beside)
    beside.replace(target)


def run_study(path: Path, *, engine: str = "local", jobs: int | None = None, runs: Path, measured: Path) -> int:
    """Run what is missing of a study; finished runs are exported at once and counted as done ever after.

    :param engine: "local"; "ray" is for more than one machine
    :param jobs: processes at a time (None: one per core)
    :return: number of runs that failed
    :raises UsageError: for a file that cannot be run
    """
    if engine == "ray":
        raise UsageError("The Ray engine is not part of this release: use --engine local, which takes every core of this machine.")
    study = Study.read(path)
    study.check()
    todo = [job for job in study.jobs() if not job.exported(measured).is_file()]
    total = len(list(study.jobs()))
    print(f"study {study.name}: {total} runs, {total - len(todo)} done before", flush=True)
    return _run_local(todo, jobs or available_cores(), runs, measured)


def _run_local(todo: list[Job], width: int, runs: Path, measured: Path) -> int:
    queue, slots, failed = list(todo), list(range(width)), 0
    running: dict[subprocess.Popen[bytes], tuple[Job, float, int]] = {}
    try:
        while queue or running:
            while queue and slots:
                job, slot = queue.pop(0), slots.pop(0)
                running[_start(job, runs, slot if width <= available_cores() else None)] = (job, time.monotonic(), slot)
                print(f"  started   {job.label}", flush=True)
            time.sleep(0.5)
            for process in [p for p in running if p.poll() is not None]:
                job, begun, slot = running.pop(process)
                slots.append(slot)
                if process.returncode == 0:
                    folder = runs / job.env.replace("/", "--") / job.agent / f"seed-{job.seed}"
                    export(folder, job.exported(measured), job.study.name)
                    print(f"  finished  {job.label} in {time.monotonic() - begun:.0f} s", flush=True)
                else:
                    failed += 1
                    print(f"  FAILED    {job.label} (exit code {process.returncode}); its log: {_log(job, runs)}", flush=True)
    finally:
        for process in running:  # Ctrl-C: the runs save themselves, then the study ends
            process.send_signal(2)
        for process in running:
            process.wait()
    return failed


def _start(job: Job, runs: Path, core: int | None) -> subprocess.Popen[bytes]:
    """Start a run; ``core`` is the one it keeps to, so that neighbours do not take turns on each other's."""
    log = _log(job, runs)
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread each: as many processes as cores, so a second thread would only take from a neighbour.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tether", *job.command(runs)],
            stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {sorted(os.sched_getaffinity(0))[core]})
    return process


def _log(job: Job, runs: Path) -> Path:
    return runs / job.env.replace("/", "--") / job.agent / f"seed-{job.seed}" / "log.txt"


def _yaml_word(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")
