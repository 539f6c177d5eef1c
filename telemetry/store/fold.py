"""What one batch of believed messages changes: known rows and messages in, changed rows out. Pure.

Rules, in order:

1. A message of a boot below the device's floor is late: what that boot sent is forgotten.
2. (device, boot, seq) counts once; repeats are settled, and acknowledged again.
3. The last state wins by (boot_count, seq), in whatever order the messages come.
4. Presence of an older boot is stale. A will is the broker's word: it is no contact. It keeps an
   announced sleep, because a sleeping device is cut off sooner or later.
5. Every contact moves the device's `change` to this batch, so that readers find it by watermark.
6. A large batch takes several numbers, one for each `LOT` of rows: readers read whole numbers, and
   a reader whom somebody may need at any moment reads little at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from device_agent.protocol import Health, Presence, Reported
from telemetry.decode import Sample, components_text
from telemetry.store import bulk, rollups
from telemetry.store.packed import Packed
from telemetry.store.seen import Seen, Verdict, pack
from telemetry.sums import Layout

LOT = 1_000  # rows of one number

Message = Reported | Health | Sample | Presence


class Heard(NamedTuple):
    """Who sent something, and what: checked messages in the order of their arrival."""

    device: str
    messages: Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    heard: Sequence[Heard] = ()
    refusals: Mapping[str, int] = field(default_factory=dict)  # refused before: reason → count
    probe: bool = False  # our own loopback probe came through: the server can hear

    @property
    def numbers(self) -> int:
        """How many its rows need at most."""
        return max(1, -(-sum(len(messages) for _, messages in self.heard) // LOT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    batch: int  # its last number: the watermark
    verdicts: tuple[Verdict, ...]  # one per message, as they stand in the batch
    shifted: int  # messages whose device clock was not plausible


@dataclass(slots=True, kw_only=True)
class Contact:
    last_contact: float = 0.0
    heard_clock: float = 0.0
    online: bool = False
    sleeping_until: float | None = None
    boot: str = ""
    boot_count: int = 0
    boot_floor: int = 0


@dataclass(slots=True, kw_only=True)
class Known:
    """What the store holds, at least of the devices of this batch."""

    contacts: dict[str, Contact] = field(default_factory=dict)
    boots: dict[tuple[str, str], Seen] = field(default_factory=dict)
    states: dict[str, tuple[int, int]] = field(default_factory=dict)  # (boot_count, seq) of reports
    sums: dict[str, Packed] = field(default_factory=dict)
    hours: dict[tuple[int, str], Packed] = field(default_factory=dict)  # by (hour, device)
    layouts: dict[int, Layout] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Changes:
    verdicts: list[Verdict] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    boots: set[tuple[str, str]] = field(default_factory=set)
    reports: dict[str, Reported] = field(default_factory=dict)
    health: list[bulk.Row] = field(default_factory=list)
    rollups: rollups.Rollups = field(default_factory=rollups.Rollups)


def fold(heard: Iterable[Heard], known: Known, *, first: int, clock: float, now: float) -> Changes:
    """Fold messages, in order of arrival, into `known` (changed in place) and the changes.

    `first` is the batch's first number. A device may stand there more than once; once is cheaper.
    """
    changes = Changes()
    for device, messages in heard:
        contact = known.contacts.get(device)
        if contact is None:
            contact = known.contacts[device] = Contact()
        turn = _Turn(device, contact, known, changes, first, clock, now)
        verdicts = [turn.take(message) for message in messages]
        changes.verdicts += verdicts
        if Verdict.NEW in verdicts:
            changes.touched.add(device)
    return changes


def refused(changes: Changes, batch: Batch) -> Counter[str]:
    counts = Counter(batch.refusals)
    counts.update(v.value for v in changes.verdicts if v is not Verdict.NEW)
    return counts


def contact_rows(changes: Changes, known: Known, first: int) -> list[bulk.Row]:
    rows: list[bulk.Row] = []
    for place, device in enumerate(sorted(changes.touched)):
        c = known.contacts[device]
        number = first + place // LOT
        head = (device, number, c.last_contact, c.heard_clock, c.online, c.sleeping_until)
        rows.append((*head, c.boot, c.boot_count, c.boot_floor))
    return rows


def boot_rows(changes: Changes, known: Known, now: float) -> list[bulk.Row]:
    rows: list[bulk.Row] = []
    for device, boot in sorted(changes.boots):
        seen = known.boots[device, boot]
        rows.append((device, boot, seen.boot_count, seen.high, pack(seen.missing), now))
    return rows


def report_rows(changes: Changes, now: float) -> list[bulk.Row]:
    return [
        (
            device,
            report.boot,
            report.boot_count,
            report.seq,
            now,
            report.state.value,
            report.reason,
            _json(report.blocked_by),
            report.attempt,
            report.term,
            report.generation,
            _json(report.components),
            _json(report.history),
            report.log,
        )
        for device, report in sorted(changes.reports.items())
    ]


@dataclass(slots=True)
class _Turn:
    """The messages of one device."""

    device: str
    contact: Contact
    known: Known
    changes: Changes
    first: int
    clock: float
    now: float
    _boot: str | None = None  # of the message before
    _seen: Seen | None = None
    _sums: rollups.DeviceSums | None = None

    def take(self, message: Message) -> Verdict:
        if isinstance(message, Presence):
            return self._presence(message)
        contact = self.contact
        if message.boot_count < contact.boot_floor:
            return Verdict.LATE
        seen = self._seen
        if seen is None or message.boot != self._boot:
            seen = self._look_up(message)
        verdict = seen.take(message.seq)
        if verdict is not Verdict.NEW:
            return verdict
        if message.boot_count >= contact.boot_count:
            contact.boot, contact.boot_count = message.boot, message.boot_count
        contact.last_contact, contact.heard_clock, contact.online = self.now, self.clock, True
        if isinstance(message, Reported):
            self._report(message)
        else:
            self._keep(message)
        return verdict

    def _look_up(self, message: Reported | Health | Sample) -> Seen:
        key = (self.device, message.boot)
        seen = self.known.boots.get(key)
        if seen is None:
            seen = self.known.boots[key] = Seen(boot_count=message.boot_count)
        self.changes.boots.add(key)  # it may be a repeat: then its row is written as it was
        self._boot, self._seen = message.boot, seen
        return seen

    def _presence(self, message: Presence) -> Verdict:
        contact = self.contact
        if message.boot_count < max(contact.boot_count, contact.boot_floor):
            return Verdict.REPEAT
        contact.online = message.online
        if message.online or message.sleeping_until is not None:
            contact.sleeping_until = message.sleeping_until
        if message.boot_count >= contact.boot_count:
            contact.boot, contact.boot_count = message.boot, message.boot_count
        if message.online or not contact.last_contact:
            contact.last_contact, contact.heard_clock = self.now, self.clock
        return Verdict.NEW

    def _report(self, message: Reported) -> None:
        version = (message.boot_count, message.seq)
        if version > self.known.states.get(self.device, (-1, -1)):
            self.known.states[self.device] = version
            self.changes.reports[self.device] = message

    def _keep(self, message: Health | Sample) -> None:
        sums = self._sums
        if sums is None:
            sums = self._sums = self.changes.rollups.of(self.device)
        seconds, levels = sums.add(message, self.now)
        rows = self.changes.health
        rows.append(
            (
                self.first + len(rows) // LOT,
                len(rows),
                self.device,
                self.now,
                message.boot,
                message.seq,
                message.attempt,
                components_text(message),
                message.t0,
                seconds,
                _json((levels, message.counters, message.exposure)),
            )
        )


_encode = msgspec.json.Encoder().encode


def _json(value: object) -> str:
    return _encode(value).decode()
