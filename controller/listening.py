"""What the loop hears: devices' words, our own ears, evidence. It reads what is new, by the page.

Without telemetry the loop goes on, blind: it acts on holds and stops alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controller.evidence import Evidence
from controller.memory import Memory
from controller.rollout import standing
from controller.rollout.ears import Ears
from controller.rollout.model import Arm, Member, MemberState, Rollout, RolloutState
from controller.rollout.withholding import HEED
from controller.rollout.world import World
from telemetry.report import DeviceRow, TelemetryReader

log = structlog.get_logger()

LATELY = 3600.0  # seconds: a device out of contact for longer is off
CROWD = 5  # devices: fewer tell nothing about the road to them
PAGE = 1_000  # rows of devices read in one turn, about; and messages of health


@dataclass(slots=True)
class Heard:
    """What one turn took in."""

    words: list[str] = field(default_factory=list)  # devices that said something new
    contacts: list[str] = field(default_factory=list)  # devices that were only heard
    sight_regained: bool = False


class Listening:
    def __init__(self, reader: TelemetryReader, memory: Memory, now: float) -> None:
        self._reader = reader
        self._memory = memory
        self.seen: dict[str, DeviceRow] = {}
        self.ears = Ears(0.0, now)
        self.evidence = Evidence(reader)
        self.blind = True  # until telemetry was read
        self.more = False  # is there more to read than one turn took?
        self.unheeded: set[str] = set()  # devices that an order of ours never reached
        self._change = 0
        self._last_word = 0.0
        self._resent: dict[str, float] = {}
        self._complained = False

    def listen(self, world: Callable[[], World], now: float, rung: Callable[[], bool]) -> Heard:
        """Take in telemetry, a page of it: what is left is read in the next turn.

        `rung`: does somebody wait for the end of this turn? Then the evidence is left, too.
        """
        found = Heard()
        was_blind, page = self.blind, None if self.blind else PAGE
        try:
            if was_blind:
                self._begin(now)
            rows = self._reader.devices_changed(self._change, limit=page)
            for row in rows:
                before = self.seen.get(row.device)
                self.seen[row.device] = row
                self._change = max(self._change, row.change)
                self._last_word = max(self._last_word, row.heard_clock)
                same = before is not None and row.says_the_same(before)
                (found.contacts if same else found.words).append(row.device)
                self._heed(row, now)
            heard = self._reader.hearing()
            self.ears.hear(
                heard, self._last_word, now, quiet=self._quiet(world()), crowd=self._crowd
            )
            if page is None:
                whole = self.evidence.read()
            else:
                whole = not rung() and self.evidence.read(page, rung)
            self.more = not whole or (page is not None and len(rows) >= page)
        except (SQLAlchemyError, OSError) as error:
            if not (was_blind and self._complained):
                log.error("telemetry_unavailable", detail=str(error).splitlines()[0])
            self.blind = self._complained = True
            self.more = False
        else:
            self.blind = False
            found.sight_regained = was_blind
        return found

    def _begin(self, now: float) -> None:
        """Read evidence from its beginning: what an outage left half read counts once."""
        if self._change == 0:
            self.ears = Ears.resumed(self._memory.ears, self._reader.hearing(), now)
        self.evidence = Evidence(self._reader)
        for rollout in self._memory.rollouts.values():
            if rollout.active:
                memory, name = self._memory, rollout.id
                members = memory.members.get(name, {}).values()
                draws = memory.draws.get(name, ())
                self.evidence.resume(rollout, memory.pinned[name], members, draws)

    def _quiet(self, world: World) -> float:
        """Seconds without any contact that are worth a question."""
        rollouts = self._memory.rollouts.values()
        return (
            min((standing.patience(world, r) for r in rollouts if r.active), default=math.inf) / 2
        )

    def _crowd(self) -> bool:
        """Were devices heard lately to whom no rollout was doing anything?"""
        touched = {
            member.device
            for rollout in self._memory.rollouts.values()
            if rollout.active or rollout.state is RolloutState.ROLLING_BACK
            for member in self._memory.members.get(rollout.id, {}).values()
            if _under_way(rollout, member)
        }
        since = self._last_word - LATELY
        lately = (d for d, row in self.seen.items() if row.heard_clock > since)
        return sum(device not in touched for device in lately) >= CROWD

    def _heed(self, row: DeviceRow, now: float) -> None:
        """A report of an older order, long after ours was out: the broker may keep another one.

        A leader that was stopped and woke up may have sent it; at most once in a while, because
        who refuses our order reports just so.
        """
        order = self._memory.orders.get(row.device)
        if order is None or (row.term, row.generation) >= (order.term, order.generation):
            self._resent.pop(row.device, None)
            return
        since = max(order.at, self._resent.get(row.device, 0.0))
        if (row.reported_at or 0.0) > since + HEED:
            self._resent[row.device] = now
            self.unheeded.add(row.device)


def _under_way(rollout: Rollout, member: Member) -> bool:
    """Is this device being updated or taken back, or was it never heard since it was?"""
    if member.arm is not Arm.EXPOSED:
        return False
    proven = member.step < rollout.step and member.state is MemberState.UPDATED
    return rollout.state is RolloutState.ROLLING_BACK or not proven
