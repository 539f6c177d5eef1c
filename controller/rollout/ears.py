"""Decides what the service can hear: the clock on which silence is measured, and its outages.

Pure: a fold over what telemetry says of itself at each look. The *hearing clock* (telemetry) stands
still while broker or ingest are away. That is not enough. Rules, in order:

1. Our own probe does not come through: we are deaf, from its last coming.
2. Nobody at all is heard, though the probe comes through and a crowd was heard before, to whom
   nothing was done: the road to them is cut. That is deafness too.
3. When it is over devices are on their way back, each at its own pace: the longer the outage, the
   later. Until then the clock stands still, so that nobody counts as silent.
4. Our own absence is an outage like another: whoever starts goes on from what was noted last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

PROBE_LATE = 5.0  # seconds since our own probe came through that are no outage
COMES_BACK = 90.0  # seconds: the longest pause between two attempts of an agent to connect
MOST = 20  # outages that are remembered


class Ears:
    def __init__(self, raw: float, heard_at: float) -> None:
        """`raw`: the hearing clock, `heard_at`: server time of its last advance."""
        self.clock = raw  # seconds; what silence is measured on
        self.heard_at = heard_at  # server time at which we last could hear
        self.deaf: list[tuple[float, float]] = []  # recent outages, server time: [from, to]
        self._raw, self._at = raw, heard_at
        self._cut: float | None = None  # the road is cut since then, on the hearing clock
        self._asked = -math.inf  # the last word about which `crowd` was asked
        self._back = -math.inf  # until then devices come back, on the hearing clock

    @classmethod
    def resumed(
        cls, noted: Mapping[str, Any] | None, hearing: tuple[float, float], now: float
    ) -> Ears:
        """After a start: `noted` by whoever looked before us. What happened since, nobody saw."""
        ears, raw = cls(*hearing), hearing[0]
        if noted is None or noted["clock"] > raw:
            return ears  # nobody looked before, or at another telemetry than this
        ears.clock = noted["clock"]
        ears.deaf = [(since, until) for since, until in noted["deaf"]]
        ears._cut = noted["cut"]
        ears._back = -math.inf if noted["back"] is None else noted["back"]
        ears._return(raw, max(0.0, now - noted["at"]))
        return ears

    def note(self, now: float) -> dict[str, Any]:
        """What the next one must know who looks."""
        back = None if self._back == -math.inf else self._back
        return {
            "at": now, "clock": self.clock, "cut": self._cut, "back": back,
            "deaf": self.deaf,
        }  # fmt: skip

    def hear(
        self,
        hearing: tuple[float, float],
        last_word: float,
        now: float,
        *,
        quiet: float,
        crowd: Callable[[], bool],
    ) -> None:
        """One look. `last_word`: hearing clock at the newest contact of any device; `quiet`:
        seconds without one that are worth the question `crowd`: was there a crowd before?"""
        raw, at = hearing
        if raw <= self._raw and now - at > PROBE_LATE:
            self._note(at, now)
            self.heard_at = at
            return
        if self.deaf and self.deaf[-1][0] == self._at and raw > self._raw:
            self._return(raw, self.deaf[-1][1] - self.deaf[-1][0])
        self._raw, self._at, self.heard_at = raw, at, at
        silence = raw - last_word
        if silence > quiet and self._is_cut(last_word, crowd):
            self._cut = last_word
            self.clock = min(self.clock, last_word + quiet)  # at our start it may be long ago
            self.heard_at = now - silence
            self._note(self.heard_at, now)
            return
        if self._cut is not None:
            self._return(raw, raw - self._cut)
            self._cut = None
        if raw >= self._back:
            self.clock = raw

    def _is_cut(self, last_word: float, crowd: Callable[[], bool]) -> bool:
        """`crowd` looks at the whole fleet: it is asked once about each silence."""
        if self._cut is None and last_word != self._asked:
            self._asked = last_word
            return crowd()
        return self._cut is not None

    def _return(self, raw: float, away: float) -> None:
        self._back = max(self._back, raw + min(COMES_BACK, PROBE_LATE + 2 * away))

    def _note(self, since: float, until: float) -> None:
        if self.deaf and abs(self.deaf[-1][0] - since) < PROBE_LATE:
            self.deaf[-1] = (self.deaf[-1][0], until)
        else:
            self.deaf = [*self.deaf[-MOST:], (since, until)]
