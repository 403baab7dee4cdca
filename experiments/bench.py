"""Speed of on-policy training: ours and its peers in one process, in turns, because absolute times drift.

Every contestant is one way of training (agent, hyperparameters, backend). What is compared is the ratio within a round.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError, nearest
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import spread, table
from .presets import build_arguments, preset

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

ENVS = ("HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "dm_control/cheetah-run-v0", "CartPole-v1")
# SB3's defaults but for the batch: what a user who cares for speed gives every PPO.
EQUAL = {"n_steps": 256, "batch_size": 512, "n_epochs": 10}
ENVS_PER_AGENT = 8
LIMIT_ENVS = 16
REFERENCES = ("SB3 PPO", "SB3 PPO, DummyVecEnv", "SB3 PPO, defaults")


@dataclass
class _Contestant:
    """A way of training, and what was measured of it, round by round."""

    name: str
    settings: str
    make: Callable[[str], BaseAlgorithm]
    model: Any = None
    rates: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def measure(self, seconds: float) -> None:
        """Train for about that long; env steps per second, and where each microsecond went."""
        model, clock = self.model, dict.fromkeys(("env", "update"), 0.0)
        rollout = model.n_steps * model.n_envs
        target, before = max(1, round(seconds * self.speed / rollout)) * rollout, model.num_timesteps
        begun = time.perf_counter()
        with _timed(model, clock):
            model.learn(target, reset_num_timesteps=False)
        spent, steps = time.perf_counter() - begun, model.num_timesteps - before
        self.rates.append(steps / spent)
        clock["policy"] = spent - sum(clock.values())
        self.shares.append({part: 1e6 * took / steps for part, took in clock.items()})

    def warm_up(self, env_id: str) -> None:
        """Build it and train for two rollouts; the second tells how fast it is."""
        self.model = self.make(env_id)
        rollout = self.model.n_steps * self.model.n_envs
        self.model.learn(rollout)
        begun = time.perf_counter()
        self.model.learn(rollout, reset_num_timesteps=False)
        self.speed = rollout / (time.perf_counter() - begun)


def contestants() -> list[_Contestant]:
    """All that can run with what is installed; SBX's PPO joins where ``sbx-rl`` is."""
    import stable_baselines3 as sb3

    from tether import agents

    equal = f"{ENVS_PER_AGENT} envs x 256, batch 512, 10 epochs"
    found = [
        _Contestant("MDPO", "its defaults: 16 envs x 128", _preset(agents.MDPO, "MDPO", halves=True)),
        _Contestant("BPO", equal, _equal(agents.BPO)),
        _Contestant("R2VPO", equal, _equal(agents.R2VPO)),
        _Contestant("PPO", equal, _equal(agents.PPO)),
        _Contestant("PPO, compiled", equal, _equal(agents.PPO, compile_loss=True)),
        _Contestant("BPO, compiled", equal, _equal(agents.BPO, compile_loss=True)),
        _Contestant("SB3 PPO", equal, _equal(sb3.PPO, halves=False)),
        _Contestant("SB3 PPO, DummyVecEnv", equal, _equal(sb3.PPO, "dummy", halves=False)),
        _Contestant("SB3 PPO, defaults", "1 env x 2048, batch 64, 10 epochs", _defaults(sb3.PPO)),
        _Contestant("TRPO", "sb3-contrib with RL-Zoo's values", _trpo()),
    ]
    try:
        from sbx import PPO as SBXPPO
    except ModuleNotFoundError:
        return found
    return [*found, _Contestant("SBX PPO", equal, _equal(SBXPPO, halves=False))]


def _vec(env_id: str, n_envs: int, **kwargs: Any) -> VecEnv:
    from tether.envs import make_vec

    return make_vec(env_id, n_envs, seed=0, **kwargs)


def _equal(cls: Any, backend: str = "auto", halves: bool = True, **kwargs: Any) -> Callable[[str], BaseAlgorithm]:
    def make(env_id: str) -> BaseAlgorithm:
        env = _vec(env_id, ENVS_PER_AGENT, backend=backend, halves=halves)
        return cls("MlpPolicy", env, seed=0, device="cpu", **EQUAL, **kwargs)

    return make


def _defaults(cls: Any) -> Callable[[str], BaseAlgorithm]:
    return lambda env_id: cls("MlpPolicy", _vec(env_id, 1), seed=0, device="cpu")


def _preset(cls: Any, name: str, **kwargs: Any) -> Callable[[str], BaseAlgorithm]:
    def make(env_id: str) -> BaseAlgorithm:
        arguments = preset(name, env_id)
        normalize = {"normalize": True} if arguments.get("normalize") else {}
        env = _vec(env_id, arguments.get("n_envs", 1), **kwargs, **normalize)
        return cls("MlpPolicy", env, seed=0, device="cpu", **build_arguments(name, arguments))

    return make


def _trpo() -> Callable[[str], BaseAlgorithm]:
    from sb3_contrib import TRPO

    return _preset(TRPO, "TRPO")


@contextmanager
def _timed(model: Any, clock: dict[str, float]) -> Iterator[None]:
    """Add the time spent in the environments (sending and waiting) and in ``train`` to the clock."""
    env = model.get_env()
    parts = env.halves if hasattr(type(env), "halves") else [env]
    watched = [(part, name, "env") for part in parts for name in ("step_async", "step_wait")]
    watched.append((model, "train", "update"))

    def timed(function: Callable[..., Any], key: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock[key] += time.perf_counter() - begun

        return run

    for owner, name, key in watched:
        setattr(owner, name, timed(getattr(owner, name), key))
    try:
        yield
    finally:
        for owner, name, _ in watched:
            delattr(owner, name)


class _Physics:
    """The rate of the environments alone: random actions drawn beforehand, nothing done with what comes back."""

    def __init__(self, env_id: str) -> None:
        self.env = _vec(env_id, LIMIT_ENVS)
        self.env.reset()
        self.env.action_space.seed(0)
        drawn = [self.env.action_space.sample() for _ in range(LIMIT_ENVS * 256)]
        self.actions = itertools.cycle(np.stack(drawn).reshape(256, LIMIT_ENVS, *self.env.action_space.shape))  # type: ignore[misc]
        self.rates: list[float] = []

    def measure(self, seconds: float) -> None:
        """Step for about that long."""
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            self.env.step(next(self.actions))
            steps += LIMIT_ENVS
        self.rates.append(steps / (time.perf_counter() - begun))


def on_policy(
    envs: list[str] | None = None,
    out: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 3.0,
    command: str = "tether bench on-policy",
) -> str:
    """Measure every contestant on every environment, one torch thread each.

    With networks of this size SB3's PPO is no faster with more threads, and on a busy machine far slower.

    :param envs: environment ids; None: :data:`ENVS`
    :param out: folder for ``on-policy.md`` and ``on-policy.json``, written after each environment, beside what they hold
        of others
    :param only: names of contestants; None: all
    :param rounds: each trains once a round, for about ``seconds``
    :param command: for the head of the table
    :return: the table
    :raises UsageError: for a contestant that is not known
    """
    import torch as th

    chosen = list(only or [])
    known = [one.name for one in contestants()]
    for name in chosen:
        if name not in known:
            raise UsageError(f"There is no contestant '{name}'.{nearest(name, known)} They are: {'; '.join(known)}.")
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        results = _results_of(out)
        for env_id in envs or ENVS:
            racers = [one for one in contestants() if not chosen or one.name in chosen]
            result = _race(env_id, racers, rounds, seconds)
            made = {"command": command, "hardware": hardware(), "versions": versions(), **git_revision()}
            results = [other for other in results if other["env"] != env_id] + [{**result, **made}]
            text = _markdown(results)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / "on-policy.json", results)
                write_atomically(out / "on-policy.md", text)
    finally:
        th.set_num_threads(before)
    return text


def _results_of(out: Path | None) -> list[dict[str, Any]]:
    """What an earlier command left in the folder: its environments stay in the table until they are measured again."""
    path = out and out / "on-policy.json"
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else []


def _race(env_id: str, racers: list[_Contestant], rounds: int, seconds: float) -> dict[str, Any]:
    physics = _Physics(env_id)
    for one in racers:
        one.warm_up(env_id)
    for _ in range(rounds):
        physics.measure(seconds / 3)
        for one in racers:
            one.measure(seconds)
    physics.env.close()
    for one in racers:
        one.model.get_env().close()
    rows = {
        one.name: {"settings": one.settings, "env steps/s": one.rates, "us per env step": one.shares} for one in racers
    }
    return {"env": env_id, "random actions/s": physics.rates, "contestants": rows}


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Training speed of the on-policy agents",
        "",
        "Medians over rounds, ranges in brackets. In a round all train in turns, one torch thread each; ratios are medians of",
        "the ratios within a round. *env*: sending actions and waiting for the environments; *update*: `train`; *policy*: all",
        f"else. *of the limit*: against random actions on {LIMIT_ENVS} environments of the fastest backend, on which SB3's",
        "agents run too where no other is named.",
    ]
    for result in results:
        machine, rounds = result["hardware"], len(result["random actions/s"])
        where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
        lines += ["", f"## {result['env']}", "", f"`{result['command']}` on {where}; {rounds} rounds.", "", *_table(result)]
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any]) -> list[str]:
    limit, rows = np.array(result["random actions/s"]), result["contestants"]
    rates = {name: np.array(row["env steps/s"]) for name, row in rows.items()}
    references = [name for name in REFERENCES if name in rates]
    head = ["agent", "settings", "env steps/s", "env µs", "policy µs", "update µs", "of the limit"]
    head += [f"of {reference}" for reference in references]
    lines = [f"Random actions: {np.median(limit):,.0f} env steps/s [{limit.min():,.0f}, {limit.max():,.0f}].", ""]
    body = []
    for name, rate in rates.items():
        shares = [np.median([share[part] for share in rows[name]["us per env step"]]) for part in ("env", "policy", "update")]
        cells = [
            name, rows[name]["settings"], spread(rate),
            *(f"{share:.0f}" for share in shares), f"{np.median(rate / limit):.2f}",
            *(f"{np.median(rate / rates[reference]):.2f}" for reference in references),
        ]  # fmt: skip
        body.append(cells)
    return [*lines, *table(head, body)]
