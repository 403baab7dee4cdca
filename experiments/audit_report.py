"""The audit in words, tables and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from .audit import ALPHA, BEHAVIOUR, EPISODES, GAMMA, MARGIN, SIMULATED
from .figures import COLOURS, OTHERS, STYLE
from .markdown import brackets, number, table
from .statistics import interval
from .treatment_metrics import EPSILONS

TOLERANCE = 0.1  # discounted costly steps an episode, by which a true cost may pass its limit and still counts as kept
Judged = Sequence[dict[str, Any]]
WHERE = {"train": "estimate", "all": "estimate, all data", "real": "true"}


def markdown(about: dict[str, Any], judged: Judged, command: str) -> Iterator[str]:
    """The report: what was compared, then values, constraints, support and the paper's metrics."""
    yield f"# Audit of {about['env']}"
    yield ""
    yield f"`{command}`"
    yield ""
    simulated = f"means over {SIMULATED} simulated episodes"
    truth = f"computed exactly (steps outside and changes of dose: {simulated})" if about["exact"] else simulated
    yield (
        f"Policies learnt from {about['trained_on']:,} of {about['transitions']:,} transitions (`{about['source']}`, "
        f"{about['episodes']:,} episodes), judged twice. *Estimate*: {EPISODES:,} episodes of {about['horizon']} steps at "
        "most from recorded first states, in the world of the nearest recorded transition of the training part; *estimate, "
        "all data*: the same with all transitions, from first states of the part that was not learnt from. *True*: in the "
        f"environment itself, {truth}. Values and costs are discounted with {GAMMA}. Brackets: 95 % bootstrap intervals of "
        "the mean over seeds. Stochastic policies are judged as they were trained, sampling."
    )
    yield ""
    yield "![Estimated against true value](audit.png)"
    yield ""
    yield from _plain_words(judged)
    yield "## Value and death"
    yield ""
    yield from _values(judged)
    yield ""
    yield from _constraints(about, judged)
    yield "## Support"
    yield ""
    yield from _support(about, judged)
    yield ""
    yield "## The paper's metrics, every open choice named"
    yield ""
    yield from _paper(about, judged)


def _rows(judged: Judged) -> dict[str, list[dict[str, Any]]]:
    """The judgements of each agent, the behaviour policy first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in judged:
        rows.setdefault(one["agent"], []).append(one)
    return rows


def _cell(values: Sequence[float]) -> str:
    """Mean, and its interval where there are several seeds."""
    array = np.array(values, np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        return number(float(array.mean()))
    return f"{number(float(array.mean()))} {brackets(*interval(array, np.mean))}"


def _of(rows: Sequence[dict[str, Any]], where: str, key: str, column: int | None = None) -> list[float]:
    return [float(one[where][key] if column is None else one[where][key][column]) for one in rows]


def _plain_words(judged: Judged) -> Iterator[str]:
    """What a nearest-neighbour estimate does and does not show, with the numbers of these runs."""
    rows = {agent: of for agent, of in _rows(judged).items() if agent != BEHAVIOUR}
    gaps = {agent: float(np.mean(_of(of, "train", "value")) - np.mean(_of(of, "real", "value"))) for agent, of in rows.items()}
    if not gaps:
        return
    worst, best = max(gaps, key=lambda agent: abs(gaps[agent])), min(gaps, key=lambda agent: abs(gaps[agent]))
    estimates = [float(np.mean(_of(of, "train", "value"))) for of in rows.values()]
    truths = [float(np.mean(_of(of, "real", "value"))) for of in rows.values()]
    rank = float(stats.spearmanr(estimates, truths).statistic) if len(rows) > 2 else np.nan
    deaths = [(float(np.mean(_of(of, "all", "death"))), float(np.mean(_of(of, "real", "death")))) for of in rows.values()]
    yield "## What the estimate shows, and what it does not"
    yield ""
    yield (
        "The world of the nearest recorded transition answers every action, also one that nobody took in that state, with "
        "what once followed something similar. It shows whether an optimiser does what it is told in that world: lowers what "
        "is constrained, stays where there are data. It does not show that a policy is good: one that learns which recorded "
        "patients to jump to is estimated to be excellent, however its own patients would fare."
    )
    yield ""
    yield (
        f"Here the value of {worst} is estimated {number(gaps[worst])} too high, that of {best} {number(gaps[best])}; over "
        f"the methods, the ranks of estimates and true values correlate by {number(rank)}. Estimated mortality runs from "
        f"{number(min(e for e, _ in deaths))} to {number(max(e for e, _ in deaths))}, true mortality from "
        f"{number(min(t for _, t in deaths))} to {number(max(t for _, t in deaths))}. Nothing here is evidence about patients."
    )
    yield ""


def _values(judged: Judged) -> Iterator[str]:
    header = ["policy", "seeds", *(f"value, {words}" for words in WHERE.values()), "estimate - true"]
    header += [f"death, {WHERE['all']}", "death, true", "length, estimate", "length, true"]
    body = []
    for agent, rows in _rows(judged).items():
        values = [_of(rows, where, "value") for where in WHERE]
        body.append([
            agent, str(len(rows)), *map(_cell, values), _cell(np.subtract(values[0], values[2]).tolist()),
            *(_cell(_of(rows, where, "death")) for where in ("all", "real")),
            *(_cell(_of(rows, where, "length")) for where in ("train", "real")),
        ])  # fmt: skip
    yield from table(header, body)


def _constraints(about: dict[str, Any], judged: Judged) -> Iterator[str]:
    yield "## Constraints"
    yield ""
    yield (
        "The limit is what the training part's own episodes cost; each cell is the discounted cost of an episode. Kept: seeds "
        f"whose estimate is at most the limit, and whose true cost is at most the limit and {TOLERANCE:g}."
    )
    for j, (name, limit) in enumerate(zip(about["names"], about["limits"], strict=True)):
        yield ""
        yield f"### {name}, limit {limit:.3f}"
        yield ""
        body = []
        for agent, rows in _rows(judged).items():
            estimates, truths = (np.array(_of(rows, where, "costs", j)) for where in ("train", "real"))
            kept = [f"{int((v <= bound).sum())} of {len(v)}" for v, bound in ((estimates, limit), (truths, limit + TOLERANCE))]
            body.append([agent, *(_cell(v.tolist()) for v in (estimates, truths)), *kept])
        yield from table(["policy", "estimate", "true", "kept, estimate", "kept, true"], body)
    yield ""


def _support(about: dict[str, Any], judged: Judged) -> Iterator[str]:
    known = any("inadmissible" in one["real"] for one in judged)
    guardian = f"kernel density of bandwidth {about['bandwidth']:.3g}, {ALPHA:.0%} of the training part outside"
    yield f"Outside: share of steps where the guardian ({guardian}) objects."
    yield ""
    if about["guardian"] is not None:
        precision, recall, area = (number(about["guardian"][key]) for key in ("precision", "recall", "auc"))
        yield (
            "Inadmissible: share of steps with an action that clinicians hardly ever took in that state. Of every state with "
            f"every action the guardian objects to inadmissible ones with a precision of {precision}, a recall of {recall}; "
            f"an inadmissible pair is less dense than an admissible one with a probability of {area}."
        )
        yield ""
    header = ["policy", "outside, estimate", "outside, true", *(["inadmissible, true"] if known else [])]
    body = []
    for agent, rows in _rows(judged).items():
        cells = [_cell(_of(rows, where, "outside")) for where in ("train", "real")]
        body.append([agent, *cells, *([_cell(_of(rows, "real", "inadmissible"))] if known else [])])
    yield from table(header, body)


def _paper(about: dict[str, Any], judged: Judged) -> Iterator[str]:
    yield (
        "MCR: share of logged steps at which the policy is nearer to the clinician than epsilon, here a share of the largest "
        "distance of two actions. AIR: of the logged steps with a cost that calls for more treatment, the share with a higher "
        "dose of either drug than the clinician's in the step before; by at least "
        f"{MARGIN:g} more; of both drugs; than the clinician's in the same step. ACP: mean change of each dose from step to "
        "step, in the environment. Unsafe: reduction of the share of costly steps against the logged ones, in percent, by the "
        "estimate on all data."
    )
    yield ""
    header = ["policy", *(f"MCR {epsilon:g}" for epsilon in EPSILONS), "AIR before", "by more", "both", "same step"]
    first = next(iter(judged))
    header += [f"ACP dose {k + 1}" for k in range(len(first["change"]))] + [f"unsafe {name}" for name in about["names"]]
    body = []
    for agent, rows in _rows(judged).items():
        keys = ("concordance", "intensification", "change", "reduction")
        cells = [np.mean([one[key] for one in rows], axis=0) for key in keys]
        body.append([agent, *(number(float(value)) for values in cells for value in values)])
    yield from table(header, body)


def picture(judged: Judged) -> bytes:
    """A PNG: estimated against true value of every policy, one dot a seed, and the line where they agree."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axis = figure.subplots()
        colours = {BEHAVIOUR: "#222"} | COLOURS
        every: list[float] = []
        for agent, rows in _rows(judged).items():
            estimates, truths = _of(rows, "train", "value"), _of(rows, "real", "value")
            every += truths
            marker, size = ("*", 130) if agent == BEHAVIOUR else ("o", 30)
            look = {"marker": marker, "s": size, "color": colours.get(agent, OTHERS[0]), "alpha": 0.8, "linewidths": 0}
            axis.scatter(truths, estimates, label=agent, **look)  # type: ignore[arg-type]
        low, high = min(every), max(every)
        pad = 0.15 * (high - low) + 1e-9
        ends = np.array([low - pad, high + pad])
        axis.plot(ends, ends, color="#555", linestyle="--", linewidth=1.0, label="estimate = true", zorder=1)
        axis.set_xlim(*ends)
        axis.set(xlabel="true value", ylabel="estimated value (nearest recorded transition)")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
