"""Downloads that resume, are checked, and appear under their name only when they are whole."""

from __future__ import annotations

import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from .cache import file_sha256, sync_folder
from .dataset import BLOCK, DatasetError

logger = logging.getLogger("tether")

_TRIES = 4  # in a row without a byte of progress
_PAUSE = 1.0  # seconds, times the number of failures
_SILENCE = 60  # seconds


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetch a file, going on where an earlier try ended; what is there already is kept.

    Beside an unfinished ``<name>.part`` lies ``<name>.tag`` with the server's version of the file, so that parts of two
    versions are never put together.

    :param sha256: what the file must have; otherwise it is removed
    :return: the path
    :raises DatasetError: where the server or the disk fails, or the checksum is wrong; no half file bears the name
    """
    from filelock import FileLock

    try:
        if path.exists():
            _check(url, path, sha256)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # another process may have brought it meanwhile
                part = path.with_name(f"{path.name}.part")
                logger.info("downloading %s to %s", url, path)
                _fetch(url, part)
                _check(url, part, sha256)
                part.replace(path)
                _tag(part).unlink(missing_ok=True)
                sync_folder(path.parent)
    except OSError as error:
        raise DatasetError(f"{path} cannot be written ({error.strerror}): make room, or set TETHER_DATA elsewhere.") from error
    return path


def _tag(part: Path) -> Path:
    return part.with_suffix(".tag")


def _check(url: str, path: Path, sha256: str | None) -> None:
    if sha256 is None or (found := file_sha256(path)) == sha256.lower():
        return
    path.unlink()
    _tag(path).unlink(missing_ok=True)
    raise DatasetError(f"{url} has the sha256 {found} instead of {sha256.lower()} and was removed: check both and try again.")


def _fetch(url: str, part: Path) -> None:
    """Bring the part to its full length; a connection that dies is taken up again as long as bytes come."""
    failures = 0
    while failures < _TRIES:
        before = _size(part)
        try:
            if _fetch_more(url, part):
                return
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is longer than what the server has now
                part.unlink(missing_ok=True)
            elif error.code < 500:
                advice = "fetch it by hand and give its path"
                raise DatasetError(f"{url} cannot be downloaded (HTTP {error.code}): {advice}.") from error
            problem = f"HTTP {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        time.sleep(_PAUSE * failures)
    raise DatasetError(f"{url} cannot be downloaded ({problem}): try again later to go on, or give the path of a local copy.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_more(url: str, part: Path) -> bool:
    """Append what the server sends; whether the file is whole now."""
    request = urllib.request.Request(url, headers={"User-Agent": "tether-rl", "Accept-Encoding": "identity"})
    if _size(part) and _tag(part).exists():
        request.add_header("Range", f"bytes={_size(part)}-")
        request.add_header("If-Range", _tag(part).read_text(encoding="utf-8"))
    with urllib.request.urlopen(request, timeout=_SILENCE) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        whole = re.search(r"/(\d+)$", response.headers.get("Content-Range", "")) if resumed else None
        total = int(whole[1]) if whole else int(length) if length and not resumed else None
        if not resumed:
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            _tag(part).unlink(missing_ok=True)
            if version and not version.startswith("W/"):
                _tag(part).write_text(version, encoding="utf-8")
        with open(part, "ab" if resumed else "wb") as file:
            try:
                while block := response.read(BLOCK):
                    file.write(block)
            finally:
                file.flush()
                os.fsync(file.fileno())
    return total is None or _size(part) == total
