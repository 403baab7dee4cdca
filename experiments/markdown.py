"""What reports are written with: Markdown tables, and numbers, step counts and intervals of a readable length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table whose columns also line up in a terminal; the first column is left-aligned, numbers right."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, *body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    for line in (cells[0], rule, *cells[1:]):
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        yield f"| {' | '.join(padded)} |"


def number(value: float) -> str:
    """Three digits, of larger numbers all before the point; a dash for nan."""
    if not np.isfinite(value):
        return "-"
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def format_steps(steps: float) -> str:
    """Steps as people say them: 300k, 2.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(steps) >= unit:
            return f"{steps / unit:.4g}{name}"
    return f"{steps:.4g}"


def brackets(low: float, high: float, form: str = "") -> str:
    """An interval, its ends as `number` gives them or in a form of their own; a dash for nan."""
    if not np.isfinite(low):
        return "-"
    return f"[{form.format(low)}, {form.format(high)}]" if form else f"[{number(low)}, {number(high)}]"


def spread(values: np.ndarray) -> str:
    """Median and range of repeated measurements, in whole numbers."""
    return f"{np.median(values):,.0f} [{values.min():,.0f}, {values.max():,.0f}]"


def ranges(seeds: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    ordered = sorted(set(seeds))
    starts = [seed for seed in ordered if seed - 1 not in ordered]
    ends = [seed for seed in ordered if seed + 1 not in ordered]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
