"""What a world model imagines, held against evaluation episodes that it never saw."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3.common.preprocessing import maybe_transpose

from tether.agents.girl.drift import Episode
from tether.agents.girl.networks import seen
from tether.agents.girl.picture_encoders import newest_frame

from .imagination_report import HORIZON, SHORT

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from tether.agents.girl.drift import Dream, Drift

NUMBERS_SHOWN = 12  # of a vector
FPS = 10


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
        self.running[env].append((_row(self._seen(local["observations"]), env), action))
        if local["done"]:
            last = local["info"].get("terminal_observation")
            if last is not None:
                is_dict = isinstance(last, dict)
                one = {name: np.asarray([part]) for name, part in last.items()} if is_dict else np.asarray([last])
                rows = [observation for observation, _ in self.running[env]] + [_row(self._seen(one), 0)]
                actions = np.stack([action for _, action in self.running[env]])
                observations = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
                self.episodes.append(Episode(observations, actions))
            self.running[env] = []

    def _seen(self, observations: Any) -> dict[str, np.ndarray]:
        """Parts by name (n, ...), pictures with channels first, as SB3's ``predict`` turns them."""
        if isinstance(self.space, spaces.Dict):
            turned: Any = {name: maybe_transpose(part, self.space[name]) for name, part in observations.items()}
        else:
            turned = maybe_transpose(observations, self.space)
        return seen(turned, self.space)


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

    ``dfm`` is the honest variant over ``dfm_horizon`` lags: :data:`HORIZON`, or as many as the longest episode has steps;
    ``dfm_real`` and ``dfm_none`` are the others where there is grounding, ``dfm_short`` the honest one at :data:`SHORT`.
    """
    horizon = min(HORIZON, max((len(episode.actions) for episode in episodes), default=0))
    if horizon < 1:
        return {}, None
    drift = model.measure_drift(episodes, horizon, seed=seed)
    row = {"dfm": drift.dfm(horizon), "dfm_short": drift.dfm(min(SHORT, horizon)), "decoder_error": drift.error(horizon)}
    row["dfm_horizon"] = horizon
    row |= {f"dfm_{name}": drift.dfm(horizon, name) for name in ("real", "none") if name in drift.kl}
    return row, drift


def film(dream: Dream) -> np.ndarray | None:
    """Real, imagined and the difference of both side by side, (T, H, 3 W, 3) uint8; None where nothing is a picture.

    Several pictures lie one below the other; the steps that the model saw have a green edge.
    """
    rows = []
    for name, real in dream.real.items():
        if real.ndim == 4:
            imagined = dream.imagined[name]
            columns = [_rgb(picture) for picture in (real, imagined, 0.5 + 0.5 * (imagined - real))]
            rows.append(np.concatenate(columns, 2))
    if not rows:
        return None
    frames = (np.concatenate(rows, 1).clip(0.0, 1.0) * 255.0).astype(np.uint8)
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        frames[: dream.context][edge] = (60, 200, 90)
    return frames


def _rgb(pictures: np.ndarray) -> np.ndarray:
    """The newest frames (T, H, W, 3) of stacked ones (T, C, H, W)."""
    return newest_frame(th.from_numpy(pictures)).movedim(1, -1).numpy()


def chart(dream: Dream) -> Figure | None:
    """The first numbers of the vectors over time, real and imagined; None where all observations are pictures."""
    vectors = [name for name, real in dream.real.items() if real.ndim == 2]
    if not vectors:
        return None
    real, imagined = (np.concatenate([of[name] for name in vectors], 1) for of in (dream.real, dream.imagined))
    shown = min(NUMBERS_SHOWN, real.shape[1])
    columns = min(4, shown)
    figure = Figure(figsize=(2.6 * columns, 1.6 * -(-shown // columns) + 0.5), layout="constrained")
    axes = figure.subplots(-(-shown // columns), columns, squeeze=False, sharex=True).flatten()
    for number, axis in enumerate(axes):
        axis.set_visible(number < shown)
        if number < shown:
            axis.axvspan(0, dream.context - 1, color="#3cc85a", alpha=0.2, lw=0)
            axis.plot(real[:, number], color="#4d5560", lw=1.2, label="real")
            axis.plot(imagined[:, number], color="#d6277f", lw=1.2, label="imagined")
            axis.set_title(f"observation {number}", fontsize=8)
            axis.tick_params(labelsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure
