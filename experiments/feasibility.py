"""The feasible region that an agent learnt, beside the analytic one of the point robot."""

from __future__ import annotations

from io import BytesIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch as th
from matplotlib.figure import Figure

from tether.envs import OfflineDataset
from tether.envs.point_robot import ARENA, HAZARD_RADIUS, HAZARDS, ID, avoidable, observation_of, states_of

from .errors import UsageError
from .figures import STYLE

SLICES = ((1.0, 0.0), (1.0, np.pi / 2), (2.0, 0.0), (2.0, np.pi / 2))  # speed and heading of the pictures
SIDE = 121  # points of a picture's axis


class Agreement(NamedTuple):
    """How far the sign of V_h agrees with the analytic set, on states of a dataset."""

    states: int
    share: float
    infeasible: float
    """Share of the states that are infeasible by the analytic set: what calling all feasible would get wrong."""
    missed: float
    """Share of the infeasible states that the agent takes for feasible."""
    alarms: float
    """Share of the feasible states that the agent takes for infeasible."""

    def __str__(self) -> str:
        share, infeasible, missed, alarms = (100.0 * part for part in self[1:])
        return (
            f"the sign of V_h agrees with the analytic set on {share:.1f} % of {self.states:,} states of the data, of which "
            f"{infeasible:.1f} % are infeasible; {missed:.1f} % of the infeasible ones are missed, {alarms:.1f} % of the "
            "feasible ones are false alarms"
        )


def feasibility_of(model: Any, observations: np.ndarray) -> np.ndarray:
    """V_h at raw observations (N, o), (N,).

    :raises UsageError: if the agent has no such value
    """
    policy = model.policy
    if not hasattr(policy, "values"):
        raise UsageError(f"{type(model).__name__} learns no feasibility value: give a run of FISOR.")
    rows = th.from_numpy(np.ascontiguousarray(observations, np.float32)).to(policy.device)
    with th.no_grad():
        parts = [policy.values(policy.normalized(part).unsqueeze(0))[0, 1] for part in rows.split(65_536)]
    return th.cat(parts).cpu().numpy()


def agreement(model: Any, dataset: OfflineDataset) -> Agreement:
    """Compare on all states of a dataset of the point robot.

    :raises UsageError: for data of another task
    """
    if dataset.meta.get("env_id") != ID:
        raise UsageError(f"The analytic set is that of {ID}: give a dataset of it, not of {dataset.meta.get('env_id')}.")
    observations = np.asarray(dataset.observations)
    learnt, truth = feasibility_of(model, observations) <= 0.0, avoidable(states_of(observations))
    return Agreement(
        len(truth), float((learnt == truth).mean()), float((~truth).mean()), float(learnt[~truth].mean()),
        float((~learnt[truth]).mean()),
    )  # fmt: skip


def regions(model: Any) -> bytes:
    """V_h over the plane for some speeds and headings, its zero line, and the analytic boundary; a PNG.

    :raises UsageError: for an agent of another task
    """
    if model.policy.obs_dim != observation_of(np.zeros((1, 4))).shape[1]:
        raise UsageError(f"The picture is of {ID}: give a run of FISOR on it.")
    axis = np.linspace(-ARENA, ARENA, SIDE)
    x, y = np.meshgrid(axis, axis)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 7.6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
        for panel, (speed, heading) in zip(panels, SLICES, strict=True):
            states = np.column_stack([x.ravel(), y.ravel(), np.full(x.size, speed), np.full(x.size, heading)])
            learnt = feasibility_of(model, observation_of(states)).reshape(x.shape)
            truth = avoidable(states).reshape(x.shape)
            image = panel.imshow(
                learnt, origin="lower", extent=(-ARENA, ARENA, -ARENA, ARENA), cmap="RdBu_r", vmin=-1.0, vmax=1.0
            )
            panel.contour(x, y, learnt, [0.0], colors="black", linewidths=1.4)
            panel.contour(x, y, truth.astype(float), [0.5], colors="#1a7f37", linewidths=1.4, linestyles="--")
            turn = np.linspace(0, 2 * np.pi, 200)
            circle = HAZARD_RADIUS * np.array([np.cos(turn), np.sin(turn)])
            for hazard in HAZARDS:
                panel.plot(*(hazard[:, None] + circle), color="#555", lw=0.8)
            panel.set_title(f"v = {speed:g} m/s, heading {np.degrees(heading):.0f}°", loc="left", fontsize=9)
            panel.grid(False)
        label = "V_h, learnt (black: its zero; green: the analytic boundary; grey: hazards)"
        figure.colorbar(image, ax=panels.tolist(), label=label, shrink=0.7)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()
