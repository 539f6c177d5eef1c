"""Where a process may die: every call of a port is a point, and points are counted.

`kill` names the points (1, 2, …) at which the process that made the call dies: what it had in
memory is gone, what it had committed stays. `mean` adds deaths by chance: one in `mean` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random


class Killed(BaseException):
    """The process is dead. Not an Exception: nothing in it may catch its own death."""


class Points:
    def __init__(
        self, kill: frozenset[int] = frozenset(), chance: Random | None = None, mean: float = 0.0
    ) -> None:
        self.count = 0
        self.names: list[str] = []  # of the points so far, when `recording`
        self.recording = False
        self.who = ""  # the process that runs now; empty: the world itself, which cannot die
        self.killed: list[tuple[int, str]] = []
        self.between: Callable[[str], None] | None = None  # others act while this one is here
        self._kill = kill
        self._chance = chance
        self._mean = mean

    def reach(self, where: str) -> None:
        """A port was called; raises Killed when the caller dies here."""
        if not self.who:
            return
        self.count += 1
        if self.recording:
            self.names.append(f"{self.who}/{where}")
        if self.between is not None:
            self.between(where)
        if self.count in self._kill or self._struck():
            self.killed.append((self.count, f"{self.who}/{where}"))
            raise Killed(f"{self.who} at {where}")

    @contextmanager
    def by(self, who: str) -> Iterator[None]:
        """What happens inside is done by that process."""
        before, self.who = self.who, who
        try:
            yield
        finally:
            self.who = before

    def rest(self) -> None:
        """Nobody dies any more."""
        self._kill, self._mean = frozenset(), 0.0

    def _struck(self) -> bool:
        if self._chance is None or self._mean <= 0:
            return False
        return self._chance.random() * self._mean < 1.0
