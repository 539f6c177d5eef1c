"""A database that was wiped, restored from an older backup, or cut off from telemetry.

The loop on a real SQLite; devices and broker are those of story.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.exc import OperationalError

from controller.rollout.recovery import MOST
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import decisions, desired, holds, metadata
from device_agent.protocol import State
from telemetry.store.database import reading, writing

from .story import DIGESTS, Story, base, rollout

FOREVER = [
    {"cohort": "canary", "soak": "1h", "maxSoak": "2h"},
    {"cohort": "general", "soak": "1h", "maxSoak": "2h"},
]


@pytest.fixture
def cars(story: Story) -> Story:
    """Forty cars that completed app-2, and a canary of twelve on app-3, soaking for an hour."""
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    assert story.versions() == {"2": 40}
    return story


def begin_canary(cars: Story) -> None:
    cars.commit(*base(), rollout("cars", "app-3", FOREVER))
    cars.run(5)
    assert cars.versions() == {"2": 28, "3": 12}


def kept(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-backup")


def back_up(cars: Story, folder: Path) -> None:
    with writing(cars.engine) as conn:
        conn.exec_driver_sql("SELECT 1")
    cars.engine.dispose()
    shutil.copytree(folder, kept(folder))


def restore(cars: Story, folder: Path) -> None:
    cars.engine.dispose()
    for file in folder.glob("control.db*"):
        file.unlink()
    for file in kept(folder).glob("control.db*"):
        shutil.copy(file, folder)
    cars.engine = open_control(f"sqlite:///{folder / 'control.db'}")


def wipe(cars: Story) -> None:
    """All tables but the registry, which has its own copy."""
    with writing(cars.engine) as conn:
        for table in reversed(metadata.sorted_tables):
            if table.name not in ("devices", "enrolment_tokens"):
                conn.execute(delete(table))


def start_above(cars: Story) -> None:
    """As `controller_role` does: a term above all that devices report."""
    cars.start()
    heard = max(row.term for row in cars.world.rows.values())
    with writing(cars.engine) as conn:
        term = store.take_over(conn, heard + 1)
    cars.loop._issuer = replace(cars.loop._issuer, term=term)
    cars.loop._outbox._term = term


def orders_since(cars: Story, mark: dict[str, int]) -> list:
    return [o for d, orders in cars.world.orders.items() for o in orders[mark.get(d, 0) :]]


def marked(cars: Story) -> dict[str, int]:
    return {device: len(orders) for device, orders in cars.world.orders.items()}


# -- wiped ----------------------------------------------------------------------------------------


def test_after_a_wipe_unfinished_work_waits_for_a_person_and_nothing_changes(cars: Story) -> None:
    begin_canary(cars)
    wipe(cars)
    mark = marked(cars)
    start_above(cars)
    cars.run(60)
    assert cars.versions() == {"2": 28, "3": 12}
    assert cars.rollout().state == "Paused"
    assert "control database is new" in cars.rollout().sentence
    told = orders_since(cars, mark)
    assert len(told) == 40  # each hears again what it runs, under the new term: nothing to do
    assert all(cars.world.rows[o.device].state is not State.REJECTED for o in told)
    cars.command("resume")
    cars.run(10)
    assert cars.rollout().state in ("Progressing", "Soaking")


def test_after_a_wipe_what_was_completed_is_completed_and_proven(cars: Story) -> None:
    wipe(cars)
    start_above(cars)
    cars.run(10)
    assert cars.rollout().state == "Completed"
    assert "found on all 40 devices" in cars.rollout().sentence
    cars.enrol("new", model="m3")
    cars.world.join("new", {"app": ("app-1", DIGESTS["1"])})
    cars.run(5)
    assert cars.versions() == {"2": 41}  # the newcomer gets what the fleet has proven


def test_the_next_commit_after_a_wipe_rolls_out_as_ever(cars: Story) -> None:
    wipe(cars)
    start_above(cars)
    cars.run(10)
    cars.commit(*base(), rollout("cars", "app-3"))
    cars.run(40)
    assert cars.versions() == {"3": 40}
    assert cars.rollout().state == "Completed"


def test_a_wipe_of_everything_is_known_by_the_registry_copy(story: Story) -> None:
    """Telemetry is empty too: the marker of the recovered registry is all that tells."""
    with writing(story.engine) as conn:
        store.put_meta(conn, "recovered", {"at": 1.0, "devices": 40})
    story.start()
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(10)
    assert story.rollout().state == "Paused"
    story.start()
    story.run(3)
    story.command("resume")
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(40)
    assert story.versions() == {"3": 40}  # what comes later waits for nobody


# -- restored -------------------------------------------------------------------------------------


def test_a_restored_backup_pauses_what_moves_and_is_obeyed(cars: Story, tmp_path: Path) -> None:
    folder = tmp_path
    back_up(cars, folder)
    begin_canary(cars)
    restore(cars, folder)
    start_above(cars)
    cars.run(5)
    assert cars.versions() == {"2": 28, "3": 12}  # nobody is sent back to what the backup says
    states = {row.state for row in cars.world.rows.values()}
    assert State.REJECTED not in states
    terms = {o.term for o in (orders[-1] for orders in cars.world.orders.values())}
    cars.commit(*base(), rollout("cars", "app-3.1"))
    cars.run(60)
    assert cars.versions() == {"3.1": 40}
    assert max(o[-1].term for o in cars.world.orders.values()) > min(terms)


def test_a_backup_from_the_middle_of_a_rollout_waits_for_a_person(
    cars: Story, tmp_path: Path
) -> None:
    begin_canary(cars)
    back_up(cars, tmp_path)
    cars.command("promote")
    cars.run(10)
    assert cars.versions() == {"3": 40}
    restore(cars, tmp_path)
    mark = marked(cars)
    start_above(cars)
    cars.run(30)
    assert cars.rollout().state == "Paused"
    assert "older than what devices were told" in cars.rollout().sentence
    assert cars.versions() == {"3": 40}
    assert {o.components["app"].digest for o in orders_since(cars, mark)} <= {DIGESTS["3"]}


def test_a_backup_from_before_a_hold_tells_nobody_what_is_held(cars: Story, tmp_path: Path) -> None:
    """The hold stands in Git: nothing forward leaves before Git was asked."""
    begin_canary(cars)
    back_up(cars, tmp_path)
    cars.command("rollback")
    cars.run(5)
    assert cars.versions() == {"2": 40}
    with reading(cars.engine) as conn:
        hold = dict(conn.execute(select(holds)).one()._mapping)
    head = cars.world.head
    restore(cars, tmp_path)
    with writing(cars.engine) as conn:  # as after every new session with the broker
        store.unpublish_all(conn)
    mark = marked(cars)
    start_above(cars)
    assert head is not None
    cars.world.head = replace(head, asked=False, heard=False)
    cars.run(5)
    assert orders_since(cars, mark) == []
    cars.world.head = head
    with writing(cars.engine) as conn:
        conn.execute(holds.insert().values(**hold))
    cars.run(10)
    assert cars.versions() == {"2": 40}
    assert DIGESTS["3"] not in {o.components["app"].digest for o in orders_since(cars, mark)}


def test_an_ordinary_restart_is_no_restore(cars: Story) -> None:
    begin_canary(cars)
    start_above(cars)
    cars.run(5)
    assert cars.rollout().state in ("Progressing", "Soaking")


def test_a_device_that_claims_a_huge_term_disturbs_nobody(cars: Story) -> None:
    begin_canary(cars)
    liar = cars.world.rows["car-00"]
    cars.world.rows["car-00"] = replace(liar, term=2**62, generation=2**62)
    cars.world.say("car-00")
    start_above_without_the_liar(cars)
    cars.run(5)
    cars.command("rollback")
    cars.run(5)
    with reading(cars.engine) as conn:
        last = conn.execute(select(desired.c.term, desired.c.generation)).all()
    assert all(max(row) < MOST for row in last)
    assert cars.versions()["2"] >= 39


def start_above_without_the_liar(cars: Story) -> None:
    cars.start()


# -- telemetry away -------------------------------------------------------------------------------


def blind(cars: Story) -> None:
    def away(*_: object, **__: object) -> None:
        raise OperationalError("SELECT", {}, Exception("disk I/O error"))

    for name in ("watermark", "hearing", "devices_changed", "health_since", "totals"):
        setattr(cars.world, name, away)


def see(cars: Story) -> None:
    for name in ("watermark", "hearing", "devices_changed", "health_since", "totals"):
        delattr(cars.world, name)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_rollback_works_without_telemetry(cars: Story, restarted: bool) -> None:
    begin_canary(cars)
    blind(cars)
    if restarted:
        cars.start()
    cars.command("rollback")
    mark = marked(cars)
    cars.run(2, work=False)
    told = orders_since(cars, mark)
    assert {o.device for o in told} == {f"car-{i:02}" for i in range(12)}
    assert {(o.kind, o.components["app"].digest) for o in told} == {("rollback", DIGESTS["2"])}
    assert cars.rollout().state == "RollingBack"
    see(cars)
    cars.run(5)
    assert cars.versions() == {"2": 40}
    assert cars.rollout().state == "RolledBack"


@pytest.mark.parametrize("restarted", [False, True])
def test_without_telemetry_nothing_widens_fails_or_goes_forward(
    cars: Story, restarted: bool
) -> None:
    cars.commit(*base(), rollout("cars", "app-3"))
    cars.run(2)
    before, count = cars.versions(), cars.rollout().step
    blind(cars)
    if restarted:
        cars.start()
    mark = marked(cars)
    cars.run(600, step=20, work=False)
    assert orders_since(cars, mark) == []
    assert (cars.versions(), cars.rollout().step) == (before, count)
    with reading(cars.engine) as conn:
        verdicts = set(conn.execute(select(decisions.c.verdict)).scalars())
    assert "roll_back" not in verdicts
    see(cars)
    cars.run(60)
    assert cars.versions() == {"3": 40}


def test_evidence_that_was_half_read_counts_once(cars: Story) -> None:
    """An outage in the middle of reading: the ledgers begin again from the rows."""
    begin_canary(cars)
    blind(cars)
    cars.run(2, work=False)
    see(cars)
    cars.run(2)
    assert cars.loop._listening.evidence.watermark == cars.world.batch
    assert not cars.loop._listening.blind


def test_orders_that_a_device_never_got_go_out_again(cars: Story) -> None:
    """A leader that woke up too late, or a broker that mixed up what it keeps."""
    begin_canary(cars)
    with writing(cars.engine) as conn:
        assert conn.execute(update(desired).values(published=True)).rowcount
    stale = cars.world.rows["car-03"]
    cars.world.rows["car-03"] = replace(stale, generation=stale.generation - 1)
    cars.world.now += 60
    cars.world.say("car-03")
    mark = marked(cars)
    cars.run(2, work=False)
    assert [o.device for o in orders_since(cars, mark)] == ["car-03"]
    assert orders_since(cars, mark)[0].generation == stale.generation
