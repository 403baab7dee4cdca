"""Set before anything imports MuJoCo or torch, which read these once."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")
# Small networks: a second thread only waits, and takes minutes to do so where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
