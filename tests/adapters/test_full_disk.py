"""A full disk takes no ordinary write, but a stop and a rollback: room was kept for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from controller import ballast, commands
from controller.controller_role import _Turns
from controller.store import rollouts as store
from controller.store.tables import stops
from telemetry.store.database import reading, writing
from tests.disks import fill, small_or_skip

from .story import Story, base, forty, rollout

ROOM = 96  # MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of this test's own."""
    with small_or_skip(tmp_path / "disk", ROOM) as place:
        yield place


def _begin(cars: Story) -> Story:
    cars.commit(*base(), rollout("cars", "app-2", [
        {"cohort": "canary", "soak": "1h", "maxSoak": "2h"},
        {"cohort": "general", "soak": "1h", "maxSoak": "2h"},
    ]))  # fmt: skip
    cars.run(5)
    assert cars.versions() == {"1": 28, "2": 12}
    ballast.lay(cars.engine)
    return cars


class Always:
    """A lease that is held, and a broker session that stands."""

    connections = 0

    def turned(self) -> None:
        pass


def test_a_rollback_works_when_the_disk_is_full(disk: Path) -> None:
    cars = _begin(forty(disk))
    assert (disk / "control.db.ballast").stat().st_blocks * 512 >= ballast.SIZE
    fill(disk)
    with pytest.raises(OperationalError, match="full"), writing(cars.engine) as conn:
        store.put_meta(conn, "notices", {"long": "x" * 100_000})
    cars.command("rollback")
    assert not (disk / "control.db.ballast").exists()
    cars.run(5)
    assert cars.versions() == {"1": 40}
    cars.engine.dispose()


def test_the_loop_frees_the_room_for_its_own_stop_and_for_nothing_else(disk: Path) -> None:
    cars = _begin(forty(disk))
    turns = _Turns(cars.loop, cars.engine, Always(), Always(), cars.loop._issuer.term)
    fill(disk)
    cars.commit(*base(), rollout("cars", "app-3"))
    with pytest.raises(OperationalError, match="full"):
        turns._tick()
    assert (disk / "control.db.ballast").exists()
    commands.record(
        cars.engine, kind="stop", rollout=None, body={"scope": "all"}, actor="eve",
        reason="smoke", incident=None, if_revision=None, now=cars.world.now,
    )  # fmt: skip
    with reading(cars.engine) as conn:
        assert len(conn.execute(select(stops)).all()) == 1
    cars.engine.dispose()


def test_the_room_is_laid_again_and_never_takes_the_last_of_it(disk: Path) -> None:
    cars = _begin(forty(disk))
    file = disk / "control.db.ballast"
    file.unlink()
    fill(disk)
    ballast.lay(cars.engine)
    assert not file.exists()
    (disk / "filler").unlink()
    ballast.lay(cars.engine)
    assert file.exists()
    cars.engine.dispose()
