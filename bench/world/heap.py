"""The event heap: it owns the clock. What happens at one instant happens in the order of asking."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Deed = Callable[[], None]


class Heap:
    def __init__(self, start: float) -> None:
        self.now = start
        self._entries: list[tuple[float, int, Deed]] = []  # (when, which asked, what)
        self._asked = 0

    def at(self, when: float, deed: Deed) -> None:
        """Do it then; what lies in the past is done next."""
        self._asked += 1
        heapq.heappush(self._entries, (max(when, self.now), self._asked, deed))

    def after(self, seconds: float, deed: Deed) -> None:
        self.at(self.now + seconds, deed)

    def leap(self, seconds: float) -> None:
        """Time in which nothing of all this ran; what was due meanwhile is done right after it."""
        self.now += seconds

    def run(self, until: float) -> None:
        """Everything up to and including `until`; the clock stands there afterwards."""
        while self._entries and self._entries[0][0] <= until:
            at, _, deed = heapq.heappop(self._entries)
            self.now = max(self.now, at)
            deed()
        self.now = max(self.now, until)
