"""Speed of the flow policies' training and acting: FQL beside its authors' JAX code, FMQ and its rivals beside FQL.

The sizes are those of OGBench's cube-single. The authors' code (packages ``agents`` and ``utils``, with JAX) joins where its
folder is given.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import UsageError
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import table
from .racing import Contestant, Run, random_data, rate_cells, require_known

OBS, ACT, ROWS, HORIZON = 28, 5, 50_000, 5
SEEDS = 5
ACTING = "acting"
ACTING_NET = (512, 512, 512, 512)
BATCHES = (1, 16, 256)
PREDICTIONS = 0.2  # seconds of them a round, at least one
PLAIN, EULER, BEST, BEST_EULER = "FMQ, plain", "QC, plain, FMQ's network", "FMQ, best of 32", "QC, best of 32"
AIMS = {  # least calls of the network against most: what the ratio is asked to be at most
    (PLAIN, EULER): "1/8",
    (BEST, BEST_EULER): "1/3",
}


class Size(NamedTuple):
    """Hidden units, rows of a batch, and N of best-of-N."""

    net_arch: tuple[int, ...]
    batch: int
    candidates: int

    def __str__(self) -> str:
        return f"{len(self.net_arch)}x{self.net_arch[0]}, batch {self.batch}"


SIZES = (Size((512,) * 4, 256, 32), Size((256,) * 2, 128, 8))


def flow(
    out: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 3.0,
    command: str = "tether bench flow",
    authors: Path | None = None,
) -> str:
    """Measure updates per second of every method on the CPU, and milliseconds of ``predict`` on one core.

    :param out: folder for ``flow.md`` and ``flow.json``
    :param only: groups of the table ("FQL, 4x512, batch 256, one action"), or "acting"; None: all
    :param rounds: each trains once a round, for about ``seconds``
    :param command: for the head of the table
    :param authors: folder of the FQL authors' code
    :return: the table
    :raises UsageError: for a group that is not known, or a folder from which the authors' code cannot be imported
    """
    import torch as th

    load = os.getloadavg()[0]
    racers = contestants(authors)
    require_known(only, [*(one.group for one in racers), ACTING])
    racers = [one for one in racers if not only or one.group in only]
    for one in racers:
        one.warm_up(seconds)
    for _ in range(rounds):
        for one in racers:
            one.measure()
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "threads": th.get_num_threads(),
        "rounds": rounds, "load_before": load,
        "contestants": [{"method": o.group, "name": o.name, "agents": o.agents, "updates/s": o.rates} for o in racers],
        "acting": _acting(rounds) if not only or ACTING in only else {},
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "flow.json", result)
        write_atomically(out / "flow.md", text)
    return text


# ---------------------------------------------------------------------- training


def contestants(authors: Path | None) -> list[Contestant]:
    """All that train; the first of a group is what the others are compared with."""
    from tether.agents import FMQ, FQL, MVP, QC

    theirs = None if authors is None else _authors_fql(authors)
    found = []
    for size in SIZES:
        group = f"FQL, {size}, one action"
        if theirs is not None:
            found.append(Contestant(group, "authors' JAX", theirs(size)))
        found.append(Contestant(group, "Tether", _ours(FQL, size, horizon=1)))
    for size in SIZES:
        one: dict[str, Any] = {"target_candidates": 1}
        best: dict[str, Any] = {"policy_kwargs": {"n_candidates": size.candidates}}
        makers = {
            "FQL": _ours(FQL, size),
            "FMQ online, targets of one sample": _ours(FMQ, size, online=True, **one),
            f"FMQ online, targets of the best of {size.candidates}": _ours(FMQ, size, online=True, **best),
            "FMQ offline, targets of one sample": _ours(FMQ, size, **one),
            f"MVP online, the best of {size.candidates}": _ours(MVP, size, online=True, **best),
            f"QC offline, targets of the best of {size.candidates}": _ours(QC, size, **best),
        }
        group = f"chunks of {HORIZON}, {size}"
        found += [Contestant(group, name, make) for name, make in makers.items()]
        found += [
            Contestant(group, f"FQL, {SEEDS} seeds at once", _ours(FQL, size, seeds=SEEDS), SEEDS),
            Contestant(group, f"FMQ offline, {SEEDS} seeds at once", _ours(FMQ, size, seeds=SEEDS, **one), SEEDS),
        ]
    return found


def _data() -> dict[str, np.ndarray]:
    return random_data(ROWS, OBS, ACT)


def _ours(cls: Any, size: Size, online: bool = False, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Maker of the gradient steps of an agent, as its training takes them.

    :param online: those of the online phase, on a replay memory that the dataset fills
    """

    def make() -> Run:
        networks = {"net_arch": size.net_arch, **(policy_kwargs or {})}
        agent = cls(seed=0, device="cpu", batch_size=size.batch, policy_kwargs=networks, **kwargs).learn_offline(_data(), 1)
        if online:
            agent.begin_online()

        def run(n: int) -> None:
            with agent._torch_threads(size.batch):
                for _ in range(n):
                    agent._improve(1)

        return run

    return make


def _authors_fql(folder: Path) -> Callable[[Size], Callable[[], Run]]:
    """Maker of the authors' FQL at our sizes.

    :raises UsageError: if it cannot be imported from there
    """
    sys.path.insert(0, str(folder))
    try:
        import jax

        fql: Any = import_module("agents.fql")
    except ImportError as error:
        raise UsageError(f"The FQL authors' code cannot be imported from {folder}: {error}.") from None
    finally:
        sys.path.remove(str(folder))

    def at(size: Size) -> Callable[[], Run]:
        def make() -> Run:
            data, rng = _data(), np.random.default_rng(0)
            arrays = {name: data[name] for name in ("observations", "next_observations", "actions", "rewards")}
            arrays["masks"] = 1.0 - data["terminals"].astype(np.float32)
            config = fql.get_config()
            config.update(batch_size=size.batch, actor_hidden_dims=size.net_arch, value_hidden_dims=size.net_arch)
            state = [fql.FQLAgent.create(0, arrays["observations"][:1], arrays["actions"][:1], config)]

            def run(n: int) -> None:
                for _ in range(n):
                    rows = rng.integers(ROWS, size=size.batch)
                    state[0], _info = state[0].update({name: values[rows] for name, values in arrays.items()})
                jax.block_until_ready(state[0].network.params)

            return run

        return make

    return at


# ---------------------------------------------------------------------- acting


def _acting(rounds: int) -> dict[str, dict[str, Any]]:
    """Calls of the network for a chunk, and milliseconds of ``predict`` for every batch, of each way to act."""
    import torch as th

    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        policies = dict(_policies())
        times: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in BATCHES} for name in policies}
        for n in BATCHES:
            counts = {name: max(1, int(PREDICTIONS / _seconds(policy, n, 1))) for name, policy in policies.items()}
            for _ in range(rounds):
                for name, policy in policies.items():
                    times[name][str(n)].append(1e3 * _seconds(policy, n, counts[name]))
    finally:
        th.set_num_threads(before)
    return {name: {"calls": _calls(policy), "ms": times[name]} for name, policy in policies.items()}


def _policies() -> Iterator[tuple[str, Any]]:
    from tether.agents import FMQ, FQL, MVP, QC

    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        PLAIN: (FMQ, {"inference": "plain"}),
        EULER: (QC, {"inference": "plain", "fourier": True}),
        "QC, plain": (QC, {"inference": "plain"}),
        "FQL": (FQL, {}),
        BEST: (FMQ, {}),
        "MVP, best of 32": (MVP, {}),
        "FMQ, QGBS (M 4, K 1, B 4)": (FMQ, {"inference": "qgbs", "search": {"beams": 4, "levels": 1, "branches": 4}}),
        BEST_EULER: (QC, {}),
    }
    data = _data()
    for name, (cls, kwargs) in ways.items():
        agent = cls(seed=0, device="cpu", batch_size=2, policy_kwargs={"net_arch": ACTING_NET, **kwargs})
        yield name, agent.learn_offline(data, 1).policy


def _seconds(policy: Any, n: int, count: int) -> float:
    """Of one ``predict`` for n observations; a single one comes without its axis, as from an environment."""
    observations = np.zeros(OBS, np.float32) if n == 1 else np.zeros((n, OBS), np.float32)
    begun = time.perf_counter()
    for _ in range(count):
        policy.predict(observations)
    return (time.perf_counter() - begun) / count


def _calls(policy: Any) -> int:
    """Rows that the actor's network is evaluated for, for a chunk."""
    before = policy.network_calls
    policy.predict(np.zeros(OBS, np.float32))
    return policy.network_calls - before


# ---------------------------------------------------------------------- the report


def _markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    lines = [
        "# Speed of the flow policies",
        "",
        f"`{result['command']}` on {machine['cpu']}, {machine['cores']} cores, whose load was",
        f"{result['load_before']:.2f} before; {result['rounds']} rounds, in one process and in turns; random data with the",
        f"sizes of cube-single ({OBS} observations, {ACT} actions).",
    ]
    if result["contestants"]:
        lines += [
            "",
            f"Updates per second of all agents together on the CPU, {result['threads']} torch threads: medians over rounds,",
            "ranges in brackets; ratios are those within a round.",
            "",
            *table(["method", "who", "updates/s", "of the first"], list(_rates(result["contestants"]))),
        ]
    if result["acting"]:
        lines += ["", *_times_to_act(result["acting"])]
    return "\n".join(lines) + "\n"


def _rates(contestants: list[dict[str, Any]]) -> Iterator[list[str]]:
    firsts: dict[str, np.ndarray] = {}
    for one in contestants:
        rates = np.array(one["updates/s"])
        yield [one["method"], one["name"], *rate_cells(rates, firsts.setdefault(one["method"], rates))]


def _times_to_act(acting: dict[str, dict[str, Any]]) -> Iterator[str]:
    size = f"{len(ACTING_NET)}x{ACTING_NET[0]}"
    yield f"Milliseconds of `predict` on one core, {size}, with a new chunk of {HORIZON} actions every time: medians over"
    yield "rounds, ranges in brackets. Calls are evaluations of the actor's network for a chunk."
    yield ""
    batches = next(iter(acting.values()))["ms"]
    body = []
    for name, one in acting.items():
        times = [np.array(ms) for ms in one["ms"].values()]
        body.append([name, f"{one['calls']}", *(f"{np.median(t):.3g} [{t.min():.3g}, {t.max():.3g}]" for t in times)])
    yield from table(["agent", "calls", *(f"batch {n}" for n in batches)], body)
    yield ""
    for (fast, slow), aim in AIMS.items():
        ratios = np.divide(acting[fast]["ms"]["1"], acting[slow]["ms"]["1"])
        yield (
            f"- {fast} / {slow}, batch 1: {np.median(ratios):.3f} [{ratios.min():.3f}, {ratios.max():.3f}] "
            f"(asked: at most {aim})"
        )
