"""The run's logger: ``progress.csv`` and TensorBoard, continued where the checkpoint was when a run resumes."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.logger import (
    HParam,
    HumanOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)

from .manifest import write_atomically

STEP = "time/total_timesteps"


def make_logger(folder: Path, timesteps: int, verbose: bool) -> Logger:
    """Logger of ``progress.csv`` and TensorBoard events in ``folder``.

    :param timesteps: steps already trained; what an interrupted run logged after them is dropped
    :param verbose: also print SB3's table
    """
    outputs: list[KVWriter] = [ProgressWriter(folder / "progress.csv", timesteps), EventWriter(folder, timesteps)]
    if verbose:
        outputs.append(HumanOutputFormat(sys.stdout))
    return Logger(str(folder), outputs)


def write_now(logger: Logger, values: dict[str, float], step: int) -> None:
    """Log values at their own step, without what else waits for the next dump."""
    for output in logger.output_formats:
        if isinstance(output, KVWriter):
            output.write(values, dict.fromkeys(values, ()), step)


def write_figure(logger: Logger, name: str, figure: Figure, step: int) -> None:
    """Show a figure in TensorBoard; nothing happens without it."""
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            output.writer.add_figure(name, figure, step)


def write_video(logger: Logger, name: str, frames: np.ndarray, step: int, fps: int) -> None:
    """Show a film in TensorBoard, as the animated picture that its video summaries are; nothing happens without it.

    :param frames: (T, H, W, 3) uint8
    """
    import imageio.v3 as iio
    from tensorboard.compat.proto.summary_pb2 import Summary

    outputs = [output for output in logger.output_formats if isinstance(output, TensorBoardOutputFormat)]
    if outputs:
        content = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
        height, width = frames.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        for output in outputs:
            output.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def write_configuration(logger: Logger, hparams: dict[str, Any], text: str, step: int) -> None:
    """Fill TensorBoard's hparams tab and show the configuration as text; nothing happens without TensorBoard.

    :param hparams: flat mapping of names to numbers, words or booleans
    :param text: the configuration as Markdown
    """
    metrics: dict[str, float | int] = {"rollout/ep_rew_mean": 0.0, "eval/mean_reward": 0.0}
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            output.write({"hparams": HParam(hparams, metrics)}, {"hparams": ()}, step)
            output.writer.add_text("configuration", text, step)


def drop_episodes_after(folder: Path, moment: float) -> None:
    """Remove from the monitor files the episodes that ended after a moment (seconds since the epoch)."""
    for path in folder.glob("*monitor.csv"):
        lines = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", errors="replace").splitlines()
        if len(lines) < 2:  # a kill cut its head
            path.unlink()
            continue
        header, columns, *rows = lines
        begun = json.loads(header.removeprefix("#"))["t_start"]
        cells = [row.split(",") for row in rows]  # return, length, seconds since the start
        kept = [",".join(row) for row in cells if len(row) >= 3 and _is_number(row[2]) and begun + float(row[2]) <= moment]
        write_atomically(path, "\n".join([header, columns, *kept]) + "\n")


class ProgressWriter(KVWriter):
    """``progress.csv`` as SB3 writes it, but with one row per step: what is logged later at the same step joins it.

    :param path: of the file
    :param timesteps: rows after this step are dropped, all of them if it is 0
    """

    def __init__(self, path: Path, timesteps: int) -> None:
        self.path = path
        self.rows = [row for row in _read(path) if float(row[STEP]) <= timesteps]
        self.keys = list(dict.fromkeys(key for row in self.rows for key in row))
        write_atomically(path, _as_csv(self.keys, self.rows, header=True))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append the scalars among the values as a row, or add them to the last row if that has the same step."""
        scalars = filter_excluded_keys(key_values, key_excluded, "csv")
        row = {STEP: step, **{k: v for k, v in scalars.items() if isinstance(v, (int, float, str, np.number))}}
        same_step = bool(self.rows) and int(self.rows[-1][STEP]) == step
        new_keys = [key for key in row if key not in self.keys]
        self.keys += new_keys
        if same_step:
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        if same_step or new_keys:
            write_atomically(self.path, _as_csv(self.keys, self.rows, header=True))
        else:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_as_csv(self.keys, [row], header=False))

    def close(self) -> None:
        """Nothing is open between two rows."""


class EventWriter(TensorBoardOutputFormat):
    """SB3's TensorBoard writer with ``purge_step``: what was logged after the checkpoint is hidden, so a curve is one line.

    :param folder: of the event files
    :param timesteps: of the checkpoint, 0 for a new run
    """

    def __init__(self, folder: Path, timesteps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Not SB3's constructor, which would open a file of events without purge_step first.
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=timesteps + 1 if timesteps else None)
        self._is_closed = False


def _as_csv(keys: list[str], rows: list[dict[str, Any]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    if header and keys:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a kill may have cut the last one, or left zeros where it was to be."""
    if not path.is_file():
        return []
    text = path.read_bytes().rpartition(b"\n")[0].replace(b"\0", b"").decode("utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(text))
    return [{key: value for key, value in row.items() if key and value} for row in rows if _is_number(row.get(STEP))]


def _is_number(word: str | None) -> bool:
    try:
        return math.isfinite(float(word or "nan"))
    except ValueError:
        return False
