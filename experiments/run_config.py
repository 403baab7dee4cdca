"""What a run was asked for, and whether a folder holds the same run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .catalogue import OFFLINE, OFFLINE_TO_ONLINE, OURS, TAKE_DATASETS, agent_class, canonical_name
from .errors import UsageError
from .presets import check_arguments, merge, preset

DEFAULT_STEPS = 1_000_000


@dataclass(frozen=True)
class RunConfig:
    """What ``tether train`` was asked for; what of it makes the run's identity, :func:`identity_of` says.

    :param agent: name in the catalogue
    :param env: environment id; offline agents are evaluated there
    :param train_share: of the dataset's episodes, drawn by a fixed seed, that an offline agent learns from; `audit` judges
        it on the rest
    :param dataset: for offline agents, a file, folder or name of :func:`tether.envs.load_dataset`; for those peers that may
        have one, what their replay buffer begins with
    :param steps: env steps, for offline agents gradient steps (None: the preset's, else a million)
    :param online_steps: env steps after them, of the agents that go on in their environment
    :param init_from: a saved model whose parameters, optimisers and counters an offline agent begins with; ``{env}``,
        ``{seed}`` and ``{agent}`` in the path stand for those of the run
    :param n_envs: parallel environments (None: the preset's, else 1)
    :param backend: of the vector environment: auto, dummy, subproc, envpool
    :param hp: constructor arguments that override the preset
    :param eval_every: steps between evaluations (None: a twentieth of all)
    :param checkpoint_every: seconds between checkpoints
    :param on_nonfinite: at a number that is not finite: "stop"; "skip" the update or the episodes; "rollback" to the last
        checkpoint, with other random numbers
    :param out: folder below which run folders lie
    """

    agent: str
    env: str
    steps: int | None = None
    seed: int = 0
    n_envs: int | None = None
    backend: str = "auto"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    hp: dict[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    eval_episodes: int = 10
    checkpoint_every: float = 120.0
    on_nonfinite: str = "stop"
    out: Path = Path("results/runs")
    device: str = "auto"
    dataset: str | None = None
    train_share: float = 1.0
    online_steps: int = 0
    init_from: str | None = None

    @property
    def total(self) -> int:
        """Steps of both phases, of a configuration that was resolved."""
        assert self.steps is not None
        return self.steps + self.online_steps

    @property
    def collects(self) -> bool:
        """Whether the agent steps training environments."""
        return not self.offline or self.online_steps > 0

    @property
    def offline(self) -> bool:
        """Whether the agent learns from a dataset."""
        return canonical_name(self.agent) in OFFLINE

    def resolve(self) -> tuple[RunConfig, dict[str, Any]]:
        """The configuration with every default filled in, and the agent's checked arguments.

        :raises UsageError: in one sentence, for anything that cannot be run
        """
        agent = canonical_name(self.agent)
        if self.offline and self.dataset is None:
            raise UsageError(f"{agent} learns from data: give --dataset FILE, which `tether collect {self.env}` makes.")
        takes = agent in TAKE_DATASETS or self.dataset is None
        _require(takes, f"{agent} learns in its environment: leave out --dataset.")
        goes_on = agent in OFFLINE_TO_ONLINE or self.online_steps == 0
        _require(goes_on, f"--online-steps is for {', '.join(OFFLINE_TO_ONLINE)}: leave it out for {agent}.")
        _require(self.online_steps >= 0, f"--online-steps must be 0 or more, not {self.online_steps}.")
        starts = self.offline or self.init_from is None
        _require(starts, f"--init-from is for offline agents of ours: leave it out for {agent}.")
        for name, given in (("steps", self.steps), ("n_envs", self.n_envs)):
            twice = given is not None and self.hp.get(name, given) != given
            _require(not twice, f"{name} is {self.hp.get(name)} in --hp and {given} as an option: leave one of them out.")
        arguments = merge(preset(agent, self.env), self.hp)
        check_arguments(agent, arguments)
        env_kwargs = merge(arguments.pop("env_kwargs", {}), self.env_kwargs)
        _require(0.0 < self.train_share <= 1.0, f"--train-share lies in (0, 1], not {self.train_share}.")
        steps = arguments.get("steps", DEFAULT_STEPS) if self.steps is None else self.steps
        n_envs = arguments.get("n_envs", 1) if self.n_envs is None else self.n_envs
        eval_every = max(1, (steps + self.online_steps) // 20) if self.eval_every is None else self.eval_every
        whole = {"steps": steps, "n-envs": n_envs, "eval-every": eval_every, "eval-episodes": self.eval_episodes}
        for option, number in whole.items():
            _require(number >= 1, f"--{option} must be 1 or more, not {number}.")
        _require(self.checkpoint_every > 0, f"--checkpoint-every is in seconds and above 0, not {self.checkpoint_every}.")
        choices = ("stop", "skip", "rollback") if agent in OURS else ("stop", "rollback")
        known = self.on_nonfinite in choices
        _require(known, f"--on-nonfinite of {agent} is one of {', '.join(choices)}, not '{self.on_nonfinite}'.")
        parameters = inspect.signature(agent_class(agent).__init__).parameters
        if "buffer_size" in parameters and not self.offline and "buffer_size" not in self.hp:
            # A replay buffer never holds more than the run collects, or one sequence; a smaller one makes smaller checkpoints.
            sequence = arguments.get("batch_length", parameters["batch_length"].default) if "batch_length" in parameters else 1
            arguments["buffer_size"] = min(arguments.get("buffer_size", 1_000_000), max(steps, n_envs * sequence))
        config = replace(self, agent=agent, steps=steps, n_envs=n_envs, eval_every=eval_every, env_kwargs=env_kwargs)
        return replace(config, init_from=config._model_path()), arguments

    def _model_path(self) -> str | None:
        """``init_from`` of this run."""
        if self.init_from is None:
            return None
        try:
            return self.init_from.format(env=self.env.replace("/", "--"), seed=self.seed, agent=self.agent)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            sentence = f"--init-from takes {{env}}, {{seed}} and {{agent}} in braces, not '{self.init_from}'."
            raise UsageError(sentence) from error

    @property
    def folder(self) -> Path:
        """``<out>/<env>/<agent>/seed-<k>``; slashes of an env id become ``--``."""
        return self.out / self.env.replace("/", "--") / self.agent / f"seed-{self.seed}"


def identity_of(config: RunConfig, arguments: dict[str, Any], **sha256: str | None) -> dict[str, Any]:
    """What makes two runs the same: the configuration with the agent's arguments, without where and on what it runs.

    :param sha256: of ``dataset`` and ``init_from``, wherever they lie; None for what there is not
    """
    values = asdict(config)
    for key in ("out", "device", "checkpoint_every", "on_nonfinite", "hp", "dataset", "init_from"):
        values.pop(key)
    values |= {key: digest for key, digest in sha256.items() if digest is not None}
    # As in the manifests from before these were options.
    if config.train_share == 1.0:
        values.pop("train_share")
    if config.online_steps == 0:
        values.pop("online_steps")
    return values | {"arguments": {k: v for k, v in arguments.items() if k not in ("n_envs", "steps")}}


def refuse_other_configuration(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """:raises UsageError: if two identities differ, with the differences; the steps, which others follow, first"""
    old, new = dict(_leaves(plain(before))), dict(_leaves(plain(now)))
    names = sorted({*old, *new}, key=lambda name: (name != "steps", name))
    changed = [f"'{name}' was {old.get(name)!r}, now {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
    if changed:
        raise UsageError(
            f"{folder} holds a run with another configuration ({'; '.join(changed)}): "
            "delete the folder, or give another --seed or --out."
        )


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an agent's arguments stand under their own names, as --hp takes them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, "" if prefix + key == "arguments" else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def plain(value: Any) -> Any:
    """As JSON gives it back, so that a tuple equals the list it was written as."""
    return json.loads(json.dumps(value, default=str))


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)
