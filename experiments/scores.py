"""Normalised scores: 0 is the worst or a random policy, 1 the best possible or a human, so that games can be averaged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from .markdown import brackets, format_steps, table
from .published import Published
from .runs import FloatArray, Row
from .statistics import iqm, stratified_bootstrap

SCORES = {"train_iqm": "as trained", "unseen_iqm": "unseen levels"}  # metrics of published scores over many tasks
# ProcGen's easy mode, (R_min, R_max): Cobbe et al. 2020, arXiv 1912.01588, as public code quotes it.
PROCGEN_EASY = {
    "bigfish": (1.0, 40.0), "bossfight": (0.5, 13.0), "caveflyer": (3.5, 12.0), "chaser": (0.5, 13.0),
    "climber": (2.0, 12.6), "coinrun": (5.0, 10.0), "dodgeball": (1.5, 19.0), "fruitbot": (-1.5, 32.4),
    "heist": (3.5, 10.0), "jumper": (3.0, 10.0), "leaper": (3.0, 10.0), "maze": (5.0, 10.0), "miner": (1.5, 13.0),
    "ninja": (3.5, 10.0), "plunder": (4.5, 30.0), "starpilot": (2.5, 64.0),
}  # fmt: skip
# Atari, (random, human): the values of the Nature DQN paper's successors, of the five games of Atari-5.
ATARI = {
    "BattleZone": (2360.0, 37187.5), "DoubleDunk": (-18.6, -16.4), "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6), "Qbert": (163.9, 13455.0),
}  # fmt: skip


def score_range(env_id: str) -> tuple[float, float] | None:
    """The returns that count as 0 and 1 in an environment; None where there is no convention."""
    if match := re.fullmatch(r"procgen/(\w+)-easy-v0", env_id):
        return PROCGEN_EASY.get(match[1])
    if match := re.fullmatch(r"(?:ALE/)?([A-Za-z]+?)(?:NoFrameskip)?-v\d", env_id):
        return ATARI.get(match[1])
    return None


def normalized(env_id: str, returns: np.ndarray) -> np.ndarray | None:
    """(R - R_min) / (R_max - R_min), or None where there is no convention; neither end is clipped."""
    ends = score_range(env_id)
    return None if ends is None else (returns - ends[0]) / (ends[1] - ends[0])


def score_section(rows: Sequence[Row], papers: Sequence[Published]) -> Iterator[str]:
    """Normalised scores over all environments that have a scale."""
    yield "## Normalised scores"
    yield ""
    yield (
        "(R - R_min) / (R_max - R_min) of the final policy, with the constants in `experiments/scores.py`; IQM over all runs "
        "of all environments, intervals by the bootstrap stratified by environment. Unfinished runs take no part."
    )
    scores: dict[tuple[str, int], list[tuple[FloatArray, FloatArray]]] = {}
    for row in rows:
        seen, unseen = (normalized(row.env, returns) for returns in (row.returns, row.unseen_returns))
        if seen is not None and unseen is not None and row.finished:
            scores.setdefault((row.label, row.steps), []).append((seen, unseen))
    with_unseen = any(len(unseen) for pairs in scores.values() for _, unseen in pairs)
    header = ["agent", "steps", "environments", "runs", "as trained (IQM)", "95 % interval"]
    header += ["unseen levels (IQM)", "95 % interval"] if with_unseen else []
    body = []
    for (label, steps), pairs in scores.items():
        kinds = list(zip(*pairs, strict=True))[: 1 + with_unseen]
        cells = [label, format_steps(steps), str(len(pairs)), str(sum(len(seen) for seen, _ in pairs))]
        for tasks in kinds:
            filled = [task for task in tasks if len(task)]
            whole = np.concatenate(filled) if filled else np.empty(0)
            cells += [f"{iqm(whole):.3f}", brackets(*stratified_bootstrap(filled), "{:.3f}")] if filled else ["-", "-"]
        body.append(cells)
    yield ""
    yield from table(header, body)
    cited = [paper for paper in papers if any(row.agent == paper.agent for row in rows)]
    if cited:
        yield ""
        for paper in cited:
            what = f"{paper.agent}, {SCORES[paper.metric]}, {paper.place}"
            yield f"- Published {what}: {paper.number}. {paper.source}; {paper.note}."
