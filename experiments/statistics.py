"""Statistics for a handful of seeds: interquartile mean, stratified bootstrap, probability of improvement.

The definitions are those of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice"
(NeurIPS 2021, arXiv:2108.13264). Scores are given per task, one entry per run: a mapping `{task: runs}` or a
sequence `[runs, runs, ...]`, so a 2-D array is (tasks, runs), the transpose of rliable's. Tasks may have unequal
numbers of runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FloatArray = NDArray[np.float64]
Scores = Mapping[Any, ArrayLike] | Sequence[ArrayLike] | FloatArray
Statistic = Callable[..., Any]  # statistic(scores, axis=...), as np.mean and np.median


class Interval(NamedTuple):
    """A confidence interval in the unit of the scores, nan where there is none.

    Both ends are floats for scalar scores, and arrays of the trailing shape where a run is a curve.
    """

    low: Any
    high: Any


class Estimate(NamedTuple):
    """A value with its confidence interval, nan where there is none."""

    value: float
    low: float
    high: float


def iqm(scores: ArrayLike, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of what is left when the lowest and the highest quarter of the scores are dropped.

    `floor(n / 4)` scores are dropped at each end (scipy's `trim_mean`), so with fewer than four scores it is the mean.
    `axis=None` takes all scores together.
    """
    return stats.trim_mean(np.asarray(scores, dtype=np.float64), 0.25, axis=axis)


def stratified_bootstrap(
    scores: Scores,
    statistic: Statistic = iqm,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile interval, under the stratified bootstrap, of a statistic of all runs of all tasks together.

    Every resample draws, within each task, as many runs as the task has, with replacement.
    Each run counts once: with unequal counts, a task with more runs weighs more. A run may be a number or a curve;
    entries of a task are (runs, ...) with one trailing shape.

    :param statistic: called as `statistic(scores, axis=...)`
    :param confidence: size of the interval
    :return: nan at both ends if a task has a single run, whose spread nobody knows
    :raises ValueError: if there is no task, a task has no run, or a score is not finite
    """
    tasks = _tasks(scores)
    if min(map(len, tasks)) < 2:
        unknown = np.full(tasks[0].shape[1:], np.nan)[()]
        return Interval(unknown, unknown)
    rng = np.random.default_rng(seed)
    resampled = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in tasks]
    return Interval(*_percentiles(statistic(np.concatenate(resampled, axis=1), axis=1), confidence))


def interval(
    scores: ArrayLike,
    statistic: Statistic = iqm,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """`stratified_bootstrap` for one task: `scores` is (runs,), or (runs, ...) where a run is a curve."""
    return stratified_bootstrap([scores], statistic, confidence=confidence, resamples=resamples, seed=seed)


def probability_of_improvement(
    x: Scores,
    y: Scores,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """P(X > Y): how likely a run of X beats a run of Y on a task drawn at random, with its bootstrap interval.

    Per task it is the Mann-Whitney U statistic over the number of pairs, ties counting one half; tasks are averaged
    with equal weight. The runs of X and Y are resampled independently within each task.

    :param x: scores of X per task; two mappings are compared on the tasks that both have
    :param y: scores of Y per task
    :return: in [0, 1]; without an interval if a task has a single run of X or Y
    :raises ValueError: if no task is shared, a task has no run, or a score is not finite
    """
    pairs = list(zip(*_shared_tasks(x, y), strict=True))
    rng = np.random.default_rng(seed)
    values, resampled, single = [], np.zeros(resamples), False
    for x_task, y_task in pairs:
        wins = (1 + np.sign(x_task[:, None] - y_task[None, :])) / 2  # (n, m): 1 won, 1/2 tied, 0 lost
        values.append(wins.mean())
        # How often each run is drawn says all about a resample: no need to build it.
        x_counts, y_counts = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in wins.shape)
        resampled += ((x_counts @ wins) * y_counts).sum(axis=1) / (wins.size * len(pairs))
        single |= min(wins.shape) < 2
    if single:
        return Estimate(float(np.mean(values)), np.nan, np.nan)
    return Estimate(float(np.mean(values)), *_percentiles(resampled, confidence))


def _percentiles(resampled: FloatArray, confidence: float) -> FloatArray:
    """Both ends of the central interval: (2, ...) from (resamples, ...)."""
    tail = (1 - confidence) / 2
    return np.quantile(resampled, [tail, 1 - tail], axis=0)


def _tasks(scores: Scores) -> list[FloatArray]:
    named = scores.items() if isinstance(scores, Mapping) else enumerate(scores)
    tasks = {name: np.asarray(runs, dtype=np.float64) for name, runs in named}
    if not tasks:
        raise ValueError("There are no scores: give at least one task with at least one run.")
    for name, runs in tasks.items():
        if runs.ndim == 0:
            raise ValueError("Scores come as one list of runs per task: for a single task, write [scores].")
        if len(runs) == 0:
            raise ValueError(f"Task {name!r} has no run: leave the task out or add a run.")
        if not np.isfinite(runs).all():
            raise ValueError(f"Task {name!r} has a score that is not finite: leave that run out.")
    return list(tasks.values())


def _shared_tasks(x: Scores, y: Scores) -> tuple[list[FloatArray], list[FloatArray]]:
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        shared = [task for task in x if task in y]
        if not shared:
            raise ValueError("X and Y share no task: give runs of both on at least one task.")
        return _tasks({task: x[task] for task in shared}), _tasks({task: y[task] for task in shared})
    x_tasks, y_tasks = _tasks(x), _tasks(y)
    if len(x_tasks) != len(y_tasks):
        raise ValueError(f"X has {len(x_tasks)} tasks and Y has {len(y_tasks)}: give both on the same tasks.")
    return x_tasks, y_tasks
