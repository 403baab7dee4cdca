"""The rules of the house: who may import whom, what every module owes its reader, what an import may cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("agents", "envs", "experiments")
MODULES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# What must not be imported from where.
FORBIDDEN = {"agents": {"envs", "experiments"}, "envs": {"agents", "experiments"}, "experiments": set[str]()}

# Text that people wrote or that a command wrote for them; pictures, locks and binaries are left out.
TEXTS = {".py", ".pyi", ".toml", ".yaml", ".yml", ".md", ".txt", ".cfg", ".ini", ".json", ".csv", ".sh", ""}
NOT_OURS = {".git", ".venv", ".hypothesis", "__pycache__", "build", "dist", "runs", "shared"}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, as an absolute name below tether where it is relative, with its line."""
    here = ("tether", *path.parent.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def _is_absolute(path: Path, line: int) -> bool:
    text = (ROOT / path).read_text(encoding="utf-8").splitlines()[line - 1].strip()
    return not text.startswith("from .")


def test_there_are_modules() -> None:
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports(path: Path) -> None:
    package = path.parts[0]
    for name, line in _imports(path):
        for other in FORBIDDEN[package]:
            assert not f"{name}.".startswith(f"tether.{other}."), f"{path}:{line}: {package} imports {name}"
            assert name.split(".")[0] != other, f"{path}:{line}: {name} works only in the repository's root"
        if f"{name}.".startswith(f"tether.{package}."):
            assert not _is_absolute(path, line), f"{path}:{line}: imports inside a package are relative"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_docstrings(path: Path) -> None:
    """The module, and every public class and function in it, says what it is for."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def _our_files() -> Iterator[Path]:
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if name not in NOT_OURS and not name.endswith(("_cache", ".egg-info"))]
        yield from (Path(folder) / name for name in names if Path(name).suffix in TEXTS)


def test_our_files_are_found() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in _our_files()}
    assert {"pyproject.toml", "LICENSE", "agents/mdpo.py", "tests/test_house.py", "experiments/presets/ppo.yaml"} <= found


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    # Put together here, so that this file passes its own test.
    places = ["/" + place + "/" for place in ("home", "root", "Users", "work", "mnt")]
    for path in _our_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            for place in places:
                start = line.find(place)
                inside = start > 0 and (line[start - 1].isalnum() or line[start - 1] in "._-")  # part of a longer path or URL
                assert start < 0 or inside, f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("tether.agents", ["mujoco", "dm_control", "envpool", "matplotlib", "tether.envs", "tether.experiments"]),
        ("tether.envs", ["dm_control", "envpool", "tether.agents", "tether.experiments"]),
        ("tether.experiments.cli", ["torch", "stable_baselines3", "gymnasium", "matplotlib"]),
    ],
)
def test_imports_are_light(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
