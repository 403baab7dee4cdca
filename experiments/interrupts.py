"""Ctrl-C and ``kill`` end a run the same way: it stops after the step that it is in and saves itself."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether someone asked the run to stop, and whether it waits for a good moment."""

    def __init__(self) -> None:
        self.requested = self.waits = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block the first signal only sets :attr:`requested`; the second one interrupts at once."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if not self.waits or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step; once more to stop at once, from the last checkpoint.", file=sys.stderr, flush=True)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside the block SIGINT and SIGTERM go to a :class:`Stop`, also where ``nohup ... &`` had SIGINT ignored.

    Python allows this in the main thread alone; in others the block runs as it is.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python
