"""What taking the safest of N candidates costs FISOR: trained runs, evaluated again with other N.

    python -m tether.experiments.candidates results/runs/fisor/*/FISOR/seed-* --episodes 10 --out results/measured/fisor
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .evaluate import evaluate, load_trained
from .manifest import write_atomically
from .markdown import number, table

Scores = dict[tuple[str, int], list[tuple[float, float]]]


def candidates(runs: Sequence[Path], counts: Sequence[int], episodes: int, seed: int = 0) -> Scores:
    """Mean return and cost of each run with each N, under (environment, N), in the order of the runs.

    :param runs: folders of runs of FISOR, or its models
    :param counts: N, from 1 on; 1 is the diffusion policy itself
    :param episodes: of each evaluation; all evaluations start from the same states
    :raises UsageError: for N below 1, an agent that chooses among no candidates, or an environment without costs
    """
    if min(counts) < 1:
        raise UsageError(f"Candidates are 1 or more, not {min(counts)}.")
    scores: Scores = defaultdict(list)
    for run in runs:
        trained = load_trained(run)
        policy: Any = trained.model.policy
        if not hasattr(policy, "n_candidates"):
            raise UsageError(f"{run} holds a {type(trained.model).__name__}, which chooses among no candidates: give FISOR's.")
        for n in counts:
            policy.n_candidates = n
            with closing(trained.make_env(1, seed)) as env:
                trained.model.set_random_seed(seed)
                result = evaluate(trained.model, env, episodes)
            if result.costs is None:
                raise UsageError(f"{trained.env_id} reports no costs.")
            scores[trained.env_id, n].append((float(result.returns.mean()), float(result.costs.mean())))
    return scores


def markdown(scores: Scores, episodes: int) -> Iterator[str]:
    """The table, means over runs."""
    counts = sorted({n for _, n in scores})
    yield "# The safest of N"
    yield ""
    words = f"--counts {' '.join(map(str, counts))} --episodes {episodes}"
    yield f"`python -m tether.experiments.candidates RUNS {words}`: mean return and cost of a run's episodes, means over runs."
    yield ""
    header = ["environment", "runs", *(f"return, N = {n}" for n in counts), *(f"cost, N = {n}" for n in counts)]
    body = []
    for env in sorted({env for env, _ in scores}):
        means = np.array([np.mean(scores[env, n], axis=0) for n in counts]).T
        body.append([env, str(len(scores[env, counts[0]])), *map(number, means.ravel())])
    yield from table(header, body)


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_OR_MODEL")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--episodes", type=int, default=20, metavar="E")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write candidates.md there")
    args = parser.parse_args()
    try:
        scores = candidates(args.runs, args.counts, args.episodes)
    except UsageError as error:
        sys.exit(str(error))
    text = "\n".join(markdown(scores, args.episodes)) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out / "candidates.md", text)


if __name__ == "__main__":
    main()
