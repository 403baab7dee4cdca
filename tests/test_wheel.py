"""The wheel: it holds everything, and works where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agents", "envs", "experiments")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, without anything but the copy and what is installed."""
    copy = tmp_path_factory.mktemp("copy") / "tether"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *PACKAGES):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    """Every module, preset and study of the repository, and nothing beside the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    expected = {"tether/__init__.py", "tether/__main__.py", "tether/py.typed"}
    for package in PACKAGES:
        for pattern in ("*.py", "presets/*.yaml", "studies/*.yaml"):
            expected |= {f"tether/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / package).rglob(pattern)}
    assert ours == expected
    assert {name.rpartition("/")[2] for name in names - ours} >= {"METADATA", "entry_points.txt", "LICENSE"}


def test_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import tether.experiments.presets as p; print(p.__file__)").strip()).is_relative_to(target)
    assert "mujoco" in run("-m", "tether", "list", "presets").split("PPO")[1].splitlines()[0]
    # Somebody else's checkout around an installed wheel is not the code's revision.
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert run("-c", "from tether.experiments.manifest import git_revision; print(git_revision())").strip() == "{}"
