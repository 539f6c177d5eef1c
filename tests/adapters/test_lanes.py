"""Who asks too fast waits; a stop never waits for anybody else. Events reach every listener."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from controller.http import services
from controller.http.events import Events
from controller.http.lanes import Lanes
from controller.roles import Role
from controller.store import views

if TYPE_CHECKING:
    from conftest import House


def scope(path: str, method: str = "GET", token: str = "", host: str = "192.0.2.1") -> Any:
    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    return {
        "type": "http",
        "path": path,
        "method": method,
        "headers": headers,
        "client": (host, 1),
    }


def test_a_caller_may_burst_and_then_waits_its_rate() -> None:
    now = 0.0
    lanes = Lanes(10.0, clock=lambda: now)
    asked = scope("/api/v1/devices", token="a")
    assert [lanes.wait(asked, False) for _ in range(50)] == [0.0] * 50
    assert 0 < lanes.wait(asked, False) <= 0.1
    now += 0.1
    assert lanes.wait(asked, False) == 0.0
    assert lanes.wait(scope("/api/v1/devices", token="b"), False) == 0.0


def test_another_token_each_time_does_not_help() -> None:
    lanes = Lanes(1.0, clock=lambda: 0.0)
    waits = [lanes.wait(scope("/api/v1/devices", token=str(i)), False) for i in range(100)]
    assert waits[:50] == [0.0] * 50
    assert all(wait > 0 for wait in waits[50:])


def test_a_stop_has_a_lane_of_its_own() -> None:
    lanes = Lanes(1.0, clock=lambda: 0.0)
    for _ in range(100):
        lanes.wait(scope("/api/v1/devices", token="a"), False)
    assert lanes.wait(scope("/api/v1/devices", token="a"), False) > 0
    for path in ("stop", "rollouts/cars:rollback", "rollouts/cars:hold", "rollouts/cars:pause"):
        assert lanes.wait(scope(f"/api/v1/{path}", "POST", token="a"), False) == 0.0, path
    for path in ("stop", "rollouts/cars/rollback"):  # the pages' buttons
        assert lanes.wait(scope(f"/{path}", "POST", token="a"), False) == 0.0, path
    assert lanes.wait(scope("/api/v1/rollouts/cars:promote", "POST", token="a"), False) > 0


def test_the_machines_own_user_is_not_limited() -> None:
    lanes = Lanes(1.0, clock=lambda: 0.0)
    here = scope("/api/v1/devices", host="127.0.0.1")
    assert not any(lanes.wait(here, True) for _ in range(1000))
    assert any(lanes.wait(here, False) for _ in range(1000))


def test_what_is_remembered_of_callers_is_bounded() -> None:
    lanes = Lanes(1e9, clock=lambda: 0.0)
    for i in range(30_000):
        lanes.wait(scope("/x", token=str(i)), False)
    assert len(lanes._buckets) <= 10_000


def test_who_is_too_fast_is_told_how_long_to_wait(house: House) -> None:
    client = house.with_settings(auth="required", rate_limit=1.0)
    headers = house.token(Role.ON_CALL)
    answers = [client.get("/api/v1/rollouts", headers=headers) for _ in range(7)]
    refused = answers[-1]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["hint"]
    body = {"scope": "all", "reason": "smoke"}
    assert client.post("/api/v1/stop", json=body, headers=headers).status_code == 202


@pytest.mark.parametrize("slow", [60])
def test_a_stop_is_taken_while_every_other_thread_is_busy(
    house: House, slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def stuck(*_: Any) -> list[Any]:
        release.wait(30)
        return []

    monkeypatch.setattr(views, "fleets", stuck)
    house.add_rollout()

    async def story() -> int:
        transport = httpx2.ASGITransport(house.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8420"
        ) as client:
            waiting = [asyncio.create_task(client.get("/api/v1/fleets")) for _ in range(slow)]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in waiting)
            try:
                done = await client.post(
                    "/api/v1/rollouts/cars:rollback",
                    json={"reason": "smoke"},
                    headers={"If-Match": "*"},
                )
                assert not any(task.done() for task in waiting)
            finally:
                release.set()
            await asyncio.gather(*waiting)
            return done.status_code

    assert asyncio.run(asyncio.wait_for(story(), 60)) == 202


def test_a_button_is_taken_while_every_other_thread_is_busy(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def stuck(*_: Any, **__: Any) -> list[Any]:
        release.wait(30)
        return []

    monkeypatch.setattr(views, "list_audit", stuck)

    async def story() -> int:
        transport = httpx2.ASGITransport(house.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8420"
        ) as client:
            waiting = [asyncio.create_task(client.get("/api/v1/audit")) for _ in range(60)]
            await asyncio.sleep(0.2)
            form = {"csrf": house.app.state.local_csrf, "scope": "all", "reason": "smoke"}
            try:
                done = await client.post("/stop", data=form)
                assert not any(task.done() for task in waiting)
            finally:
                release.set()
            await asyncio.gather(*waiting)
            return done.status_code

    assert asyncio.run(asyncio.wait_for(story(), 60)) == 303


def test_what_comes_before_the_first_look_is_heard_by_who_listened_before_it(house: House) -> None:
    """It is in no memory, and it came after the listener had asked the database."""
    house.add_rollout()
    events = Events(house.deps.engine)
    head = events._head

    def late() -> int:
        body = {"scope": "hardware", "value": "hw1", "reason": "smoke"}
        assert house.client.post("/api/v1/stop", json=body).status_code == 202
        return head()

    async def story() -> list[int]:
        events._head = late  # type: ignore[method-assign]
        try:
            return [row.seq for row in await events.since(0, patience=30.0)]
        finally:
            events.stop()

    assert asyncio.run(story()) == [1]


def test_every_listener_gets_every_event_once_and_in_order(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "EVENTS_LAST", 3.0)
    house.add_rollout()

    async def listen(client: httpx2.AsyncClient, last: str) -> list[dict[str, Any]]:
        answer = await client.get("/api/v1/events", headers={"Last-Event-ID": last})
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.text.splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]

    async def story() -> list[list[dict[str, Any]]]:
        transport = httpx2.ASGITransport(house.app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8420", timeout=30
        ) as client:
            listeners = [asyncio.create_task(listen(client, "0")) for _ in range(20)]
            for i in range(5):
                body = {"scope": "hardware", "value": f"hw{i}", "reason": "smoke"}
                assert (await client.post("/api/v1/stop", json=body)).status_code == 202
                await asyncio.sleep(0.1)
            return list(await asyncio.gather(*listeners))

    for rows in asyncio.run(story()):
        assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
        assert [row["detail"]["value"] for row in rows] == [f"hw{i}" for i in range(5)]
