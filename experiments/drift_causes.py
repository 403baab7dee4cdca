"""Which part of GIRL moves the drift of imagination: world models of several kinds, learnt from one and the same memory.

    python -m tether.experiments.drift_causes results/runs/girl-cartpole/dm_control--cartpole-swingup-v0/GIRL/seed-0 \
        --updates 3000 --seeds 2 --out results/measured/girl-cartpole

The memory is that of a finished run, the held-out episodes are new ones of its policy. Behaviour is not learnt, and a masked
autoencoder learns from the whole memory, not from its first random steps. With ``--out`` the same command goes on where an
interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..agents import GIRL, CheckpointError
from .errors import UsageError
from .evaluate import evaluate, load_trained
from .imagination import EpisodeRecorder, has_world_model
from .imagination_report import HORIZON, SHORT
from .manifest import git_revision, versions, write_atomically, write_json
from .markdown import table

GROUNDED: dict[str, Any] = {"trust_region": False, "ensemble_members": 0}  # and beta and free nats are the arm's
KINDS: dict[str, dict[str, Any]] = {
    "DreamerV3 arm": GIRL.VARIANTS["dreamerv3"],
    "GIRL": {},
    "GIRL, beta at least 1": {"beta_bounds": (1.0, 10.0)},
    "grounding alone": GROUNDED,
    "trust region alone": GIRL.VARIANTS["no-grounding"],
    "GIRL, beta 1": GIRL.VARIANTS["fixed-beta"],
    "trust region alone, beta at least 1": {**GIRL.VARIANTS["no-grounding"], "beta_bounds": (1.0, 10.0)},
    "GIRL, beta at least 1, mu = 0": {"beta_bounds": (1.0, 10.0), "consistency_coef": 0.0},
    "grounding alone, mu = 0": {**GROUNDED, "consistency_coef": 0.0},
    "grounding alone, prior never sees c_hat": {**GROUNDED, "predicted_share": 0.0},
    "grounding alone, prior always sees c_hat": {**GROUNDED, "predicted_share": 1.0},
}
# Arguments that a world model has from the run; the second where both are grounded.
SOURCE = ("learning_rate", "batch_size", "batch_length", "buffer_size", "policy_kwargs", "precision", "encoder_updates")
GROUNDING = ("grounding", "encoder_weights", "grounding_index")
FEWEST_UPDATES = 8
COLUMNS = ("dfm", "dfm_short", "dfm_real", "dfm_none", "error", "error_short")
Numbers = dict[str, list[dict[str, float]]]


def drift_causes(
    run: Path, updates: int, seeds: int, only: Sequence[str] | None = None, there: Numbers | None = None, episodes: int = 4
) -> Iterator[Numbers]:
    """Drift and decoder error of each kind and seed after the same updates; gives the whole table whenever it has grown.

    :param run: folder of a run of a world model, with its checkpoint
    :param updates: of each world model, 8 or more: delta is set after an eighth of them
    :param seeds: of each kind
    :param only: names of :data:`KINDS`
    :param there: what an interrupted call gave
    :param episodes: held out
    :raises UsageError: for a run without a world model or of several environments, a kind that there is not, no seeds, too
        few updates
    """
    unknown = set(only or ()) - set(KINDS)
    if unknown:
        raise UsageError(f"There is no kind '{min(unknown)}': use some of {', '.join(map(repr, KINDS))}.")
    if seeds < 1:
        raise UsageError(f"--seeds is 1 or more, not {seeds}.")
    if updates < FEWEST_UPDATES:
        raise UsageError(f"--updates is {FEWEST_UPDATES} or more, not {updates}: the radius is set after an eighth of them.")
    trained = load_trained(run)
    if not has_world_model(trained.model):
        raise UsageError(f"{run} holds a {type(trained.model).__name__}, which has no world model: give a run of GIRL.")
    if trained.model.n_envs > 1:
        raise UsageError(f"{run} has a memory of {trained.model.n_envs} environments: give a run of one.")
    recorder = EpisodeRecorder(trained.model)
    with closing(trained.make_env(1, 10_000)) as env:
        evaluate(trained.model, env, episodes, True, recorder)
    with closing(trained.make_env(1, 0)) as env:
        cls: Any = type(trained.model)
        source = cls.load_checkpoint(run / "checkpoint", env, device="cpu", compile_loss=False)
        there, wanted = there or {}, only or list(KINDS)
        numbers: Numbers = {name: there.get(name, []) for name in KINDS if name in there or name in wanted}
        for seed in range(seeds):
            for name, rows in numbers.items():
                if name in wanted and len(rows) == seed:
                    rows.append(_learn(source, KINDS[name], updates, seed, recorder.episodes))
                    yield numbers


def _learn(source: Any, kind: dict[str, Any], updates: int, seed: int, episodes: Sequence[Any]) -> dict[str, float]:
    """A world model of a kind, of the source's size, rates and memory: what it then says of held-out episodes."""
    arguments: dict[str, Any] = {name: getattr(source, name) for name in SOURCE}
    if source.grounding is not None and "grounding" not in kind:
        arguments |= {name: getattr(source, name) for name in GROUNDING}
    agent = GIRL("MultiInputPolicy", source.env, seed=seed, device="cpu", ensemble_interval=4, **arguments, **kind)
    memory, told = agent.replay_buffer, source.replay_buffer
    for name in ("actions", "rewards", "terminals", "first", "ages", "totals"):
        getattr(memory, name)[:] = getattr(told, name)
    for name, part in told.observations.items():
        memory.observations[name][:] = part
    agent._embed_waiting()
    agent._set_rates()
    agent.policy.set_training_mode(True)
    for update in range(updates):
        if agent.trust_region and update == updates // FEWEST_UPDATES:  # about as 10^4 steps of 10^5
            agent.policy.trust_region.activate()
            agent._warm = True
        agent.update_model(agent._draw(), agent.policy.ensemble is not None and update % 4 == 0, False)
        if agent._warm and update % agent.radius_interval == 0:
            agent._refresh_radius()
    drift = agent.measure_drift(episodes, min(HORIZON, max(len(episode.actions) for episode in episodes)), seed=seed)
    whole = len(drift.kl["none"])
    row = {"lags": whole, "dfm": drift.dfm(whole), "dfm_short": drift.dfm(min(SHORT, whole))}
    row |= {"error": drift.error(whole), "error_short": drift.error(min(SHORT, whole))}
    return row | {f"dfm_{name}": drift.dfm(whole, name) for name in ("real", "none") if name in drift.kl}


def markdown(numbers: Numbers, command: str) -> str:
    """The table: means over seeds, ranges in brackets where there are several."""
    seeds = " or ".join(sorted({str(len(rows)) for rows in numbers.values() if rows}))
    seeds += " seed" if seeds == "1" else " seeds"
    whole = int(max((row.get("lags", HORIZON) for rows in numbers.values() for row in rows), default=HORIZON))
    short = min(SHORT, whole)
    header = ["world model", f"DFM({whole})", f"DFM({short})", "with real c", "without c", "error", f"error ({short})"]
    body = []
    for name, rows in ((name, rows) for name, rows in numbers.items() if rows):
        cells = [name]
        for column in COLUMNS:
            of = np.array([row[column] for row in rows if column in row])
            spread = f" [{of.min():.3g}, {of.max():.3g}]" if len(of) > 1 else ""
            cells.append(f"{of.mean():.3g}{spread}" if len(of) else "-")
        body.append(cells)
    return "\n".join([
        "# What moves the drift of imagination", "",
        f"`{command}`: world models learnt from the memory of that run, and measured on new episodes of its policy; means "
        f"over {seeds}, ranges in brackets. DFM is in nats of each model's own latent space, with the "
        "grounding vectors that it predicts itself; the error is the decoder's (squared, symlog), one measure for all.", "",
        *table(header, body),
    ]) + "\n"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    told = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tether.experiments.drift_causes", description=told)
    parser.add_argument("run", type=Path, help="folder of a run of a world model")
    parser.add_argument("--updates", type=int, default=3000, metavar="N", help="of each world model (default: 3000)")
    parser.add_argument("--seeds", type=int, default=2, metavar="K", help="of each kind (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(map(repr, KINDS))}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write drift-causes.md and .json there")
    args = parser.parse_args(arguments)
    command = f"python -m tether.experiments.drift_causes {args.run} --updates {args.updates} --seeds {args.seeds}"
    command += f" --only {shlex.join(args.only)}" if args.only else ""
    text = ""
    try:
        there = _there(args.out, command)
        earlier = [{name: there[name] for name in ("revision", "dirty") if name in there}, *there.get("earlier", [])]
        for numbers in drift_causes(args.run, args.updates, args.seeds, args.only, there.get("numbers")):
            text = markdown(numbers, command)
            if args.out is not None:
                result = {"command": command, "numbers": numbers, "versions": versions(), **git_revision()}
                result |= {"earlier": [one for one in earlier if one]}  # revisions that began it
                args.out.mkdir(parents=True, exist_ok=True)
                write_json(args.out / "drift-causes.json", result)
                write_atomically(args.out / "drift-causes.md", text)
    except (UsageError, CheckpointError) as error:
        print(f"drift_causes: {error}", file=sys.stderr)
        return 2
    print(text or f"All of it is in {args.out} already.")
    return 0


def _there(out: Path | None, command: str) -> dict[str, Any]:
    """The file that a run of the same command left, whole or interrupted."""
    path = None if out is None else out / "drift-causes.json"
    if path is None or not path.is_file():
        return {}
    result = json.loads(path.read_text())
    same = result["command"].partition(" --seeds")[0] == command.partition(" --seeds")[0]  # more seeds go on with fewer
    return result if same else {}


if __name__ == "__main__":
    sys.exit(main())
