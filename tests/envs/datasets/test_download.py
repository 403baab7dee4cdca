"""Downloads from a server of our own: whole, resumed, cut, changed, refused, down."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tether.envs import DatasetError, load_dataset
from tether.envs.datasets import d4rl, load
from tether.envs.datasets import download as module
from tether.envs.datasets.download import download

Make = Callable[..., dict[str, np.ndarray]]
Save = Callable[..., Path]
CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves one content under every path.

    :ivar cuts: how many bytes each of the next answers sends before the connection dies
    :ivar ranges: whether ranges are served
    :ivar asked: the Range header of each request
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.status = CONTENT, '"one"', 200
        self.ranges, self.cuts, self.asked = True, list[int](), list["str | None"]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.status != 200:
            self.send_error(server.status)
            return
        first, total = 0, len(server.content)
        if asked and server.ranges and self.headers.get("If-Range") == server.tag:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            if first >= total:
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(total - first))
        self.end_headers()
        end = first + server.cuts.pop(0) if server.cuts else total
        self.wfile.write(server.content[first:end])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_whole(server: Server, tmp_path: Path) -> None:
    path = download(server.url, tmp_path / "sub" / "data.bin", SHA256)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["data.bin"]
    download(server.url, path, SHA256)
    assert server.asked == [None], "what is there is not downloaded again"


def test_a_connection_that_dies_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    assert download(server.url, tmp_path / "data.bin", SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_call_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIES", 1)
    server.cuts = [100_000, 0]
    with pytest.raises(DatasetError, match=r"data\.bin cannot be downloaded \(the connection ended early\): try again later"):
        download(server.url, tmp_path / "data.bin", SHA256)
    assert names(tmp_path) == ["data.bin.part", "data.bin.tag"]
    assert download(server.url, tmp_path / "data.bin", SHA256).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=100000-"
    assert names(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("change", ["the file changed", "ranges are not served", "the part is whole", "the part is too long"])
def test_parts_never_mix(server: Server, tmp_path: Path, change: str) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "data.bin.tag").write_text(server.tag)
    if change == "the file changed":
        server.content, server.tag = CONTENT[::-1], '"two"'
    elif change == "ranges are not served":
        server.ranges = False
    else:
        (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more" * (change == "the part is too long"))
    assert download(server.url, tmp_path / "data.bin").read_bytes() == server.content


def test_a_wrong_sha256_is_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"data\.bin has the sha256 {SHA256} instead of 0{{64}} and was removed: check"):
        download(server.url, tmp_path / "data.bin", "0" * 64)
    assert names(tmp_path) == []
    download(server.url, tmp_path / "data.bin")
    with pytest.raises(DatasetError, match="was removed"):
        download(server.url, tmp_path / "data.bin", "0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("status", "tries", "advice"), [(404, 1, "fetch it by hand"), (503, 4, "try again later")])
def test_refusals(server: Server, tmp_path: Path, status: int, tries: int, advice: str) -> None:
    server.status = status
    with pytest.raises(DatasetError, match=rf"data\.bin cannot be downloaded \(HTTP {status}\): {advice}"):
        download(server.url, tmp_path / "data.bin")
    assert len(server.asked) == tries
    assert names(tmp_path) == []


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.bin"
    with pytest.raises(DatasetError, match=r"data\.bin cannot be downloaded \(.*refused.*\): try again later"):
        download(url, tmp_path / "data.bin")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        download(server.url, tmp_path / "file" / "data.bin")


def test_a_name_is_downloaded_into_the_cache(
    server: Server, transitions: Make, save_hdf5: Save, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = save_hdf5(tmp_path / "a.hdf5", transitions()).read_bytes()
    task = d4rl.tasks()["hopper-medium-v2"]
    monkeypatch.setattr(load.d4rl, "tasks", lambda: {"hopper-medium-v2": task._replace(url=server.url)})
    dataset = load_dataset("hopper-medium-v2")
    assert (cache / "files" / "d4rl" / "data.bin").read_bytes() == server.content
    assert dataset.meta["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert dataset.meta["reference_max_return"] == 3234.3
    load_dataset("hopper-medium-v2")
    assert len(server.asked) == 1
    with pytest.raises(DatasetError, match="was removed"):
        load_dataset("hopper-medium-v2", sha256="0" * 64)
    assert not (cache / "files" / "d4rl" / "data.bin").exists()
