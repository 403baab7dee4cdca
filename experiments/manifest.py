"""What a run was: command, configuration, code, versions and hardware, kept beside its curves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError

PACKAGES = (
    "tether-rl", "torch", "numpy", "gymnasium", "mujoco", "dm-control", "stable-baselines3", "sb3-contrib", "envpool",
    "ogbench",
)  # fmt: skip


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a kill or a full disk leaves the former version whole."""
    from tether.agents.common.atomic import replace_file  # here, because the agents take seconds to import

    replace_file(path, text)


def write_json(path: Path, data: Any) -> None:
    """``data`` as indented JSON, written atomically."""
    write_atomically(path, json.dumps(data, indent=2, default=str) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a run's folder; None where there is none.

    :raises UsageError: if the file is not a run's manifest
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("agent", "env", "status", "config", "wall_seconds") if key not in manifest]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): restore it, or delete {folder} to start the run anew.") from error
    if not isinstance(manifest, dict) or missing:
        raise UsageError(f"{path} is not a run's manifest: restore it, or delete {folder} to start the run anew.")
    return manifest


def git_revision() -> dict[str, Any]:
    """Revision and dirty flag of the checkout this code runs from; empty where there is none (an installed wheel)."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        words = ("git", "-C", str(here.parent), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a wheel may lie inside somebody else's checkout
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, number of cores and GPU of this machine."""
    import torch as th

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    gpu = th.cuda.get_device_name() if th.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "gpu": gpu, "platform": platform.platform()}


def describe() -> dict[str, Any]:
    """The parts of a manifest that do not depend on the run."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_revision(),
        "versions": versions(),
        "hardware": hardware(),
    }
