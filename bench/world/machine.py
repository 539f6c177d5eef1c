"""Memory and disk of a simulated device: what `Agent` asks of its journal, outbox and slots.

The same promises as the real ones (one contract test runs over both): a saved record is there after
a power cut; the last messages of an outbox may not be; a slot is written whole or not at all, and
what runs is switched at one instant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.world.points import Points
from device_agent import work
from device_agent.codec import from_wire, to_wire
from device_agent.outbox import Waiting
from device_agent.protocol import Channel, Reason, State
from device_agent.record import Record
from device_agent.work import Item


class MemoryJournal:
    def __init__(self, points: Points) -> None:
        self._points = points
        self._saved: Record | None = None

    def load(self) -> Record:
        if self._saved is None:
            return Record()
        record: Record = from_wire(Record, to_wire(self._saved))
        return record

    def save(self, record: Record) -> None:
        self._points.reach("journal.save")
        self._saved = record
        self._points.reach("journal.saved")

    @property
    def saved(self) -> Record | None:
        return self._saved


class MemoryOutbox:
    def __init__(self, points: Points, *, max_messages: int = 5_000) -> None:
        self._points = points
        self._messages: dict[tuple[str, int], Waiting] = {}
        self._max = max_messages
        self._lost = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, boot: str, seq: int, channel: Channel, payload: bytes, tells: int = 0) -> None:
        self._points.reach("outbox.put")
        if (boot, seq) in self._messages:
            raise ValueError(f"({boot}, {seq}) is in the outbox already")
        self._messages[boot, seq] = Waiting(boot=boot, seq=seq, channel=channel, payload=payload)
        if len(self._messages) > self._max:
            self._shed()

    def oldest(self, limit: int, *, without: Collection[tuple[str, int]] = ()) -> list[Waiting]:
        found: list[Waiting] = []
        for key, waiting in self._messages.items():
            if len(found) >= limit:
                break
            if key not in without:
                found.append(waiting)
        return found

    def acknowledge(self, boot: str, ranges: Iterable[tuple[int, int]]) -> None:
        spans = list(ranges)
        for name, seq in list(self._messages):
            if name == boot and any(first <= seq <= last for first, last in spans):
                del self._messages[name, seq]

    def take_lost(self) -> int:
        lost, self._lost = self._lost, 0
        return lost

    def power_cut(self, newest: int) -> None:
        """The last messages had not reached the disk (synchronous=NORMAL)."""
        for key in list(self._messages)[len(self._messages) - newest :]:
            del self._messages[key]

    def _shed(self) -> None:
        order = sorted(
            self._messages, key=lambda key: self._messages[key].channel is not Channel.HEALTH
        )
        gone = order[: max(1, self._max // 100)]
        for key in gone:
            del self._messages[key]
        self._lost += len(gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """One activation, as the machine itself saw it: the truth behind what devices report."""

    at: float
    digest: str
    kind: str  # of the order it followed; "back": the device's own way back
    term: int
    generation: int
    guards: tuple[str, ...]  # the order's preconditions that were not true at this instant
    late: bool = False  # installed under a lease that had passed, by the device's clock


@dataclass(slots=True)
class MemoryDisk:
    """Slots of components. `active` is what runs; `slots` what can be switched to."""

    points: Points
    active: dict[str, str] = field(default_factory=dict)
    slots: dict[str, set[str]] = field(default_factory=dict)
    started: list[Started] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)  # every digest that was ever whole in a slot

    def factory(self, images: Mapping[str, str]) -> None:
        self.active = dict(images)
        self.slots = {component: {digest} for component, digest in images.items()}
        self.whole = set(images.values())

    def holds(self, item: Item) -> bool:
        """Does it lie in a slot already? Then nothing is downloaded."""
        return item.digest in self.slots.get(item.component, set())

    def install(self, items: Iterable[Item]) -> None:
        for item in items:
            self.points.reach("disk.install")
            held = self.slots.setdefault(item.component, set())
            running = self.active.get(item.component)
            held.intersection_update({running} if running else set())  # two slots: the other one
            held.add(item.digest)
            self.whole.add(item.digest)

    def switch(self, to: Mapping[str, str | None], about: Started) -> Reason | None:
        """All of them at one instant; the reason when a slot is not there."""
        for component, digest in to.items():
            if digest is not None and digest not in self.slots.get(component, set()):
                return Reason.ACTIVATION_FAILED
        self.points.reach("disk.switch")
        for component, digest in sorted(to.items()):
            before = self.active.get(component)
            if digest is None:
                self.active.pop(component, None)
                continue
            self.active[component] = digest
            if before != digest:
                self.started.append(replace(about, digest=digest))
        self.points.reach("disk.switched")
        return None


def answer(effect: work.Effect, state: State, reason: Reason | None) -> work.Fact:
    """The fact that answers Fetch, Install, Activate or SwitchBack."""
    attempt: Any = effect.attempt  # type: ignore[union-attr]
    if reason is None:
        return work.Done(attempt=attempt, work=state)
    return work.Failed(attempt=attempt, work=state, reason=reason)
