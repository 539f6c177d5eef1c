"""Faults that we plant into production code on purpose: the checker must find each of them.

Every fault is told twice: with it the invariant is broken, without it the same story breaks none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import update as sql_update

from bench.world import server, texts
from bench.world.databases import Databases
from bench.world.world import World
from controller import audit, dispatch
from controller.rollout import desired, drawing, judging, telling, withholding
from controller.rollout.ears import Ears
from controller.rollout.gate import Verdict
from controller.store import lease, rollouts
from controller.store.tables import leases
from controller.store.tables import rollouts as rollout_rows
from device_agent import trust, update
from telemetry.store import seen
from telemetry.store.database import writing
from telemetry.store.fold import Written
from telemetry.store.reports import Store
from telemetry.store.seen import Verdict as Counted

MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "3s", "maxSoak": "60s", "margins": MARGINS}
STEPS = [
    {"cohort": "canary", **STEP},
    {"cohort": "general", "percent": "50%", **STEP},
    {"cohort": "general", **STEP},
]
STRATEGY = {"silentAfter": "20s", "maxFailed": "1%"}


STAGES: list[Stage] = []  # the one that is played now, last


class Stage:
    """Ten devices, four of them canaries; `tell` runs a story."""

    def __init__(self, databases: Databases) -> None:
        self.world = World(databases, "planted")
        STAGES[:] = [self]
        for n in range(10):
            self.world.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}))
        base = {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy()}
        self.world.commit({**base, "1.yaml": texts.release("1")})
        self.world.start()
        self.world.run(6)

    def publish(self, version: str, *requires: str, steps: list | None = None) -> None:
        self.world.commit(
            {
                f"{version}.yaml": texts.release(version, requires=requires),
                "cars.yaml": texts.rollout(version, steps or STEPS, STRATEGY),
            }
        )


def plain_rollout(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(60)


def noisy_network(stage: Stage) -> None:
    stage.world.wire.weather.double = 0.5
    plain_rollout(stage)


def rolled_back_by_a_person(stage: Stage) -> None:
    """The broker forgets after it: everything is published again."""
    stage.publish("2")
    stage.world.run(9)
    stage.world.ask("rollback")
    stage.world.run(12)
    stage.world.broker_away(3, forgot=True)
    stage.world.run(30)


def rolled_back_beside_a_hold_of_another(stage: Stage) -> None:
    """Where all others go back to is rejected for one device, and for that one alone."""
    stage.publish("2")
    stage.world.run(9)
    hold, named = "01mcc5sjatd4j5brjrenvfz8aa", {"devices": ["car-9"]}
    text = texts.hold(
        hold, "1", texts.digest_of("1"), to="stay", at="2027-01-15T08:00:00Z", scope=named
    )
    stage.world.commit({f"holds/{hold}.yaml": text})
    stage.world.run(2)
    stage.world.ask("rollback")
    stage.world.run(45)


def two_controllers(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(7)
    stage.world.second_controller()
    stage.world.run(30)
    stage.world.ask("rollback")
    stage.world.run(20)


def restarted(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(30)
    stage.world.controller_away(3)
    stage.world.run(40)


def stopped(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(7)
    stage.world.ask("stop", None, scope="all")
    stage.world.run(40)


def driving(stage: Stage) -> None:
    for device in stage.world.devices.values():
        device.park(False)
    stage.publish("2", "parked")
    stage.world.run(20)


def ahead_of_time(stage: Stage) -> None:
    """Devices whose clock is three hours ahead hold no lease."""
    for device in stage.world.devices.values():
        device.skew = 3 * 3600.0
    stage.publish("2")
    stage.world.run(20)


def deaf(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(13)
    stage.world.broker_away(200)
    stage.world.run(60)


@dataclass(frozen=True)
class Fault:
    name: str
    invariant: str
    story: Callable[[Stage], None]
    plant: Callable[[pytest.MonkeyPatch], None]
    spoil: Callable[[Stage], None] = lambda stage: None  # rows that somebody edits in the end


def blind_to_holds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        desired, "_by_holds", lambda place, component, base, catalog, now: (base, False, None)
    )
    # The second line of defence: what a hold rejects is not sent again.
    patch.setattr(withholding, "rejected", lambda *_: False)


def counts_everything(patch: pytest.MonkeyPatch) -> None:
    take = seen.Seen.take

    def twice(self: seen.Seen, seq: int) -> Counted:
        take(self, seq)
        return Counted.NEW

    patch.setattr(seen.Seen, "take", twice)


def draws_too_many(patch: pytest.MonkeyPatch) -> None:
    draw = drawing.draw
    patch.setattr(drawing, "draw", lambda cohort, **more: draw(cohort, **{**more, "percent": 1.0}))


def no_fence(patch: pytest.MonkeyPatch) -> None:
    for module in (rollouts, lease):
        patch.setattr(module, "fence", lambda conn, term: None)
        patch.setattr(module, "check", lambda conn, term: None)


def forgets_a_device(patch: pytest.MonkeyPatch) -> None:
    compose = dispatch.Dispatch.compose

    def most(self: Any, world: Any, *more: Any, **named: Any) -> Any:
        known = {n: d for n, d in world.devices.items() if n != "car-1" or not world.holds}
        return compose(self, replace(world, devices=known), *more, **named)

    patch.setattr(dispatch.Dispatch, "compose", most)


def judges_by_hope(patch: pytest.MonkeyPatch) -> None:
    judge = judging.judge
    patch.setattr(
        judging,
        "judge",
        lambda case: replace(judge(case), verdict=Verdict.WIDEN, sentence="WIDENED — surely"),
    )
    patch.setattr(judging, "_passes", lambda *_: True)


def acknowledges_without_writing(patch: pytest.MonkeyPatch) -> None:
    write, turns = Store.write, []

    def sometimes(self: Store, batch: Any, now: float) -> Written:
        turns.append(now)
        if len(turns) % 5 or not batch.heard:
            return write(self, batch, now)
        verdicts = tuple(Counted.NEW for h in batch.heard for _ in h.messages)
        return Written(batch=1, verdicts=verdicts, shifted=0)

    patch.setattr(Store, "write", sometimes)


def takes_a_lower_term(patch: pytest.MonkeyPatch) -> None:
    def lower(conn: Any, at_least: int) -> int:
        before = lease.look(conn).term
        term = lease.take_over(conn, at_least) if not before else before - 1
        conn.execute(sql_update(leases).values(term=term))
        return term

    patch.setattr(server.store, "take_over", lower)


def ignores_stops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(telling, "stopped", lambda *_: False)
    patch.setattr(desired, "stopped", lambda *_: False)


def ignores_guards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(update, "_blockers", lambda *_: ())


def ignores_leases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trust, "lease_holds", lambda order, now: True)


def keeps_no_record(patch: pytest.MonkeyPatch) -> None:
    append = audit.append

    def some(conn: Any, **more: Any) -> int:
        return 0 if more["action"].startswith("draw") else append(conn, **more)

    patch.setattr(audit, "append", some)


def counts_silence_by_the_clock(patch: pytest.MonkeyPatch) -> None:
    hearing = Store.hearing

    def always(self: Store) -> tuple[float, float]:
        (clock, at), now = hearing(self), STAGES[-1].world.now
        return clock + (now - at), now

    patch.setattr(Store, "hearing", always)
    # The second line of defence: that nobody at all is heard says as much.
    patch.setattr(Ears, "_is_cut", lambda *_: False)


def forges_orders(patch: pytest.MonkeyPatch) -> None:
    from bench.world.wire import Wire

    publish = Wire.publish

    def forged(self: Wire, messages: Any, **more: Any) -> list[bool]:
        changed = [(t, b.replace(b'"install"', b'"rollback"')) for t, b in messages]
        return publish(self, changed, **more)

    patch.setattr(Wire, "publish", forged)


def step_by_hand(stage: Stage) -> None:
    with writing(stage.world.databases.control) as conn:
        conn.execute(sql_update(rollout_rows).values(step=2))


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


def early(stage: Stage) -> None:
    stage.publish("2")
    stage.world.run(7)


FAULTS = [
    Fault("an order after a hold", "I1", rolled_back_by_a_person, blind_to_holds),
    Fault("a double count", "I5", noisy_network, counts_everything),
    Fault("an oversize step", "I2", plain_rollout, draws_too_many),
    Fault("an unfenced write", "I7", two_controllers, no_fence),
    Fault("a forgotten device", "I3", rolled_back_by_a_person, forgets_a_device),
    Fault(
        "a forgotten device beside a held one",
        "I3",
        rolled_back_beside_a_hold_of_another,
        forgets_a_device,
    ),
    Fault("a step widened without evidence", "I14", plain_rollout, judges_by_hope),
    Fault("a lost acknowledgement", "I4", plain_rollout, acknowledges_without_writing),
    Fault("a downgraded term", "I8", restarted, takes_a_lower_term),
    Fault("a stop that stops nothing", "I12", stopped, ignores_stops),
    Fault("an activation while it drives", "I10", driving, ignores_guards),
    Fault("an install without a lease", "I1", ahead_of_time, ignores_leases),
    Fault("a decision without a record", "I13", plain_rollout, keeps_no_record),
    Fault("silence while nobody listened", "I14", deaf, counts_silence_by_the_clock),
    Fault("an order that nobody signed", "I7", plain_rollout, forges_orders),
    Fault("a step raised by hand", "I14", early, nothing, step_by_hand),
]
BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_planted_fault_is_found(databases: Databases, name: str) -> None:
    fault = BY_NAME[name]
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        stage = Stage(databases)
        fault.story(stage)
    fault.spoil(stage)
    found = {finding.invariant for finding in stage.world.check()}
    assert fault.invariant in found, f"{found} {stage.world.lines[-3:]}"


@pytest.mark.parametrize("story", sorted({f.story for f in FAULTS}, key=lambda s: s.__name__))
def test_without_the_fault_nothing_is_found(
    databases: Databases, story: Callable[[Stage], None]
) -> None:
    stage = Stage(databases)
    story(stage)
    assert [str(finding) for finding in stage.world.check()] == []
