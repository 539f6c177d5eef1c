"""`GET /devices:changes?since=&where=` over a real registry and real telemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update

from controller.store.tables import devices
from device_agent.protocol import ComponentReport, Health, HistoryEntry, Reported, State
from telemetry.store.database import writing

if TYPE_CHECKING:
    from conftest import House

NOW = 1_800_000_000.0
OLD, NEW = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def fleet(house: House) -> House:
    """40 cars; those with the new release on hw2 are in trouble."""
    names = [f"car-{i:02}" for i in range(40)]
    many = [
        {"id": n, "fleet": "eu", "labels": {"hardware": f"hw{2 + i % 2}", "vin": n}}
        for i, n in enumerate(names)
    ]
    assert house.client.post("/api/v1/devices", json=many).status_code == 201
    with writing(house.deps.engine) as conn:
        conn.execute(update(devices).values(status="active", enrolled_at=NOW - 30 * 86400))
    for i, name in enumerate(names):
        new = i < 20
        report(house, name, new=new, failed=new and i % 2 == 0)
    return house


def report(house: House, device: str, *, new: bool, failed: bool) -> None:
    release, digest = ("app-2", NEW) if new else ("app-1", OLD)
    activated = HistoryEntry(
        component="app", release=release, digest=digest, at=NOW - 3600, event="activated"
    )
    message = Reported(
        boot="b",
        boot_count=1,
        seq=1,
        state=State.STUCK if failed else State.COMMITTED,
        components={"app": ComponentReport(release=release, digest=digest, committed=True)},
        history=(activated,) if new else (),
    )
    house.hear(device, message)


def ask(house: House, *where: str, **params: Any) -> Any:
    return house.client.get("/api/v1/devices:changes", params={"where": where, **params})


def test_the_release_on_that_hardware_is_the_first_suspect(fleet: House) -> None:
    found = ask(fleet, "state=STUCK", since="24h").json()
    assert (found["affected"], found["others"]) == (10, 30)
    first = found["suspects"][0]
    assert (first["factor"], first["value"]) == ("running on hardware", "app-2 on hw2")
    assert (first["affected"], first["affectedOf"]) == (10, 10)
    assert (first["others"], first["othersOf"]) == (0, 30)
    assert first["p"] < 1e-5
    names = [(s["factor"], s["value"]) for s in found["suspects"]]
    assert ("changed", "app-2 activated") in names
    assert ("running", "app-2") in names
    assert ("label", "hw2") in names
    assert not any(s["name"] == "vin" for s in found["suspects"])
    assert "10 devices match" in found["sentence"]


def test_what_was_asked_for_is_no_suspect(fleet: House) -> None:
    found = ask(fleet, "label.hardware=hw2", "state=STUCK").json()
    assert all(s["name"] != "hardware" for s in found["suspects"])
    assert all(s["factor"] != "running on hardware" for s in found["suspects"])


def test_only_what_changed_since_then_counts_as_changed(fleet: House) -> None:
    found = ask(fleet, "state=STUCK", since="30m").json()
    assert all(s["factor"] != "changed" for s in found["suspects"])


def test_a_symptom_of_nobody_is_an_answer(fleet: House) -> None:
    found = ask(fleet, "state=ROLLED_BACK").json()
    assert (found["affected"], found["suspects"]) == (0, [])
    assert found["sentence"] == "no device of 40 matches"


def test_a_grant_of_one_fleet_compares_within_it(fleet: House) -> None:
    headers = fleet.token("viewer", ("us",))
    found = fleet.client.get(
        "/api/v1/devices:changes", params={"where": "state=STUCK"}, headers=headers
    ).json()
    assert (found["affected"], found["others"]) == (0, 0)


@pytest.mark.parametrize(
    "where",
    ["", "state", "=x", "state>1", "hard_braking>x", "hard_braking>nan", "nobody_reports_this>1",
     "a/b>1", "x" * 5000, "\u202e=1", "state\x01=2", "score>inf", "<script>=1"],
)  # fmt: skip
def test_a_condition_that_means_nothing_is_422(fleet: House, where: str) -> None:
    answer = ask(fleet, where)
    if where == "":
        assert answer.status_code in (200, 422)
        return
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"].startswith("query/where")
    assert answer.json()["hint"]


@pytest.mark.parametrize("since", ["yesterday", "-1h", "9999999d", "2026-99-99", "1e400"])
def test_a_time_that_is_none_is_422(fleet: House, since: str) -> None:
    assert ask(fleet, "state=STUCK", since=since).status_code == 422


def test_a_metric_is_a_condition(fleet: House) -> None:
    driven = Health(
        boot="b",
        boot_count=1,
        seq=2,
        components={"app": NEW},
        t0=NOW - 600,
        dt=60.0,
        columns={},
        counters={"hard_braking": 6},
        exposure={"device_hour": 0.5},
    )
    for name in ("car-01", "car-03", "car-05"):
        fleet.hear(name, driven)
    found = ask(fleet, "hard_braking/device_hour>10", since="24h").json()
    assert (found["affected"], found["others"]) == (3, 37)
    assert ask(fleet, "hard_braking>=7", since="24h").json()["affected"] == 0
