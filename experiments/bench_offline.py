"""Speed of offline training and of acting: ours, several seeds at once, and peers, in one process and in turns.

Peers join where they can be imported: ``d3rlpy`` for the baselines, the FISOR authors' package ``jaxrl5`` (JAX).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import spread, table
from .racing import Contestant, Run, random_data, rate_cells, require_known

OBS, ACT, ROWS = 17, 6, 100_000  # HalfCheetah's sizes
PAPER: dict[str, Any] = {}
REDUCED = {"batch_size": 512, "policy_kwargs": {"width": 128, "n_blocks": 2, "net_arch": [128, 128]}}
SEEDS = 5


def contestants(device: Any) -> list[Contestant]:
    """All that can run with what is installed."""
    from tether import agents

    sizes = {"FISOR, paper's size": PAPER, "FISOR, reduced": REDUCED}
    found = [
        Contestant(group, name, _ours(agents.FISOR, seeds, device, **size), seeds)
        for group, size in sizes.items()
        for name, seeds in (("Tether", 1), (f"Tether, {SEEDS} seeds at once", SEEDS))
    ]
    found += [Contestant(group, "authors' JAX", make) for group, make in _jax_peers()]
    for cls in (agents.BC, agents.TD3BC, agents.PRDC, agents.IQL, agents.CPQ, agents.BCQLag):
        for name, seeds in (("Tether", 1), (f"Tether, {SEEDS} seeds at once", SEEDS)):
            found.append(Contestant(cls.__name__, name, _ours(cls, seeds, device), seeds))
    found += [Contestant(group, "d3rlpy", make) for group, make in _d3rlpy_peers(device)]
    if device.type == "cuda":
        for one in found:
            one.updates = 1000  # of which those before the graph is captured, 40 slow ones, are few
    return found


def _data() -> dict[str, np.ndarray]:
    return random_data(ROWS, OBS, ACT)


def _ours(cls: Any, seeds: int, device: Any, **kwargs: Any) -> Callable[[], Run]:
    import torch as th

    def make() -> Run:
        agent, data = cls(seed=0, device=device, seeds=seeds, **kwargs), _data()
        agent.learn_offline(data, 50 if device.type == "cuda" else 1)  # until its graph is captured

        def run(n: int) -> None:
            agent.learn_offline(data, n, reset_num_timesteps=False)
            if device.type == "cuda":
                th.cuda.synchronize()

        return run

    return make


def _jax_peers() -> Iterator[tuple[str, Callable[[], Run]]]:
    """The authors' FISOR at both sizes, as their ``train_offline.py`` makes it."""
    try:
        from jaxrl5.agents.fisor import fisor as theirs
    except ImportError:
        return
    import jax
    from gymnasium import spaces
    from jaxrl5.data.dataset import Dataset

    network = theirs.MLPResNet

    def maker(batch: int, width: int, blocks: int, hidden: int) -> Callable[[], Run]:
        def make() -> Run:
            theirs.MLPResNet = partial(network, hidden_dim=width)  # no argument of `create`
            raw = _data()
            arrays = {name: raw[name] for name in ("observations", "next_observations", "actions", "rewards", "costs")}
            dones = raw["terminals"].astype(np.float32)
            dataset = Dataset({**arrays, "dones": dones, "masks": 1.0 - dones}, seed=0)
            agent = theirs.FISOR.create(
                0, spaces.Box(-1, 1, (OBS,), np.float32), spaces.Box(-1, 1, (ACT,), np.float32),
                actor_architecture="ln_resnet", actor_num_blocks=blocks, actor_dropout_rate=0.1, actor_layer_norm=True,
                critic_hidden_dims=(hidden, hidden), critic_hyperparam=0.9, cost_critic_hyperparam=0.9, cost_temperature=5,
                reward_temperature=3, N=16, T=5, actor_objective="feasibility", critic_type="hj", extract_method="minqc",
                decay_steps=int(3e6), cost_ub=150,
            )  # fmt: skip
            state = [agent]

            def run(n: int) -> None:
                for _ in range(n):
                    state[0], _info = state[0].update(dataset.sample_jax(batch))
                jax.block_until_ready(state[0].score_model.params)

            return run

        return make

    yield "FISOR, paper's size", maker(2048, 256, 3, 256)
    yield "FISOR, reduced", maker(512, 128, 2, 128)


def _d3rlpy_peers(device: Any) -> Iterator[tuple[str, Callable[[], Run]]]:
    try:
        import d3rlpy
    except ImportError:
        return
    algos = d3rlpy.algos
    configs = {
        "BC": algos.BCConfig(batch_size=512, learning_rate=1e-3), "TD3BC": algos.TD3PlusBCConfig(),
        "PRDC": algos.PRDCConfig(), "IQL": algos.IQLConfig(),
    }  # fmt: skip

    def maker(config: Any) -> Callable[[], Run]:
        def make() -> Run:
            raw = _data()
            ends = raw["terminals"].astype(np.float32)
            dataset = d3rlpy.dataset.MDPDataset(raw["observations"], raw["actions"], raw["rewards"][:, None], ends)
            algo = config.create(device=device.type == "cuda")
            algo.build_with_dataset(dataset)
            if hasattr(algo.impl, "_nbsr"):  # PRDC's search, which its `fit` would make
                algo.impl._nbsr.fit(np.hstack([algo.config.beta * raw["observations"], raw["actions"]]))

            def run(n: int) -> None:
                for _ in range(n):
                    algo.update(dataset.sample_transition_batch(algo.config.batch_size))

            return run

        return make

    for name, config in configs.items():
        yield name, maker(config)


def offline(
    out: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 3.0,
    command: str = "tether bench offline",
    device: str = "auto",
) -> str:
    """Measure updates per second of every method, and how near FISOR comes to the machine's matrix product.

    :param out: folder for ``offline.md`` and ``offline.json``
    :param only: methods ("FISOR, reduced", "IQL"); None: all
    :param rounds: each trains once a round, for about ``seconds``
    :param command: for the head of the table
    :param device: of ours and d3rlpy's; JAX takes the GPU where it can
    :return: the table
    :raises UsageError: for a method that is not known
    """
    import torch as th
    from stable_baselines3.common.utils import get_device

    place = get_device(device)
    racers = contestants(place)
    require_known(only, (one.group for one in racers))
    racers = [one for one in racers if not only or one.group in only]
    products: list[float] = []
    for one in racers:
        one.warm_up(seconds)
    for _ in range(rounds):
        products.append(_matrix_product(seconds / 5, place))
        for one in racers:
            one.measure()
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "threads": th.get_num_threads(),
        "device": place.type, "GFLOP/s of a matrix product": products,
        "GFLOP per update": _flops([one.group for one in racers]),
        "contestants": [{"method": o.group, "name": o.name, "agents": o.agents, "updates/s": o.rates} for o in racers],
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "offline.json", result)
        write_atomically(out / "offline.md", text)
    return text


def _matrix_product(seconds: float, device: Any) -> float:
    """GFLOP/s of (1024, 256) by (256, 1024) in float32, with as many threads as the agents."""
    import torch as th

    first, second = th.randn(1024, 256, device=device), th.randn(256, 1024, device=device)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(10):
            first @ second
        if device.type == "cuda":
            th.cuda.synchronize()
        count += 10
    return 2.0 * 1024 * 256 * 1024 * count / (time.perf_counter() - begun) / 1e9


def _flops(groups: list[str]) -> dict[str, float]:
    """GFLOP of the matrix products of one update of our FISOR."""
    from torch.utils.flop_counter import FlopCounterMode

    from tether.agents import FISOR

    counts = {}
    for group, size in (("FISOR, paper's size", PAPER), ("FISOR, reduced", REDUCED)):
        if group in groups:
            agent = FISOR(seed=0, device="cpu", **size).learn_offline(_data(), 1)
            with FlopCounterMode(display=False) as counter:
                agent.learn_offline(_data(), 1, reset_num_timesteps=False)
            counts[group] = counter.get_total_flops() / 1e9
    return counts


def _markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    products = np.array(result["GFLOP/s of a matrix product"])
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}, {result['threads']} torch threads"
    where += f"; device {result.get('device', 'cpu')}"
    lines = [
        "# Training speed of the offline agents",
        "",
        f"`{result['command']}` on {where}; {len(products)} rounds, random data of {ROWS:,} rows ({OBS} observations, {ACT}",
        "actions). Updates per second of all agents together, medians over rounds, ranges in brackets; ratios are medians of",
        f"the ratios within a round. A matrix product (1024, 256) x (256, 1024): {spread(products)} GFLOP/s.",
        "",
    ]
    body = []
    for group in dict.fromkeys(one["method"] for one in result["contestants"]):
        rows = [one for one in result["contestants"] if one["method"] == group]
        reference = np.array(rows[0]["updates/s"])
        flops = result["GFLOP per update"].get(group)
        for one in rows:
            rates = np.array(one["updates/s"])
            ours = one["name"].startswith("Tether")
            share = f"{np.median(rates * flops):.0f} ({np.median(rates * flops / products):.2f})" if flops and ours else "-"
            body.append([group, one["name"], *rate_cells(rates, reference), share])
    header = ["method", "who", "updates/s", "of one of ours", "GFLOP/s (of the product)"]
    return "\n".join([*lines, *table(header, body)]) + "\n"


# ---------------------------------------------------------------------- acting


def inference(out: Path | None = None, rounds: int = 5, command: str = "tether bench inference") -> str:
    """Milliseconds of ``predict`` for one observation on one core.

    :param out: folder for ``inference.md`` and ``inference.json``
    :param rounds: each acts 50 times a round
    :param command: for the head of the table
    :return: the table
    """
    import torch as th

    from tether import agents

    sizes = {
        "FISOR, paper's size (16 candidates, 5 steps)": (agents.FISOR, PAPER),
        "FISOR, reduced (16 candidates, 5 steps)": (agents.FISOR, REDUCED),
        "BC": (agents.BC, {}), "IQL": (agents.IQL, {}), "CPQ": (agents.CPQ, {}), "BCQLag": (agents.BCQLag, {}),
    }  # fmt: skip
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        made = {name: cls(seed=0, device="cpu", **size).learn_offline(_data(), 1) for name, (cls, size) in sizes.items()}
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds + 1):
            for name, agent in made.items():
                times[name].append(_milliseconds(agent))
    finally:
        th.set_num_threads(before)
    body = [[name, *_three(np.array(of[1:]))] for name, of in times.items()]  # the first round warms up
    text = "\n".join([
        "# Time to act", "",
        f"`{command}` on {hardware()['cpu']}, one core; {rounds} rounds of 50 calls of `predict`, one observation each.", "",
        *table(["agent", "ms (median)", "least", "most"], body),
    ]) + "\n"  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "inference.json", {"command": command, "hardware": hardware(), "versions": versions(), "ms": times})
        write_atomically(out / "inference.md", text)
    return text


def _milliseconds(agent: Any) -> float:
    observation = np.zeros(OBS, np.float32)
    begun = time.perf_counter()
    for _ in range(50):
        agent.predict(observation, deterministic=True)
    return (time.perf_counter() - begun) / 50 * 1e3


def _three(values: np.ndarray) -> list[str]:
    return [f"{value:.2f}" for value in (np.median(values), values.min(), values.max())]
