"""How trained chunk policies act: the same runs evaluated as one sample, as the best of N, and with QGBS.

    python -m tether.experiments.acting results/runs/fmq/*/*/seed-* --episodes 50 --out results/measured/fmq
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .evaluate import evaluate, load_trained
from .manifest import read_manifest, write_atomically
from .markdown import brackets, number, table
from .statistics import interval

# What each way sets of a policy: its inference, and the arguments of the search.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "best-of-n": ("best-of-n", {}),
    "qgbs": ("qgbs", {}),
    "qgbs-jump": ("qgbs", {"denoise": "jump"}),
    "qgbs-elitist": ("qgbs", {"denoise": "jump", "keep_incumbents": True}),
}
COLUMNS = ("env", "agent", "way", "seed", "success_rate", "mean_reward", "calls")


@dataclass(frozen=True)
class Score:
    """One run acting in one way.

    :param calls: rows of the actor's network for one chunk
    """

    env: str
    agent: str
    way: str
    seed: int
    success_rate: float
    mean_reward: float
    calls: float


def acting(runs: Sequence[Path], ways: Sequence[str], episodes: int, seed: int = 20_000) -> list[Score]:
    """Each run in each way that its policy can act.

    :param runs: folders of finished runs of agents with action chunks
    :param episodes: of each evaluation; all evaluations start from the same states
    :raises UsageError: for an agent without chunks, or an environment that reports no success
    """
    scores = []
    for run in runs:
        trained, manifest = load_trained(run), read_manifest(run)
        policy: Any = trained.model.policy
        if not hasattr(policy, "network_calls") or manifest is None:
            raise UsageError(f"{run} is no run of an agent with action chunks: give those of FMQ, MVP, QC, FQL or FlowBC.")
        search: Any = getattr(policy, "search", None)
        for way in ways:
            inference, arguments = WAYS[way]
            of_one = inference == "best-of-n" and getattr(policy, "n_candidates", 1) == 1  # which is plain
            if inference not in getattr(policy, "INFERENCE", ("plain",)) or of_one:
                continue
            if hasattr(policy, "inference"):
                policy.inference = inference
            if inference == "qgbs":
                policy.search = replace(search, **arguments)
            before, chunks = policy.network_calls, policy.chunks_made
            with closing(trained.make_env(min(episodes, 10), seed)) as env:
                trained.model.set_random_seed(seed)
                result = evaluate(trained.model, env, episodes)
            if result.successes is None:
                raise UsageError(f"{trained.env_id} reports no success.")
            calls = (policy.network_calls - before) / (policy.chunks_made - chunks)
            who = (trained.env_id, manifest["agent"], way, manifest["seed"])
            scores.append(Score(*who, float(result.successes.mean()), float(result.returns.mean()), calls))
    return scores


def markdown(scores: Sequence[Score], ways: Sequence[str], episodes: int) -> Iterator[str]:
    """A table of success: an agent and a way a row, a task a column with its bootstrap interval over runs, their mean last."""
    pairs = list(dict.fromkeys((score.agent, score.way) for score in scores))
    yield "# Ways of acting"
    yield ""
    yield f"`python -m tether.experiments.acting RUNS --ways {' '.join(ways)} --episodes {episodes}`:"
    yield "success of the final policies, means over runs with 95 % stratified-bootstrap intervals over them; calls of the"
    yield "actor's network for one chunk of actions."
    yield ""
    envs = sorted({score.env for score in scores})
    body = []
    for agent, way in pairs:
        own = [score for score in scores if (score.agent, score.way) == (agent, way)]
        of = [[s.success_rate for s in own if s.env == env] for env in envs]
        cells = [_with_interval(values) if values else "-" for values in of]
        body.append([agent, way, f"{np.mean([s.calls for s in own]):g}", *cells, number(_mean_of(of))])
    yield from table(["agent", "acts by", "calls", *envs, "mean"], body)


def _with_interval(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, high = interval(values, np.mean)
    return f"{np.mean(values):.2f} {brackets(float(low), float(high), '{:.2f}')}"


def _mean_of(tasks: Sequence[Sequence[float]]) -> float:
    """Of the tasks' means; nan where one is missing."""
    return float(np.mean([np.mean(values) if values else np.nan for values in tasks]))


def rows(scores: Sequence[Score]) -> str:
    """The scores as CSV."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(score) for score in scores)
    return file.getvalue()


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--episodes", type=int, default=50, metavar="E")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write acting.md and acting.csv there")
    args = parser.parse_args()
    try:
        scores = acting(args.runs, args.ways, args.episodes)
    except UsageError as error:
        sys.exit(str(error))
    text = "\n".join(markdown(scores, args.ways, args.episodes)) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "acting.md", text)
        write_atomically(args.out / "acting.csv", rows(scores))


if __name__ == "__main__":
    main()
