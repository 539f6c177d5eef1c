"""What the store holds of the devices' words: the frozen rows that evidence and the loop read.

Only data here. `telemetry.store` writes and reads these rows, `telemetry.evidence` and
`controller.listening` fold them. Times are Unix seconds by the server's clock unless said
otherwise.

The *hearing clock* counts the seconds in which the server could hear (its loopback probe went
through broker and ingest). Silence is measured on it, so an outage of ours silences nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from device_agent.protocol import ComponentReport, HistoryEntry, State

if TYPE_CHECKING:
    from telemetry.sums import Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """The last word of one device: the winner by (boot_count, seq), and when we heard it last."""

    device: str
    change: int  # batch number of the last change: `TelemetryReader.devices_changed` pages by it
    last_contact: float  # any accepted message; server time
    heard_clock: float  # the hearing clock at last contact, seconds
    online: bool  # by presence and will
    sleeping_until: float | None
    boot: str
    boot_count: int
    reported_at: float | None  # when the last `reported` came; None: never
    state: State | None
    reason: str | None = None
    blocked_by: tuple[str, ...] = ()
    attempt: str | None = None
    term: int = 0
    generation: int = 0
    components: Mapping[str, ComponentReport] = field(default_factory=dict)
    history: tuple[HistoryEntry, ...] = ()
    log: str = ""

    def says_the_same(self, before: DeviceRow) -> bool:
        """Is this only another contact: nothing in it that anything is decided by, but its time?"""
        return (
            self.generation == before.generation
            and self.term == before.term
            and self.state is before.state
            and self.reason == before.reason
            and self.attempt == before.attempt
            and self.blocked_by == before.blocked_by
            and self.sleeping_until == before.sleeping_until
            and (self.reported_at is None) == (before.reported_at is None)
            and self.heard_clock >= before.heard_clock
            and self.components == before.components
            and self.history == before.history
        )


class Level(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """n, sum and sum of squares of one gauge's samples in one message."""

    n: int
    total: float
    squares: float


class HealthRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One accepted, counted-once health message. (A struct: ten thousand of them come a second.)"""

    batch: int  # the watermark this message belongs to
    device: str
    received_at: float
    boot: str
    seq: int
    attempt: str | None
    components: Mapping[str, str]  # component → digest active during the interval
    t0: float  # device clock
    seconds: float  # dt × samples: the length of the interval
    levels: Mapping[str, Level]
    counters: Mapping[str, int]
    exposure: Mapping[str, float]  # unit (device_hour, km, …) → amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts and exposures of many devices over a window: what the score reads.

    `devices` has n entries; each table maps a name to float64 arrays of shape (n,).
    """

    devices: Sequence[str]
    counters: Mapping[str, npt.NDArray[np.float64]]
    exposure: Mapping[str, npt.NDArray[np.float64]]
    levels: Mapping[str, npt.NDArray[np.float64]]  # means; NaN where a device has no sample

    def of(self, devices: Iterable[str]) -> Totals:
        """Those of these devices alone, in the same order; unknown ones are left out."""
        wanted = set(devices)
        kept = np.array([i for i, name in enumerate(self.devices) if name in wanted], dtype=np.intp)
        return Totals(
            devices=[self.devices[i] for i in kept],
            counters={name: column[kept] for name, column in self.counters.items()},
            exposure={name: column[kept] for name, column in self.exposure.items()},
            levels={name: column[kept] for name, column in self.levels.items()},
        )


def added(rows: Iterable[HealthRow]) -> Totals:
    """The sums of these messages, as the store's rollups would have them."""
    devices: dict[str, int] = {}
    sums: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for row in rows:
        at = devices.setdefault(row.device, len(devices))
        for kind, values in (("counter", row.counters), ("exposure", row.exposure)):
            for name, value in values.items():
                column = sums.setdefault((kind, name), {})
                column[at] = (1.0, column.get(at, (1.0, 0.0))[1] + value)
        if "device_hour" not in row.exposure:
            column = sums.setdefault(("exposure", "device_hour"), {})
            column[at] = (1.0, column.get(at, (1.0, 0.0))[1] + row.seconds / 3600)
        for name, level in row.levels.items():
            column = sums.setdefault(("level", name), {})
            n, total = column.get(at, (0.0, 0.0))
            column[at] = (n + level.n, total + level.total)
    found: dict[str, dict[str, npt.NDArray[np.float64]]] = {"counter": {}, "exposure": {}}
    found["level"] = {}
    for (kind, name), column in sums.items():
        array = np.full(len(devices), np.nan if kind == "level" else 0.0)
        for at, (n, total) in column.items():
            array[at] = (total / n if n > 0 else np.nan) if kind == "level" else total
        found[kind][name] = array
    return Totals(
        devices=list(devices),
        counters=found["counter"],
        exposure=found["exposure"],
        levels=found["level"],
    )


class TelemetryReader(Protocol):
    """What the controller asks of the telemetry store. Reading only: ingest alone writes."""

    def watermark(self) -> int:
        """The last number of the last committed ingest batch; 0 before the first."""
        ...

    def hearing(self) -> tuple[float, float]:
        """(hearing clock in seconds, server time of its last advance)."""
        ...

    def devices_changed(self, since: int, *, limit: int | None = None) -> Sequence[DeviceRow]:
        """Rows with `change` > since, in order of change. since=0 gives the whole fleet.

        With a limit about so many, and no change cut in two; fewer than it: that was all.
        """
        ...

    def device(self, device: str) -> DeviceRow | None: ...

    def health_since(self, batch: int, *, limit: int = 20_000) -> Sequence[HealthRow]:
        """Messages of batch numbers > `batch`, in order, whole numbers, at most about `limit` rows.

        A large batch has several numbers."""
        ...

    def totals(self, *, since: float, until: float, names: Collection[str] | None = None) -> Totals:
        """Sums over [since's hour, until) by the samples' own (bounded) time; of the series with
        these names, or of all. It costs what was measured in all of these hours."""
        ...

    def sums(self) -> Sums:
        """What every device counted ever: the same price however long that is."""
        ...

    def checkpoints(self, since: float) -> Sequence[int]:
        """Unix days of which there is a checkpoint: the newest that is not after `since`, where
        there is one, and all later ones, in order."""
        ...

    def checkpoint(self, day: int) -> Sums:
        """As `sums` was at the beginning of that day; a message counts when it came."""
        ...
