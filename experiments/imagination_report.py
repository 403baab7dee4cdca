"""What runs of world models tell of imagination: drift, decoder error, and how many steps a return took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .diagnostics import Series
from .markdown import brackets, format_steps, table
from .runs import ENV_KWARGS, FloatArray, Row, Run, read_columns
from .statistics import interval

HORIZON = 100  # of the drift in `evaluations.csv`, or as long as the episodes are
SHORT = 15  # imagined steps that behaviour is learnt from
COLUMNS = ("dfm", "dfm_real", "dfm_none", "dfm_short", "decoder_error", "dfm_horizon")
BASELINE = "DreamerV3"
RETURNS = {"dm_control/": (500.0, 750.0)}  # of at most 1,000
LAST = 4  # evaluations that a mean is taken over: drift is one evaluation's episodes


def imagination_of(run: Run) -> Series:
    """Drift and decoder error at each evaluation, (T,) with ``timesteps``; empty where the run has no world model."""
    path = run.path if run.path.suffix == ".csv" else run.path / "evaluations.csv"
    columns = read_columns(path, ("timesteps", *COLUMNS)) if path.is_file() else {}
    known = np.isfinite(columns.get("dfm", np.empty(0)))
    return {name: values[known] for name, values in columns.items()} if known.any() else {}


def has_imagination(row: Row) -> bool:
    """Whether a row's runs are of world models."""
    return any(imagination_of(run) for run in row.runs)


def steps_to(run: Run, threshold: float) -> float:
    """The environment's own steps until an evaluation first reached a return; inf where none did."""
    repeat = run.settings.get(f"{ENV_KWARGS}action_repeat", 1)
    reached = np.flatnonzero(run.mean_reward >= threshold)
    return float(run.timesteps[reached[0]] * repeat) if len(reached) else float("inf")


def imagination_section(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each environment.

    :param rows: of world models and of the agents beside them
    """
    yield "## Imagination"
    yield ""
    yield (
        f"DFM({HORIZON}): nats between what filtering finds and what the prior imagines along recorded actions, mean over the "
        "lags, on the evaluations' episodes; the model has the grounding vectors that it predicts itself (honest), the real "
        f"ones, or none. DFM({SHORT}) and the decoder's error (squared, of vectors in symlog, over the {HORIZON} lags) are "
        f"of the honest variant. All are means over a run's last {LAST} evaluations, then over seeds, with 95 % bootstrap "
        "intervals. A KL in the latent space of one model is no measure of another's: the decoder's error is. Suite steps are "
        "the environment's own, action repeat included, until an evaluation reached the return: the median over seeds, those "
        "that did not reach it included."
    )
    for env in sorted({row.env for row in rows if has_imagination(row)}):
        yield ""
        yield f"### {env}"
        yield ""
        yield from _table([row for row in rows if row.env == env and row.runs], env)


def _table(rows: Sequence[Row], env: str) -> Iterator[str]:
    returns = next((values for prefix, values in RETURNS.items() if env.startswith(prefix)), ())
    header = ["agent", "grounding", "seeds", f"DFM({HORIZON})", "of the arm's", "real", "none", f"DFM({SHORT})"]
    header += ["decoder error", "of the arm's", *(f"suite steps to {threshold:g}" for threshold in returns)]
    arms = [row for row in rows if row.agent == BASELINE and has_imagination(row)]
    body = []
    for row in rows:
        rivals = [arm for arm in arms if arm.task == row.task]
        mine, arm = _lasts(row), _lasts(rivals[0]) if len(rivals) == 1 else {}  # of several none is the arm
        names = sorted({str(run.manifest["grounding"]) for run in row.runs if "grounding" in run.manifest})
        budget = f", {format_steps(row.steps)}" if any(row.label == o.label and row.steps != o.steps for o in rows) else ""
        cells = [row.label + budget, ", ".join(names) or "-", str(len(row.runs))]
        cells += [_mean(mine, "dfm"), _share(mine, arm, "dfm")]
        cells += [_mean(mine, name) for name in ("dfm_real", "dfm_none", "dfm_short", "decoder_error")]
        cells += [_share(mine, arm, "decoder_error"), *(_steps(row, threshold) for threshold in returns)]
        body.append(cells)
    yield from table(header, body)
    for row in rows:
        lags = _lasts(row).get("dfm_horizon", np.empty(0))
        if len(lags) and lags.min() < HORIZON:
            yield ""
            yield f"- {row.label}: episodes of fewer than {HORIZON} steps; its DFM is over {lags.min():.3g} lags and more."


def _lasts(row: Row) -> dict[str, FloatArray]:
    """Means over the last evaluations of each run that has such, (R,) by column."""
    series = [of for of in map(imagination_of, row.runs) if of]
    known = {name: [of[name][np.isfinite(of[name])][-LAST:] for of in series if name in of] for name in COLUMNS}
    return {name: np.array([values.mean() for values in of if len(values)]) for name, of in known.items()}


def _mean(values: dict[str, FloatArray], name: str) -> str:
    of = values.get(name, np.empty(0))
    if not len(of):
        return "-"
    return f"{of.mean():.3g}" + (f" {brackets(*interval(of, np.mean), '{:.3g}')}" if len(of) > 1 else "")


def _share(mine: dict[str, FloatArray], arm: dict[str, FloatArray], name: str) -> str:
    if not len(mine.get(name, ())) or not len(arm.get(name, ())) or not arm[name].mean():
        return "-"
    return f"{mine[name].mean() / arm[name].mean():.2f}"


def _steps(row: Row, threshold: float) -> str:
    steps = np.array([steps_to(run, threshold) for run in row.runs])
    few = f" ({np.isfinite(steps).sum()} of {len(steps)})" if not np.isfinite(steps).all() else ""
    middle = float(np.median(steps))
    return (format_steps(middle) if np.isfinite(middle) else "-") + few
