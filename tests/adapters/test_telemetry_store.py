"""The telemetry store on a real SQLite and a real PostgreSQL: the same rules on both."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, create_engine, text

from device_agent.protocol import (
    ComponentReport,
    Health,
    HistoryEntry,
    Presence,
    Reported,
    State,
)
from telemetry.store.database import open_engine
from telemetry.store.fold import LOT, Batch, Heard
from telemetry.store.reports import Store
from telemetry.store.retention import BOOTS, DAY, Retention, sweep
from telemetry.store.seen import WINDOW, Seen, Verdict, pack, unpack
from telemetry.store.tables import create_schema, metadata

NOW = 1_800_000_000.0
DIGEST = "sha256:" + "a" * 64
_PG = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[str]:
    """An own PostgreSQL child; the URL of its server without a database name."""
    if not (_PG / "initdb").exists():
        pytest.skip("PostgreSQL 15 is not installed")
    root = Path(tempfile.mkdtemp(prefix="bw-pg-"))
    drop = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if drop:
        shutil.chown(root, "postgres")
    data = root / "data"
    initdb = [*drop, str(_PG / "initdb"), "-D", str(data), "-U", "bw", "--auth=trust", "-E", "UTF8"]
    subprocess.run([*initdb, "--no-sync"], check=True, capture_output=True, cwd=root)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {root} -c fsync=off"
    start = [*drop, str(_PG / "pg_ctl"), "-D", str(data), "-w", "-o", options]
    subprocess.run([*start, "-l", str(root / "log"), "start"], check=True, cwd=root)
    yield f"postgresql+psycopg://bw@127.0.0.1:{port}"
    stop = [*drop, str(_PG / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"]
    subprocess.run(stop, check=True, cwd=root, capture_output=True)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'telemetry.db'}"
    else:
        server = request.getfixturevalue("own_postgres")
        name = f"t_{uuid.uuid4().hex[:12]}"
        admin = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = f"{server}/{name}"
    engine = open_engine(url)
    create_schema(engine)
    create_schema(engine)  # harmless twice
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


def health(seq: int, *, boot: str = "b1", boot_count: int = 1, **more: Any) -> Health:
    values: dict[str, Any] = {
        "components": {"autopilot": DIGEST},
        "t0": NOW - 120,
        "dt": 10.0,
        "columns": {"cpu": (1.0, None, 3.0)},
        "counters": {"disengagement": 2},
        "exposure": {"device_hour": 0.5},
    }
    return Health(boot=boot, boot_count=boot_count, seq=seq, **(values | more))


def reported(seq: int, *, boot: str = "b1", boot_count: int = 1, **more: Any) -> Reported:
    values: dict[str, Any] = {
        "state": State.IDLE,
        "components": {"autopilot": ComponentReport(release="r1", digest=DIGEST, committed=True)},
    }
    return Reported(boot=boot, boot_count=boot_count, seq=seq, **(values | more))


def batch(device: str, *messages: Reported | Health | Presence, probe: bool = False) -> Batch:
    return Batch(heard=[Heard(device, messages)] if messages else [], probe=probe)


def test_a_batch_is_numbered_and_readable_as_it_was_written(store: Store) -> None:
    entry = HistoryEntry(
        component="autopilot", release="r1", digest=DIGEST, at=NOW, event="activated"
    )
    report = reported(2, reason="ordered", blocked_by=("parked",), history=(entry,), log="a\tb|é")
    written = store.write(batch("car-1", health(1), report), NOW)
    assert written.batch == store.watermark() == 1
    (row,) = store.devices_changed(0)
    assert row == store.device("car-1")
    assert (row.state, row.reason, row.blocked_by) == (State.IDLE, "ordered", ("parked",))
    assert (row.history, row.components, row.log) == ((entry,), report.components, "a\tb|é")
    (raw,) = store.health_since(0)
    assert raw.levels["cpu"].n == 2
    assert (raw.levels["cpu"].total, raw.levels["cpu"].squares) == (4.0, 10.0)
    assert (raw.counters, raw.exposure, raw.seconds) == (
        {"disengagement": 2},
        {"device_hour": 0.5},
        30.0,
    )
    assert store.devices_changed(1) == []


def test_a_message_counts_once_in_any_order_and_however_often_it_comes(store: Store) -> None:
    chance = random.Random(7)
    numbers = [n for n in range(300) for _ in range(chance.randint(1, 3))]
    chance.shuffle(numbers)
    for first in range(0, len(numbers), 37):
        store.write(batch("car-1", *(health(n) for n in numbers[first : first + 37])), NOW)
    assert sorted(row.seq for row in store.health_since(0)) == list(range(300))
    totals = store.totals(since=NOW - DAY, until=NOW + 1)
    assert totals.counters["disengagement"].tolist() == [600.0]
    assert totals.levels["cpu"].tolist() == [2.0]


def test_the_same_number_of_another_boot_or_device_is_another_message(store: Store) -> None:
    store.write(batch("car-1", health(1), health(1, boot="b2", boot_count=2)), NOW)
    store.write(batch("car-2", health(1)), NOW)
    assert len(store.health_since(0)) == 3


def test_what_is_older_than_the_window_is_late_and_not_counted(store: Store) -> None:
    store.write(batch("car-1", health(WINDOW + 10)), NOW)
    written = store.write(batch("car-1", health(10), health(9), health(11)), NOW)
    assert written.verdicts == (Verdict.NEW, Verdict.LATE, Verdict.NEW)
    assert store.refusals()["late"] == 1


def test_a_number_chosen_to_hurt_costs_bounded_memory(store: Store) -> None:
    store.write(batch("car-1", health(2**53 - 1)), NOW)
    written = store.write(batch("car-1", health(2**53 - 2), health(5)), NOW)
    assert written.verdicts == (Verdict.NEW, Verdict.LATE)


def test_the_last_state_wins_by_boot_and_number_not_by_arrival(store: Store) -> None:
    newer = reported(3, boot="b2", boot_count=2, state=State.TRIAL)
    store.write(batch("car-1", newer, reported(9, state=State.IDLE)), NOW)
    store.write(batch("car-1", reported(2, boot="b2", boot_count=2, state=State.ARMED)), NOW)
    row = store.device("car-1")
    assert row is not None
    assert (row.state, row.boot, row.boot_count) == (State.TRIAL, "b2", 2)


def test_a_will_is_no_contact_and_keeps_an_announced_sleep(store: Store) -> None:
    store.write(batch("car-1", health(1)), NOW)
    asleep = Presence(online=False, boot="b1", boot_count=1, sleeping_until=NOW + 500)
    store.write(batch("car-1", asleep), NOW + 50)
    store.write(batch("car-1", Presence(online=False, boot="b1", boot_count=1)), NOW + 60)
    row = store.device("car-1")
    assert row is not None
    assert (row.online, row.last_contact, row.sleeping_until) == (False, NOW, NOW + 500)
    store.write(batch("car-1", Presence(online=True, boot="b1", boot_count=1)), NOW + 70)
    row = store.device("car-1")
    assert row is not None
    assert (row.online, row.last_contact, row.sleeping_until) == (True, NOW + 70, None)


def test_presence_of_an_older_boot_is_stale(store: Store) -> None:
    store.write(batch("car-1", health(1, boot="b2", boot_count=2)), NOW)
    store.write(batch("car-1", Presence(online=False, boot="b1", boot_count=1)), NOW + 1)
    row = store.device("car-1")
    assert row is not None
    assert row.online


def test_the_hearing_clock_counts_what_was_heard_and_no_outage(store: Store) -> None:
    for second in (0, 1, 2, 3):
        store.write(Batch(probe=True), NOW + second)
    store.write(Batch(probe=True), NOW + 600)  # ten minutes deaf
    store.write(Batch(probe=True), NOW + 601)
    store.write(batch("car-1", health(1)), NOW + 602)
    assert store.hearing() == (4.0, NOW + 601)
    row = store.device("car-1")
    assert row is not None
    assert row.heard_clock == 4.0


def test_a_server_clock_that_jumps_back_does_not_turn_hearing_back(store: Store) -> None:
    for at in (NOW, NOW + 1, NOW - 100, NOW - 99):
        store.write(Batch(probe=True), at)
    assert store.hearing() == (1.0, NOW + 1)


@pytest.mark.parametrize("years", [-10, 10])
def test_an_implausible_device_clock_is_taken_as_now(store: Store, years: int) -> None:
    written = store.write(batch("car-1", health(1, t0=NOW + years * 365 * DAY)), NOW)
    assert written.shifted == 1
    totals = store.totals(since=NOW - 3600, until=NOW + 1)
    assert totals.exposure["device_hour"].tolist() == [0.5]


def test_history_is_counted_in_its_own_hours(store: Store) -> None:
    start = (NOW - 20 * DAY) // 3600 * 3600
    message = health(1, t0=start, dt=1800.0, columns={"cpu": (1.0, 1.0, 5.0, 5.0)})
    store.write(batch("car-1", message), NOW)
    first = store.totals(since=start, until=start + 3600)
    second = store.totals(since=start + 3600, until=start + 7200)
    assert first.levels["cpu"].tolist() == [1.0]
    assert first.counters["disengagement"].tolist() == [2.0]
    assert second.levels["cpu"].tolist() == [5.0]
    assert not second.counters


def test_totals_hold_every_device_in_every_array(store: Store) -> None:
    store.write(batch("car-1", health(1)), NOW)
    store.write(batch("car-2", health(1, counters={}, columns={"disk": (4.0,)})), NOW)
    totals = store.totals(since=NOW - DAY, until=NOW + 1)
    assert list(totals.devices) == ["car-1", "car-2"]
    assert totals.counters["disengagement"].tolist() == [2.0, 0.0]
    np.testing.assert_array_equal(totals.levels["cpu"], [2.0, np.nan])


def test_batches_are_read_whole(store: Store) -> None:
    for number in range(4):
        store.write(batch("car-1", *(health(number * 10 + n) for n in range(10))), NOW)
    assert len(store.health_since(0, limit=25)) == 20
    assert len(store.health_since(2, limit=5)) == 10
    assert {row.batch for row in store.health_since(2, limit=5)} == {3}


def test_a_large_batch_is_read_a_little_at_a_time(store: Store) -> None:
    """Whoever reads it may be needed at any moment."""
    store.write(batch("car-1", health(1)), NOW)
    store.write(batch("car-2", *(health(n) for n in range(2 * LOT + 5))), NOW)
    store.write(batch("car-1", health(2)), NOW)
    assert store.watermark() == 5
    pages, since = [], 1
    while page := store.health_since(since, limit=LOT):
        pages.append([(row.batch, row.seq) for row in page])
        since = page[-1].batch
    assert [len(page) for page in pages] == [LOT, LOT, 6]
    assert [seq for page in pages for _, seq in page] == [*range(2 * LOT + 5), 2]
    assert [number for number, _ in pages[2]] == [4] * 5 + [5]


def test_devices_of_a_large_batch_are_read_a_little_at_a_time(store: Store) -> None:
    names = [f"car-{n:04d}" for n in range(LOT + 5)]
    store.write(Batch(heard=[Heard(name, [health(1)]) for name in names]), NOW)
    first = store.devices_changed(0, limit=LOT)
    rest = store.devices_changed(first[-1].change, limit=LOT)
    assert [row.device for row in (*first, *rest)] == names
    assert (len(first), len(rest)) == (LOT, 5)


def test_two_writers_leave_no_gap_and_count_once(engine: Engine) -> None:
    stores = [Store(engine), Store(engine)]
    failures: list[Exception] = []
    seen: list[int] = []

    def work(own: Store) -> None:
        try:
            for n in range(30):
                own.write(batch("car-1", health(n)), NOW)
                seen.append(own.watermark())
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert stores[0].watermark() == 60
    rows = stores[0].health_since(0)
    assert sorted(row.seq for row in rows) == list(range(30))


def test_a_failed_batch_leaves_nothing_behind(store: Store, engine: Engine) -> None:
    store.write(batch("car-1", health(1)), NOW)
    broken = dataclasses.replace(health(2), boot=None)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"(?i)null|none"):
        store.write(batch("car-1", health(3), broken), NOW)
    assert store.watermark() == 1
    assert [row.seq for row in store.health_since(0)] == [1]
    assert store.write(batch("car-1", health(3)), NOW).verdicts == (Verdict.NEW,)


def test_several_processes_may_make_the_schema_at_once(engine: Engine) -> None:
    metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE telemetry_version"))
    failures: list[Exception] = []

    def make() -> None:
        own = open_engine(engine.url.render_as_string(hide_password=False))
        try:
            create_schema(own)
        except Exception as error:  # noqa: BLE001
            failures.append(error)
        finally:
            own.dispose()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert Store(engine).watermark() == 0


def test_a_database_that_cut_its_connections_is_used_again(store: Store, engine: Engine) -> None:
    if engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no connections to cut")
    store.write(batch("car-1", health(1)), NOW)
    other = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    other.dispose()
    assert store.write(batch("car-1", health(1), health(2)), NOW).verdicts == (
        Verdict.REPEAT,
        Verdict.NEW,
    )


def test_a_replaced_board_starts_over(store: Store) -> None:
    store.write(batch("car-1", reported(5, boot_count=40), health(6, boot_count=40)), NOW)
    store.forget("car-1", NOW + 1)
    row = store.device("car-1")
    assert row is not None
    assert (row.state, row.change) == (None, 2)
    store.write(batch("car-1", reported(1, boot="n1", state=State.TRIAL)), NOW + 2)
    row = store.device("car-1")
    assert row is not None
    assert row.state is State.TRIAL


def test_retention_removes_old_rows_and_still_counts_nothing_twice(
    store: Store, engine: Engine
) -> None:
    store.write(batch("car-1", health(1)), NOW)
    later = NOW + 100 * DAY
    store.write(batch("car-1", health(1, boot="b2", boot_count=2)), later)
    while sweep(engine, later, Retention(raw=7 * DAY, rollups=60 * DAY, boots=90 * DAY)):
        pass
    assert [row.boot for row in store.health_since(0)] == ["b2"]
    assert not store.totals(since=NOW - DAY, until=NOW + DAY).counters
    again = store.write(batch("car-1", health(1)), later)
    assert again.verdicts == (Verdict.LATE,)


def test_invented_boots_are_bounded(store: Store, engine: Engine) -> None:
    many = [health(1, boot=f"b{n}", boot_count=n) for n in range(1, BOOTS + 41)]
    store.write(batch("car-1", *many), NOW)
    same = [health(1, boot=f"x{n}", boot_count=7) for n in range(BOOTS + 40)]
    store.write(batch("car-2", *same), NOW)
    while sweep(engine, NOW):
        pass
    with engine.connect() as connection:
        query = text("SELECT device, COUNT(*) FROM telemetry_boots GROUP BY device ORDER BY device")
        assert [tuple(row) for row in connection.execute(query)] == [
            ("car-1", BOOTS),
            ("car-2", BOOTS),
        ]
    assert store.write(batch("car-1", health(1, boot="b1")), NOW).verdicts == (Verdict.LATE,)
    assert store.write(batch("car-2", health(9, boot="x1", boot_count=7)), NOW).verdicts == (
        Verdict.NEW,
    )


def test_the_bitmap_agrees_with_a_set() -> None:
    chance = random.Random(3)
    for _ in range(50):
        seen, counted = Seen(boot_count=1), set[int]()
        top = chance.choice([10, 100, 3 * WINDOW])
        high = -1
        for _ in range(200):
            seq = chance.randrange(top)
            if chance.random() < 0.5:
                seq = max(0, min(top, high + chance.randint(-5, 5)))
            seen.missing = unpack(pack(seen.missing))
            verdict = seen.take(seq)
            if seq < high - WINDOW:
                assert verdict is Verdict.LATE
                continue
            assert verdict is (Verdict.REPEAT if seq in counted else Verdict.NEW)
            counted.add(seq)
            high = max(high, seq)
