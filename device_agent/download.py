"""Brings one artifact to the disk: resumed after a cut, verified, bounded. urllib, blocking.

Rules, in order:

1. Bytes land in `<target>.part`, synced every `SYNC_BYTES`. A resume asks for the rest with `Range`
   and `If-Range`; a server that answers 200, or names another ETag, starts from zero.
2. Never more bytes than the order says; a whole file of another size or digest is thrown away.
3. 4xx is final for that URL, except 408 and 429; everything else is tried again, with the next
   URL: exponential back-off, full jitter, `Retry-After` honoured, one deadline for all of it.
4. The enrolled server's origin gets our credentials; no other host ever does. Redirects are
   refused: the order names the places.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from device_agent import reconnect
from device_agent.installers.slots import sync_directory
from device_agent.machine import FetchRefused
from device_agent.protocol import Reason
from device_agent.reserve import LAST, room
from device_agent.work import Item

if TYPE_CHECKING:  # imported where they are used: 3 MiB that a device needs for downloads only
    import http.client
    import urllib.error
    import urllib.request

SYNC_BYTES = 4 << 20
_CHUNK = 64 << 10
_FINAL_EXCEPT = frozenset({408, 429})


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    deadline: float = 3_600.0  # seconds for one artifact, all tries together
    timeout: float = 20.0  # seconds without a byte
    first_wait: float = 1.0
    longest_wait: float = 120.0


class _Again(Exception):
    def __init__(self, detail: str, *, after: float = 0.0) -> None:
        super().__init__(detail)
        self.after = after


@cache
def _opener() -> urllib.request.OpenerDirector:
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object, **__: object) -> None:
            return None

    # No proxies from the environment: where a device fetches from is the order's word alone.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirects())


class Downloader:
    """A `machine.Transfer`. `stop` ends a wait at once."""

    def __init__(
        self,
        *,
        server: str = "",
        credentials: tuple[str, str] | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
        dice: Callable[[], float] = reconnect.dice,
    ) -> None:
        self._origin = origin(server)
        self._credentials = credentials
        self._patience = patience or Patience()
        self._stop = stop or threading.Event()
        self._dice = dice

    def __call__(self, item: Item, target: Path) -> None:
        """Raises FetchRefused with the reason; OSError when the disk fails."""
        deadline = time.monotonic() + self._patience.deadline
        urls = [url for url in item.urls if urlsplit(url).scheme in ("http", "https")]
        last = "no http(s) URL"
        tries = 0
        while urls:
            url = urls[tries % len(urls)]
            try:
                self._try(url, item, target, deadline)
                return
            except FetchRefused as refused:
                urls.remove(url)
                # Of a full disk no mirror knows better.
                if not urls or refused.reason is Reason.DISK_FULL:
                    raise
                last = str(refused)
                continue
            except _Again as again:
                last, after = str(again), again.after
            tries += 1
            wait = max(after, self._backoff(tries))
            if time.monotonic() + wait >= deadline or self._stop.wait(wait):
                break
        raise FetchRefused(Reason.DOWNLOAD_FAILED, f"{item.component}: {last}")

    def _backoff(self, tries: int) -> float:
        highest = min(
            self._patience.longest_wait, self._patience.first_wait * 2.0 ** min(tries, 16)
        )
        return float(self._dice() * highest)

    def _try(self, url: str, item: Item, target: Path, deadline: float) -> None:
        import http.client
        import urllib.error
        import urllib.request

        part = target.with_name(target.name + ".part")
        offset, etag = _resume_at(part, item.size)
        request = urllib.request.Request(url, headers=self._headers(url))  # noqa: S310 - http(s)
        if offset and etag:
            request.add_header("Range", f"bytes={offset}-")
            request.add_header("If-Range", etag)
        try:
            with _opener().open(request, timeout=self._patience.timeout) as answer:
                self._receive(answer, item, part, offset if answer.status == 206 else 0, deadline)
        except urllib.error.HTTPError as error:
            with error:
                _refuse(error, url, part)
        except (http.client.HTTPException, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                _drop(part)  # what was filled with it is free again
                raise FetchRefused(Reason.DISK_FULL, str(error)) from error
            raise _Again(f"{url}: {error!r}") from error
        _finish(item, part, target)

    def _headers(self, url: str) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "bellwether-agent"}
        if self._credentials and origin(url) == self._origin:
            headers["Authorization"] = basic(*self._credentials)
        return headers

    def _receive(
        self, answer: http.client.HTTPResponse, item: Item, part: Path, offset: int, deadline: float
    ) -> None:
        if answer.status == 206 and not _continues(answer, offset):
            part.unlink(missing_ok=True)
            raise _Again("the server resumed at another place")
        etag = answer.headers.get("ETag", "")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(offset)
            file.seek(offset)
            _fits(item, offset, part)
            synced = offset
            _note(part, offset, etag)
            while chunk := answer.read(_CHUNK):
                if file.tell() + len(chunk) > item.size:
                    file.truncate(0)
                    raise FetchRefused(Reason.SIZE_MISMATCH, f"more than {item.size} bytes")
                file.write(chunk)
                if file.tell() - synced >= SYNC_BYTES:
                    synced = _sync(file, part, etag)
                if self._stop.is_set() or time.monotonic() > deadline:
                    break
            synced = _sync(file, part, etag)
        if synced < item.size:
            raise _Again(f"cut at byte {synced} of {item.size}")


def origin(url: str) -> tuple[str, str, int] | None:
    """(scheme, host, port), or None for what is no http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return parts.scheme, parts.hostname.lower(), port


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _refuse(error: urllib.error.HTTPError, url: str, part: Path) -> None:
    detail = f"{url}: HTTP {error.code}"
    if error.code == 416:  # what we have is not a beginning of what they have
        part.unlink(missing_ok=True)
        raise _Again(detail)
    if 300 <= error.code < 500 and error.code not in _FINAL_EXCEPT:
        raise FetchRefused(Reason.DOWNLOAD_REFUSED, detail)
    after = error.headers.get("Retry-After", "")
    raise _Again(detail, after=min(float(after), 3_600.0) if after.isdecimal() else 0.0)


def _fits(item: Item, offset: int, part: Path) -> None:
    """Do not fill the disk to find that it is too small: others write to it, too."""
    wanted, there = item.size - offset + LAST, room(part.parent)
    if there < wanted:
        _drop(part)
        detail = f"{item.component}: {wanted} bytes are needed, {there} are free"
        raise FetchRefused(Reason.DISK_FULL, detail)


def _drop(part: Path) -> None:
    for file in (part, _notes(part), _begun(part)):
        file.unlink(missing_ok=True)


def _continues(answer: http.client.HTTPResponse, offset: int) -> bool:
    return answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _finish(item: Item, part: Path, target: Path) -> None:
    with part.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    _notes(part).unlink(missing_ok=True)
    if digest != item.digest:
        part.unlink()
        raise FetchRefused(Reason.DIGEST_MISMATCH, f"{item.component}: {digest}")
    part.replace(target)
    sync_directory(target.parent)


def _sync(file: IO[bytes], part: Path, etag: str) -> int:
    file.flush()
    os.fdatasync(file.fileno())
    _note(part, file.tell(), etag)
    return file.tell()


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _begun(part: Path) -> Path:
    return part.with_name(part.name + ".json.new")


def _note(part: Path, offset: int, etag: str) -> None:
    aside = _begun(part)
    aside.write_text(json.dumps({"offset": offset, "etag": etag}))
    aside.replace(_notes(part))


def _resume_at(part: Path, size: int) -> tuple[int, str]:
    """(synced offset, ETag): bytes after the last sync may be anything after a power cut."""
    try:
        note = json.loads(_notes(part).read_text())
        offset, etag = int(note["offset"]), str(note["etag"])
        usable = 0 < offset < size and offset <= part.stat().st_size and not etag.startswith("W/")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
    return (offset, etag) if usable and etag else (0, "")
