"""Who must be asked again: what touches which rollout, and when time alone does.

Pure of I/O; the loop tells it what it took in or recorded. It keeps the musters of the rollouts
that are under way, and the set of those that may have something to say. Leaving one out that has
would be a defect, asking one too many is only work: every rule here errs on the side of asking.

Rules, in order:

1. What names devices (registry, reports, orders, members) touches them in every muster; a rollout
   of whom one stands anew is asked.
2. What names no device (holds, stops, a new head) touches all whom it may concern.
3. Time: a rollout is asked at its `next_look`; a device is looked at when its moment has come.
4. A clock that goes back makes everything be counted again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

from controller.rollout import opening, scope
from controller.rollout.case import ended
from controller.rollout.model import ACTIVE, Member, MemberState, Rollout, RolloutState
from controller.rollout.muster import Muster
from controller.rollout.reconcile import Awake, next_look
from controller.rollout.standing import deaf
from controller.rollout.world import Action, Notice, World
from telemetry.evidence.observations import Observations

_UNDER_WAY = ACTIVE | {RolloutState.ROLLING_BACK}


class Rollcall:
    def __init__(self) -> None:
        self.musters: dict[str, Muster] = {}
        self.ended: dict[str, tuple[int, int, int]] = {}
        self._awake: set[str] = set()
        self._opening = True
        self._looks: dict[str, float] = {}
        self._observed: dict[str, Observations] = {}
        self._in_parts: set[str] = set()  # rollouts against whom a partial hold was ever in force
        self._opens_at = math.inf  # when time alone may open something
        self._outage: float | None = None  # since when our own ears are shut

    def take(self, world: World, now: float) -> None:
        """Count everything from the beginning."""
        self.musters.clear()
        self._looks.clear()
        self._awake, self._opening = set(world.rollouts), True
        for rollout in world.rollouts.values():
            if rollout.state in _UNDER_WAY:
                self.musters[rollout.id] = Muster(world, rollout, now)
            elif rollout.state is RolloutState.COMPLETED:
                self.ended[rollout.id] = ended(world, rollout)

    # -- what happened -----------------------------------------------------------------------------

    def pass_time(self, world: World, now: float) -> None:
        outage = world.heard_at if deaf(world, now) else None
        if outage != self._outage:
            self._outage = outage
            self._awake |= set(self.musters)
        for name, muster in self.musters.items():
            moved = muster.pass_time(world, world.rollouts[name], now)
            if moved is None:
                self.take(world, now)
                return
            if moved:
                self._awake.add(name)

    def devices(self, world: World, touched: Collection[str], now: float) -> None:
        """The registry, a report or an order of these devices changed."""
        if not touched:
            return
        fleets = {world.devices[d].fleet for d in touched if d in world.devices}
        for name, muster in self.musters.items():
            rollout = world.rollouts[name]
            undrawn = rollout.fleet in fleets and not _drawn(rollout)
            if muster.touch(world, rollout, touched, now) or undrawn:
                self._awake.add(name)

    def contacts(self, world: World, devices: Sequence[str], now: float) -> None:
        """These devices said nothing new, but they were heard."""
        for name, muster in self.musters.items():
            away = [device for device in devices if muster.out_of_reach(device)]
            if away and muster.touch(world, world.rollouts[name], away, now):
                self._awake.add(name)

    def commit(self, world: World, now: float) -> None:
        """The head changed: who waits may wait for something else now. Nobody else asks it."""
        self._awake |= set(world.rollouts)
        self._opening = True
        for name, muster in self.musters.items():
            muster.touch(world, world.rollouts[name], muster.waiting(), now)

    def people(self, world: World, now: float, fleets: Container[str] | None = None) -> None:
        """Holds, stops or rules changed: all that waits may wait for something else now.

        `fleets`: only holds of these changed. How members of others stand is not touched by them.
        """
        self._awake |= set(world.rollouts)
        self._opening = True
        for name, muster in self.musters.items():
            rollout = world.rollouts[name]
            if fleets is not None and rollout.fleet not in fleets:
                continue
            back = rollout.state is RolloutState.ROLLING_BACK
            partial = bool(scope.partial(world, rollout))
            everybody = back or partial or name in self._in_parts
            if partial:
                self._in_parts.add(name)
            whom = world.members.get(name, {}) if everybody else muster.waiting()
            muster.touch(world, rollout, whom, now)

    def scored(self, world: World, fleet: str) -> None:
        """The fleet has new scores: a step that is not drawn yet may be drawn by them."""
        self._awake |= {
            name
            for name in self.musters
            if world.rollouts[name].fleet == fleet and not _drawn(world.rollouts[name])
        }

    def put(self, world: World, name: str, members: Iterable[Member], now: float) -> None:
        """Members of a rollout were recorded."""
        devices = [member.device for member in members]
        for other, muster in self.musters.items():
            if muster.touch(world, world.rollouts[other], devices, now) or other == name:
                self._awake.add(other)

    def changed(self, world: World, before: Rollout | None, after: Rollout, now: float) -> None:
        """A rollout was recorded; `before` is None for a new one."""
        name = after.id
        self._awake.add(name)
        if before is not None and before.state is after.state and before.step == after.step:
            return
        self._opening = True
        if after.state not in _UNDER_WAY:
            self.musters.pop(name, None)
            self._looks.pop(name, None)
        elif name not in self.musters or after.state is RolloutState.ROLLING_BACK:
            self.musters[name] = Muster(world, after, now)
        elif before is not None and before.step != after.step:
            self.musters[name].open_step(world, after, now)
        if after.state is RolloutState.COMPLETED:
            self.ended[name] = ended(world, after)
            self._awake |= set(self.musters)  # the fleet's failure budget counts it
        if before is not None and before.active and not after.active:
            self._freed(world, name, now)

    def _freed(self, world: World, name: str, now: float) -> None:
        """A rollout that is over keeps no device busy."""
        members: Mapping[str, Member] = world.members.get(name, {})
        busy = [m.device for m in members.values() if m.state is MemberState.TOLD]
        for other, muster in self.musters.items():
            if other != name and muster.touch(world, world.rollouts[other], busy, now):
                self._awake.add(other)

    # -- who is asked ------------------------------------------------------------------------------

    def awake(self, world: World, now: float) -> Awake:
        """Whom `decide` must ask now."""
        due = {name for name, at in self._looks.items() if at <= now}
        for name in self.musters:
            seen = world.observations.get(name)
            if seen is not None and seen is not self._observed.get(name):
                self._observed[name] = seen
                due.add(name)
        self._awake |= due
        opens = self._opening or self._opens_at <= now
        return Awake(rollouts=frozenset(self._awake), opening=opens)

    def answered(self, world: World, awake: Awake, actions: Sequence[Action], now: float) -> None:
        """`decide` answered that: who said nothing sleeps until it is touched or its time comes."""
        said = {name for action in actions if (name := _of(action))}
        for name in awake.rollouts - said:
            self._awake.discard(name)
            self._looks.pop(name, None)
            at = next_look(world, world.rollouts[name], now)
            if at < math.inf:
                self._looks[name] = at
        if awake.opening and all(isinstance(action, Notice) for action in actions):
            self._opening = False
            self._opens_at = opening.next_look(world, now)


def _drawn(rollout: Rollout) -> bool:
    return rollout.flags.get("drawn") == rollout.step


def _of(action: Action) -> str | None:
    """The id of the rollout that an action belongs to."""
    rollout = getattr(action, "rollout", None)
    return rollout.id if isinstance(rollout, Rollout) else rollout
