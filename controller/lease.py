"""One controller at a time: waits for its turn, stays the leader while it lives, notices its end.

Rules, in order:

1. A lease that was given back, or that a controller held which is known to be dead, is free.
2. Another one's lease is free when its beat stood still for its seconds, by our own clock.
3. The leader's beat is raised by each of its transactions, and by a thread of its own meanwhile;
   not when its loop hangs: then somebody else shall take over.
4. A leader that was overtaken (it was stopped, or cut off) writes nothing more, says so, and
   stands by: it does not take the lease back from one that lives.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from controller.store import lease as rows
from controller.store.lease import Fenced, LeaseRow
from telemetry import metrics
from telemetry.store.database import reading, writing

log = structlog.get_logger()

EPOCH = 1_577_836_800.0  # 2020-01-01: until 2088 the seconds since then fit into 31 bits
HUNG = 300.0  # seconds without a turn of the loop after which it counts as hung


def lowest(heard: int, now: float) -> int:
    """The lowest term that a controller may begin with.

    Above all that devices were heard to obey, and not below the seconds since `EPOCH`: a database
    that was wiped or restored while the devices could not be heard must not begin with a term that
    was used before. (A term rises by one at each take-over, so the clock is always ahead of it.)
    """
    return max(heard + 1, int(now - EPOCH))


class Lease:
    """`wait` for a term, then lead inside `held(term)`; Fenced ends it."""

    def __init__(
        self,
        engine: Engine,
        *,
        holder: str,
        seconds: float,
        alone: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`alone`: no other process can work under this holder's name, so that one was us."""
        self._engine, self._holder, self._seconds = engine, holder, seconds
        self._alone, self._clock = alone, clock
        self._turned = clock()
        self._over = threading.Event()

    def wait(self, stopping: threading.Event, at_least: int) -> int | None:
        """A term of our own, at least this; None when told to stop before."""
        seen, since = None, self._clock()
        while not stopping.is_set():
            try:
                with reading(self._engine) as conn:
                    now = rows.look(conn)
                if now != seen:
                    self._stands_by(seen, now)
                    seen, since = now, self._clock()
                if self._free(now, self._clock() - since):
                    return self._take(now, at_least)
            except Fenced:
                pass
            except SQLAlchemyError as error:
                log.warning("lease", detail=str(error).splitlines()[0])
                seen, since = None, self._clock()  # we saw nothing: nobody is late
            stopping.wait(min(1.0, self._seconds / 5))
        return None

    @contextlib.contextmanager
    def held(self, term: int) -> Iterator[None]:
        """Renew the lease meanwhile; give it back at the end."""
        self._over.clear()
        self.turned()
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(term, ended), name="lease", daemon=True)
        beat.start()
        metrics.gauge("bellwether_controller_term", term)
        metrics.gauge("bellwether_controller_leading", 1)
        try:
            yield
        finally:
            metrics.gauge("bellwether_controller_leading", 0)
            ended.set()
            beat.join()
            with contextlib.suppress(SQLAlchemyError), writing(self._engine) as conn:
                rows.give_back(conn, term)

    def turned(self) -> None:
        """The loop has made a turn; raises Fenced when the lease is known to be lost."""
        self._turned = self._clock()
        if self._over.is_set():
            raise Fenced("another controller has taken over while this one stood still")

    def _free(self, row: LeaseRow, unchanged: float) -> bool:
        if not row.holder or (self._alone and row.holder == self._holder):
            return True
        return unchanged > max(row.seconds, self._seconds)

    def _take(self, seen: LeaseRow, at_least: int) -> int:
        with writing(self._engine) as conn:
            term = rows.take(
                conn, seen, holder=self._holder, seconds=self._seconds, at_least=at_least
            )
        if seen.holder:
            log.warning("took_over", term=term, of=seen.holder, their_term=seen.term)
        return term

    def _stands_by(self, seen: LeaseRow | None, now: LeaseRow) -> None:
        leader = now.holder and not (self._alone and now.holder == self._holder)
        if leader and (seen is None or seen.term != now.term):
            log.info("standing_by", leader=now.holder, term=now.term, lease_seconds=now.seconds)

    def _beat(self, term: int, ended: threading.Event) -> None:
        while not ended.wait(self._seconds / 3):
            if self._clock() - self._turned > HUNG:
                log.error("hung", seconds=HUNG, detail="the lease is not renewed any more")
                return
            try:
                with writing(self._engine) as conn:
                    rows.fence(conn, term)
            except Fenced:
                self._over.set()
                return
            except SQLAlchemyError as error:
                log.warning("lease", detail=str(error).splitlines()[0])
