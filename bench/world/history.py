"""One history from its seed: things happen, everything heals, and the promises are checked.

A seed says the script, the weather, every delay, and which port calls somebody dies at. `kills`
names the points of death instead: so one script can be told once for every point (`points`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sqlalchemy import func, select

from bench.world.databases import Databases
from bench.world.points import Points
from bench.world.script import BUSY, DAY, Script
from bench.world.world import World
from controller.dispatch import SETTLES
from controller.facts import Finding
from controller.store.tables import desired, holds, rollouts
from telemetry.store.database import reading
from telemetry.store.prepared import Prepared

QUIET = 4.8  # seconds between looks whether all is settled
PATIENCE = 30  # looks: devices have 90 s to come back after an outage of ours

_WAITING = Prepared(select(func.count()).where(desired.c.published.is_(False)))
_STATES = Prepared(select(rollouts.c.id, rollouts.c.state, rollouts.c.step))

Plant = Callable[[World], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: str
    findings: tuple[Finding, ...]
    lines: tuple[str, ...]  # what happened, one line each
    points: int  # port calls at which somebody could have died
    deaths: int
    devices: int
    virtual: float  # seconds of the world's own time
    death_points: tuple[str, ...] = ()


def defect(seed: str, error: Exception) -> Outcome:
    """What is told of a history that ended in an exception of ours."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    finding = Finding(invariant="defect", what=what[:500], do="Replay the seed and read the trace")
    return Outcome(
        seed=seed,
        findings=(finding,),
        lines=tuple(traceback.format_exception(error)),
        points=0,
        deaths=0,
        devices=0,
        virtual=0.0,
    )


def run(
    databases: Databases,
    seed: str,
    *,
    kills: frozenset[int] | None = None,
    plant: Plant | None = None,
    named: bool = False,
) -> Outcome:
    """Tell the history of a seed; `plant` may put a fault into the world before it begins."""
    chance = Random(f"{seed}/deaths")
    if kills is None:
        mean = chance.choice((0.0, 0.0, 150.0, 400.0))
        points = Points(chance=chance, mean=mean)
    else:
        points = Points(kill=kills)
    points.recording = named
    world = World(databases, seed, points)
    script = Script(world)
    script.stage()
    if plant is not None:
        plant(world)
    began = world.now
    world.run(BUSY)
    _heal(world)
    _settle(world)
    findings = [*world.check(), *_unfinished(world)]
    return Outcome(
        seed=seed,
        findings=tuple(findings),
        lines=tuple(world.lines),
        points=points.count,
        deaths=len(points.killed),
        devices=len(world.devices),
        virtual=world.now - began,
        death_points=tuple(points.names),
    )


def _heal(world: World) -> None:
    """Every fault ends; who slept for weeks wakes up."""
    world.trace("everything heals")
    world.points.rest()
    weather = world.wire.weather
    weather.cut = weather.double = weather.lose_puback = 0.0
    weather.slow = 0.05
    sleepers = [d for d in world.devices.values() if d.asleep_until > world.now + DAY]
    world.leap(21 * DAY if sleepers else 310.0)  # what is tried again is tried again by now
    if not world.wire.up:
        world.wire.rise(forgot=False)
    world.repository.up = True
    world.heal()
    for device in world.devices.values():
        device.reachable = True
        device.flaky = 0.0
        device.start()
        device.park(True)


def _settle(world: World) -> None:
    """Run on until every device is idle and in touch, and the loop has nothing to say soon."""
    before = ""
    for _ in range(PATIENCE):
        world.run(QUIET)
        after = _state(world)
        if after == before and "busy" not in after:
            return
        before = after


def _state(world: World) -> str:
    with reading(world.databases.control) as conn:
        waiting = _WAITING.one(conn)[0]
        states = _STATES.all(conn)
    idle = all(d.settled or d.awaits_lease for d in world.devices.values() if d.in_service)
    idle = idle and all(row.state != "RollingBack" for row in states)
    loops = (controller.loop for controller in world.controllers)
    idle = idle and not any(loop.waits(world.now + 2 * SETTLES) for loop in loops if loop)
    return f"{states} {waiting} {'idle' if idle else 'busy'}"


def _unfinished(world: World) -> list[Finding]:
    """I3 at the end: every device in touch has had its newest order."""
    found = []
    with reading(world.databases.control) as conn:
        orders = conn.execute(select(desired)).all()
        stuck = conn.execute(
            select(rollouts.c.release).where(rollouts.c.state == "RollingBack")
        ).all()
        in_force = conn.execute(select(holds.c.artifacts).where(holds.c.lifted_at.is_(None)))
        rejected = {digest for artifacts in in_force.scalars() for digest in artifacts}
    for row in orders:
        device = world.devices[row.device]
        record = device.journal.saved
        if record is None or not device.in_service or device.liar:
            continue
        overtaken = any(told["digest"] in rejected for told in row.components.values())
        if overtaken and not any(sent.payload == bytes(row.body) for sent in world.wire.sent):
            continue  # withheld: a hold came before it left
        if row.at > world.now - 2 * QUIET:  # it is on its way: patience ended before its arrival
            continue
        if (record.term, record.generation) < (row.term, row.generation):
            found.append(
                Finding(
                    invariant="I3",
                    what=f"{row.device} is in touch and never had its order of generation "
                    f"{row.generation}",
                    do="Look at outbox and broker",
                )
            )
    if stuck and all(d.settled for d in world.devices.values() if d.in_service):
        found.append(
            Finding(
                invariant="I3",
                what=f"the rollback of {stuck[0].release} never ends",
                do="Look at the members that are not back",
            )
        )
    return found
