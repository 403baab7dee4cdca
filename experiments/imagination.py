"""What a world model imagines, held against evaluation episodes that it never saw."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from tether.agents.girl.drift import Episode
from tether.agents.girl.networks import seen

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from tether.agents.girl.drift import Drift

HORIZON = 100  # of the drift in `evaluations.csv`, or as long as the episodes are
SHORT = 15  # imagined steps that behaviour is learnt from
COLUMNS = ("dfm", "dfm_real", "dfm_none", "dfm_short", "decoder_error")


class EpisodeRecorder:
    """Keeps the episodes of an evaluation, as the callback of SB3's ``evaluate_policy``.

    :param model: whose policy says what its world model takes as an action
    """

    def __init__(self, model: Any) -> None:
        self.policy, self.space = model.policy, model.observation_space
        self.running: dict[int, list[tuple[dict[str, np.ndarray], np.ndarray]]] = defaultdict(list)
        self.episodes: list[Episode] = []

    def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> None:
        env = local["i"]
        action = self.policy.to_model(local["actions"][env : env + 1])[0]
        self.running[env].append((_row(seen(local["observations"], self.space), env), action))
        if local["done"]:
            last = local["info"].get("terminal_observation")
            if last is not None:
                is_dict = isinstance(last, dict)
                one = {name: np.asarray([part]) for name, part in last.items()} if is_dict else np.asarray([last])
                rows = [observation for observation, _ in self.running[env]] + [_row(seen(one, self.space), 0)]
                actions = np.stack([action for _, action in self.running[env]])
                observations = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
                self.episodes.append(Episode(observations, actions))
            self.running[env] = []


def _row(observations: dict[str, np.ndarray], env: int) -> dict[str, np.ndarray]:
    return {name: np.array(part[env]) for name, part in observations.items()}


def drift_table(drift: Drift) -> str:
    """The drift by lag as CSV: ``lag``, the KL of each variant, and the decoder's error of each."""
    names = [f"kl_{name}" for name in drift.kl] + [f"error_{name}" for name in drift.decoder_error]
    columns = zip(*drift.kl.values(), *drift.decoder_error.values(), strict=True)
    rows = [",".join([str(lag), *(f"{value:.6g}" for value in row)]) for lag, row in enumerate(columns, 1)]
    return "\n".join([",".join(["lag", *names]), *rows]) + "\n"


def has_world_model(model: BaseAlgorithm) -> bool:
    """Whether an agent can say how far its imagination drifts."""
    return hasattr(model, "measure_drift")


def drift_row(model: Any, episodes: list[Episode], seed: int) -> tuple[dict[str, float], Drift | None]:
    """The columns of ``evaluations.csv`` that tell of imagination, and the drift by lag; none where episodes are too short.

    ``dfm`` is the honest variant at :data:`HORIZON`, ``dfm_real`` and ``dfm_none`` the others where there is grounding,
    ``dfm_short`` the honest one at :data:`SHORT`.
    """
    shortest = min((len(episode.actions) for episode in episodes), default=0)
    horizon = min(HORIZON, shortest)
    if horizon < 1:
        return {}, None
    drift = model.measure_drift(episodes, horizon, seed=seed)
    row = {"dfm": drift.dfm(horizon), "dfm_short": drift.dfm(min(SHORT, horizon)), "decoder_error": drift.error(horizon)}
    row |= {f"dfm_{name}": drift.dfm(horizon, name) for name in ("real", "none") if name in drift.kl}
    return row, drift
