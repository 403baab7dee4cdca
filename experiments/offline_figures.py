"""Pictures of offline data."""

from __future__ import annotations

from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .figures import OTHERS, STYLE


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
