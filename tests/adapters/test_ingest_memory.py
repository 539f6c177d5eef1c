"""What the store remembers between batches: never more than the database says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, select

from device_agent.protocol import Health, Presence, Reported, State
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.fold import Batch, Heard, Message
from telemetry.store.reports import Store
from telemetry.store.retention import DAY, Retention, sweep
from telemetry.store.seen import Verdict
from telemetry.store.tables import boots, contacts, create_schema, layouts, reports, rollups, sums

NOW = 1_800_000_000.0


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    create_schema(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


def health(seq: int, *, boot: str = "b1", boot_count: int = 1) -> Health:
    counters = {"disengagement": 1}
    return Health(
        boot=boot, boot_count=boot_count, seq=seq, components={}, t0=NOW, dt=1.0, counters=counters
    )


def reported(seq: int, *, boot: str = "b1", boot_count: int = 1) -> Reported:
    return Reported(boot=boot, boot_count=boot_count, seq=seq, state=State.IDLE, components={})


def batch(device: str, *messages: Message) -> Batch:
    return Batch(heard=[Heard(device, messages)])


def test_what_is_remembered_ends_with_another_writer(engine: Engine) -> None:
    own, other = Store(engine), Store(engine)
    own.write(batch("car-1", health(1), health(3)), NOW)
    assert own.write(batch("car-1", health(3)), NOW).verdicts == (Verdict.REPEAT,)  # from memory
    other.write(batch("car-1", health(2), reported(9)), NOW)
    again = own.write(batch("car-1", health(2), health(4), reported(8)), NOW)
    assert again.verdicts == (Verdict.REPEAT, Verdict.NEW, Verdict.NEW)
    row = own.device("car-1")
    assert row is not None
    assert row.change == own.watermark() == 4
    with reading(engine) as connection:
        assert connection.execute(select(reports.c.seq)).scalar() == 9


def test_a_batch_that_failed_is_not_remembered(store: Store, monkeypatch: Any) -> None:
    store.write(batch("car-1", health(1)), NOW)
    with monkeypatch.context() as patch:  # the statement after all others of the batch

        def fails(*_: Any, **__: Any) -> None:
            raise ConnectionError

        patch.setattr("telemetry.store.reports.refused", fails)
        with pytest.raises(ConnectionError):
            store.write(batch("car-1", health(2), reported(3), health(7, boot="b2")), NOW)
    again = store.write(batch("car-1", health(2), reported(3), health(7, boot="b2")), NOW)
    assert again.verdicts == (Verdict.NEW,) * 3
    row = store.device("car-1")
    assert row is not None
    assert row.state is State.IDLE


def test_a_database_from_a_backup_is_not_taken_for_the_one_remembered(
    store: Store, engine: Engine
) -> None:
    """As many turns as we remember, and yet another history: only the connection is new."""
    store.write(batch("car-1", health(1)), NOW)
    store.write(batch("car-1", health(2)), NOW)
    other = open_engine(engine.url.render_as_string(hide_password=False))
    with writing(other) as connection:
        connection.execute(delete(boots))
    other.dispose()
    assert store.write(batch("car-1", health(2)), NOW).verdicts == (Verdict.REPEAT,)
    with writing(engine) as connection:
        connection.execute(delete(boots))
    engine.dispose()  # as a restored server does
    assert store.write(batch("car-1", health(2)), NOW).verdicts == (Verdict.NEW,)


def test_memory_is_bounded(store: Store, monkeypatch: Any) -> None:
    monkeypatch.setattr("telemetry.store.memory.MOST", 3)
    for n in range(8):
        heard = [Heard(f"car-{d}", [health(n), health(n, boot=f"x{n}")]) for d in range(2)]
        assert store.write(Batch(heard=heard), NOW).verdicts == (Verdict.NEW,) * 4
        assert store.write(Batch(heard=heard), NOW).verdicts == (Verdict.REPEAT,) * 4


def test_forgetting_boots_is_a_turn_of_its_own(store: Store, engine: Engine) -> None:
    """Else a process that remembers the device would write its old floor back."""
    store.write(batch("car-1", health(1, boot="old", boot_count=1)), NOW)
    later = NOW + 91 * DAY
    store.write(batch("car-1", health(1, boot="new", boot_count=2)), later)
    before = store.watermark()
    while sweep(engine, later, Retention()):
        pass
    assert store.watermark() == before + 1
    assert store.write(batch("car-1", health(2, boot="new", boot_count=2)), later).verdicts == (
        Verdict.NEW,
    )
    with reading(engine) as connection:
        assert connection.execute(select(contacts.c.boot_floor)).scalar() == 2
    sweep(engine, later, Retention())
    assert store.watermark() == before + 2  # nothing to forget, no turn


class Failing(Exception):
    pass


@pytest.mark.parametrize("seed", range(4))
def test_with_and_without_memory_any_history_ends_the_same(
    seed: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Repeats, boots, other writers, retention, replaced boards, failed and doubtful commits."""
    engines = [open_engine(f"sqlite:///{tmp_path / name}.db") for name in ("with", "without")]
    for engine in engines:
        create_schema(engine)
    remembering, stranger = Store(engines[0]), Store(engines[0])
    verdicts: tuple[list[Any], list[Any]] = ([], [])
    for turn in range(120):
        dice = random.Random(f"{seed} {turn}")
        now, heard = NOW + turn * DAY, _said(dice)
        event = dice.choice(["batch"] * 6 + ["stranger", "fails", "lost", "sweep", "forget"])
        for engine, seen in zip(engines, verdicts, strict=True):
            store = Store(engine) if engine is engines[1] else remembering
            if event == "stranger" and engine is engines[0]:
                store = stranger
            if event == "sweep":
                sweep(engine, now, Retention(raw=9 * DAY, boots=20 * DAY))
            elif event == "forget":
                store.forget("car-1", now)
            elif event == "fails":  # with all statements done, before the commit
                _write_and_lose(store, Batch(heard=heard), now, monkeypatch, committed=False)
            elif event == "lost":  # committed, but we never hear of it
                _write_and_lose(store, Batch(heard=heard), now, monkeypatch, committed=True)
            else:
                seen.append(store.write(Batch(heard=heard), now).verdicts)
    assert verdicts[0] == verdicts[1]
    assert _content(engines[0]) == _content(engines[1])
    for engine in engines:
        engine.dispose()


def _said(dice: random.Random) -> list[Heard]:
    def one() -> Message:
        count = dice.randint(1, 3)
        boot, seq = f"b{count}{dice.choice('xy')}", dice.randint(0, 12)
        kind = dice.random()
        if kind < 0.2:
            return Presence(boot=boot, boot_count=count, online=dice.random() < 0.5)
        return (reported if kind < 0.5 else health)(seq, boot=boot, boot_count=count)

    devices = dice.sample(["car-1", "car-2", "car-3"], dice.randint(1, 3))
    return [Heard(device, [one() for _ in range(dice.randint(1, 4))]) for device in devices]


def _write_and_lose(
    store: Store, some: Batch, now: float, monkeypatch: Any, *, committed: bool
) -> None:
    with monkeypatch.context() as patch:

        def fails(*_: Any) -> None:
            raise Failing

        target = (
            "telemetry.store.memory.Memory.keep" if committed else "telemetry.store.reports.refused"
        )
        patch.setattr(target, fails)
        with pytest.raises(Failing):
            store.write(some, now)


def _content(engine: Engine) -> list[Any]:
    with reading(engine) as connection:
        return [
            sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in (contacts, boots, reports, rollups, sums, layouts)
        ]
