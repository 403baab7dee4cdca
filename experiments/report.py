"""Tables, figures and statistics from runs: what `tether report` prints and writes."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .figures import distances, imagination, learning_curves, prominence, trust_region
from .imagination_report import has_imagination, imagination_section
from .markdown import brackets, format_steps, number, ranges, table
from .offline_figures import reward_and_cost
from .published import Published, read_published, same_task
from .runs import FloatArray, Row, Run, RunError, group, load_runs
from .safe_scores import METRICS, has_safe_scores, safe_section
from .scores import SCORES, score_range, score_section
from .statistics import Estimate, interval, iqm, probability_of_improvement, stratified_bootstrap

SUMMARY_COLUMNS = (
    *("env", "agent", "steps", "source", "finished", "quantity", "statistic"),
    *("seed", "versus", "value", "low", "high", "runs"),
)
FEW_SEEDS = 5
PICTURES = {
    "curves.png": "Learning curves: IQM over seeds with 95 % bootstrap bands",
    "reward-cost.png": "Reward and cost of what was learnt from data: large dots are means over seeds, shaded is unsafe",
    "trust-region.png": "How far updates leave the trust region: means over seeds, the range between them shaded",
    "distances.png": "How far policies and world models' drift go within their trust regions: means over seeds, range shaded",
    "imagination.png": "Drift of imagination and its decoder's error: means over seeds, the range between them shaded",
}


@dataclass(frozen=True)
class Comparison:
    """Probability that agent `x` beats agent `y`, over the tasks (`Row.task`) that both have finished."""

    x: str
    y: str
    quantity: str
    """`"return"` or `"success"`, where more is better, or `"cost"`, where less is."""
    tasks: int
    runs: str
    estimate: Estimate


def report(
    paths: Iterable[str | Path],
    published: str | Path | None = None,
    out: str | Path | None = None,
    envs: Sequence[str] | None = None,
) -> str:
    """Compare runs: tables with intervals, learning curves, and how all of it was made.

    :param paths: as `load_runs` takes them; of several copies of a run the one named first counts
    :param published: folder of CSV files with the numbers of papers; None takes `results/published` where it exists
    :param out: folder to write `report.md`, `summary.csv` and :data:`PICTURES`, those that there is something to show in, to;
        None writes nothing
    :param envs: only these environments
    :return: the report as Markdown
    :raises RunError: if there is no run, or a file is missing or damaged
    """
    runs = [run for run in load_runs(paths) if envs is None or run.env in envs]
    if not runs:
        raise RunError(f"There is no run on {', '.join(envs or [])}: check the environment's id.")
    rows = sorted(group(runs), key=prominence)
    papers = read_published(published)
    comparisons = list(_comparisons(rows))
    pictures = _pictures(rows) if out is not None else {}
    text = "\n".join(_document(rows, papers, comparisons, list(pictures)))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            _write(folder / name, picture)
        _write(folder / "summary.csv", _summary(rows, comparisons).encode())
        _write(folder / "report.md", text.encode())
    return text


def _pictures(rows: Sequence[Row]) -> dict[str, bytes]:
    """Those of :data:`PICTURES` that there is something to show in."""
    drawable, safe = any(row.runs for row in rows), _safe(rows)
    made = {
        "curves.png": learning_curves(rows) if drawable else None,
        "reward-cost.png": reward_and_cost(safe) if safe else None,
        "trust-region.png": trust_region(rows),
        "distances.png": distances(rows),
        "imagination.png": imagination(rows),
    }
    return {name: picture for name, picture in made.items() if picture is not None}


def _safe(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.finished and has_safe_scores(row)]


# ------------------------------------------------------------------------------------------------ the document


def _document(
    rows: Sequence[Row], papers: Sequence[Published], comparisons: Sequence[Comparison], pictures: Sequence[str]
) -> Iterator[str]:
    yield "# Report"
    yield ""
    yield (
        "The return of a run is that of its last evaluation, made with the final policy. IQM is the interquartile mean "
        "over seeds, brackets hold 95 % bootstrap intervals (Agarwal et al. 2021), std is over seeds, and steps/s are "
        "training steps per second of wall time (median over seeds)."
    )
    for name in pictures:
        yield ""
        yield f"![{PICTURES[name]}]({name})"
    for env in sorted({row.env for row in rows}):
        yield ""
        yield f"## {env}"
        yield ""
        of_task = [p for p in papers if p.metric in ("return", "success_rate") and same_task(p.env, env)]
        yield from _env_section([row for row in rows if row.env == env], of_task)
    if any(score_range(row.env) for row in rows):
        yield ""
        yield from score_section(rows, [p for p in papers if p.metric in SCORES])
    if safe := _safe(rows):
        yield ""
        yield from safe_section(safe, [p for p in papers if p.metric in METRICS])
    if any(has_imagination(row) for row in rows):
        yield ""
        yield from imagination_section(rows)
    if len({row.env for row in rows if row.finished and len(row.successes)}) > 1:
        yield ""
        yield from _success_section(rows)
    if comparisons:
        yield ""
        yield from _comparison_section(comparisons)
    yield ""
    yield from _making_section(rows)


def _env_section(rows: Sequence[Row], papers: Sequence[Published]) -> Iterator[str]:
    """The table of one environment and its footnotes."""
    rows = sorted(rows, key=lambda row: (row.steps, -iqm(row.returns) if row.runs else np.inf))
    with_costs = any(len(row.costs) for row in rows)
    with_unseen = any(len(row.unseen_returns) for row in rows)
    with_success = any(len(row.successes) for row in rows)
    cited = {(row.agent, row.steps): _cited(row, papers) for row in rows}
    places = {paper.place for found in cited.values() for paper in found}
    header = ["agent", "seeds", "steps", "return (IQM)", "95 % interval", "mean", "std"]
    header += ["unseen levels (IQM)", "95 % interval"] if with_unseen else []
    header += ["cost (IQM)", "cost, 95 % interval", "mean cost"] if with_costs else []
    header += ["success (IQM)", "success, 95 % interval", "mean success"] if with_success else []
    header += [f"published ({places.pop()})" if len(places) == 1 else "published"] if any(cited.values()) else []
    header += ["steps/s"]
    body = []
    for row in rows:
        cells = [row.label, str(len(row.runs)), format_steps(row.steps), *_score_cells(row.returns), _std(row.returns)]
        cells += _score_cells(row.unseen_returns)[:2] if with_unseen else []
        cells += _score_cells(row.costs) if with_costs else []
        cells += _score_cells(row.successes) if with_success else []
        cells += [_published_cell(cited[row.agent, row.steps], header)] if any(cited.values()) else []
        cells += [number(_speed(row))]
        body.append(cells)
    yield from table(header, body)
    notes = [*_notes(rows), *_citations(cited)]
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)


def _cited(row: Row, papers: Sequence[Published]) -> list[Published]:
    """The published numbers of a row's agent: those of its environment and budget where there are any, else all."""
    own = [paper for paper in papers if paper.agent == row.agent]
    return [paper for paper in own if (paper.env, paper.steps) == (row.env, row.steps)] or own


def _score_cells(scores: FloatArray) -> list[str]:
    """IQM, interval and mean of one score per seed."""
    if not len(scores):
        return ["-", "-", "-"]
    return [number(iqm(scores)), brackets(*interval(scores)), number(scores.mean())]


def _published_cell(papers: Sequence[Published], header: Sequence[str]) -> str:
    """The numbers of the papers, with environment and budget where the header does not say them."""
    if "published" in header:
        return "; ".join(f"{paper.number} ({paper.place})" for paper in papers) or "-"
    return "; ".join(paper.number for paper in papers) or "-"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What a reader of the table must know to trust it."""
    for row in rows:
        unfinished = ", ".join(_progress(run) for run in row.left_out)
        if row.left_out and row.finished:
            yield f"{row.label}: unfinished runs are left out ({unfinished})."
        elif not row.finished:
            progress = ", ".join(_progress(run) for run in [*row.runs, *row.left_out])
            yield f"{row.label}: **no run has finished**; the numbers are of the last evaluation so far ({progress})."
        if row.source == "training":
            yield (
                f"{row.label}: returns of training episodes (SB3's `rollout/ep_rew_mean`), not evaluations; "
                "they are not comparable with the evaluated rows."
            )
    for agent in dict.fromkeys(row.agent for row in rows):
        budgets = sorted({row.steps for row in rows if row.agent == agent})
        if len(budgets) > 1:
            lengths = ", ".join(map(format_steps, budgets))
            yield f"{agent}: runs of different lengths ({lengths} steps) are not mixed; each has a row of its own."
        phases = dict.fromkeys(run.switch for row in rows if row.agent == agent for run in _all_runs([row]))
        for switch in phases:
            if switch is not None:
                yield f"{agent}: the first {format_steps(switch)} steps are gradient steps on data, the others are env steps."
    few = [row.label for row in rows if 1 < len(row.runs) < FEW_SEEDS]
    if few:
        yield f"Fewer than {FEW_SEEDS} seeds: the intervals of {', '.join(few)} are rough, and rather too narrow."
    yield from _version_warning(rows)
    if len({_machine(run.manifest["hardware"]) for run in _all_runs(rows) if run.manifest.get("hardware")}) > 1:
        yield "The runs come from different machines: compare steps/s only within one."


def _version_warning(rows: Sequence[Row]) -> Iterator[str]:
    """MuJoCo's dynamics change between versions, and with them what a return means."""
    users: dict[str, list[str]] = {}
    for row in rows:
        for run in row.runs:
            version = (run.manifest.get("versions") or {}).get("mujoco")
            if version and row.label not in users.setdefault(version, []):
                users[version].append(row.label)
    if len(users) > 1:
        found = "; ".join(f"{version}: {', '.join(labels)}" for version, labels in sorted(users.items()))
        yield f"**Warning: this table mixes MuJoCo versions, whose dynamics differ** ({found})."


def _citations(cited: Mapping[tuple[str, int], Sequence[Published]]) -> Iterator[str]:
    for paper in dict.fromkeys(paper for papers in cited.values() for paper in papers):
        kind = f" ({paper.spread_kind})" if paper.spread_kind else ""
        note = f"; {paper.note}" if paper.note else ""
        yield f"Published {paper.agent} on {paper.place}: {paper.number}{kind}. {paper.source}{note}."


def _progress(run: Run) -> str:
    return f"seed {run.seed} at {format_steps(run.reached)} of {format_steps(run.steps)} steps"


# ------------------------------------------------------------------------------------------- across environments


def _comparisons(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Every pair of agents that share a task. Rows of unfinished runs take no part."""
    for quantity, of in (
        ("return", lambda row: row.returns), ("success", lambda row: row.successes), ("cost", lambda row: -row.costs)
    ):  # fmt: skip
        scores: dict[str, dict[tuple[str, int, str], FloatArray]] = {}
        for row in rows:
            if row.finished and len(of(row)):
                scores.setdefault(row.label, {})[row.task] = of(row)
        for x, y in combinations(scores, 2):
            shared = [task for task in scores[x] if task in scores[y]]
            if shared:
                counts = [sum(len(scores[label][task]) for task in shared) for label in (x, y)]
                estimate = probability_of_improvement(scores[x], scores[y])
                yield Comparison(x, y, quantity, len(shared), f"{counts[0]} / {counts[1]}", estimate)


def _comparison_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    yield "## Probability of improvement"
    yield ""
    yield (
        "How likely a run of X ends better than a run of Y on the same environment, with the same arguments of it and the "
        "same budget, ties counting one half, averaged over the environments that both have finished. The intervals are "
        "not corrected for the number of pairs; one without width says that these few seeds do not overlap, not that no "
        "seed would."
    )
    for quantity, better in (("return", "higher return"), ("success", "higher success rate"), ("cost", "lower cost")):
        chosen = [comparison for comparison in comparisons if comparison.quantity == quantity]
        if chosen:
            yield ""
            header = ["X", "Y", f"P(X has the {better})", "95 % interval", "environments", "runs X / Y"]
            yield from table(
                header,
                [
                    [c.x, c.y, f"{c.estimate.value:.2f}", brackets(*c.estimate[1:], "{:.2f}"), str(c.tasks), c.runs]
                    for c in chosen
                ],
            )


def _success_section(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Success"
    yield ""
    yield (
        "Share of episodes whose last step is a success, of the final policy: over all runs of all environments that report "
        "it, with intervals by the bootstrap stratified by environment."
    )
    rates: dict[tuple[str, int], dict[str, FloatArray]] = {}
    for row in rows:
        if row.finished and len(row.successes):
            rates.setdefault((row.label, row.steps), {})[row.env] = row.successes
    body = []
    for (label, steps), of in rates.items():
        every = np.concatenate(list(of.values()))
        cells = [label, format_steps(steps), str(len(of)), str(len(every))]
        for statistic in (iqm, np.mean):
            ends = stratified_bootstrap(of, statistic)
            cells += [f"{statistic(every):.3f}", brackets(*ends, "{:.3f}")]
        body.append(cells)
    yield ""
    header = ["agent", "steps", "environments", "runs", "IQM", "95 % interval", "mean", "95 % interval"]
    yield from table(header, body)


# ------------------------------------------------------------------------------------------------ how it was made


def _making_section(rows: Sequence[Row]) -> Iterator[str]:
    yield "## How it was made"
    commands: dict[str, list[int]] = {}
    for run in _all_runs(rows):
        command = re.sub(r" --out[ =]\S+", "", run.manifest.get("command") or "")  # where it lay changes no number
        if command:
            commands.setdefault(re.sub(r"--seed[ =]\d+", "--seed K", command), []).append(run.seed)
    if commands:
        yield ""
        yield "```"
        width = max(map(len, commands))
        yield from (f"{command:{width}}  # seed {ranges(seeds)}" for command, seeds in commands.items())
        yield "```"
    yield ""
    yield from (f"- {line}" for line in _circumstances(list(_all_runs(rows))))


def _circumstances(runs: Sequence[Run]) -> Iterator[str]:
    """Evaluation, versions, hardware and code of the runs, each with what differs."""
    yield f"Evaluation: {_evaluation(runs)}."
    manifests = [run.manifest for run in runs if run.manifest]
    versions: dict[str, list[str]] = {}
    for manifest in manifests:
        for package, version in (manifest.get("versions") or {}).items():
            if version not in versions.setdefault(package, []):
                versions[package].append(version)
    if versions:
        yield "Versions: " + ", ".join(f"{package} {' / '.join(found)}" for package, found in versions.items()) + "."
    hardware = dict.fromkeys(_machine(manifest["hardware"]) for manifest in manifests if manifest.get("hardware"))
    if hardware:
        yield "Hardware: " + "; ".join(hardware) + "."
    code = dict.fromkeys(_revision(manifest["git"]) for manifest in manifests if manifest.get("git"))
    if code:
        yield "Code: " + ", ".join(code) + "."
    if len(manifests) < len(runs):
        missing = f"{len(runs) - len(manifests)} of {len(runs)} runs"
        yield f"Without a manifest: {missing}; their names come from their folders, the rest is unknown."


def _evaluation(runs: Sequence[Run]) -> str:
    evaluated = [run for run in runs if run.source == "evaluation" and len(run.timesteps)]
    kinds = set()
    for run in evaluated:
        # `tether train` evaluates without noise; a run by another hand says so, or nothing is known.
        known = run.manifest.get("deterministic", True) if run.manifest else None
        kinds.add({True: "deterministic actions", False: "sampled actions", None: "actions not recorded"}[known])
    kinds |= {"sampled actions during training" for run in runs if run.source == "training"}
    episodes = sorted({int(run.episodes[-1]) for run in evaluated if np.isfinite(run.episodes[-1])})
    count = [f"{' or '.join(map(str, episodes))} episodes"] if episodes else []
    return ", ".join([*sorted(kinds), *count]) or "none yet"


def _revision(git: Mapping[str, Any]) -> str:
    revision = str(git.get("revision", "unknown"))[:12]
    return f"{revision} with local changes" if git.get("dirty") else revision


def _machine(hardware: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {hardware[part]}" for part in ("cpu", "cores", "gpu") if hardware.get(part) is not None)


# ---------------------------------------------------------------------------------------------------- the files


def _summary(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """All numbers of the report in long format: one number a line, empty where a column does not apply."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, SUMMARY_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        place = {"env": row.env, "agent": row.label, "steps": row.steps, "source": row.source}
        for line in _row_summary(row):
            writer.writerow(place | {"finished": row.finished, "runs": len(row.runs)} | line)
    for c in comparisons:
        estimate = dict(zip(("value", "low", "high"), map(_exact, c.estimate), strict=True))
        names = {"agent": c.x, "versus": c.y, "quantity": c.quantity, "statistic": "probability_of_improvement"}
        writer.writerow(names | {"runs": c.runs} | estimate)
    return buffer.getvalue()


def _row_summary(row: Row) -> Iterator[dict[str, Any]]:
    quantities = {"return": row.returns, "unseen_return": row.unseen_returns, "cost": row.costs, "success": row.successes}
    for quantity, scores in quantities.items():
        if not len(scores):
            continue
        for run, score in zip(row.runs, scores, strict=True):
            yield {"quantity": quantity, "statistic": "final", "seed": run.seed, "value": _exact(score), "runs": 1}
        low, high = map(_exact, interval(scores))
        yield {"quantity": quantity, "statistic": "iqm", "value": _exact(iqm(scores)), "low": low, "high": high}
        yield {"quantity": quantity, "statistic": "mean", "value": _exact(scores.mean())}
        if len(scores) > 1:
            yield {"quantity": quantity, "statistic": "std", "value": _exact(scores.std(ddof=1))}
    if np.isfinite(_speed(row)):
        yield {"quantity": "steps_per_second", "statistic": "median", "value": _exact(_speed(row))}


def _write(path: Path, data: bytes) -> None:
    """Write beside, then rename: a reader never sees half a file, and a full disk leaves the former one."""
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- small helpers


def _all_runs(rows: Iterable[Row]) -> Iterator[Run]:
    for row in rows:
        yield from row.runs
        yield from row.left_out


def _speed(row: Row) -> float:
    """Median training steps per second of wall time, nan where no manifest tells."""
    speeds = [run.steps_per_second for run in row.runs if np.isfinite(run.steps_per_second)]
    return float(np.median(speeds)) if speeds else float("nan")


def _std(scores: FloatArray) -> str:
    return number(scores.std(ddof=1)) if len(scores) > 1 else "-"


def _exact(value: float) -> str:
    """For machines: every digit, empty for nan."""
    return repr(float(value)) if np.isfinite(value) else ""
