"""Files and folders that are there in whole or not at all: written beside, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill, a power cut or a full disk at any byte leaves the former version whole.

    :param path: of the file; a link is followed, so that what it points to is replaced
    :param content: text is written as UTF-8
    :raises OSError: as the system says it; nothing is left beside the file
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.new")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that appears under its name when everything in it is on the disk.

    :param folder: must not exist yet
    :param fill: writes the files into the folder that it is given
    :raises OSError: as the system says it; nothing is left
    """
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        for path in beside.iterdir():
            sync_file(path)
        sync_folder(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder away; a kill in between leaves at most remains that begin with a dot, never half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; not every system can, and those that cannot are left to themselves."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
