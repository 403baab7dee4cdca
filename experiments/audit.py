"""What a treatment policy learnt from data is estimated to do, and what it really does: trained runs, judged both ways.

    python -m tether.experiments.audit results/runs/ogsrl-sepsis --dataset FILE --out results/measured/ogsrl-sepsis

The estimate is OGSRL's: episodes in a world made of recorded transitions, where the nearest one answers. The truth is exact
for ICU-Sepsis with features, and simulated elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from scipy import stats

from .errors import UsageError
from .manifest import read_manifest, write_atomically, write_json
from .treatment_metrics import EPSILONS, change, concordance, intensification, mortality, reduction

if TYPE_CHECKING:
    from tether.envs import OfflineDataset

TOO_MUCH = ("hypoglycaemia",)  # costs that call for less treatment, not for more
GAMMA, ALPHA = 0.99, 0.05
EPISODES = 2000  # imagined, of each policy
SIMULATED = 200  # of the real environment
MARGIN = 0.25  # of an action in [-1, 1], by which a dose has to be higher in one of the readings of intensification
BEHAVIOUR = "behaviour policy"
Act = Callable[[np.ndarray, np.ndarray], np.ndarray]  # observations (B, o) and numbers of episodes (B,) to actions (B, d)


@dataclass(frozen=True)
class Data:
    """A dataset, the part that agents learnt from, and the part that they did not see.

    :param died: whether each episode of the whole ended in death, (E,); None where the data do not say
    :param unseen: numbers of the episodes of the part that was not seen
    """

    whole: OfflineDataset
    train: OfflineDataset
    test: OfflineDataset
    died: np.ndarray | None
    unseen: np.ndarray

    @classmethod
    def of(cls, whole: OfflineDataset, train_share: float) -> Data:
        """The parts that ``tether train --train-share`` makes.

        :raises UsageError: for data without costs, or where no episode was left out
        """
        if whole.costs is None:
            raise UsageError(f"{whole.meta.get('source')} has no costs, and the audit is about them: give data with some.")
        if not train_share < 1.0:
            raise UsageError("The runs learnt from all episodes, so that none is left: train with --train-share 0.6.")
        (seen,) = whole.split_episodes((train_share,))
        unseen = np.setdiff1d(np.arange(len(whole.episode_ends)), seen)
        died = None if "died" not in whole.meta else np.array(whole.meta["died"], bool)
        return cls(whole, whole.select_episodes(seen), whole.select_episodes(unseen), died, unseen)

    @property
    def names(self) -> list[str]:
        """Of the constraints."""
        return list(self.whole.meta.get("cost_names") or ["cost"])

    @property
    def horizon(self) -> int:
        """The time limit of the data, or their longest episode."""
        return int(self.whole.meta.get("max_episode_steps") or self.whole.episodes().lengths.max())

    def limits(self) -> np.ndarray:
        """Discounted cost of the training part's own episodes, (m,): what constrained agents are held to by default."""
        return np.array([discounted(column, self.train) for column in columns_of(self.train).T])


def columns_of(dataset: OfflineDataset) -> np.ndarray:
    """Costs (N, m)."""
    assert dataset.costs is not None
    return np.asarray(dataset.costs).reshape(len(dataset), -1)


def discounted(values: np.ndarray, dataset: OfflineDataset) -> float:
    """Mean over episodes of sum_t gamma^t values_t, of (N,)."""
    steps = np.arange(len(dataset)) - np.repeat(dataset.episode_starts, dataset.episodes().lengths)
    return float((values * GAMMA**steps).sum() / len(dataset.episode_ends))


# ---------------------------------------------------------------------- the estimate


class RecordedWorld:
    """The world of the nearest recorded transition.

    :param died: whether each episode ended in death, (E,)
    """

    def __init__(self, dataset: OfflineDataset, died: np.ndarray | None) -> None:
        from tether.agents.common.min_max import MinMax
        from tether.agents.common.nearest_model import NearestModel

        pairs = pairs_of(dataset.observations, dataset.actions)
        self.scale = MinMax.of(pairs)
        self.model = NearestModel(self.scale.scaled(pairs))
        self.following, self.rewards, self.terminals = dataset.next_observations, dataset.rewards, dataset.terminals
        self.costs = columns_of(dataset)
        self.deadly = np.zeros(len(dataset), bool)
        self.nobody = np.nan if died is None else 0.0  # deaths, where none is seen
        if died is not None:
            self.deadly[dataset.episode_ends] = died & dataset.terminals[dataset.episode_ends]

    def imagine(self, act: Act, starts: np.ndarray, horizon: int, guardian: Any) -> dict[str, Any]:
        """Expectations over episodes that begin in ``starts`` (E, o): value, costs, death, length, share of steps outside."""
        states, going, died = np.array(starts, np.float32), np.arange(len(starts)), np.full(len(starts), self.nobody)
        value, costs, steps, outside, plain = 0.0, np.zeros(self.costs.shape[1]), 0, 0, np.zeros(self.costs.shape[1])
        for step in range(horizon):
            pairs = pairs_of(states, act(states, going))
            rows = self.model.rows(self.scale.scaled(pairs)).numpy()
            value += GAMMA**step * float(self.rewards[rows].sum())
            costs, plain = costs + GAMMA**step * self.costs[rows].sum(0), plain + self.costs[rows].sum(0)
            steps, outside = steps + len(rows), outside + int(guardian.outside(pairs).sum())
            died[going[self.deadly[rows]]] += 1.0
            keep = ~self.terminals[rows]
            states, going = np.asarray(self.following[rows[keep]]), going[keep]
            if not len(going):
                break
        count = len(starts)
        return {
            "value": value / count, "costs": costs / count, "death": mortality(died), "length": steps / count,
            "outside": outside / steps, "unsafe": plain / steps,
        }  # fmt: skip


def pairs_of(observations: Any, actions: Any) -> th.Tensor:
    """(s, a), (N, o + d) float32."""
    return th.from_numpy(np.hstack([np.asarray(observations), np.asarray(actions)]).astype(np.float32))


# ---------------------------------------------------------------------- the truth


def simulate(env_id: str, env_kwargs: dict[str, Any], act: Act, guardian: Any) -> dict[str, Any]:
    """The same expectations of episodes of the real environment."""
    from tether.envs import OfflineDataset, make_env

    from .collect import run_round

    envs = [make_env(env_id, **env_kwargs) for _ in range(SIMULATED)]
    low, high = (getattr(envs[0].action_space, end) for end in ("low", "high"))
    arrays = run_round(envs, lambda o, k: low + (act(o, k) + 1.0) / 2.0 * (high - low), 12345)
    died = arrays.pop("died", np.full(SIMULATED, np.nan))
    episodes = OfflineDataset(**arrays, meta={"cost_names": arrays["costs"][:1].ravel().tolist()})  # as many as costs
    costs = columns_of(episodes)
    return {
        "value": discounted(episodes.rewards, episodes), "costs": np.array([discounted(c, episodes) for c in costs.T]),
        "death": mortality(died), "length": len(episodes) / SIMULATED, "unsafe": costs.mean(0),
        "outside": float(guardian.outside(pairs_of(episodes.observations, episodes.actions)).float().mean()),
        "actions": np.asarray(episodes.actions), "ends": np.asarray(episodes.terminals | episodes.timeouts),
    }  # fmt: skip


def exact(env_id: str, env_kwargs: dict[str, Any], act: Act) -> dict[str, Any]:
    """What of it is known without simulation; empty for environments of which nothing is."""
    if not exact_is_known((env_id, env_kwargs)):
        return {}
    from tether.envs import sepsis

    matrix = sepsis.policy_matrix(lambda observations: act(observations, np.arange(len(observations))))
    reward, steps = env_kwargs.get("reward", "inverse_sofa"), env_kwargs.get("max_episode_steps", sepsis.STEPS)
    known = sepsis.truth(matrix, reward, GAMMA, steps)
    plain = sepsis.truth(matrix, reward, 1.0, steps)
    return {
        "value": known.value, "costs": known.costs, "death": known.death, "length": known.length,
        "unsafe": plain.costs / known.length, "inadmissible": known.inadmissible,
    }  # fmt: skip


# ---------------------------------------------------------------------- a policy, judged


def judge(
    act: Act, data: Data, worlds: dict[str, RecordedWorld], guardian: Any, task: tuple[str, dict[str, Any]]
) -> dict[str, Any]:
    """Everything the report tells of a policy.

    :param worlds: ``train``, of the training part, and ``all``, of the whole dataset
    :param task: id and arguments of the environment
    """
    horizon = data.horizon
    rng = np.random.default_rng(0)

    def starts(part: OfflineDataset) -> np.ndarray:
        return np.asarray(part.observations[np.sort(rng.choice(part.episode_starts, EPISODES))])

    with th.random.fork_rng():
        th.manual_seed(0)
        real = simulate(*task, act, guardian)
        steadiness = change(real.pop("actions"), real.pop("ends"))
        return {
            "train": worlds["train"].imagine(act, starts(data.train), horizon, guardian),
            "all": worlds["all"].imagine(act, starts(data.test), horizon, guardian),
            "real": {**real, **exact(*task, act)},
            **on_logged(act, data.test),
            "change": steadiness,
        }


def on_logged(act: Act, test: OfflineDataset) -> dict[str, Any]:
    """The paper's metrics on states that clinicians saw: concordance by epsilon, intensification by what it is relative to."""
    logged = np.asarray(test.actions)
    numbers = np.repeat(np.arange(len(test.episode_ends)), test.episodes().lengths)
    recommended = act(np.asarray(test.observations), numbers)
    treatable = [name not in TOO_MUCH for name in test.meta.get("cost_names") or ["cost"]]
    need, span = columns_of(test)[:, treatable].sum(axis=1) > 0.0, 2.0 * np.sqrt(logged.shape[1])
    later = np.ones(len(test), bool)
    later[test.episode_starts] = False
    rows = np.flatnonzero(later)
    before, now, ill = logged[rows - 1], recommended[rows], need[rows]
    return {
        "concordance": [concordance(recommended, logged, epsilon * span) for epsilon in EPSILONS],
        "intensification": [
            intensification(now, before, ill), intensification(now, before, ill, MARGIN),
            intensification(now, before, ill, 0.0, True), intensification(recommended, logged, need),
        ],
        "need": float(need.mean()),
    }  # fmt: skip


def acting(model: Any) -> Act:
    """The policy of a trained agent, as it was trained: sampled where it is stochastic, in [-1, 1]."""
    low, high = model.action_space.low, model.action_space.high

    def act(observations: np.ndarray, _: np.ndarray) -> np.ndarray:
        actions = model.predict(np.asarray(observations, np.float32), deterministic=False)[0]
        return (2.0 * (actions - low) / (high - low) - 1.0).astype(np.float32)  # as datasets have them

    return act


def audit(
    runs: Sequence[Path], dataset: Path | str, bandwidth: float | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judge runs of one environment, and the behaviour policy where it is known.

    :param runs: folders of finished runs
    :param bandwidth: of the guardian that says what is outside; None: the paper's, Scott's factor
    :return: about the data, and an entry for each policy, with its ``agent`` and ``seed``
    :raises UsageError: for folders that hold no finished run of one environment and one ``train_share``
    :raises DatasetError: for data that cannot be read
    """
    from tether.agents.common.guardian import KernelGuardian
    from tether.envs import clinician_of, load_dataset

    from .evaluate import load_trained

    if bandwidth is not None and not bandwidth > 0.0:
        raise UsageError(f"A bandwidth is above 0, not {bandwidth:g}.")
    manifests = {run: read_manifest(run) for run in runs}
    unfinished = [str(run) for run, manifest in manifests.items() if not manifest or manifest["status"] != "finished"]
    if unfinished or not runs:
        raise UsageError(f"There is no finished run in {', '.join(unfinished) or 'what was named'}: name finished ones.")
    configs = [manifest["config"] for manifest in manifests.values() if manifest]
    shared = {(c["env"], c.get("train_share", 1.0), str(c["env_kwargs"])) for c in configs}
    whole = load_dataset(dataset)
    learnt = {c.get("dataset") for c in configs} - {whole.meta["sha256"]}
    if learnt:
        raise UsageError(f"{dataset} is not the file that the runs learnt from: its sha256 is {whole.meta['sha256']}.")
    if len(shared) > 1:
        raise UsageError("The runs are not all of one environment and one --train-share: audit them apart.")
    data = Data.of(whole, configs[0].get("train_share", 1.0))
    task = (configs[0]["env"], configs[0]["env_kwargs"])
    guardian = KernelGuardian.fit(pairs_of(data.train.observations, data.train.actions), ALPHA, bandwidth)
    died = data.died
    seen = None if died is None else np.delete(died, data.unseen)
    worlds = {"train": RecordedWorld(data.train, seen), "all": RecordedWorld(data.whole, died)}
    judged = []
    clinician = clinician_of(task[0])
    if clinician is not None:
        judged.append({"agent": BEHAVIOUR, "seed": 0, **judge(_numbered(clinician), data, worlds, guardian, task)})
    for run, manifest in manifests.items():
        assert manifest is not None
        trained = load_trained(run, device="cpu")
        judged.append({
            "agent": manifest["agent"], "seed": manifest["seed"],
            **judge(acting(trained.model), data, worlds, guardian, task),
        })  # fmt: skip
    logged = columns_of(data.test).mean(0)
    about = {
        "env": task[0], "env_kwargs": task[1], "source": Path(str(data.whole.meta["source"])).name, "names": data.names,
        "sha256": data.whole.meta["sha256"], "episodes": len(data.whole.episode_ends), "transitions": len(data.whole),
        "trained_on": len(data.train), "horizon": data.horizon, "limits": data.limits(),
        "logged_value": discounted(data.test.rewards, data.test), "logged_unsafe": logged,
        "logged_death": None if died is None else mortality(died[data.unseen]),
        "exact": exact_is_known(task), "bandwidth": guardian.bandwidth,
        "guardian": guardian_against_admissible(guardian) if exact_is_known(task) else None,
    }  # fmt: skip
    for one in judged:
        one["reduction"] = [reduction(*shares) for shares in zip(one["all"]["unsafe"], logged, strict=True)]
    return about, judged


def run_folders(roots: Sequence[Path]) -> list[Path]:
    """All folders of runs that hold a model, in the folders and below."""
    models = (path for root in roots for path in root.rglob("model.zip"))
    return sorted({path.parent for path in models if path.parent.parent.name != "checkpoint"})


def guardian_against_admissible(guardian: Any) -> dict[str, float]:
    """How the guardian's label "outside" and its density tell inadmissible actions of ICU-Sepsis from admissible ones.

    Every state with every action, once, with the jitter of observations and of the clinician's doses: precision, recall, and
    the area under the curve, the probability that an inadmissible pair is less dense than an admissible one.
    """
    from tether.envs import sepsis

    rng, admissible = np.random.default_rng(0), sepsis.process().admissible
    states, actions = (part.ravel() for part in np.indices(admissible.shape))
    doses = sepsis.doses_of(actions) + sepsis.DOSE_NOISE * rng.standard_normal((len(actions), 2)).clip(-2.0, 2.0)
    pairs = pairs_of(sepsis.observe(states, rng), doses.clip(-1.0, 1.0))
    density, wrong, outside = guardian.density(pairs).numpy(), ~admissible.ravel(), guardian.outside(pairs).numpy()
    area = stats.mannwhitneyu(density[~wrong], density[wrong]).statistic / (wrong.sum() * (~wrong).sum())
    hits = float((outside & wrong).sum())
    return {"precision": hits / float(outside.sum()), "recall": hits / float(wrong.sum()), "auc": float(area)}


def exact_is_known(task: tuple[str, dict[str, Any]]) -> bool:
    """Whether :func:`exact` knows this environment."""
    return task[0].startswith("Sepsis/") and task[1].get("representation") == "features"


def _numbered(clinician: Any) -> Act:
    """A clinician whose episodes are numbered from 0 on, without an end: each has the character of its number."""
    inner = clinician(0, 100_000)
    return lambda observations, episodes: inner(observations, episodes)


def main() -> None:
    """The command above."""
    from tether.envs import DatasetError

    from .audit_report import markdown, picture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="run folders, or folders above them")
    parser.add_argument("--dataset", required=True, metavar="FILE", help="the whole dataset that they learnt a part of")
    parser.add_argument("--bandwidth", type=float, metavar="B", help="of the guardian (default: Scott's factor, as the paper)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write audit.md, audit.json and audit.png there")
    args = parser.parse_args()
    try:
        about, judged = audit(run_folders(args.runs), args.dataset, args.bandwidth)
    except (UsageError, DatasetError) as error:
        sys.exit(str(error))
    command = f"python -m tether.experiments.audit {' '.join(map(str, args.runs))} --dataset {args.dataset}"
    command += "" if args.bandwidth is None else f" --bandwidth {args.bandwidth:g}"
    text = "\n".join(markdown(about, judged, command)) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "audit.json", plain({"command": command, **about, "policies": judged}))
        write_atomically(args.out / "audit.md", text)
        (args.out / "audit.png").write_bytes(picture(judged))


def plain(value: Any) -> Any:
    """Arrays as lists, in any nest of dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


if __name__ == "__main__":
    main()
