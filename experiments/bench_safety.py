"""What safety costs: the finite guard as a share of training, a checkpoint as a share of the minute between two."""

from __future__ import annotations

import inspect
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .catalogue import OFFLINE, OURS, agent_class
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import table
from .presets import build_arguments, merge, preset

ENV = "HalfCheetah-v5"
INTERVAL = 60.0  # seconds between checkpoints
FULL = 1_000_000  # transitions of a replay buffer


def safety(out: Path | None, rounds: int, seconds: float, command: str) -> str:
    """Measure every agent of ours with its preset on :data:`ENV`, one torch thread.

    :param out: folder for ``safety.md`` and ``safety.json``
    :param rounds: in each an agent trains with the guard and without it, for about ``seconds`` each; then it is saved
    :param command: for the head of the table
    :return: the table
    """
    import torch as th

    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        rows = [_measure(name, rounds, seconds) for name in OURS if name not in OFFLINE]
    finally:
        th.set_num_threads(before)
    made = {"command": command, "hardware": hardware(), "versions": versions(), **git_revision()}
    text = _markdown(rows, made)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "safety.json", {**made, "agents": rows})
        write_atomically(out / "safety.md", text)
    return text


def _measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    model = _make(name)
    model.learn(max(600, 2 * _chunk(model)))
    begun = time.perf_counter()
    model.learn(_chunk(model), reset_num_timesteps=False)
    chunks = max(1, round(seconds / (time.perf_counter() - begun)))
    guarded: list[float] = []
    bare: list[float] = []
    saves: list[float] = []
    with TemporaryDirectory() as folder:
        if hasattr(model, "replay_buffer"):
            _fill(model.replay_buffer)
        model.save_checkpoint(folder)  # the first one writes all that a replay buffer holds
        for turn in range(rounds):
            for with_guard in (turn % 2 == 0, turn % 2 == 1):
                rates = guarded if with_guard else bare
                rates.append(_rate(model, chunks * _chunk(model), with_guard))
            begun = time.perf_counter()
            model.save_checkpoint(folder)
            saves.append(time.perf_counter() - begun)
    looking = _seconds_of_looking(model)
    model.get_env().close()
    return {
        "agent": name, "with the guard": guarded, "without": bare, "seconds to save": saves,
        "seconds of looking per env step": looking,
    }  # fmt: skip


def _chunk(model: Any) -> int:
    """Steps that make whole iterations."""
    return model.n_steps * model.n_envs if hasattr(model, "rollout") else 50


def _make(name: str) -> Any:
    from tether.envs import make_vec

    arguments = preset(name, ENV)
    if "buffer_size" in inspect.signature(agent_class(name).__init__).parameters:
        arguments = merge(arguments, {"learning_starts": 500, "buffer_size": FULL})
    env = make_vec(ENV, arguments.get("n_envs", 1), seed=0, halves=True)
    return agent_class(name)("MlpPolicy", env, seed=0, device="cpu", **build_arguments(name, arguments))


def _fill(buffer: Any) -> None:
    """Transitions in every row: what a checkpoint of a long training has to look after."""
    random = np.random.default_rng(0)
    for name in ("observations", "next_observations", "actions", "rewards"):
        array = getattr(buffer, name)
        array[...] = random.standard_normal(array.shape, dtype=np.float32)
    buffer.full = True


def _rate(model: Any, steps: int, guard: bool) -> float:
    with _as_it_is() if guard else _without_guard():
        begun, before = time.perf_counter(), model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)
        return (model.num_timesteps - before) / (time.perf_counter() - begun)


def _seconds_of_looking(model: Any) -> float:
    """Per env step: how often each check is called, times what a call takes by itself, the gradient's norm included."""
    calls: dict[int, list[Any]] = {}

    def counting(function: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any) -> None:
            kind = [0, function, args]
            calls.setdefault(hash((function, *(isinstance(a, str) and a for a in args))), kind)[0] += 1
            return function(*args)

        return counted

    before = model.num_timesteps
    with _patched(counting):
        model.learn(2 * _chunk(model), reset_num_timesteps=False)
    spent = sum(count * _seconds_of(function, args) for count, function, args in calls.values())
    return spent / (model.num_timesteps - before)


def _seconds_of(function: Callable[..., None], args: tuple[Any, ...]) -> float:
    import torch as th

    gradients = [p.grad for _, p in args[4] if p.grad is not None] if function.__name__ == "check_step" else []
    if gradients and isinstance(args[4], list):  # an on-policy update has them in one vector
        gradients = [th.cat([gradient.flatten() for gradient in gradients])]

    def look() -> None:
        if len(gradients) == 1:
            gradients[0].norm()
        elif gradients:
            th.nn.utils.get_total_norm(gradients)
        function(*args)

    return min(timeit.repeat(look, number=300, repeat=5)) / 300


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _without_guard() -> AbstractContextManager[None]:
    """Inside the block nothing looks whether numbers are finite."""
    return _patched(lambda _: lambda *args: None)


@contextmanager
def _patched(change: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Inside the block the checks are what ``change`` makes of them."""
    from tether.agents.common import off_policy, on_policy, updates

    places = [(on_policy, "check_finite"), (off_policy, "check_finite"), (off_policy, "check_step"), (updates, "check_step")]
    former: list[Callable[..., None]] = [getattr(module, name) for module, name in places]
    for (module, name), function in zip(places, former, strict=True):
        setattr(module, name, change(function))
    try:
        yield
    finally:
        for (module, name), function in zip(places, former, strict=True):
            setattr(module, name, function)


def _markdown(rows: list[dict[str, Any]], made: dict[str, Any]) -> str:
    machine = made["hardware"]
    lines = [
        "# What safety costs",
        "",
        f"`{made['command']}` on {machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; {ENV}, presets,",
        "one torch thread. *guard, counted*: calls of the checks times what one takes by itself, the norm of the gradient",
        "included although most agents clip by it. *guard, raced*: how much slower a round with the guard is than the one",
        "beside it without; median and quartiles, which show the machine's noise. *checkpoint*: median time to save, slowest",
        f"in brackets, and its share of {INTERVAL:.0f} s. The replay buffer of OffPolicyMDPO is full, {FULL:,} transitions,",
        "and every row is looked at, because each round is a call of `learn` of its own.",
        "",
    ]
    header = ["agent", "guard, counted, %", "guard, raced, %", "checkpoint, ms", "% of training time"]
    body = []
    for row in rows:
        cost = 100.0 * (np.array(row["without"]) / np.array(row["with the guard"]) - 1.0)
        low, middle, high = np.percentile(cost, [25, 50, 75])
        save = 1e3 * np.array(row["seconds to save"])
        counted = 100 * row["seconds of looking per env step"] * np.median(row["with the guard"])
        raced, saving = f"{middle:.1f} [{low:.1f}, {high:.1f}]", f"{np.median(save):.0f} [{save.max():.0f}]"
        body.append([row["agent"], f"{counted:.2f}", raced, saving, f"{np.median(save) / INTERVAL / 10:.2f}"])
    return "\n".join([*lines, *table(header, body)]) + "\n"
