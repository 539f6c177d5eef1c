"""The muster of one rollout: where each member stands, and how many stand alike.

Pure of I/O. Nothing here is a fact of its own: `_stand` derives a member's place from the world,
and the muster keeps what it answered until something that it read is touched. So an answer costs
what changed and the handful of groups, not the members; and it is the same as counting from the
beginning (`of` does that where the world brings no muster).

What `_stand` reads, and who touches the member when it changes (`rollcall` sees to it):
member, device, row, order → that device; holds, stops, releases, step, state → all whom they may
concern; time → `pass_time`, by a heap of the moments at which a device falls out of reach, and by
the minute where there are windows.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from controller.manifests.kinds import OfflineAction, Window
from controller.rollout import scope, step, telling, windows
from controller.rollout.case import outcome
from controller.rollout.cohort import rank
from controller.rollout.follow import wants_telling
from controller.rollout.model import (
    ActiveHold,
    Member,
    MemberState,
    Rollout,
    RolloutState,
)
from controller.rollout.retreat import came_back, failed_back, nowhere_to_go, rejecting, stays
from controller.rollout.standing import Alike, count_after, overdue, patience, reachable
from controller.rollout.world import World
from telemetry.report import DeviceRow

LATELY = 60.0  # seconds that maxPerMinute looks back
_SLACK = 1e-3  # seconds: a moment is looked at a little early, and again until it has passed


class Stand(NamedTuple):
    """Where one member stands."""

    alike: Alike
    moves: bool  # its device's last word, or its silence, makes it another member
    why: str | None  # why it may not be told now; "": it may; None: it does not wait for that


def of(world: World, rollout: Rollout, now: float) -> Muster:
    """The muster that the world brings, else one counted from the beginning."""
    known = world.musters.get(rollout.id)
    return known if known is not None else Muster(world, rollout, now)


class Muster:
    """The members of one rollout. `decide` only reads it; `rollcall` keeps it true."""

    def __init__(self, world: World, rollout: Rollout, now: float) -> None:
        self.groups: Counter[Alike] = Counter()
        self.moving: set[str] = set()  # members that their device's last word changes
        self.unsaid: set[str] = set()  # members that do not say yet why they wait
        self.ready = Ranked(f"{rollout.seed}/tell")
        self._stands: dict[str, Stand] = {}
        self._shared: dict[Stand, Stand] = {}  # one object for all that stand alike
        self._told: list[float] = []  # when members of this step were told lately, in order
        self._quiet, self._asleep = _Moments(), _Moments()
        self._zones: dict[str, str] = {}  # time zone → what the windows said there last
        self._mark(world, rollout, now)
        self.touch(world, rollout, world.members.get(rollout.id, {}), now)

    def why(self, device: str) -> str:
        """Why this member may not be told now; empty when it may."""
        return self._stands[device].why or ""

    def told_since(self, since: float) -> int:
        """How many of the current step were told after that moment, at most LATELY ago."""
        return len(self._told) - bisect_right(self._told, since)

    def told_next(self, since: float) -> float | None:
        """The first moment after `since` at which one of the current step was told."""
        place = bisect_right(self._told, since)
        return self._told[place] if place < len(self._told) else None

    # -- keeping it true ---------------------------------------------------------------------------

    def touch(self, world: World, rollout: Rollout, devices: Iterable[str], now: float) -> bool:
        """Something about these devices changed: derive them again. True: one stands anew."""
        members = world.members.get(rollout.id, {})
        context: _Context | None = None  # it looks at every rollout: most turns touch nobody of us
        moved = False
        for device in _both(devices, members):
            member = members[device]
            context = context or _Context.of(world, rollout)
            if self._derive(world, rollout, context, member, now):
                moved = True
        return moved

    def out_of_reach(self, device: str) -> bool:
        """Was this member counted as out of reach? Only then a bare contact changes something."""
        stand = self._stands.get(device)
        return stand is not None and not stand.alike.near

    def pass_time(self, world: World, rollout: Rollout, now: float) -> bool | None:
        """Time went on: does one stand anew? None when it went back: all must be counted again."""
        if now < self._now or world.hearing < self._hearing:
            return None
        due = self._quiet.due(world.hearing) + self._asleep.due(now)
        declared = world.pinned[rollout.id].rollout.windows
        if windows.instant(declared, now) != self._instant and self._zones:
            before = dict(self._zones)
            self._zones = {zone: windows.word(declared, zone, now) for zone in before}
            if before != self._zones:
                due += self.waiting()
        self._mark(world, rollout, now)
        if len(self._told) > 64 and self._told[len(self._told) // 2] <= now - LATELY:
            del self._told[: bisect_right(self._told, now - LATELY)]
        return self.touch(world, rollout, due, now)

    def waiting(self) -> list[str]:
        """Who waits to be told, for whatever reason."""
        return [device for device, stand in self._stands.items() if stand.why is not None]

    def open_step(self, world: World, rollout: Rollout, now: float) -> None:
        """Another step: nobody of the one before is told any more, and nobody of it was lately."""
        self._told = []
        self.touch(world, rollout, self.waiting(), now)

    def _mark(self, world: World, rollout: Rollout, now: float) -> None:
        self._hearing, self._now = world.hearing, now
        self._instant = windows.instant(world.pinned[rollout.id].rollout.windows, now)

    def _derive(
        self, world: World, rollout: Rollout, context: _Context, member: Member, now: float
    ) -> bool:
        device = member.device
        before, after = self._stands.get(device), _stand(world, rollout, context, member, now)
        after = self._shared.setdefault(after, after)
        if after.alike.near:
            self._watch(world.seen[device], context, now)
        elif context.count_after is not None and not after.alike.overdue:
            self._expect(world.seen.get(device), member, context.count_after, now)
        if after.why is not None and context.windows:
            zone = windows.zone_of(world.devices[device])
            if zone not in self._zones:
                self._zones[zone] = windows.word(context.windows, zone, now)
        _keep(self.moving, device, after.moves)
        drawn = member.state is MemberState.DRAWN  # who is told once more keeps saying why
        _keep(self.unsaid, device, drawn and bool(after.why) and after.why != member.reason)
        if before is after:
            return False
        self._stands[device] = after
        self._count(before, after)
        if after.why == "":
            self.ready.add(device)
        else:
            self.ready.discard(device)
        drawn = before is not None and before.alike.state is MemberState.DRAWN
        fresh = drawn or before is None or before.why is not None
        at = member.told_at if context.paced and fresh else None
        if at is not None and at > now - LATELY and member.step == rollout.step:
            insort(self._told, at)
        return True

    def _count(self, before: Stand | None, after: Stand) -> None:
        self.groups[after.alike] += 1
        if before is not None:
            self.groups[before.alike] -= 1
            if not self.groups[before.alike]:
                del self.groups[before.alike]

    def _watch(self, row: DeviceRow, context: _Context, now: float) -> None:
        """Look again when this device may have fallen out of reach."""
        if row.sleeping_until is not None and row.sleeping_until > now:
            self._asleep.note(row.device, row.sleeping_until)
        else:
            self._quiet.note(row.device, row.heard_clock + context.patience)

    def _expect(self, row: DeviceRow | None, member: Member, limit: float, now: float) -> None:
        """Look again when this device may have been out of reach for too long."""
        if row is not None:
            self._quiet.note(member.device, row.heard_clock + limit)
            if row.sleeping_until is not None and row.sleeping_until > now:
                self._asleep.note(member.device, row.sleeping_until)
        if member.drawn_at + limit > now:
            self._asleep.note(member.device, member.drawn_at + limit)


class _Context(NamedTuple):
    """What all members of a rollout share."""

    patience: float
    paced: bool  # the step has a maxPerMinute
    windows: Sequence[Window]
    hold: ActiveHold | None  # of a rollout that goes back
    others: Sequence[str]  # the other active rollouts
    partial: Sequence[ActiveHold]  # holds against a part of its devices
    count_after: float | None  # seconds out of reach after which nobody waits; None: nobody does
    gives_up: bool  # then it counts as failed

    @classmethod
    def of(cls, world: World, rollout: Rollout) -> _Context:
        pinned = world.pinned[rollout.id]
        back = rollout.state is RolloutState.ROLLING_BACK
        return cls(
            patience=patience(world, rollout),
            paced=pinned.waves[rollout.step].step.max_per_minute is not None,
            windows=pinned.rollout.windows,
            hold=rejecting(world, rollout) if back else None,
            others=[r.id for r in world.rollouts.values() if r.active and r.id != rollout.id],
            partial=scope.partial(world, rollout),
            count_after=count_after(world, rollout),
            gives_up=pinned.rollout.strategy.offline.action is OfflineAction.FAIL,
        )


def _stand(world: World, rollout: Rollout, context: _Context, member: Member, now: float) -> Stand:
    """Derive where a member stands. Reads nothing but its arguments."""
    row = world.seen.get(member.device)
    near = reachable(world, member.device, context.patience, now)
    back = rollout.state is RolloutState.ROLLING_BACK
    if back:
        after = came_back(world, rollout, context.hold, member, now)
    else:
        after = step.followed(world, rollout, member, context.patience, context.partial, now)
    why = None
    here = member.step == rollout.step or member.state is MemberState.TOLD
    if wants_telling(member) and near and after is member and here and not back:
        pinned = world.pinned[rollout.id]
        why = telling.waits(world, rollout, pinned, member, context.others, now)
    note = ""
    if member.reason and member.state is MemberState.TOLD:
        note = "deferred"
    elif near and member.state is MemberState.DRAWN:
        note = member.reason
    late = not near and not back and overdue(world, rollout, member, now)
    word = outcome(member, row)
    alike = Alike(
        step=member.step,
        arm=member.arm,
        hardware=member.hardware,
        state=member.state,
        near=near,
        exposed=member.exposed_at is not None,
        word="failed" if late and context.gives_up else word,
        note=note,
        bound=back
        and not stays(rollout, member)
        and nowhere_to_go(world, rollout, context.hold, member.device),
        lost=back
        and failed_back(
            row,
            world.orders.get(member.device),
            hearing=world.hearing,
            patience=context.patience,
            now=now,
        ),
        overdue=late,
    )
    return Stand(alike, after is not member, why)


class Ranked:
    """Devices in the order of a stable draw; what leaves it costs nothing until it is read."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._inside: set[str] = set()
        self._order: list[tuple[int, str]] = []
        self._new: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._inside)

    def __iter__(self) -> Iterator[str]:
        if self._new or len(self._order) > 2 * len(self._inside) + 64:
            kept = {entry for entry in self._order + self._new if entry[1] in self._inside}
            self._order, self._new = sorted(kept), []
        return (device for _, device in self._order if device in self._inside)

    def add(self, device: str) -> None:
        if device not in self._inside:
            self._inside.add(device)
            self._new.append((rank(self._seed, device), device))

    def discard(self, device: str) -> None:
        self._inside.discard(device)


class _Moments:
    """device → the earliest moment at which to look at it again. One valid entry a device."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._noted: dict[str, float] = {}

    def note(self, device: str, at: float) -> None:
        """A later moment than the one noted is not needed: it is noted when that one has come."""
        known = self._noted.get(device)
        if known is None or at < known:
            self._noted[device] = at
            heapq.heappush(self._heap, (at, device))

    def due(self, clock: float) -> list[str]:
        """Take out whose moment has come."""
        found = []
        while self._heap and self._heap[0][0] <= clock + _SLACK:
            at, device = heapq.heappop(self._heap)
            if self._noted.get(device) == at:
                del self._noted[device]
                found.append(device)
        return found


def _both(devices: Iterable[str], members: Mapping[str, Member]) -> Iterator[str]:
    """Those of `devices` that are members, whichever of the two is the shorter way to find them."""
    if isinstance(devices, Mapping) and len(members) < len(devices):
        return (device for device in members if device in devices)
    return (device for device in devices if device in members)


def _keep(group: set[str], device: str, inside: bool) -> None:
    if inside:
        group.add(device)
    else:
        group.discard(device)
