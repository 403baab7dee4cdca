"""The run's logger: SB3's CSV and TensorBoard writers, continued where the checkpoint was when a run resumes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat


def make_logger(folder: Path, timesteps: int, verbose: bool) -> Logger:
    """Logger of ``progress.csv`` and TensorBoard events in ``folder``.

    :param timesteps: steps already trained; what an interrupted run logged after them is dropped
    :param verbose: also print SB3's table
    """
    progress = folder / "progress.csv"
    rows = _rows_until(progress, timesteps)
    csv_output = CSVOutputFormat(str(progress))
    for row in rows:
        csv_output.write(row, dict.fromkeys(row, ()), 0)
    outputs: list[KVWriter] = [csv_output, _TensorBoard(folder, timesteps)]
    if verbose:
        import sys

        outputs.append(HumanOutputFormat(sys.stdout))
    return Logger(str(folder), outputs)


class _TensorBoard(TensorBoardOutputFormat):
    """SB3's writer with ``purge_step``: events logged after the checkpoint are hidden, so that the curve is one line."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(str(folder))
        if purge_step:
            self.writer.close()
            self.writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step + 1)


def _rows_until(path: Path, timesteps: int) -> list[dict[str, Any]]:
    if not (timesteps and path.is_file()):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if value}
        for row in rows
        if row.get("time/total_timesteps") and int(float(row["time/total_timesteps"])) <= timesteps
    ]
