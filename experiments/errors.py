"""The one exception that the command line turns into a sentence and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something the caller can mend; the message is one sentence that says what to do."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word nearest to ``word``, or an empty string."""
    names = list(known)
    lower = {name.lower(): name for name in names}
    match = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    return f" Did you mean '{lower[match[0]]}'?" if match else ""


def first_line(error: Exception) -> str:
    """Kind and first line of an error of some library, whose messages may fill a screen."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.: ')}" if lines else type(error).__name__
