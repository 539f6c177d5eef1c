"""Downloads over a real HTTP server that cuts, stalls, moves and refuses."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from device_agent.download import Downloader, Patience
from device_agent.machine import FetchRefused, hash_file
from device_agent.protocol import Reason
from device_agent.reserve import LAST
from device_agent.work import Item
from tests.disks import fill, small_or_skip

BODY = bytes(range(256)) * 1000
QUICK = Patience(deadline=20.0, timeout=2.0, first_wait=0.01, longest_wait=0.02)

Answer = Callable[[BaseHTTPRequestHandler, int], None]


class Site:
    """Answers the n-th request by its script; the last entry serves all later ones."""

    def __init__(self, *script: Answer) -> None:
        self.script, self.ranges = script, list[str | None]()
        self.authorized = list[str | None]()

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        number = len(self.ranges)
        self.ranges.append(request.headers.get("Range"))
        self.authorized.append(request.headers.get("Authorization"))
        self.script[min(number, len(self.script) - 1)](request, number)


def whole(request: BaseHTTPRequestHandler, _: int, *, cut: int | None = None) -> None:
    text = request.headers.get("Range")
    start = int(text[6:-1]) if text else 0
    request.send_response(206 if text else 200)
    request.send_header("ETag", '"one"')
    if text:
        request.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
    request.send_header("Content-Length", str(len(BODY) - start))
    request.end_headers()
    request.wfile.write(BODY[start:cut])


def cut(request: BaseHTTPRequestHandler, number: int) -> None:
    whole(request, number, cut=100_000)


def status(code: int, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler, _: int) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@pytest.fixture
def serve() -> Iterator[Callable[[Site], str]]:
    servers = []

    def start(site: Site) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/a"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def item(*urls: str, size: int = len(BODY), body: bytes = BODY) -> Item:
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    return Item(
        component="app", release="r", digest=digest, size=size, urls=urls, installer="slots"
    )


def fetch(target: Path, wanted: Item) -> None:
    Downloader(patience=QUICK)(wanted, target)
    assert hash_file(target) == wanted.digest


def test_a_cut_download_resumes_where_it_was_synced(tmp_path: Path, serve: Any) -> None:
    site = Site(cut, whole)
    fetch(tmp_path / "x", item(serve(site)))
    assert site.ranges == [None, "bytes=100000-"]


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, serve: Any) -> None:
    site = Site(status(503), status(429, Retry_After="0"), status(408), whole)
    fetch(tmp_path / "x", item(serve(site)))
    assert len(site.ranges) == 4


def test_416_starts_from_zero(tmp_path: Path, serve: Any) -> None:
    site = Site(cut, status(416), whole)
    fetch(tmp_path / "x", item(serve(site)))
    assert site.ranges[2] is None


def test_404_is_final_unless_another_place_has_it(tmp_path: Path, serve: Any) -> None:
    missing, there = Site(status(404)), Site(whole)
    fetch(tmp_path / "x", item(serve(missing), serve(there)))
    with pytest.raises(FetchRefused) as refused:
        fetch(tmp_path / "y", item(serve(missing)))
    assert refused.value.reason is Reason.DOWNLOAD_REFUSED
    assert len(missing.ranges) == 2


def test_a_redirect_is_refused(tmp_path: Path, serve: Any) -> None:
    elsewhere = Site(whole)
    moved = Site(status(302, Location=serve(elsewhere)))
    with pytest.raises(FetchRefused):
        fetch(tmp_path / "x", item(serve(moved)))
    assert elsewhere.ranges == []


def test_more_bytes_than_ordered_are_refused(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(FetchRefused) as refused:
        fetch(tmp_path / "x", item(serve(Site(whole)), size=1000))
    assert refused.value.reason is Reason.SIZE_MISMATCH


def test_another_content_is_refused(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(FetchRefused) as refused:
        fetch(tmp_path / "x", item(serve(Site(whole)), body=b"other"))
    assert refused.value.reason is Reason.DIGEST_MISMATCH
    assert not (tmp_path / "x").exists()


def test_only_the_enrolled_origin_gets_our_credentials(tmp_path: Path, serve: Any) -> None:
    home, mirror = Site(status(404)), Site(whole)
    url = serve(home)
    loader = Downloader(server=url, credentials=("car-1", "secret"), patience=QUICK)
    loader(item(url, serve(mirror)), tmp_path / "x")
    assert home.authorized[0] is not None
    assert mirror.authorized == [None]


def test_what_does_not_fit_is_refused_before_it_fills_the_disk(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_agent.download.room", lambda _: LAST + len(BODY) - 1)
    away = Site(status(503))
    with pytest.raises(FetchRefused, match="bytes are needed") as refused:
        fetch(tmp_path / "x", item(serve(Site(whole)), serve(away)))
    assert refused.value.reason is Reason.DISK_FULL
    assert not away.ranges  # no mirror has more room for it
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_meanwhile_gets_its_room_back(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setattr("device_agent.download.room", lambda _: 1 << 40)  # before it was filled

    def and_then_it_is_full(request: BaseHTTPRequestHandler, number: int) -> None:
        fill(disk)
        whole(request, number)

    with small_or_skip(disk, 8):
        with pytest.raises(FetchRefused) as refused:
            fetch(disk / "x", item(serve(Site(cut, and_then_it_is_full))))
        assert refused.value.reason is Reason.DISK_FULL
        assert {file.name for file in disk.iterdir()} == {"filler"}
