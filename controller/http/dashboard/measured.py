"""What takes seconds to measure, measured beside the pages: they show the last result and its time.

Rules: one measurement at a time; a result is measured again when somebody asks for it and it is
older than twenty times what it took (a second at least); that is waited for only shortly, then the
last one is shown, or the page says that it is coming. A program waits for the first one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import structlog

FRESH = 1.0  # seconds
PATIENCE = 0.15
OF_PROGRAMS = 60.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Result:
    value: Any  # None: it could not be measured, the log says why
    at: float
    took: float = 0.0  # seconds


class Measured:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._results: dict[Hashable, Result] = {}
        self._running: dict[Hashable, Future[Any]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="measured")

    def get(
        self, key: Hashable, measure: Callable[[], Any], patience: float = PATIENCE
    ) -> Result | None:
        """The last result; None while the first is still being measured, after `patience`."""
        with self._lock:
            known = self._results.get(key)
            if known is not None and self._clock() - known.at < max(FRESH, 20 * known.took):
                return known
            future = self._running.get(key)
            if future is None or future.done():
                future = self._running[key] = self._worker.submit(self._run, key, measure)
        wait([future], patience if known is None else PATIENCE)
        with self._lock:
            return self._results.get(key)

    def _run(self, key: Hashable, measure: Callable[[], Any]) -> None:
        began = time.perf_counter()
        try:
            value = measure()
        except Exception:  # the outermost turn of this worker: logged, and tried again
            log.exception("measured", key=str(key))
            value = None
        result = Result(value, self._clock(), time.perf_counter() - began)
        with self._lock:
            self._results[key] = result
            while len(self._results) > 64:
                del self._results[next(iter(self._results))]

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)
