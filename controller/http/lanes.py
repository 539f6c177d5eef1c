"""Limits how fast one caller may ask, and keeps a lane free for stops.

Rules:

1. A caller is its credential and, ten times as wide, its address: a new token each time helps
   nobody. The local admin of a loopback listener is not limited.
2. Stops (rollback, hold, pause, stop) have buckets and threads of their own: no number of slow
   pages, lists or refused requests keeps one waiting.
3. Who is too fast gets 429 with Retry-After, before anything is read or looked up.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.types import Scope

from controller.settings import is_loopback

P = ParamSpec("P")
T = TypeVar("T")
_STOP = re.compile(
    r"/api/v1/(stop|rollouts/[^/]+:(rollback|hold|pause))"
    r"|/(stop|rollouts/[^/]+/(rollback|hold|pause))"  # the same by a form of the pages
)
_PROBES = frozenset({"/livez", "/readyz"})
_STOP_RATE = 20.0  # a second, of one caller: a person needs one, a runaway script gets no more
_BURST = 5.0  # seconds of its rate that a caller may spend at once
_ADDRESS = 10.0  # an address is as wide as so many callers
_MOST = 10_000  # callers that are remembered
STOP_THREADS = 8


class Lanes:
    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate  # requests a second of one caller; 0: no limit
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self._threads = CapacityLimiter(STOP_THREADS)

    async def stopping(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it in the stops' own threads."""
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._threads)

    def wait(self, scope: Scope, trusted: bool) -> float:
        """Seconds until this request may come again; 0: it may come now."""
        headers, path = Headers(scope=scope), str(scope["path"])
        if self._rate <= 0 or path in _PROBES:
            return 0.0
        credential = headers.get("authorization") or headers.get("cookie") or ""
        address = (scope.get("client") or ("?",))[0]
        if trusted and not credential and is_loopback(address):
            return 0.0
        if scope["method"] == "POST" and _STOP.fullmatch(path):
            lane, rate = "stop", _STOP_RATE
        else:
            lane, rate = "usual", self._rate
        caller = sha256(credential.encode()).hexdigest() if credential else address
        return max(
            self._take((lane, caller), rate), self._take((f"{lane}@", address), rate * _ADDRESS)
        )

    def _take(self, key: tuple[str, str], rate: float) -> float:
        now, most = self._clock(), rate * _BURST
        left, at = self._buckets.pop(key, (most, now))
        left = min(most, left + (now - at) * rate)
        short = max(0.0, 1.0 - left)
        self._buckets[key] = (left - (0.0 if short else 1.0), now)
        while len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)
        return short / rate
