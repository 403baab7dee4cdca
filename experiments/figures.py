"""Learning curves and trust regions as pictures: a panel per environment, a line per agent."""

import textwrap
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import zip_longest
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from .diagnostics import Series
from .imagination_report import imagination_of
from .markdown import format_steps
from .runs import FloatArray, Row, Run
from .statistics import interval, iqm

# The agents of this library stand out; the peers that they are measured against stay in the background.
COLOURS = {
    "MDPO": "#1f5fd0",
    "OffPolicyMDPO": "#0aa2c0",
    "BPO": "#e4572e",
    "GBPO": "#f08a24",
    "R2VPO": "#8b3fd1",
    "PPO": "#4d5560",
    "HyperPPO": "#1a9850",
    "HyperPPO-Poincare": "#66bd63",
    "HyperPPO-SRYM": "#3f7fbf",
    "HyperPPO-Unregularized": "#d73027",
    "HyperPPO-Euclidean": "#c98a1b",
    "HyperDDQN": "#1a9850",
    "HyperDDQN-SRYM": "#3f7fbf",
    "HyperDDQN-Euclidean": "#c98a1b",
    "GIRL": "#d6277f",
    "GIRL-NoGrounding": "#f28cb8",
    "GIRL-FixedBeta": "#8f3f97",
    "GIRL-Distill": "#e0559a",
    "DreamerV3": "#3a6ea5",
    "FMQ": "#c79a00",
    "MVP": "#2b8a9e",
    "QC": "#b23a48",
    "FQL": "#5b7f2b",
    "FlowBC": "#a05fa8",
    "FISOR": "#0f766e",
    "PRDC": "#7b5ea7",
    "OGSRL": "#9b2226",
    "OGSRL-Absorb": "#d1495b",
    "GMB-TRPO": "#ca6702",
    "MB-CPO": "#4a7c9b",
    "MB-TRPO": "#86a3b8",
    "CQL": "#6a994e",
    "GCQL": "#386641",
    "CCQL": "#a7c957",
    "GCCQL": "#606c38",
    "BC": "#b5179e",
    "BC-Safe": "#f3a712",
    "TD3BC": "#e07a5f",
    "IQL": "#5e60ce",
    "CPQ": "#6c8ebf",
    "BCQLag": "#8d6e63",
}
PEERS = {
    "SB3-PPO": "#9a8c98",
    "TRPO": "#7a838e",
    "SAC": "#8d8377",
    "TD3": "#6e655a",
    "TQC": "#98a0a9",
    "CrossQ": "#62736b",
    "DQN": "#7f7a8a",
}
OTHERS = ("#b5179e", "#2a9d8f", "#f3722c", "#577590", "#90be6d", "#6d597a")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": "#22262b",
    "axes.labelcolor": "#5b6470",
    "axes.edgecolor": "#9aa1a9",
    "axes.linewidth": 0.7,
    "axes.labelsize": 9,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
COLUMNS = 3
GRID_POINTS = 200
# What the panels show, and the curve of a run that it is.
QUANTITIES = {"return": "mean_reward", "success rate": "success_rate", "cost": "mean_cost"}


def prominence(row: Row) -> tuple[bool, str, str, int]:
    """Sort key: our agents before their peers, then by name."""
    return row.agent in PEERS, row.label, row.env, row.steps


def learning_curves(rows: Sequence[Row]) -> bytes:
    """A PNG: IQM over seeds with its 95 % bootstrap band against steps; success and costs below returns, where there are any.

    A dotted line is where agents that learnt from data go online.

    :param rows: of any number of environments, at least one with an evaluation
    """
    rows = sorted((row for row in rows if row.runs), key=prominence)
    lines = {row.label: line for row, line in zip(rows, line_styles(rows), strict=True)}
    layout, columns = _layout(rows)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(4.3 * columns + 0.4, 3.1 * len(layout) + 0.5), dpi=150, layout=spacing)
        panels = figure.subplots(len(layout), columns, squeeze=False)
        for (envs, quantity), axes in zip(layout, panels, strict=True):
            for env, axis in zip_longest(envs, axes):
                if env:
                    _panel(axis, env, [row for row in rows if row.env == env], lines, quantity)
                else:
                    axis.set_axis_off()
        handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
        return _png(figure, handles, 2 * columns)


def _png(figure: Figure, handles: Sequence[Line2D], columns: int) -> bytes:
    """The figure with its legend below, in lines of so many columns at most, as a PNG that the same figure always gives."""
    _place_legend(figure, handles, columns)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _place_legend(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """In as many columns, up to those, as there is room for; names that are too long for one are broken."""
    for most in range(columns, 0, -1):
        lines = -(-len(handles) // most)
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // lines), frameon=False)
        room = figure.bbox.width / legend.get_window_extent().width
        if room >= 1.0:
            return
        legend.remove()
    longest = max(len(text.get_text()) for text in legend.get_texts())
    for handle in handles:
        handle.set_label(textwrap.fill(str(handle.get_label()), max(1, int(longest * room) - 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False)


# What the second picture shows: name in the log, axis, and whether the axis is logarithmic.
VIOLATIONS = (("clip_fraction", "clip fraction", False), ("approx_kl", "KL(old || new)", True))


def trust_region(rows: Sequence[Row]) -> bytes | None:
    """A PNG: clip fraction and KL of the updates against steps, means over seeds, and the range between them.

    :return: None where no run logged a clip fraction
    """
    drawn = {}
    for row in sorted((row for row in rows if row.runs), key=prominence):
        logs = [log for log in (run.diagnostics for run in row.runs) if "clip_fraction" in log]
        if logs:
            drawn[row.env, row.label] = (row, logs)
    if not drawn:
        return None
    members = [row for row, _ in drawn.values()]
    lines = {row.label: line for row, line in zip(members, line_styles(members), strict=True)}
    envs = sorted({env for env, _ in drawn})
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(4.6 * len(VIOLATIONS) + 0.4, 3.1 * len(envs) + 0.5), dpi=150, layout=spacing)
        panels = figure.subplots(len(envs), len(VIOLATIONS), squeeze=False)
        for env, axes in zip(envs, panels, strict=True):
            axes[0].set_title(env, loc="left", fontsize=11, fontweight="bold")
            for axis, (key, name, logarithmic) in zip(axes, VIOLATIONS, strict=True):
                for (of, label), (_, logs) in drawn.items():
                    if of == env:
                        _draw_log(axis, logs, key, lines[label])
                axis.set_yscale("log" if logarithmic else "linear")
                axis.set_ylabel(name)
                axis.set_xlabel("steps")
                axis.xaxis.set_major_formatter(lambda steps, _: format_steps(steps))
        handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
        return _png(figure, handles, 4)


def distances(rows: Sequence[Row]) -> bytes | None:
    """A PNG: how far policies went from what their trust region lies around, and its radius dashed, where it is logged
    as a distance and not as ratios: means over seeds, and the range between them.

    :return: None where no run logged one
    """
    drawn = _with_series(rows, lambda run: run.diagnostics, lambda log: "trust_region" in log and "clip_fraction" not in log)
    if not drawn:
        return None
    lines, envs = _lines_of(drawn)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(4.6 * len(envs) + 0.4, 3.6), dpi=150, layout=spacing)
        for env, axis in zip(envs, figure.subplots(1, len(envs), squeeze=False)[0], strict=True):
            axis.set_title(env, loc="left", fontsize=10, fontweight="bold")
            for row, logs in drawn:
                if row.env == env:
                    _draw_log(axis, logs, "trust_region", lines[row.label])
                    bounded = [log for log in logs if "trust_region_bound" in log]
                    if bounded:
                        _draw_log(axis, bounded, "trust_region_bound", lines[row.label] | {"linestyle": "--"})
            axis.set_ylim(bottom=0.0)
            axis.set_xlabel("steps")
            axis.xaxis.set_major_formatter(lambda steps, _: format_steps(steps))
        handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
        handles.append(Line2D([], [], label="radius", color="0.4", linestyle="--"))
        return _png(figure, handles, min(2 * len(envs), 4))


# Marks of a logarithmic axis, by what it spans at least.
LOG_MARKS = {5: (1, 2, 5), 2: (1, 1.5, 2, 3, 5, 7), 0: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)}
# What the picture of imagination shows: column of the evaluations, and axis.
IMAGINED = (("dfm", "DFM(100), nats"), ("dfm_short", "DFM(15), nats"), ("decoder_error", "decoder error"))


def imagination(rows: Sequence[Row]) -> bytes | None:
    """A PNG: drift of what world models imagine, over long and short horizons, and the error of its decoding.

    :return: None where no run has a world model
    """
    drawn = _with_series(rows, imagination_of, lambda series: len(series.get("timesteps", ())) > 1)
    if not drawn:
        return None
    lines, envs = _lines_of(drawn)
    with matplotlib.rc_context(STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03)
        figure = Figure(figsize=(3.8 * len(IMAGINED) + 0.4, 3.1 * len(envs) + 0.5), dpi=150, layout=spacing)
        for env, axes in zip(envs, figure.subplots(len(envs), len(IMAGINED), squeeze=False), strict=True):
            axes[0].set_title(env, loc="left", fontsize=11, fontweight="bold")
            for axis, (column, name) in zip(axes, IMAGINED, strict=True):
                for row, series in drawn:
                    if row.env == env:
                        _draw_log(axis, series, column, lines[row.label])
                axis.set_yscale("log")
                low, high = axis.get_ylim()
                marks = next(marks for span, marks in LOG_MARKS.items() if high > span * low)
                axis.yaxis.set_major_locator(LogLocator(subs=marks))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.yaxis.set_minor_locator(NullLocator())
                axis.set_ylabel(name)
                axis.set_xlabel("steps")
                axis.xaxis.set_major_formatter(lambda steps, _: format_steps(steps))
        handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
        return _png(figure, handles, 4)


def _with_series(
    rows: Sequence[Row], of: Callable[[Run], Series], kept: Callable[[Series], bool]
) -> list[tuple[Row, list[Series]]]:
    """The rows with those series of their runs that are kept, where there are any."""
    members = sorted((row for row in rows if row.runs), key=prominence)
    having = [(row, [series for series in map(of, row.runs) if kept(series)]) for row in members]
    return [(row, series) for row, series in having if series]


def _lines_of(drawn: Sequence[tuple[Row, list[Series]]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Line styles by label, and the environments."""
    rows = [row for row, _ in drawn]
    return dict(zip((row.label for row in rows), line_styles(rows), strict=True)), sorted({row.env for row in rows})


def _draw_log(axis: Axes, logs: Sequence[Series], key: str, line: dict[str, Any]) -> None:
    """The mean over seeds of what was logged, and the range between them; smoothed over a fortieth of the run. Seeds without a
    step in common are drawn one by one."""
    stop = min(log["timesteps"][-1] for log in logs)
    start = max(log["timesteps"][0] for log in logs)
    if start > stop:
        for log in logs:
            axis.plot(log["timesteps"], log[key], marker="o", markersize=4, **line)
        return
    grid = np.linspace(start, stop, GRID_POINTS)
    curves = []
    for log in logs:
        window = max(1, len(log["timesteps"]) // 40)
        smooth = np.convolve(np.pad(log[key], (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
        curves.append(np.interp(grid, log["timesteps"], smooth))
    axis.plot(grid, np.mean(curves, axis=0), solid_capstyle="round", **line)
    axis.fill_between(grid, np.min(curves, axis=0), np.max(curves, axis=0), color=line["color"], alpha=0.15, linewidth=0)


def _layout(rows: Sequence[Row]) -> tuple[list[tuple[list[str], str]], int]:
    """Rows of panels as (environments, what the panels show), "" for no environment, and the number of columns."""
    having = {quantity: {row.env for row in rows if len(_finals(row, quantity))} for quantity in QUANTITIES}
    envs = sorted({row.env for row in rows}, key=lambda env: ([env in having[quantity] for quantity in QUANTITIES], env))
    columns = 2 if len(envs) == 4 else min(COLUMNS, len(envs))
    layout = []
    for first in range(0, len(envs), columns):
        band = envs[first : first + columns]
        for quantity, those in having.items():
            if those & set(band):
                layout.append(([env if env in those else "" for env in band], quantity))
    return layout, columns


def _finals(row: Row, quantity: str) -> FloatArray:
    """What the runs of a row end with, (R,), or (0,) where they do not have it."""
    return {"return": row.returns, "success rate": row.successes, "cost": row.costs}[quantity]


def line_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Colour by agent, dashes by the agent's variants, so that an agent looks the same in every panel."""
    others = [agent for agent in dict.fromkeys(row.agent for row in rows) if agent not in COLOURS | PEERS]
    colours = COLOURS | PEERS | {agent: OTHERS[i % len(OTHERS)] for i, agent in enumerate(others)}
    variants: dict[str, list[str]] = {}
    for row in rows:
        labels = variants.setdefault(row.agent, [])
        if row.label not in labels:
            labels.append(row.label)
    peers = [agent for agent in variants if agent in PEERS]
    styles = []
    for row in rows:
        # Greys are hard to tell apart, so peers get dashes of their own.
        dash = variants[row.agent].index(row.label) + (peers.index(row.agent) if row.agent in peers else 0)
        width, order = (1.4, 2) if row.agent in peers else (2.0, 3)
        style = {"color": colours[row.agent], "linestyle": DASHES[dash % len(DASHES)]}
        styles.append(style | {"linewidth": width, "zorder": order})
    return styles


def _panel(axis: Axes, env: str, rows: Sequence[Row], lines: dict[str, dict[str, Any]], quantity: str) -> None:
    for switch in sorted({run.switch for row in rows for run in row.runs if run.switch is not None}):
        axis.axvline(switch, color="#9aa1a9", linestyle=":", linewidth=1.0, zorder=1)
        above: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "top", "fontsize": 8}
        axis.annotate("online", (switch, 1.0), xycoords=("data", "axes fraction"), color="#7b838c", **above)
    for row in rows:
        if len(_finals(row, quantity)):
            # Runs of several budgets share a line style: the end of the shorter line says its budget.
            shorter = any(row.label == other.label and row.steps < other.steps for other in rows)
            remark = "unfinished" if not row.finished else format_steps(row.steps) if shorter else ""
            _draw(axis, row, lines[row.label], QUANTITIES[quantity], remark)
    axis.set_ylabel(quantity)
    axis.set_xlabel("steps")
    axis.set_xlim(left=0)
    axis.margins(y=0.08)
    axis.xaxis.set_major_formatter(lambda steps, _: format_steps(steps))
    axis.locator_params(axis="x", nbins=5)
    axis.locator_params(axis="y", nbins=6)
    if quantity == "return":
        seeds = sorted({len(row.runs) for row in rows})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        # A long name gets smaller letters, or it would run into the number of seeds.
        axis.set_title(env, loc="left", fontsize=11 * min(1.0, 31 / len(env)), fontweight="bold")
        axis.set_title(f"{count} seed{'s' * (seeds[-1] > 1)}", loc="right", fontsize=9, color="#7b838c")


def _draw(axis: Axes, row: Row, line: dict[str, Any], curve: str, remark: str) -> None:
    """One line with its band, or a point with its interval where there is a single evaluation."""
    grid, curves = _on_common_grid(row.runs, curve)
    value, (low, high) = iqm(curves, axis=0), interval(curves, resamples=2000)
    if len(grid) > 1:
        shade = 0.1 if row.agent in PEERS else 0.15
        axis.plot(grid, value, solid_capstyle="round", **line)
        axis.fill_between(grid, low, high, color=line["color"], alpha=shade, linewidth=0, zorder=line["zorder"] - 1)
    else:
        reach = np.nan_to_num(np.stack([value - low, high - value]))
        point: dict[str, Any] = {"marker": "o", "markersize": 5, "capsize": 3}
        axis.errorbar(grid, value, reach, color=line["color"], zorder=line["zorder"], **point)
    place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(remark, (grid[-1], value[-1]), fontsize=8, color=line["color"], **place)


def _on_common_grid(runs: Sequence[Run], name: str) -> tuple[FloatArray, FloatArray]:
    """Curves of several runs at the same steps, linearly interpolated: grid (G,), curves (R, G)."""
    curves = []
    for run in runs:
        values: FloatArray = getattr(run, name)
        known = np.isfinite(values)
        if known.any():
            curves.append((run.timesteps[known], values[known]))
    start, stop = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    if start > stop:  # unfinished runs that have no step in common: the longest speaks
        curves = [max(curves, key=lambda curve: curve[0][-1])]
        start, stop = curves[0][0][0], curves[0][0][-1]
    grid = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = grid[(grid >= start) & (grid <= stop)].astype(np.float64)
    if len(grid) > GRID_POINTS:
        grid = np.linspace(start, stop, GRID_POINTS)
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in curves])
