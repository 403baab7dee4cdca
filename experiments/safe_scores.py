"""Offline runs in the units of safe offline RL: rewards between two reference returns, costs in cost limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .markdown import brackets, format_steps, number, table
from .published import Published, same_task
from .runs import FloatArray, Row, Run
from .statistics import interval

METRICS = ("normalized_reward", "normalized_cost")


def cost_limit(env_id: str) -> float:
    """Cost of an episode that counts as safe: 10 in Safety-Gymnasium's tasks, 5 elsewhere, as in FISOR's table."""
    return 10.0 if re.match(r"Safety\w+Velocity-v\d+$", env_id) else 5.0


def normalized_reward(returns: Any, low: Any, high: Any) -> Any:
    """(R - R_min) / (R_max - R_min); not clipped."""
    return (np.asarray(returns) - low) / (high - low)


def normalized_cost(costs: Any, limit: float) -> Any:
    """(C + e) / (limit + e), e = 1 where the limit is 0 and 0 elsewhere: safe is at most 1."""
    offset = 1.0 if limit == 0.0 else 0.0
    return (np.asarray(costs) + offset) / (limit + offset)


def safe_scores(row: Row) -> tuple[FloatArray, FloatArray]:
    """Normalised rewards and costs of the final policies, (R,) each, of a row for which :func:`has_safe_scores` holds."""
    low, high = np.array([_references(run) for run in row.runs], np.float64).T
    return normalized_reward(row.returns, low, high), normalized_cost(row.costs, cost_limit(row.env))


def has_safe_scores(row: Row) -> bool:
    """Whether all runs of a row learnt from a dataset with reference returns, in an environment that reports costs."""
    return bool(row.runs) and len(row.costs) == len(row.runs) and all(map(_references, row.runs))


def _references(run: Run) -> tuple[float, float] | None:
    data = run.manifest.get("dataset") or {}
    ends = data.get("reference_min_return"), data.get("reference_max_return")
    return None if None in ends else ends  # type: ignore[return-value]


def safe_section(rows: Sequence[Row], papers: Sequence[Published]) -> Iterator[str]:
    """A table for each environment, and one of the means over them.

    :param rows: those for which :func:`has_safe_scores` holds
    :param papers: published numbers of :data:`METRICS`
    """
    yield "## Safe offline RL"
    yield ""
    yield (
        "Reward: (R - R_min) / (R_max - R_min) with the reference returns of the dataset (DSRL's where it has the task, else "
        "those of the data). Cost: an episode's cost over the limit, so that at most 1 is safe. Means over seeds of the final "
        "policy, with 95 % bootstrap intervals. Published numbers are of other data (DSRL's) and longer training."
    )
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for env in sorted({row.env for row in rows}):
        yield ""
        yield f"### {env}, cost limit {cost_limit(env):g}"
        yield ""
        yield from _table([row for row in rows if row.env == env], papers, scores)
    if len({row.env for row in rows}) > 1:
        yield ""
        yield from _averages(scores)


def _table(
    rows: Sequence[Row], papers: Sequence[Published], scores: dict[str, dict[str, tuple[float, float]]]
) -> Iterator[str]:
    cited = {row.label: _published(row, papers) for row in rows}
    header = ["agent", "seeds", "steps", "reward", "95 % interval", "cost", "95 % interval", "safe", "raw cost"]
    header += ["published reward / cost"] if any(cited.values()) else []
    body = []
    for row in sorted(rows, key=lambda row: row.label):
        rewards, costs = safe_scores(row)
        scores.setdefault(row.label, {})[row.env] = (float(rewards.mean()), float(costs.mean()))
        cells = [row.label, str(len(row.runs)), format_steps(row.steps), *_cells(rewards), *_cells(costs)]
        cells += ["yes" if costs.mean() <= 1.0 else "**no**", number(row.costs.mean())]
        body.append(cells + ([cited[row.label] or "-"] if any(cited.values()) else []))
    yield from table(header, body)


def _cells(values: FloatArray) -> list[str]:
    return [f"{values.mean():.2f}", brackets(*interval(values, np.mean), "{:.2f}")]


def _published(row: Row, papers: Sequence[Published]) -> str:
    own = [p for p in papers if p.agent == row.agent and same_task(p.env, row.env)]
    found = [next((p.value for p in own if p.metric == metric), None) for metric in METRICS]
    return "" if None in found else " / ".join(map(str, found))


def _averages(scores: dict[str, dict[str, tuple[float, float]]]) -> Iterator[str]:
    yield "### Means over environments"
    yield ""
    body = []
    for label, of in scores.items():
        rewards, costs = np.array(list(of.values())).T
        safe = f"{int((costs <= 1.0).sum())} of {len(of)}"
        body.append([label, str(len(of)), f"{rewards.mean():.2f}", f"{costs.mean():.2f}", f"{costs.max():.2f}", safe])
    yield from table(["agent", "environments", "reward", "cost", "largest cost", "safe in"], body)
