"""kill -9 at random moments of real trainings, again and again, and what is left of them.

    python -m tests.faults --kills 100 --out results/measured/faults
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import envpool  # noqa: F401 - what a run imports late is imported here, once, before the processes are forked
import sb3_contrib  # noqa: F401
import torch as th
import torch._dynamo
import torch.utils.tensorboard

import tether.envs.make  # noqa: F401
from tether.agents import list_checkpoints
from tether.agents.common.model_file import read_model
from tether.experiments.callbacks import EvaluationCallback  # noqa: F401
from tether.experiments.cli import main
from tether.experiments.logs import make_logger  # noqa: F401

# Agents with and without a replay buffer, environments whose state is read, and those that are lived through again.
RUNS = (
    ("MDPO", "CartPole-v1", "envpool", ["n_steps=64", "value_batch_size=32"]),
    ("OffPolicyMDPO", "Pendulum-v1", "dummy", ["learning_starts=100", "batch_size=16", "train_freq=8", "gradient_steps=1"]),
    ("BPO", "HalfCheetah-v5", "dummy", ["n_steps=64", "batch_size=32"]),
    ("SB3-PPO", "Pendulum-v1", "dummy", ["n_steps=64", "batch_size=32", "normalize=true"]),
)
INTERVAL = 0.2  # seconds between checkpoints


@dataclass
class Tally:
    """What became of the kills."""

    kills: int = 0
    resumed: int = 0  # starts that went on from a checkpoint
    anew: int = 0  # starts after a kill before the first checkpoint
    finished: int = 0  # runs that reached their end, each with the weights of its uninterrupted twin
    age: list[float] = field(default_factory=list)  # seconds from the newest checkpoint to the kill
    while_saving: int = 0  # kills that left an unfinished checkpoint


def words_of(number: int, out: Path) -> list[str]:
    """The command of run ``number``."""
    agent, env, backend, hp = RUNS[number % len(RUNS)]
    steps, every = (4_000, 1_000) if agent == "OffPolicyMDPO" else (40_000, 10_000)
    return [
        "train", agent, "--env", env, "--backend", backend, "--n-envs", "2", "--seed", str(number), "--steps", str(steps),
        "--eval-every", str(every), "--eval-episodes", "1", "--checkpoint-every", str(INTERVAL), "--out", str(out),
        "--hp", "policy_kwargs.net_arch=[16]", *hp,
    ]  # fmt: skip


def command(words: list[str], log: str) -> None:
    """Run the command with its output in a file; what a forked process does."""
    os.setsid()
    th.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = main(words)
    os._exit(code)


def survive(kills: int, folder: Path, seed: int = 0) -> Tally:
    """Kill trainings until it was done ``kills`` times; each is then finished and compared with an uninterrupted one.

    :raises AssertionError: for anything lost or refused
    """
    draw, tally = random.Random(seed), Tally()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.kills"])
    number = 0
    while tally.kills < kills:
        killed, whole = folder / f"{number}-killed", folder / f"{number}-whole"
        assert _run(context, words_of(number, whole), folder / "log.txt") == 0
        _kill_until_finished(context, words_of(number, killed), folder / "log.txt", draw, tally, kills)
        _compare(*(next(out.glob("*/*/seed-*")) for out in (killed, whole)))
        tally.finished += 1
        number += 1
    return tally


def _run(context: Any, words: list[str], log: Path, seconds: float | None = None) -> int | None:
    """Exit code of the command, or None where it was killed after ``seconds``."""
    log.write_text("")  # or a start that is killed before it opens its log would seem to say what the last one said
    process = context.Process(target=command, args=(words, str(log)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


def _kill_until_finished(context: Any, words: list[str], log: Path, draw: random.Random, tally: Tally, kills: int) -> None:
    folder: Path | None = None
    while True:
        before = list_checkpoints(folder / "checkpoint") if folder else []
        # About half a second passes before the training begins.
        code = _run(context, words, log, draw.uniform(0.1, 3.0) if tally.kills < kills else None)
        said = log.read_text()
        if code == 0 and "is finished already" in said:  # the kill before came between the last write and the exit
            return
        if folder is not None and (code is not None or "continuing" in said):
            resumed_at = f"at step {before[-1].timesteps:,} of" if before else None
            assert (resumed_at in said) if resumed_at else "continuing" not in said, said
            tally.resumed += bool(before)
            tally.anew += not before
        if code is not None:
            assert code == 0, said
            return
        tally.kills += 1
        folder = next(Path(words[words.index("--out") + 1]).glob("*/*/seed-*"), None)
        if folder is not None:
            after = list_checkpoints(folder / "checkpoint")
            assert [c.timesteps for c in after[-1:]] >= [c.timesteps for c in before[-1:]], "a checkpoint was lost"
            tally.age += [time.time() - c.time for c in after[-1:]]
            tally.while_saving += bool(list((folder / "checkpoint").glob(".*")))


def _compare(killed: Path, whole: Path) -> None:
    """Weights, evaluations and leftovers of a run that was killed, beside one that was not."""
    mine, theirs = (read_model(folder / "model.zip", "cpu").params["policy"] for folder in (killed, whole))
    for name, value in theirs.items():
        assert th.equal(mine[name], value), f"{killed}: {name} differs"
    for name in ("evaluations.csv",):
        assert (killed / name).read_text() == (whole / name).read_text(), f"{killed / name} differs"
    assert not list((killed / "checkpoint").glob(".*")), "remains of a kill"
    assert {path.name.removesuffix(".zip") for path in killed.glob("*model.zip")} == {"model", "best_model"}


def report(tally: Tally, typed: str) -> str:
    """The figures as Markdown."""
    from tether.experiments.manifest import hardware

    ages = sorted(tally.age)
    return "\n".join([
        "# kill -9 at random moments",
        "",
        f"`{typed}` on {hardware()['cpu']}, {hardware()['cores']} cores.",
        "",
        "| | |",
        "| --- | --- |",
        f"| kills | {tally.kills} |",
        f"| of these while a checkpoint was being written | {tally.while_saving} |",
        f"| starts that went on from the newest checkpoint | {tally.resumed} |",
        f"| starts anew, because the kill came before the first checkpoint | {tally.anew} |",
        f"| trainings finished, each equal to its uninterrupted twin in weights and evaluations | {tally.finished} |",
        f"| training lost by a kill, seconds (checkpoints every {INTERVAL} s): median | {ages[len(ages) // 2]:.2f} |",
        f"| the same, at most | {ages[-1]:.2f} |",
        "",
    ])  # fmt: skip
