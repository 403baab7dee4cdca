"""Pictures of offline data, and of what agents made of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import zip_longest
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from .figures import COLUMNS, OTHERS, STYLE, line_styles
from .runs import Row
from .safe_scores import safe_scores


def coverage(returns: np.ndarray, costs: np.ndarray, behaviours: np.ndarray, title: str) -> bytes:
    """Return against cost of every episode, coloured by the behaviour that made it, as PNG; arrays (E,)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, colour in zip(dict.fromkeys(behaviours.tolist()), OTHERS * 2, strict=False):
            rows = behaviours == name
            label = f"{name} ({rows.sum()})"
            axis.scatter(costs[rows], returns[rows], s=10, alpha=0.6, color=colour, linewidths=0, label=label)
        axis.set(xlabel="cost of the episode", ylabel="return of the episode")
        axis.set_title(title, loc="left")
        axis.legend(frameon=False, fontsize=8, title="behaviour (episodes)", title_fontsize=8)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def reward_and_cost(rows: Sequence[Row]) -> bytes:
    """A PNG: normalised reward against normalised cost, a panel an environment; means, and dots for seeds.

    :param rows: those for which ``has_safe_scores`` holds, at least one
    """
    styles = dict(zip([row.label for row in rows], line_styles(rows), strict=True))
    envs = sorted({row.env for row in rows})
    columns = min(COLUMNS, len(envs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5 * columns + 0.4, 2.9 * -(-len(envs) // columns) + 0.5), dpi=150, layout="constrained")
        panels = figure.subplots(-(-len(envs) // columns), columns, squeeze=False)
        for env, axis in zip_longest(envs, panels.flat):
            if env is None:
                axis.set_axis_off()
            else:
                _scores(axis, env, [(*safe_scores(row), styles[row.label]["color"]) for row in rows if row.env == env])
        dot: dict[str, Any] = {"marker": "o", "linestyle": ""}
        handles = [Line2D([], [], label=label, color=style["color"], **dot) for label, style in styles.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
        picture = BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _scores(axis: Axes, env: str, agents: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> None:
    """One panel of :func:`reward_and_cost`, of (rewards, costs, colour); beyond the limit it is shaded."""
    for rewards, costs, colour in agents:
        axis.scatter(costs, rewards, s=12, color=colour, alpha=0.5, linewidths=0, clip_on=False)
        axis.scatter(costs.mean(), rewards.mean(), s=70, color=colour, edgecolors="white", zorder=3, clip_on=False)
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(0.0, max(2.0, 1.3 * max(costs.max() for _, costs, _ in agents)))
    axis.axvspan(1.0, axis.get_xlim()[1], color="#d73027", alpha=0.06, linewidth=0)
    axis.set_xticks([tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick <= axis.get_xlim()[1]])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="cost / limit", ylabel="normalised reward")
    axis.set_title(env, loc="left", fontsize=11, fontweight="bold")
