"""Updates a second of the world-model agents: the DreamerV3 arm, what each part of GIRL costs, and what makes both fast.

NM512/dreamerv3-torch, of whose mathematics the arm is, joins where its folder is given.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from gymnasium import spaces

from .errors import UsageError
from .manifest import git_revision, hardware, versions, write_atomically, write_json
from .markdown import table

ENV = "dm_control/cartpole-swingup-v0"
COLLECTED = 1500  # random steps in the replay memory
COLLECTED_PICTURES = 300
SIZES: dict[str, dict[str, Any]] = {
    "small": {"policy_kwargs": {"size": "small"}, "batch_size": 8, "batch_length": 32},
    "default": {"batch_size": 16, "batch_length": 64},
}
ARM = {"grounding": None, "trust_region": False, "ensemble_members": 0}
BASE, WHOLE, NM512 = "DreamerV3 arm", "GIRL", "NM512/dreamerv3-torch"
CONTESTANTS: dict[str, dict[str, Any]] = {
    BASE: ARM,
    "+ trust region": {**ARM, "trust_region": True},
    "+ ensemble": {**ARM, "ensemble_members": 5},
    "+ ensemble, every 4th update": {**ARM, "ensemble_members": 5, "ensemble_interval": 4},
    "+ grounding": {**ARM, "grounding": "masked-autoencoder"},
    WHOLE: {},
    "GIRL, ensemble every 4th update": {"ensemble_interval": 4},
    "DreamerV3 arm, other precision": {**ARM, "precision": "other"},
    "DreamerV3 arm, not captured": {**ARM, "captured": False},
    "DreamerV3 arm, compiled": {**ARM, "compile_loss": True},
    "DreamerV3 arm, compiled, other precision": {**ARM, "compile_loss": True, "precision": "other"},
    "GIRL, compiled, other precision, ensemble every 4th update": {
        "compile_loss": True, "precision": "other", "ensemble_interval": 4,
    },
}  # fmt: skip
PICTURES: dict[str, dict[str, Any]] = {
    BASE: ARM,
    "+ trust region": CONTESTANTS["+ trust region"],
    "+ ensemble": CONTESTANTS["+ ensemble"],
    "+ grounding": {**ARM, "grounding": "efficientnet-lite0"},
    WHOLE: {},
    "GIRL, ensemble every 4th update": {"ensemble_interval": 4},
    "GIRL-Distill": {"distill": True, "distill_interval": 4, "ensemble_interval": 4},
    "GIRL-Distill, student every update": {"distill": True, "ensemble_interval": 4},
}


class Textures(gym.Env):
    """Pictures (3, 64, 64) that need no renderer: an update costs the same whatever they show."""

    observation_space, action_space = spaces.Box(0, 255, (3, 64, 64), np.uint8), spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        from tether.envs.distractors import MovingTexture

        super().reset(seed=seed)
        self.texture, self.steps = MovingTexture(64, self.np_random), 0
        return self._picture(), {}

    def _picture(self) -> np.ndarray:
        return np.ascontiguousarray(self.texture.picture(self.steps).transpose(2, 0, 1))

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._picture(), float(np.sum(action)), False, self.steps == 500, {}


def world_model(
    out: Path | None = None,
    only: list[str] | None = None,
    rounds: int = 5,
    seconds: float = 3.0,
    command: str = "tether bench world-model",
    device: str = "auto",
    size: str = "default",
    pictures: bool = False,
    nm512: Path | None = None,
) -> str:
    """Measure updates a second; each contestant runs once a round.

    :param out: folder for ``world-model-<size>[-pictures].md`` and ``.json``
    :param only: names of contestants; None: all that the device knows (compiled ones on a CPU, "not captured" on a GPU)
    :param seconds: of each contestant in a round, about
    :param device: of the agents
    :param size: "small" (sequences 8 x 32) or "default" (16 x 64)
    :param pictures: observe pictures of 64 x 64 and not cartpole's states
    :param nm512: folder of NM512/dreamerv3-torch
    :return: the table
    :raises UsageError: for a contestant that there is not, or a folder from which that code cannot be imported
    """
    import torch as th
    from stable_baselines3.common.utils import get_device

    place = get_device(device)
    contestants = (PICTURES if pictures else CONTESTANTS) | ({NM512: {}} if nm512 is not None else {})
    unknown = set(only or ()) - set(contestants)
    if unknown:
        raise UsageError(f"There is no contestant '{min(unknown)}': use some of {', '.join(contestants)}.")
    names = only or [name for name in contestants if ("compiled" in name) <= (place.type == "cpu")]
    names = [name for name in names if place.type == "cuda" or "not captured" not in name]
    agents = {name: _agent(contestants[name], size, place, pictures) for name in names if name != NM512}
    if NM512 in names:
        assert nm512 is not None
        peer = Peer(nm512, size, place, pictures)
        peer.improve(4)
        agents[NM512] = peer, _measure(peer, 4)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, (agent, speed) in agents.items():
            rates[name].append(_measure(agent, 4 * max(1, round(seconds * speed / 4))))  # the ensemble may be every fourth's
    result = {
        "command": command, "hardware": hardware(), "versions": versions(), **git_revision(), "threads": th.get_num_threads(),
        "device": place.type, "size": size, "pictures": pictures, "updates per second": rates,
    }  # fmt: skip
    text = _markdown(result)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"world-model-{size}{'-pictures' if pictures else ''}"
        write_json(out / f"{name}.json", result)
        write_atomically(out / f"{name}.md", text)
    return text


def _agent(arguments: dict[str, Any], size: str, device: Any, pictures: bool) -> tuple[Any, float]:
    """An agent that has warmed up, and about how many updates a second it makes."""
    from tether.agents import GIRL
    from tether.envs import make_vec

    arguments = {**SIZES[size], **arguments}
    captured = arguments.pop("captured", True)
    if arguments.get("precision") == "other":
        arguments["precision"] = "float32" if device.type == "cuda" else "bfloat16"
    env = Textures() if pictures else make_vec(ENV, seed=0, env_kwargs={"action_repeat": 2})
    steps = COLLECTED_PICTURES if pictures else COLLECTED
    agent = GIRL(
        "CnnPolicy" if pictures else "MlpPolicy", env, seed=0, device=device, learning_starts=steps, buffer_size=2 * steps,
        encoder_updates=10, warmup_steps=0, **arguments,
    )  # fmt: skip
    agent.captures = captured
    agent.learn(steps)
    agent.improve(12)
    if agent.trust_region:
        agent.policy.trust_region.activate()
        agent._warm = True
    return agent, _measure(agent, 4)


class Peer:
    """NM512/dreamerv3-torch at our sizes, as its ``Dreamer`` updates it, on one batch, which it need not draw.

    It runs as it comes: in float32; its ``compile`` compiles ``forward``, which its updates do not call.

    :raises UsageError: if it cannot be imported from the folder
    """

    batch_size = 0

    def __init__(self, folder: Path, size: str, device: Any, pictures: bool) -> None:
        from tether.agents.girl.policy import SIZES as POLICIES

        self.device, ours = device, SIZES[size]
        sizes = POLICIES[size] | {k: v for k, v in ours.get("policy_kwargs", {}).items() if k != "size"}
        sys.path.insert(0, str(folder))
        try:
            models, networks = import_module("models"), import_module("networks")
            config = _numbers(yaml.safe_load((folder / "configs.yaml").read_text()))
        except (ImportError, OSError) as error:
            raise UsageError(f"NM512/dreamerv3-torch cannot be imported from {folder}: {error}.") from None
        finally:
            sys.path.remove(str(folder))
        init: Any = networks.MLP.__init__
        init.__defaults__ = tuple(str(device) if value == "cuda" else value for value in init.__defaults__)
        told = config["defaults"]
        for name, value in config["dmc_vision" if pictures else "dmc_proprio"].items():
            told[name] = {**told[name], **value} if isinstance(value, dict) else value
        layers, units, depth = sizes["encoder_layers"], sizes["encoder_units"], sizes["cnn_depth"]
        for part in ("encoder", "decoder"):
            told[part] |= {"mlp_layers": layers, "mlp_units": units, "cnn_depth": depth}
        told |= {
            "dyn_deter": sizes["deter"], "dyn_hidden": sizes["hidden"], "dyn_stoch": sizes["variables"],
            "dyn_discrete": sizes["classes"], "units": sizes["units"], "num_actions": 1, "device": str(device),
            "imag_horizon": ours.get("horizon", 15) + 1,  # it counts the state where imagination starts
        }  # fmt: skip
        width = 64 if pictures else 1  # it always has a picture, which costs nothing where it is not looked at
        picture = spaces.Box(0, 255, (width, width, 3), np.uint8)
        seen = spaces.Dict({"image": picture, "state": spaces.Box(-np.inf, np.inf, (5,))})
        self.model = models.WorldModel(seen, None, 0, SimpleNamespace(**told)).to(device)
        self.behaviour = models.ImagBehavior(SimpleNamespace(**told), self.model).to(device)
        self.batch = self._batch(picture.shape, ours["batch_size"], ours["batch_length"])

    @staticmethod
    def _batch(picture: tuple[int, ...], *shape: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        first = np.zeros(shape, np.float32)
        first[:, 0] = 1.0
        return {
            "image": rng.integers(0, 256, (*shape, *picture), np.uint8), "state": rng.normal(size=(*shape, 5)),
            "action": rng.uniform(-1.0, 1.0, (*shape, 1)), "reward": rng.random(shape), "is_first": first,
            "is_terminal": np.zeros(shape),
        }  # fmt: skip

    def improve(self, updates: int) -> None:
        """So many updates of everything."""
        heads, dynamics = self.model.heads, self.model.dynamics
        for _ in range(updates):
            states, _context, _told = self.model._train(self.batch)
            self.behaviour._train(states, lambda features, states, actions: heads["reward"](dynamics.get_feat(states)).mode())

    def _torch_threads(self, batch_size: int) -> Any:
        return nullcontext()


def _numbers(value: Any) -> Any:
    """Values of YAML 1.2, in which 1e-4 is a number."""
    if isinstance(value, dict):
        return {name: _numbers(part) for name, part in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _measure(agent: Any, updates: int) -> float:
    """Updates a second."""
    import torch as th

    with agent._torch_threads(agent.batch_size):
        begun = time.perf_counter()
        agent.improve(updates)
        if agent.device.type == "cuda":
            th.cuda.synchronize()
        return updates / (time.perf_counter() - begun)


def _markdown(result: dict[str, Any]) -> str:
    machine, rates = result["hardware"], {k: np.array(v) for k, v in result["updates per second"].items()}
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}, {result['threads']} torch threads"
    shape = SIZES[result["size"]]
    reference = rates.get(BASE)
    body = []
    for name, values in rates.items():
        times = None if reference is None else reference / values  # of an update, against the arm's
        cost = "-" if times is None or name == BASE else f"{np.median(times):.2f} [{times.min():.2f}, {times.max():.2f}]"
        body.append([name, f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]", cost])
    other = "float32" if result["device"] == "cuda" else "bfloat16"
    how = "bfloat16, every update one CUDA graph" if result["device"] == "cuda" else "float32, not compiled"
    pictures = ", pictures" if result["pictures"] else ""
    seen, encoder = ("pictures 64 x 64", "EfficientNet-Lite0") if pictures else ("cartpole's states", "the masked autoencoder")
    return "\n".join([
        f"# Speed of the world models, size {result['size']}{pictures}", "",
        f"`{result['command']}` on {where}; on {result['device']}. Sequences {shape['batch_size']} x {shape['batch_length']} "
        f"of {seen}, horizon 15; {how} where nothing else is said, other precision is {other}. Medians over "
        f"{len(next(iter(rates.values())))} rounds, ranges in brackets. An update is the world model's, the actor's and the "
        f"critic's; the embeddings of {encoder} lie in the replay memory.", "",
        *table(["what", "updates per second", "time of an update / the arm's"], body),
    ]) + "\n"  # fmt: skip
