"""What histories have found: each fault of ours as a story of its own."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from bench.world import texts
from bench.world.databases import Databases
from bench.world.device import Nature
from bench.world.world import World
from controller.store.tables import decisions, holds, members, rollouts
from device_agent.protocol import Desired, Kind, open_envelope
from telemetry.store.database import reading

MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "2s", "maxSoak": "60s", "margins": MARGINS}
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]
DAY = 86_400.0


def stage(databases: Databases, seed: str = "found") -> World:
    world = World(databases, seed)
    for n in range(6):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}))
    base = {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy()}
    world.commit({**base, "1.yaml": texts.release("1")})
    world.start()
    world.run(6)
    return world


@pytest.fixture
def world(databases: Databases) -> World:
    return stage(databases)


def publish(world: World, version: str) -> None:
    cars = texts.rollout(version, STEPS, {"silentAfter": "20s"})
    world.commit({f"{version}.yaml": texts.release(version), "cars.yaml": cars})


def orders(world: World, device: str | None = None) -> list[Desired]:
    return [open_envelope(s.payload)[0] for s in world.wire.sent if device in (None, s.device)]


def releases(found: list[Desired]) -> list[str]:
    return [told.release for order in found for told in order.components.values()]


def test_a_clock_that_is_years_behind_asks_for_a_lease_now_and_then(world: World) -> None:
    world.devices["car-0"].skew = -20 * 365 * DAY
    publish(world, "2")
    world.run(120)
    assert releases(orders(world, "car-0")).count("app-2") == 1
    world.run(300)
    assert releases(orders(world, "car-0")).count("app-2") == 2


def test_a_way_back_that_could_not_be_had_is_tried_again(world: World) -> None:
    publish(world, "2")
    world.run(9)
    device = world.devices["car-0"]
    assert device.disk.active[texts.COMPONENT] == texts.artifact("2")
    device.disk.slots[texts.COMPONENT] = {texts.artifact("2")}  # the other slot is lost
    device.flaky = 1.0
    world.ask("rollback")
    world.run(30)
    assert device.disk.active[texts.COMPONENT] == texts.artifact("2")
    device.flaky = 0.0
    world.run(310)
    assert device.disk.active[texts.COMPONENT] == texts.artifact("1")
    assert world.check() == []


def test_a_stop_sends_nobody_to_what_a_hold_rejects(world: World) -> None:
    publish(world, "2")
    world.run(9)
    told = len(world.wire.sent)
    publish(world, "3")
    world.ask("rollback", texts.ROLLOUT)
    world.run(0.5)  # told 3, and what they reported last is 2
    world.ask("stop", None, scope="all")
    world.run(40)
    assert "app-2" not in releases(orders(world)[told:])
    assert world.check() == []


def test_an_empty_database_repeats_no_term_of_an_unheard_one(world: World) -> None:
    world.ingest_away(60)
    publish(world, "2")
    world.run(10)
    before = {(order.device, order.term, order.generation) for order in orders(world)}
    world.lose_control_database(backup=False)
    world.run(120)
    after = {(order.device, order.term, order.generation) for order in orders(world)[len(before) :]}
    assert before
    assert not before & after
    assert world.check() == []


def test_an_old_backup_tells_nobody_what_git_has_rejected(world: World) -> None:
    world.databases.backup()
    publish(world, "2")
    world.run(9)
    world.databases.backup()
    world.ask("rollback")
    world.run(60)
    with reading(world.databases.control) as conn:
        assert conn.execute(select(func.count()).where(holds.c.commit.is_not(None))).scalar() == 1
    told = len(world.wire.sent)
    world.lose_control_database(backup=True)
    world.run(120)
    forward = [o for o in orders(world)[told:] if o.kind is Kind.INSTALL]
    assert "app-2" not in releases(forward)
    assert world.check() == []


def test_what_an_old_backup_remembers_does_not_leave_before_git_answers(world: World) -> None:
    """Seed 310520: the backup is of before the hold, and the remote that has it is away."""
    publish(world, "2")
    world.run(3)
    world.databases.backup()
    world.run(3)
    world.ask("rollback")
    world.run(60)
    told = len(world.wire.sent)
    world.git_away(15)
    world.lose_control_database(backup=True)
    world.run(12)
    world.run(90)
    assert "app-2" not in releases(orders(world)[told:])
    with reading(world.databases.control) as conn:
        assert conn.execute(select(func.count()).where(holds.c.commit.is_not(None))).scalar() == 1
    assert world.check() == []


@pytest.mark.parametrize("seed", range(6))
def test_a_rollback_in_the_middle_of_a_turn(databases: Databases, seed: int) -> None:
    """Between what the loop has decided and what the outbox sends."""
    world = stage(databases, f"interrupted {seed}")
    publish(world, "2")
    world.run(1)
    world.interrupt(lambda: world.ask("rollback"))
    world.run(60)
    assert world.check() == []
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}


def test_without_another_set_what_is_rejected_does_not_start(world: World) -> None:
    """Both what runs and what it was told are rejected: it stays what it is."""
    sleeper = world.devices["car-0"]
    publish(world, "2")
    world.run(0.5)
    sleeper.sleep(50)
    digest = texts.digest_of("1")
    for name, version, named in (("01", "1", digest), ("02", "2", texts.digest_of("2"))):
        hold = f"{name}mcc5sjatd4j5brjrenvfz8"
        text = texts.hold(hold, version, named, to="previous", at="2027-01-15T08:00:00Z")
        world.commit({f"holds/{hold}.yaml": text})
    world.run(120)
    assert texts.artifact("2") not in {start.digest for start in sleeper.disk.started}


HOLD = "01mcc5sjatd4j5brjrenvfz8aa"


def reject_what_all_run(world: World) -> None:
    """All were told 2 and run it; then 2 and the 1 before it are rejected: nowhere to go."""
    publish(world, "2")
    world.run(60)
    files = {}
    for version, hold in (("1", HOLD.replace("aa", "bb")), ("2", HOLD)):
        text = texts.hold(
            hold, version, texts.digest_of(version), to="previous", at="2027-01-15T08:00:00Z"
        )
        files[f"holds/{hold}.yaml"] = text
    world.commit(files)
    world.run(10)


def test_an_order_that_a_hold_rejects_does_not_leave_again(world: World) -> None:
    """Seed 20182: there is no other set to go to, and the broker forgets."""
    reject_what_all_run(world)
    told = len(world.wire.sent)
    world.broker_away(5, forgot=True)
    world.run(20)
    assert len(world.wire.sent) == told
    assert world.check() == []


def test_what_was_withheld_leaves_when_its_hold_is_lifted(world: World) -> None:
    reject_what_all_run(world)
    world.broker_away(5, forgot=True)
    world.run(20)
    told = len(world.wire.sent)
    assert world.ask("lift", hold=HOLD)
    world.run(20)
    assert {sent.device for sent in world.wire.sent[told:]} == set(world.devices)
    assert world.check() == []


def test_a_hold_beside_a_broken_rollout_is_in_force(world: World) -> None:
    """Who writes a hold by hand in a hurry breaks the rollout in the same commit."""
    publish(world, "2")
    world.run(9)
    text = texts.hold(HOLD, "2", texts.digest_of("2"), to="previous", at="2027-01-15T08:00:00Z")
    world.commit({f"holds/{HOLD}.yaml": text, "cars.yaml": "kind: [unfinished\n"})
    world.run(60)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_a_hold_on_a_release_that_is_removed_rejects_its_artifacts(world: World) -> None:
    publish(world, "2")
    world.run(9)
    text = texts.hold(HOLD, "2", texts.digest_of("2"), to="previous", at="2027-01-15T08:00:00Z")
    cars = texts.rollout("1", STEPS, {"silentAfter": "20s"})
    world.commit({f"holds/{HOLD}.yaml": text, "2.yaml": None, "cars.yaml": cars})
    world.run(60)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_a_hold_of_which_nothing_is_known_is_completed_later(world: World) -> None:
    """It names a rollout that no commit has shown yet."""
    text = texts.hold(HOLD, "2", texts.digest_of("2"), to="previous", at="2027-01-15T08:00:00Z")
    world.commit({f"holds/{HOLD}.yaml": text, "cars.yaml": "kind: [unfinished\n"})
    world.run(6)
    publish(world, "2")
    world.run(40)
    assert texts.artifact("2") not in {d.disk.active["app"] for d in world.devices.values()}
    with reading(world.databases.control) as conn:
        row = conn.execute(select(holds)).one()
    assert (row.fleet, row.artifacts) == ("cars", [texts.artifact("2")])
    assert world.check() == []


def test_an_automatic_rollback_reaches_who_is_no_member(databases: Databases) -> None:
    """Seed 40813: who ran it before the database was lost is not drawn, and goes back too."""
    world = World(databases, "no member")
    for n in range(12):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}))
    base = {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy()}
    world.commit({**base, "1.yaml": texts.release("1")})
    world.start()
    world.run(6)
    publish(world, "2")
    world.run(4)  # the canaries run it
    world.natures[texts.artifact("2")] = Nature(boots=0.0)
    world.lose_control_database(backup=False)
    world.run(12)
    world.ask("resume")
    world.run(0.5)
    world.git_away(1_000)  # a hold that Git has makes everybody be looked at again
    world.run(60)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_who_shall_go_back_does_so_though_a_later_hold_lets_devices_stay(world: World) -> None:
    """Seed 40918: while nobody led, one person asked to go back and another one to stop."""
    publish(world, "2")
    world.run(9)
    world.controller_away(20)
    assert world.ask("rollback")
    world.run(1)
    assert world.ask("hold")
    world.run(60)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_a_command_does_not_undo_what_its_rollout_did_in_the_same_round(world: World) -> None:
    """Seed 40851: a step that was drawn when somebody paused was drawn a second time."""
    fleet = texts.fleet().replace('"ring": "canary"', '"ring": "first"')
    cars = texts.rollout("2", STEPS, {"silentAfter": "20s"})
    world.commit({"fleet.yaml": fleet, "2.yaml": texts.release("2"), "cars.yaml": cars})
    world.run(6)
    world.register("car-9", ring="first")
    world.ask("pause")
    world.run(6)
    world.ask("resume")
    world.run(20)
    assert world.check() == []
    with reading(world.databases.control) as conn:
        kinds = list(conn.execute(select(decisions.c.kind).order_by(decisions.c.id)).scalars())
    assert kinds.count("draw") == 1, kinds


def test_who_was_silent_before_nothing_was_heard_may_be_drawn_as_that(world: World) -> None:
    """A control that is dead for long, of a rollout that opens while the broker is away."""
    for name in ("car-4", "car-5"):
        world.devices[name].die()
    world.run(60)
    world.broker_away(60.0)
    world.run(15)
    publish(world, "2")
    world.run(20)
    assert world.check() == []
    with reading(world.databases.control) as conn:
        drawn = conn.execute(select(members).where(members.c.arm == "control")).all()
    assert {row.state for row in drawn} == {"silent"}


def test_a_way_back_whose_hold_is_lifted_is_over(world: World) -> None:
    """Seed 107598: one car is away, and shall go back; then nobody shall any more."""
    publish(world, "2")
    world.run(9)
    world.devices["car-0"].lose_network(1_000)
    world.ask("rollback")
    world.run(1)
    assert world.ask("lift")
    world.run(60)
    with reading(world.databases.control) as conn:
        states = conn.execute(select(rollouts.c.state, rollouts.c.sentence)).all()
    assert "RollingBack" not in {row.state for row in states}
    assert any("the hold is lifted" in row.sentence for row in states), states
    assert world.check() == []


def test_who_fails_at_the_next_release_goes_back_to_what_it_ran_before_both(world: World) -> None:
    """Seed 104916: it falls back to the one that was rejected meanwhile."""
    publish(world, "2")
    world.run(9)
    world.natures[texts.artifact("3")] = Nature(boots=0.0)
    publish(world, "3")
    world.run(0.1)
    world.ask("rollback")
    world.run(90)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_a_way_back_is_over_when_each_release_is_rejected_by_a_hold_of_its_own(
    world: World,
) -> None:
    """Seed 21001930: all fall from the third to the first, and it and the second are held too."""
    publish(world, "2")
    world.run(6)
    assert world.ask("hold")
    world.run(3)
    world.commit({"cars.yaml": texts.rollout("1", STEPS, {})})
    world.run(6)
    world.natures[texts.artifact("3")] = Nature(boots=0.0)
    publish(world, "3")
    world.run(0.1)
    assert world.ask("rollback")
    world.run(90)
    with reading(world.databases.control) as conn:
        states = set(conn.execute(select(rollouts.c.state)).scalars())
    assert "RollingBack" not in states
    assert world.check() == []


def test_all_run_it_and_the_database_is_lost_before_it_is_rejected(world: World) -> None:
    """Seed 104777: what all run counts as proven; then the one before it does."""
    publish(world, "2")
    world.run(90)
    world.lose_control_database(backup=False)
    world.run(30)
    assert world.ask("rollback")
    world.run(90)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("1")}
    assert world.check() == []


def test_a_release_that_silences_all_is_no_cut_road(world: World) -> None:
    """Seed 211202: all were told it, the last before the first had answered; nobody is heard."""
    for n in range(6, 12):
        world.enrol(f"car-{n}").start()
        world.register(f"car-{n}")
    world.run(6)
    world.natures[texts.artifact("2")] = Nature(silent=1.0)
    publish(world, "2")
    world.run(2)
    assert world.ask("promote")
    world.run(6)
    assert world.ask("rollback")
    publish(world, "3")
    world.run(120)
    with reading(world.databases.control) as conn:
        states = set(conn.execute(select(rollouts.c.state)).scalars())
    assert "RollingBack" not in states
    assert world.check() == []


def test_what_a_device_failed_at_is_told_again_when_it_is_the_only_way_away(world: World) -> None:
    """Seed 211211: what all left the factory with is rejected; one could not download the other."""
    world.devices["car-5"].flaky = 1.0
    publish(world, "2")
    world.run(60)
    world.devices["car-5"].flaky = 0.0
    text = texts.hold(HOLD, "1", texts.digest_of("1"), to="previous", at="2027-01-15T08:00:00Z")
    world.commit({f"holds/{HOLD}.yaml": text})
    world.run(60)
    running = {d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert running == {texts.artifact("2")}
    assert world.check() == []


def test_who_may_have_left_what_is_held_is_not_told_it_again(world: World) -> None:
    """Seed 322157: reverted to while it was out of touch, and held for all that run it."""
    publish(world, "2")
    world.run(0.5)
    world.devices["car-0"].lose_network(60)
    world.run(3)
    assert world.devices["car-0"].disk.active[texts.COMPONENT] == texts.artifact("2")
    world.commit({"cars.yaml": texts.rollout("1", STEPS, {"silentAfter": "20s"})})
    world.run(1)
    assert world.ask("promote")
    world.run(3)
    assert world.ask("hold")
    told = len(orders(world, "car-0"))
    world.broker_away(3, forgot=True)
    world.run(20)
    assert "app-1" not in releases(orders(world, "car-0")[told:])
    world.run(90)
    assert world.check() == []


def test_what_a_device_left_the_factory_with_may_be_named_again_where_it_may_stay(
    world: World,
) -> None:
    """Seed 409525: its old order is handed out under a hold that lets devices stay."""
    text = texts.hold(HOLD, "1", texts.digest_of("1"), to="stay", at="2027-01-15T08:00:00Z")
    world.register("car-9")
    world.enrol("car-9").start()
    world.run(12)
    world.commit({f"holds/{HOLD}.yaml": text})
    world.run(6)
    for device in world.devices.values():
        world.hand_out(device)
    publish(world, "2")
    world.run(60)
    assert {d.disk.active[texts.COMPONENT] for d in world.devices.values()} == {texts.artifact("2")}
    assert world.check() == []
