"""A web server on this machine that misbehaves on demand, and empty places for data."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Site:
    """What the server says: `pages[path]` is called with the request and the number of requests for it before."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler, int], None]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"{self.address}{path}"

    def file(self, path: str, content: bytes, **behaviour) -> str:
        """Serve `content` properly, but for `behaviour` (see `answer`)."""
        self.pages[path] = lambda request, attempt: self.answer(request, content, attempt, **behaviour)
        return self.url(path)

    def answer(self, request: BaseHTTPRequestHandler, content: bytes, attempt: int, **behaviour) -> None:
        answer(request, content, attempt, self.closing, **behaviour)

    def asked(self, path: str) -> list[dict[str, str]]:
        return [headers for asked, headers in self.requests if asked == path]


def answer(
    request: BaseHTTPRequestHandler,
    content: bytes,
    attempt: int,
    closing: threading.Event,
    *,
    etag: str | None = '"one"',
    ranges: bool = True,
    shift: int = 0,
    send: Callable[[int], int | None] = lambda attempt: None,
    stall: bool = False,
    headers: dict[str, str] | None = None,
) -> None:
    """Send `content`, or the range asked for; `send(attempt)` bytes of it only, then close, or stall."""
    start, status = 0, 200
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    fresh = request.headers.get("If-Range") in (None, etag)
    if asked and ranges and fresh:
        start = int(asked[1]) + shift
        if start >= len(content):
            request.send_error(416)
            return
        status = 206
    body = content[start:]
    request.send_response(status)
    if status == 206:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.send_header("Content-Length", str(len(body)))
    if etag:
        request.send_header("ETag", etag)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "HEAD":
        return
    request.wfile.write(body[: send(attempt)])
    if stall and send(attempt) is not None:
        request.wfile.flush()
        closing.wait(20)


@pytest.fixture
def site() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            before = len(served.asked(self.path))
            served.requests.append((self.path, dict(self.headers)))
            page = served.pages.get(self.path)
            with suppress(ConnectionError):
                if page is None:
                    self.send_error(404)
                else:
                    page(self, before)

        do_HEAD = do_GET

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield served
    served.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty mirror and an empty cache, in the environment; the network is allowed."""
    (tmp_path / "mirror").mkdir()
    monkeypatch.setenv("LATHE_DATA", str(tmp_path / "mirror"))
    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    for name in ("LATHE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lathe.data.store._unreachable", {})
    return tmp_path
