"""The ``tether`` command."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from .errors import UsageError


class _Parser(argparse.ArgumentParser):
    """A parser that refuses in one sentence, as the rest of the command does, instead of with its whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` says what it takes.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; nothing heavy is imported for it."""
    parser = _Parser(prog="tether", description="Train, evaluate and compare trust-region agents.")
    from tether import __version__

    parser.add_argument("--version", action="version", version=f"tether {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_collect(commands)
    _add_study(commands)
    _add_report(commands)
    _add_bench(commands)
    listing = commands.add_parser("list", help="show agents, envs or presets")
    listing.add_argument("what", choices=("agents", "envs", "presets"))
    listing.set_defaults(run=_list)
    return parser


def _add_train(commands: Any) -> None:
    p = commands.add_parser("train", help="train one agent; the same command again continues or says that it is done")
    p.add_argument("agent", metavar="AGENT", help="see `tether list agents`")
    p.add_argument("--env", required=True, metavar="ID", help="environment id, see `tether list envs`")
    p.add_argument("--dataset", metavar="FILE", help="what offline agents learn from: a file, or a known dataset's name")
    p.add_argument("--init-from", metavar="MODEL.zip", help="weights to begin with; {env}, {seed}, {agent} are the run's")
    p.add_argument("--train-share", type=float, default=1.0, metavar="S", help="share of its episodes to learn from")
    p.add_argument(
        "--steps", type=_whole, metavar="N", help="env steps, offline gradient steps (default: the preset's, else 1,000,000)"
    )
    p.add_argument("--online-steps", type=_whole, default=0, metavar="N", help="env steps that follow, of FMQ and its rivals")
    p.add_argument("--seed", type=int, default=0, metavar="K")
    p.add_argument("--n-envs", type=int, metavar="N", help="parallel environments (default: the preset's)")
    p.add_argument("--backend", default="auto", metavar="B", help="auto, dummy, subproc or envpool (default: auto)")
    p.add_argument("--env-kwargs", nargs="+", default=[], metavar="K=V", help="arguments of the environment")
    p.add_argument("--hp", nargs="+", default=[], metavar="K=V", help="arguments of the agent; values are YAML, dots nest")
    p.add_argument("--eval-every", type=_whole, metavar="N", help="steps between evaluations (default: a 20th of all)")
    p.add_argument("--eval-episodes", type=_whole, default=10, metavar="N")
    p.add_argument("--checkpoint-every", type=float, default=120.0, metavar="S", help="seconds between checkpoints")
    p.add_argument("--on-nonfinite", choices=("stop", "skip", "rollback"), default="stop", help="at a NaN (default: stop)")
    p.add_argument("--out", type=Path, default=Path("results/runs"), metavar="DIR", help="run folders lie below it")
    p.add_argument("--device", default="auto", metavar="D")
    p.add_argument("--verbose", action="store_true", help="also print SB3's table of every iteration")
    p.set_defaults(run=_train)


def _add_evaluate(commands: Any) -> None:
    p = commands.add_parser("evaluate", help="evaluate a run or a saved model")
    p.add_argument("source", type=Path, metavar="RUN_OR_MODEL")
    p.add_argument("--env", metavar="ID", help="another environment than the one it was trained in")
    p.add_argument("--env-kwargs", nargs="+", default=[], metavar="K=V", help="arguments of the environment")
    p.add_argument("--episodes", type=_whole, default=20, metavar="N")
    p.add_argument("--seed", type=int, default=1_000_000, metavar="K")
    p.add_argument("--trust", action="store_true", help="read SB3's own files, which run code that their author chose")
    p.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="the likeliest actions, or sampled ones (default: as the run)",
    )
    p.add_argument("--video", type=Path, metavar="FILE.mp4", help="film one more episode")
    p.add_argument("--feasibility", type=Path, metavar="FILE.png", help="draw FISOR's feasible region of the point robot")
    p.add_argument("--dataset", metavar="FILE", help="with --feasibility: compare on the states of this dataset")
    p.set_defaults(run=_evaluate)


def _add_collect(commands: Any) -> None:
    p = commands.add_parser("collect", help="make an offline dataset: a mixture of behaviours, or one of OGBench's")
    p.add_argument("env", metavar="ENV_ID", help="environment that reports costs; or OGBench's name of a dataset")
    p.add_argument("--out", type=Path, required=True, metavar="FILE_OR_FOLDER", help="FILE.hdf5, OGBench's .npz, or a folder")
    p.add_argument("--steps", type=_whole, metavar="N", help="transitions (default: 100,000; OGBench's: as published)")
    p.add_argument("--seed", type=int, default=0, metavar="K")
    p.add_argument(
        "--behaviour", nargs="+", default=[], metavar="NAME",
        help="random, novice, reward, cautious, safe, or runs and models (default: the five, trained first)",
    )  # fmt: skip
    p.add_argument("--train-steps", type=_whole, metavar="N", help="env steps of each training of behaviours")
    p.add_argument("--env-kwargs", nargs="+", default=[], metavar="K=V", help="arguments of the environment")
    p.add_argument("--cache", type=Path, default=Path("results/runs/behaviours"), metavar="DIR", help="trained behaviours")
    p.set_defaults(run=_collect)


def _add_study(commands: Any) -> None:
    p = commands.add_parser("study", help="run a matrix of agents, envs and seeds; the same command again continues")
    p.add_argument("file", type=Path, metavar="STUDY.yaml")
    p.add_argument("--engine", choices=("local", "ray"), default="local")
    p.add_argument("--jobs", type=_whole, metavar="N", help="runs at a time (default: one per core)")
    p.add_argument("--out", type=Path, default=Path("results/runs"), metavar="DIR", help="a folder of the study is made there")
    p.add_argument("--measured", type=Path, default=Path("results/measured"), metavar="DIR", help="where finished runs go")
    p.set_defaults(run=_study)


def _add_report(commands: Any) -> None:
    p = commands.add_parser("report", help="tables with intervals and learning curves from runs")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUNS")
    p.add_argument("--published", type=Path, metavar="DIR", help="published numbers (default: results/published)")
    p.add_argument("--env", nargs="+", metavar="ID", help="only these environments")
    p.add_argument("--out", type=Path, metavar="DIR", help="write report.md, summary.csv and curves.png there")
    p.set_defaults(run=_report)


BENCH_OPTIONS = {  # that only some benches take
    "env": ("on-policy",),
    "only": ("on-policy", "offline", "flow", "world-model"),
    "device": ("offline", "images", "guardian", "world-model"),
    "fql": ("flow",),
    "size": ("world-model",),
    "pictures": ("world-model",),
    "nm512": ("world-model",),
}


def _add_bench(commands: Any) -> None:
    p = commands.add_parser("bench", help="training speed beside its peers, in the same process")
    benches = ("on-policy", "offline", "inference", "flow", "images", "safety", "guardian", "world-model")
    p.add_argument("what", choices=benches)
    p.add_argument("--env", nargs="+", metavar="ID", help="environments (default: five, from CartPole to Humanoid)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these contestants, as the table names them")
    p.add_argument("--rounds", type=_whole, default=5, metavar="N", help="each trains once a round (default: 5)")
    p.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of training a round (default: 3)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), help="of those that take one (default: auto)")
    p.add_argument("--size", choices=("small", "default"), help="of world-model's networks (default: default)")
    p.add_argument("--pictures", action="store_true", help="world-model sees 64 x 64 pictures (default: cartpole's states)")
    p.add_argument("--nm512", type=Path, metavar="DIR", help="NM512/dreamerv3-torch, which then races in world-model")
    p.add_argument("--fql", type=Path, metavar="DIR", help="the FQL authors' code, which then races in flow (needs JAX)")
    p.add_argument("--out", type=Path, metavar="DIR", help="also write the table there, as Markdown and JSON")
    p.set_defaults(run=_bench)


def _whole(word: str) -> int:
    """A whole number; 1e6 and 500_000 are accepted."""
    try:
        number = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{word}' is not a number") from None
    if not (number.is_integer() and number >= 1):
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number above 0")
    return int(number)


def _train(args: argparse.Namespace) -> int:
    from .presets import parse_assignments
    from .run_config import RunConfig
    from .train import train

    config = RunConfig(
        agent=args.agent,
        env=args.env,
        steps=args.steps,
        seed=args.seed,
        n_envs=args.n_envs,
        backend=args.backend,
        env_kwargs=parse_assignments(args.env_kwargs, "--env-kwargs"),
        hp=parse_assignments(args.hp, "--hp"),
        eval_every=args.eval_every,
        eval_episodes=args.eval_episodes,
        checkpoint_every=args.checkpoint_every,
        on_nonfinite=args.on_nonfinite,
        out=args.out,
        device=args.device,
        dataset=args.dataset,
        train_share=args.train_share,
        online_steps=args.online_steps,
        init_from=args.init_from,
    )
    result = train(config, verbose=2 if args.verbose else 1, command=args.typed)
    if not result.finished:
        steps = result.manifest["timesteps"]
        saved = f"Stopped at step {steps:,} and saved." if steps else "Stopped before there was anything to save."
        print(f"\n{saved} To go on:\n  {args.typed}")
        return 130
    if not result.fresh:
        print(f"{result.folder} is finished already ({result.manifest['timesteps']:,} steps): nothing to do.")
        return 0
    before = result.manifest.get("init_from", {}).get("timesteps", 0)
    rate = (result.manifest["timesteps"] - before) / max(result.manifest["wall_seconds"], 1e-9)
    seconds = f"{result.manifest['wall_seconds']:.0f} s ({rate:,.0f} steps/s)"
    print(f"{result.folder}: {result.manifest['timesteps']:,} steps in {seconds}")
    print(f"curves: tensorboard --logdir {args.out}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluate import evaluate, load_trained, record_video, summary
    from .presets import parse_assignments

    if args.video is not None and args.video.suffix != ".mp4":
        raise UsageError(f"--video takes a name that ends in .mp4, not '{args.video}'.")
    env_kwargs = parse_assignments(args.env_kwargs, "--env-kwargs")
    trained = load_trained(args.source, args.env, trust=args.trust, env_kwargs=env_kwargs)
    if trained.left_out:
        told = " ".join(f"{name}={value}" for name, value in trained.left_out.items())
        print(f"{trained.env_id} is made without {told}, unlike in training: --env-kwargs says what it should have.")
    deterministic = trained.deterministic if args.deterministic is None else args.deterministic
    how = "" if deterministic else ", sampled actions"
    for where, arguments in trained.worlds():
        env = trained.make_env(min(args.episodes, 10), args.seed, **arguments)
        print(f"{trained.name} on {trained.env_id}{where}{how}")
        print(summary(evaluate(trained.model, env, args.episodes, deterministic), trained.env_id))
        env.close()
    if args.feasibility is not None:
        from tether.envs import load_dataset

        from .feasibility import agreement, regions

        args.feasibility.write_bytes(regions(trained.model))
        if args.dataset is not None:
            print(agreement(trained.model, load_dataset(args.dataset)))
    if args.video is not None:
        print(f"{args.video}: {record_video(trained, args.video, args.seed)} frames")
    return 0


def _collect(args: argparse.Namespace) -> int:
    from .collect import CollectConfig, collect
    from .presets import parse_assignments

    kwargs = parse_assignments(args.env_kwargs, "--env-kwargs")
    behaviours = tuple(args.behaviour)
    config = CollectConfig(args.env, args.out, args.steps, args.seed, behaviours, args.train_steps, kwargs, args.cache)
    path = collect(config, args.typed)
    sheet = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if path.suffix == ".npz":
        print(f"{path}: {sheet['transitions']:,} transitions; validation part and datasheet beside it")
        return 0
    safe = f"{sheet['episodes_without_cost']} of {sheet['episodes']} episodes without cost"
    print(f"{path}: {sheet['transitions']:,} transitions, {safe}; datasheet and picture beside it")
    return 0


def _study(args: argparse.Namespace) -> int:
    from .study import run_study

    return 1 if run_study(args.file, engine=args.engine, jobs=args.jobs, runs=args.out, measured=args.measured) else 0


def _report(args: argparse.Namespace) -> int:
    from .report import report

    published = args.published
    if published is None and Path("results/published").is_dir():
        published = Path("results/published")
    print(report(args.runs, published=published, out=args.out, envs=args.env))
    return 0


def _bench(args: argparse.Namespace) -> int:
    command, device, what = shlex.join(["tether", *sys.argv[1:]]), args.device or "auto", args.what
    refused = [f"--{name}" for name, takers in BENCH_OPTIONS.items() if getattr(args, name) and what not in takers]
    if refused:
        raise UsageError(f"`tether bench {what}` has no use for this: leave out {' and '.join(refused)}.")
    if what == "offline":
        from .bench_offline import offline

        print(offline(args.out, args.only, args.rounds, args.seconds, command, device))
    elif what == "inference":
        from .bench_offline import inference

        print(inference(args.out, args.rounds, command))
    elif what == "flow":
        from .bench_flow import flow

        print(flow(args.out, args.only, args.rounds, args.seconds, command, args.fql))
    elif what == "guardian":
        from .bench_guardian import guardian

        print(guardian(args.out, args.rounds, command, device))
    elif what == "world-model":
        from .bench_world_model import world_model

        size = args.size or "default"
        print(world_model(args.out, args.only, args.rounds, args.seconds, command, device, size, args.pictures, args.nm512))
    elif what == "safety":
        from .bench_safety import safety

        print(safety(args.out, args.rounds, args.seconds, command))
    elif what == "images":
        from .bench_images import images

        print(images(args.out, args.rounds, command=command, device=device))
    else:
        from .bench import on_policy

        print(on_policy(args.env, args.out, args.only, args.rounds, args.seconds, command))
    return 0


def _list(args: argparse.Namespace) -> int:
    from .catalogue import AGENTS, OFFLINE, OURS, VARIANTS
    from .presets import read_presets

    if args.what == "agents":
        for name, place in AGENTS.items():
            kind = "offline" if name in OFFLINE else "Tether" if name in OURS else "peer"
            print(f"{name:24s} {kind:8s} {place.replace(':', '.')}")
    elif args.what == "presets":
        for name in AGENTS:
            base, variant = VARIANTS.get(name, (name, None))
            own = ", ".join(read_presets(base)) or "the class defaults"
            print(f"{name:24s} {own if variant is None else f'those of {base}, with its variant {variant}'}")
    else:
        from tether.envs import list_envs

        for suite, ids in list_envs().items():
            print(f"{suite}:\n  " + "\n  ".join(ids))
    return 0


@contextmanager
def quiet() -> Iterator[None]:
    """Without the news that other packages print when they are imported, which would stand before our one sentence."""
    for module, name in (("farama_notifications", "notifications"), ("gym_notices.notices", "notices")):
        with suppress(ImportError):
            getattr(importlib.import_module(module), name).clear()
    with warnings.catch_warnings():
        # An older version of an environment is asked for by name, to compare with what was published for it.
        warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
        yield


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    :return: exit code: 0 done, 1 something failed, 2 the command cannot be run as given, 130 interrupted
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        args = build_parser().parse_args(words)
        args.typed = shlex.join(["tether", *words])
        with quiet():
            return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (UsageError, OSError) as error:
        sentence = str(error)
    except (ValueError, RuntimeError) as error:
        # The libraries' own refusals (an env, an agent's argument, a number that is not finite) are sentences, too.
        if not type(error).__module__.startswith("tether"):
            raise
        sentence = str(error)
    print(f"tether: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
