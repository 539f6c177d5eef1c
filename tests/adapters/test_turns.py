"""A turn of the loop makes room for whoever rings, and reads telemetry once for everybody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from controller import wake
from controller.loop import Loop
from controller.store.tables import desired
from telemetry.report import HealthRow
from telemetry.store.database import reading

from .story import DIGESTS, Story, base, fleet, rollout

SOAKING = [{"cohort": "canary", "soak": "1h"}, {"cohort": "general"}]


@pytest.fixture
def story(tmp_path: Path) -> Any:
    """Two fleets, each soaking on app-2; `rings` says whether somebody has poked."""
    cars = Story(tmp_path)
    cars.rings = False
    cars.start()
    cars.loop = Loop(replace(cars.loop._ports, rung=lambda: cars.rings), cars.loop._issuer)
    for i in range(30):
        cars.enrol(f"car-{i:02}", model="m3", ring="canary")
        cars.enrol(f"van-{i:02}", fleet="vans", model="v1", ring="canary")
        for name in (f"car-{i:02}", f"van-{i:02}"):
            cars.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    documents = [text for text in base() if '"kind": "Fleet"' not in text]
    vans = fleet().replace('"name": "cars"', '"name": "vans"').replace("m3", "v1")
    rival = rollout("cars", "app-2", steps=SOAKING)
    other = rival.replace('"name": "cars"', '"name": "vans"').replace(
        '"fleet": "cars"', '"fleet": "vans"'
    )
    cars.commit(*documents, fleet(), vans, rival, other)
    cars.run(4)
    assert cars.rollout("cars").state == cars.rollout("vans").state == "Soaking"
    return cars


def say(story: Any, name: str) -> None:
    story.world.batch += 1
    story.world.health.append(
        HealthRow(
            batch=story.world.batch, device=name, received_at=story.world.now, boot="b", seq=1,
            attempt=None, components={}, t0=story.world.now - 1, seconds=1.0, counters={},
            exposure={}, levels={},
        )
    )  # fmt: skip


def test_a_hold_touches_no_device_of_another_fleet(story: Any) -> None:
    """Both fleets run the same artifact; the hold is of one of them."""
    composed: list[str] = []
    compose = story.loop._dispatch.compose

    def listened(*args: Any, **named: Any) -> Any:
        part = compose(*args, **named)
        composed.extend(part.devices)
        return part

    story.loop._dispatch.compose = listened
    story.command("rollback", "cars")
    story.loop.tick(story.world.now + 1)
    assert composed
    assert {name[:3] for name in composed} == {"car"}
    story.run(3)
    assert story.rollout("cars").state == "RolledBack"
    assert story.rollout("vans").state == "Soaking"


def test_while_somebody_rings_telemetry_waits_and_is_read_later(story: Any) -> None:
    say(story, "van-01")
    story.rings = True
    before = story.loop._listening.evidence.watermark
    story.loop.tick(story.world.now + 1)
    assert story.loop._listening.evidence.watermark == before < story.world.batch
    assert story.loop.behind
    story.rings = False
    story.loop.tick(story.world.now + 2)
    assert story.loop._listening.evidence.watermark == story.world.batch
    assert not story.loop.behind


def test_orders_go_out_although_somebody_rings_all_the_time(story: Any) -> None:
    story.command("rollback", "cars")
    story.rings = True
    for _ in range(5):
        story.world.now += 1
        story.loop.tick(story.world.now)
    kinds = {d: [o.kind for o in orders] for d, orders in story.world.orders.items()}
    back = [d for d, known in kinds.items() if "rollback" in known]
    assert back
    assert all(d.startswith("car") for d in back)
    assert len(back) == sum("install" in known for d, known in kinds.items() if d < "d")


def test_two_rollouts_share_one_reading_of_the_messages(story: Any) -> None:
    asked: list[int] = []
    read = story.world.health_since

    def counted(batch: int, **page: int) -> Any:
        asked.append(batch)
        return read(batch, **page)

    story.world.health_since = counted
    say(story, "car-01")
    say(story, "van-01")
    story.loop.tick(story.world.now + 1)
    assert len(asked) == len(set(asked)) > 0
    for observed in story.loop._listening.evidence.observations():
        assert story.loop._listening.evidence._read_to[observed] == story.world.batch


def test_a_bell_says_that_it_was_rung_until_it_is_heard(tmp_path: Path) -> None:
    bell = wake.Bell(tmp_path)
    try:
        assert not bell.rung()
        wake.poke(tmp_path)
        assert bell.rung()
        assert bell.rung()
        assert bell.wait(5.0)
        assert not bell.rung()
    finally:
        bell.close()


class Later:
    """A broker that answers for a part when it is asked for the answer, as the real one does."""

    def __init__(self) -> None:
        self.up = True
        self.said: list[str] = []  # what happened, in order
        self.has: dict[str, bytes] = {}

    def publish(self, messages: Any, **_more: Any) -> list[bool]:
        return self.begin(messages)()

    def begin(self, messages: Any) -> Any:
        self.said.append(f"begin {len(messages)}")
        taken = [self.up] * len(messages)
        if self.up:
            self.has.update(messages)

        def answer() -> list[bool]:
            self.said.append("answer")
            return taken

        return answer


def _orders(story: Any, waiting: bool) -> set[str]:
    with reading(story.engine) as conn:
        found = conn.execute(select(desired.c.device).where(desired.c.published.is_(not waiting)))
        return {row.device for row in found}


def test_the_next_part_is_composed_before_the_broker_answers_for_the_last(
    story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.loop.FIRST", 4)
    monkeypatch.setattr("controller.loop.PART", 5)
    broker = Later()
    story.loop._outbox._broker = broker
    compose = story.loop._dispatch.compose

    def noted(*args: Any, **named: Any) -> Any:
        broker.said.append("compose")
        return compose(*args, **named)

    story.loop._dispatch.compose = noted
    story.command("rollback", "cars")
    story.loop.tick(story.world.now + 1)
    assert broker.said[:5] == ["compose", "begin 4", "compose", "answer", "begin 5"]
    assert broker.said[-1] == "answer"
    assert _orders(story, waiting=True) == set()
    assert {name.split("/")[2][:3] for name in broker.has} == {"car"}


def test_what_the_broker_did_not_take_waits_and_leaves_once_it_is_back(
    story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.loop.FIRST", 4)
    monkeypatch.setattr("controller.loop.PART", 5)
    broker = Later()
    broker.up = False
    story.loop._outbox._broker = broker
    story.command("rollback", "cars")
    story.loop.tick(story.world.now + 1)
    waiting = _orders(story, waiting=True)
    assert len(waiting) > 4
    assert [said for said in broker.said if said != "answer"] == ["begin 4"]
    broker.up = True
    story.loop.tick(story.world.now + 2)
    assert _orders(story, waiting=True) == set()
    assert {name.split("/")[2] for name in broker.has} == waiting


def test_a_commit_that_says_nothing_of_orders_composes_none(story: Any) -> None:
    """A hold that is recorded in Git comes back as a commit that changes no order."""
    composed: list[str] = []
    compose = story.loop._dispatch.compose

    def listened(*args: Any, **named: Any) -> Any:
        part = compose(*args, **named)
        composed.extend(part.devices)
        return part

    story.loop._dispatch.compose = listened
    head = story.world.head
    story.world.head = replace(head, commit="f" * 40)
    story.loop.tick(story.world.now + 1)
    assert story.loop._memory.commit == "f" * 40
    assert composed == []
    fleets = dict(head.manifests.fleets)
    fleets["cars"] = fleets["cars"].model_copy(update={"on_unknown": "converge"})
    changed = replace(head.manifests, fleets=fleets)
    story.world.head = replace(head, commit="e" * 40, manifests=changed)
    story.loop.tick(story.world.now + 2)
    assert set(composed) == set(story.world.rows)
