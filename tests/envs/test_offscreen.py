"""MuJoCo's renderer where there is no display: what the system has, and nothing where it has none."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tether.envs.offscreen import LIBRARIES, choose_renderer

VARIABLES = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a display")
@pytest.mark.parametrize(("there", "chosen"), [(("egl", "osmesa"), "egl"), (("osmesa",), "osmesa"), ((), None)])
def test_the_first_whose_library_is_there(there: tuple[str, ...], chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name not in {LIBRARIES[renderer] for renderer in there}:
            raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    choose_renderer()
    assert os.environ.get("MUJOCO_GL") == chosen
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    choose_renderer()
    assert os.environ["MUJOCO_GL"] == "glfw"


WITHOUT = """
import ctypes
real = ctypes.CDLL.__init__
def load(self, name, *args, **kwargs):
    if name and ("EGL" in str(name) or "OSMesa" in str(name)):
        raise OSError(name)
    real(self, name, *args, **kwargs)
ctypes.CDLL.__init__ = load
from tether.envs import make_env
for env_id in ("HalfCheetah-v5", "dm_control/cartpole-swingup-v0"):
    env = make_env(env_id)
    env.reset(seed=0)
    env.step(env.action_space.sample())
print("both")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a display")
def test_states_need_no_graphics_library() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.endswith("both\n"), run.stderr
