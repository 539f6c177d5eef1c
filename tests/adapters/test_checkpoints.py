"""Running sums and their checkpoints on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, select

from device_agent.protocol import Health
from telemetry.policy import Factor, ScoreSpec
from telemetry.score import score
from telemetry.score_days import ScoreDays
from telemetry.store import checkpoints, tables
from telemetry.store.database import open_engine, reading
from telemetry.store.fold import Batch, Heard
from telemetry.store.reports import Store
from telemetry.store.retention import Retention, sweep
from telemetry.store.tables import create_schema
from telemetry.sums import Sums

DAY = 86_400.0
NOW = 20_000 * DAY + 1_000


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    create_schema(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


def health(seq: int, now: float = NOW, **more: Any) -> Health:
    values: dict[str, Any] = {"counters": {"braking": 1}, "exposure": {"device_hour": 1.0}}
    values |= {"components": {}, "t0": now - 60, "dt": 1.0}
    return Health(boot="b", boot_count=1, seq=seq, **(values | more))


def tell(store: Store, device: str, *messages: Health, now: float = NOW) -> None:
    store.write(Batch(heard=[Heard(device, messages)]), now)


SPEC = ScoreSpec(factors=(Factor(metric="braking", bad=2.0, weight=40.0),))


def braked(store: Store, now: float) -> list[float]:
    (found,) = ScoreDays(store).read(SPEC, now)
    return found.counters["braking"].tolist()


def test_a_window_begins_with_the_last_checkpoint_before_it(store: Store, engine: Engine) -> None:
    for day in range(40):
        now = NOW + day * DAY
        tell(store, "car-1", health(day, now), now=now)
        if day >= 20:
            tell(store, "car-2", health(day, now), now=now)
        assert checkpoints.take(engine, now + 60)
    assert braked(store, now + 120) == [30.0, 20.0]
    assert store.totals(since=now - 2 * DAY, until=now).counters["braking"].tolist() == [3.0, 3.0]


def test_a_checkpoint_is_taken_once_a_day_and_stays(store: Store, engine: Engine) -> None:
    assert not checkpoints.take(engine, NOW)  # nobody has counted anything
    tell(store, "car-1", health(1))
    assert checkpoints.take(engine, NOW)
    tell(store, "car-1", health(2))
    assert not checkpoints.take(engine, NOW + 60)
    assert store.sums().since(store.checkpoint(20_000)).counters["braking"].tolist() == [1.0]
    assert checkpoints.take(engine, NOW + DAY)
    assert store.checkpoints(NOW) == [20_000, 20_001]
    assert store.checkpoints(NOW + DAY) == [20_001]
    assert store.checkpoints(NOW - DAY) == [20_000, 20_001]


def test_of_two_processes_one_takes_it(store: Store, engine: Engine, monkeypatch: Any) -> None:
    tell(store, "car-1", health(1))
    assert checkpoints.take(engine, NOW)
    tell(store, "car-1", health(2))
    monkeypatch.setattr(checkpoints, "days", lambda *_: [])  # it looked before the other wrote
    assert not checkpoints.take(engine, NOW)
    assert store.sums().since(store.checkpoint(20_000)).counters["braking"].tolist() == [1.0]


def test_a_checkpoint_of_a_clock_that_was_ahead_goes(store: Store, engine: Engine) -> None:
    tell(store, "car-1", health(1))
    assert checkpoints.take(engine, NOW + 300 * DAY)
    assert checkpoints.take(engine, NOW)
    assert store.checkpoints(NOW) == [20_000]


def test_what_is_killed_while_it_is_written_leaves_no_half_of_it(
    store: Store, engine: Engine, monkeypatch: Any
) -> None:
    tell(store, "car-1", health(1))
    tell(store, "car-2", health(1, counters={"alarm": 1}))  # another layout: another row
    insert, written = checkpoints.bulk.insert, Counter[str]()

    def dies(connection: Any, table: Any, rows: Any) -> None:
        written[table.name] += 1
        if written[table.name] == 2:
            raise ConnectionError
        insert(connection, table, rows)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.bulk, "insert", dies)
        with pytest.raises(ConnectionError):
            checkpoints.take(engine, NOW)
    assert store.checkpoints(NOW) == []
    assert checkpoints.take(engine, NOW)
    assert sorted(store.checkpoint(20_000).devices) == ["car-1", "car-2"]


def test_retention_keeps_running_sums(store: Store, engine: Engine) -> None:
    tell(store, "car-1", health(1))
    checkpoints.take(engine, NOW)
    later = NOW + 500 * DAY
    tell(store, "car-1", health(2, later), now=later)
    while sweep(engine, later, Retention()):
        pass
    assert store.checkpoints(later) == []
    assert store.sums().since(Sums()).counters["braking"].tolist() == [2.0]


@pytest.mark.parametrize("seed", range(3))
def test_messages_hours_and_running_sums_agree(store: Store, engine: Engine, seed: int) -> None:
    """Whatever is said, by whomever it is written, and however late it comes."""
    dice, other = random.Random(seed), Store(engine)
    for turn in range(60):
        heard = []
        for device in dice.sample(["car-1", "car-2", "car-3"], dice.randint(1, 3)):
            names = dice.sample(["a", "b", "c", "d"], dice.randint(0, 3))
            said = health(
                dice.randint(0, 40),
                NOW - dice.randint(0, 40) * 3_000,
                counters={name: dice.randint(0, 5) for name in names},
                columns={name: (0.5, None, 2.0) for name in names[:1]},
                dt=900.0,
            )
            heard.append(Heard(device, [said]))
        (other if dice.random() < 0.3 else store).write(Batch(heard=heard), NOW + turn)
    counters, hours, heat = Counter[Any](), Counter[str](), Counter[Any]()
    for row in store.health_since(0):
        hours[row.device] += row.exposure["device_hour"]
        counters.update({(row.device, name): n for name, n in row.counters.items() if n})
        heat.update({(row.device, name): level.n for name, level in row.levels.items()})
    for found in (store.sums().since(Sums()), store.totals(since=0, until=NOW + DAY)):
        assert dict(zip(found.devices, found.exposure["device_hour"], strict=True)) == hours
        assert counters == {
            (device, name): n
            for name, column in found.counters.items()
            for device, n in zip(found.devices, column.tolist(), strict=True)
            if n
        }
        for name, column in found.levels.items():
            known = {d for d, mean in zip(found.devices, column, strict=True) if mean == 1.25}
            assert known == {device for device, level in heat if level == name}


def test_the_arithmetic_of_a_score_is_that_of_its_window(store: Store, engine: Engine) -> None:
    tell(store, "car-1", health(1, counters={"braking": 99}))
    checkpoints.take(engine, NOW + DAY)
    later = NOW + 40 * DAY
    more = health(2, later, counters={"braking": 20}, exposure={"device_hour": 40.0})
    tell(store, "car-1", more, now=later)
    found = score(ScoreDays(store).read(SPEC, later), SPEC).explain("car-1")
    assert found is not None
    assert (found.exposure_hours, found.parts[0].x, found.value) == (40.0, 0.5, 90.0)


def test_layouts_are_written_once(store: Store, engine: Engine) -> None:
    for seq in range(5):
        tell(store, "car-1", health(seq))
        tell(Store(engine), "car-2", health(seq))
    with reading(engine) as connection:
        assert len(connection.execute(select(tables.layouts)).all()) == 1
