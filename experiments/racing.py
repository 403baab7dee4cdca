"""Ways of training that race: in one process and in turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .errors import UsageError, nearest

Run = Callable[[int], None]  # trains for n updates, and waits for the last


@dataclass
class Contestant:
    """A way of training.

    :param group: what is compared: method and size
    :param make: gives the function that trains
    :param agents: that it trains at once
    :param updates: of a round, at least; :meth:`warm_up` finds how many
    """

    group: str
    name: str
    make: Callable[[], Run]
    agents: int = 1
    updates: int = 4
    rates: list[float] = field(default_factory=list)
    run: Run | None = None

    def warm_up(self, seconds: float) -> None:
        """Build it and find how many updates take about that long."""
        self.run = self.make()
        self.run(4)
        least = self.updates
        while (spent := self._seconds()) < seconds / 2:
            self.updates = max(2 * self.updates, round(0.5 * self.updates * seconds / spent))
        self.updates = max(least, round(self.updates * seconds / spent))

    def measure(self) -> None:
        """Train; updates per second, of all its agents together."""
        self.rates.append(self.agents * self.updates / self._seconds())

    def _seconds(self) -> float:
        assert self.run is not None
        begun = time.perf_counter()
        self.run(self.updates)
        return time.perf_counter() - begun


def require_known(names: Iterable[str] | None, groups: Iterable[str]) -> None:
    """:raises UsageError: for a name that is no group's"""
    groups = list(dict.fromkeys(groups))
    for name in names or ():
        if name not in groups:
            raise UsageError(f"There is no method '{name}'.{nearest(name, groups)} They are: {'; '.join(groups)}.")


def rate_cells(rates: np.ndarray, reference: np.ndarray) -> list[str]:
    """The median with its range, and that of the ratios to another's rates in the same rounds."""
    cells = [f"{np.median(rates):.4g} [{rates.min():.4g}, {rates.max():.4g}]"]
    if np.array_equal(rates, reference):
        return [*cells, "1"]
    ratios = rates / reference
    return [*cells, f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"]


def random_data(rows: int, obs_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    """A dataset of numbers without meaning in episodes of a thousand steps, a fifth of which cost something."""
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(rows + 1, obs_dim)).astype(np.float32)
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": rng.uniform(-1.0, 1.0, (rows, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "costs": (rng.random(rows) < 0.2).astype(np.float32),
        "terminals": np.arange(rows) % 1000 == 999,
    }
