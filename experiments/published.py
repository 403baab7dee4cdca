"""The numbers of papers, from the CSV files in `results/published`."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .markdown import format_steps
from .runs import RunError

DEFAULT = Path("results/published")
COLUMNS = ("agent", "env", "steps", "metric", "value", "spread", "spread_kind", "source", "note")


@dataclass(frozen=True)
class Published:
    """One cell of a paper's table."""

    agent: str
    env: str
    steps: int | None
    """Budget in environment steps, None where it is not known."""
    value: str
    """As printed in the paper."""
    spread: str
    """Half width as printed, or empty."""
    spread_kind: str
    source: str
    note: str
    metric: str = "return"
    """`"return"` or `"success_rate"` of a task, or a score over many: `"train_iqm"`, `"unseen_iqm"`."""

    @property
    def place(self) -> str:
        """Environment and budget, which say how far the number may be compared."""
        return f"{self.env}, {format_steps(self.steps)} steps" if self.steps else f"{self.env}, steps not known"

    @property
    def number(self) -> str:
        """With its spread, and said of what where it is no return."""
        number = f"{self.value} ± {self.spread}" if self.spread else self.value
        return f"{number} success" if self.metric == "success_rate" else number


def same_task(one: str, other: str) -> bool:
    """Whether two ids name one environment up to its version: Ant-v2 and Ant-v4."""
    return re.sub(r"-v\d+$", "", one) == re.sub(r"-v\d+$", "", other)


def read_published(folder: str | Path | None = None) -> list[Published]:
    """The numbers in all CSV files of a folder; None takes `results/published`, where it exists.

    :raises RunError: if the folder is missing or a file does not have the columns
    """
    place = Path(folder or DEFAULT)
    if not place.is_dir():
        if folder:
            raise RunError(f"{place} is not a folder: --published takes a folder of CSV files with published numbers.")
        return []
    return [paper for path in sorted(place.glob("*.csv")) for paper in _read_paper(path)]


def _read_paper(path: Path) -> Iterator[Published]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise RunError(f"{path} must have the columns {','.join(COLUMNS)}.")
        for line in reader:
            try:
                steps = int(float(line["steps"])) if line["steps"] else None
                float(line["value"]), float(line["spread"] or 0)
            except (TypeError, ValueError):
                raise RunError(f"{path}, line {reader.line_num}: steps, value and spread must be numbers.") from None
            words = {name: line[name] for name in COLUMNS if name != "steps"}
            yield Published(steps=steps, **words)
