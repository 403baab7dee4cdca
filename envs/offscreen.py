"""How to render where there is no display."""

import ctypes
import os
import sys

LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}  # values of MUJOCO_GL, and what each of them needs


def choose_renderer() -> None:
    """Set ``MUJOCO_GL`` on Linux without a display, where nobody has: to what the system has the library of.

    MuJoCo and dm_control read it once, when they are imported. Where the library is missing that import fails, also for those
    who want no pictures, so that without any it stays unset.
    """
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "linux" or has_display or "MUJOCO_GL" in os.environ:
        return
    for renderer, library in LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        os.environ["MUJOCO_GL"] = renderer
        return
