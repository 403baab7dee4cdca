"""Set before anything imports MuJoCo, which reads it once."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")
