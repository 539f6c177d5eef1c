"""The HTTP service over a real database and a real broker."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert, update

from controller import tokens
from controller.store.tables import desired, devices
from controller.tokens import Role
from device_agent.protocol import Presence
from telemetry.store.database import writing
from telemetry.store.fold import Batch, Heard

if TYPE_CHECKING:
    from conftest import House

NOW = 1_800_000_000.0
CARS = Path(__file__).parents[2] / "fleets" / "cars"
XSS = "<script>alert(1)</script>"


# -- devices --------------------------------------------------------------------------------------


def test_a_token_enrols_once(house: House) -> None:
    made = house.client.post(
        "/api/v1/devices", json={"id": "car-1", "fleet": "eu", "labels": {"hardware": "hw3"}}
    ).json()
    first = house.client.post("/api/v1/devices:enrol", json={"token": made["token"]})
    assert first.status_code == 200
    assert first.json()["broker"]["username"] == "car-1"
    assert first.json()["keys"][0]["public"] == house.deps.key.public_hex
    second = house.client.post("/api/v1/devices:enrol", json={"token": made["token"]})
    assert second.status_code == 401
    shown = house.client.get("/api/v1/devices/car-1").json()
    assert shown["status"] == "active"
    assert shown["labels"] == {"hardware": "hw3"}


def test_devices_come_in_bulk_and_page_by_page(house: House) -> None:
    many = [{"id": f"car-{i:03d}", "fleet": "eu"} for i in range(50)]
    made = house.client.post("/api/v1/devices", json=many)
    assert len(made.json()["items"]) == 50
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params = {"limit": 20, **({"cursor": cursor} if cursor else {})}
        page = house.client.get("/api/v1/devices", params=params).json()
        seen += [d["id"] for d in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [d["id"] for d in many]


def test_changes_show_what_moved_since_the_cursor(house: House) -> None:
    house.enrol("car-1")
    first = house.client.get("/api/v1/devices:changes").json()
    assert [d["id"] for d in first["items"]] == ["car-1"]
    again = house.client.get("/api/v1/devices:changes", params={"cursor": first["next"]}).json()
    assert again["items"] == []
    house.client.post("/api/v1/devices/car-1:move", json={"fleet": "us", "reason": "sold"})
    moved = house.client.get("/api/v1/devices:changes", params={"cursor": first["next"]}).json()
    assert [(d["id"], d["fleet"]) for d in moved["items"]] == [("car-1", "us")]


def test_changes_of_one_batch_come_page_by_page_each_once(house: House) -> None:
    many = [{"id": f"car-{i:03d}", "fleet": "eu"} for i in range(50)]
    house.client.post("/api/v1/devices", json=many)
    quiet, cursor = 0, None
    while quiet < 2:  # the registry's own changes first
        params = {"limit": 20, **({"cursor": cursor} if cursor else {})}
        page = house.client.get("/api/v1/devices:changes", params=params).json()
        quiet, cursor = (0 if page["items"] else quiet + 1), page["next"]
    word = Presence(online=True, boot="b1", boot_count=1)
    house.store.write(Batch(heard=[Heard(one["id"], [word]) for one in many]), NOW)
    seen: list[str] = []
    while True:
        params = {"limit": 20, "cursor": cursor}
        page = house.client.get("/api/v1/devices:changes", params=params).json()
        assert len(page["items"]) <= 20
        if not page["items"]:
            break
        seen, cursor = [*seen, *(one["id"] for one in page["items"])], page["next"]
    assert sorted(seen) == sorted(one["id"] for one in many)


def test_a_filter_on_the_last_word_pages_by_id_and_leaves_nobody_out(house: House) -> None:
    many = [f"car-{i:03d}" for i in range(30)]
    house.client.post("/api/v1/devices", json=[{"id": name, "fleet": "eu"} for name in many])
    word = Presence(online=True, boot="b1", boot_count=1)
    house.store.write(Batch(heard=[Heard(name, [word]) for name in many[::3]]), NOW)
    for online, wanted in ((True, many[::3]), (False, [n for n in many if n not in many[::3]])):
        seen: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            params = {"limit": 4, "online": online, **({"cursor": cursor} if cursor else {})}
            page = house.client.get("/api/v1/devices", params=params).json()
            seen, cursor = [*seen, *(one["id"] for one in page["items"])], page["next"]
        assert seen == wanted


def test_an_enrolled_device_gets_no_second_token(house: House) -> None:
    house.enrol()
    again = house.client.post("/api/v1/devices", json={"id": "car-1", "fleet": "eu"})
    assert again.status_code == 409
    assert again.json()["errors"][0]["pointer"] == "/0/id"


def test_a_device_reads_its_own_order_alone(house: House) -> None:
    mine = house.enrol("car-1")["broker"]
    house.enrol("car-2")
    basic = (mine["username"], mine["password"])
    assert house.client.get("/api/v1/devices/car-1/desired", auth=basic).status_code == 204
    with writing(house.deps.engine) as conn:
        conn.execute(
            insert(desired).values(
                device="car-1", term=1, generation=1, attempt="a", kind="install",
                components={}, body=b'{"signed":{}}', at=NOW, published=True,
            )
        )  # fmt: skip
    got = house.client.get("/api/v1/devices/car-1/desired", auth=basic)
    assert (got.status_code, got.content) == (200, b'{"signed":{}}')
    assert house.client.get("/api/v1/devices/car-2/desired", auth=basic).status_code == 403
    wrong = ("car-1", "guess")
    assert house.client.get("/api/v1/devices/car-1/desired", auth=wrong).status_code == 401
    assert house.client.get("/api/v1/devices", auth=basic).status_code == 401


def test_a_retired_device_has_no_rights_left(house: House) -> None:
    mine = house.enrol()["broker"]
    basic = (mine["username"], mine["password"])
    done = house.client.post("/api/v1/devices/car-1:retire", json={"reason": "scrapped"})
    assert done.json()["status"] == "retired"
    assert house.client.get("/api/v1/devices/car-1/desired", auth=basic).status_code == 401
    again = house.client.post("/api/v1/devices/car-1:retire", json={})
    assert again.status_code == 409


def test_a_replaced_board_gets_a_new_password_and_term(house: House) -> None:
    old = house.enrol()["broker"]["password"]
    made = house.client.post("/api/v1/devices/car-1:replace", json={"reason": "burnt"}).json()
    new = house.client.post("/api/v1/devices:enrol", json={"token": made["token"]}).json()
    assert new["broker"]["password"] != old


def test_labels_that_the_fleet_does_not_select_are_said_aloud(house: House) -> None:
    fleet = {
        "name": "eu",
        "selector": {"match_labels": {"model": "m3"}},
        "health_policy": "driving",
        "cohorts": [{"name": "general", "rest": True}],
    }
    house.add_rollout(pinned={"fleet": fleet})
    many = [{"id": "fits", "fleet": "eu", "labels": {"model": "m3"}}, {"id": "not", "fleet": "eu"}]
    made = house.client.post("/api/v1/devices", json=many).json()
    assert made["warnings"] == ["not: its labels do not match the selector of fleet eu"]


# -- verbs ----------------------------------------------------------------------------------------


def test_a_rollback_needs_the_revision_that_was_seen(house: House) -> None:
    house.add_rollout()
    url, body = "/api/v1/rollouts/cars:rollback", {"reason": "it brakes"}
    shown = house.client.get("/api/v1/rollouts/cars")
    assert shown.headers["etag"] == '"4"'
    assert house.client.post(url, json=body).status_code == 428
    stale = house.client.post(url, json=body, headers={"If-Match": '"3"'})
    assert stale.status_code == 412
    assert stale.headers["content-type"] == "application/problem+json"
    done = house.client.post(url, json=body, headers={"If-Match": shown.headers["etag"]})
    assert done.status_code == 202, done.text
    assert house.pokes
    assert house.client.get("/api/v1/rollouts/cars").json()["holds"][0]["reason"] == "it brakes"


@pytest.mark.parametrize(
    ("header", "code"),
    [('"3", "4"', 202), ('"4","9"', 202), ('W/"4"', 202), ('"3", "5"', 412), ('"4", x', 202),
     ("4", 412), ("x", 412), ('"٤"', 412), ('""', 412)],
)  # fmt: skip
def test_one_of_the_revisions_that_are_named_must_be_the_current_one(
    house: House, header: str, code: int
) -> None:
    house.add_rollout()
    done = house.client.post(
        "/api/v1/rollouts/cars:pause", json={"reason": "x"}, headers={"If-Match": header.encode()}
    )
    assert done.status_code == code, done.text


def test_any_revision_will_do_when_the_caller_says_so(house: House) -> None:
    house.add_rollout()
    done = house.client.post(
        "/api/v1/rollouts/cars:pause", json={"reason": "look"}, headers={"If-Match": "*"}
    )
    assert done.status_code == 202


def test_a_dry_run_changes_nothing(house: House) -> None:
    house.add_rollout()
    plan = house.client.post("/api/v1/rollouts/cars:rollback?dryRun=true", json={})
    assert plan.status_code == 200
    assert plan.json()["kind"] == "rollback"
    assert house.client.get("/api/v1/rollouts/cars").json()["revision"] == 4


def test_a_stop_needs_a_reason_only(house: House) -> None:
    bad = house.client.post("/api/v1/stop", json={"scope": "all", "reason": " "})
    assert bad.status_code == 422
    done = house.client.post("/api/v1/stop", json={"scope": "all", "reason": "recall"})
    assert done.status_code == 202
    assert house.client.get("/api/v1/fleets").json()["stops"][0]["reason"] == "recall"


# -- who may --------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused_even_on_loopback(house: House) -> None:
    bad = house.client.get("/api/v1/rollouts", headers={"Authorization": "Bearer bwt_nope"})
    assert bad.status_code == 401
    right = house.token(Role.VIEWER)
    assert house.client.get("/api/v1/rollouts", headers=right).status_code == 200
    row = tokens.every(house.deps.engine)[-1]
    assert tokens.revoke(house.deps.engine, row.id, actor="test", now=NOW)
    assert house.client.get("/api/v1/rollouts", headers=right).status_code == 401


def test_a_token_of_one_fleet_does_not_see_the_other(house: House) -> None:
    house.add_rollout()
    house.enrol("car-1", "eu")
    elsewhere = house.token(Role.ADMIN, ("us",))
    for path in ("rollouts/cars", "devices/car-1", "fleets/eu", "rollouts/cars/decisions"):
        assert house.client.get(f"/api/v1/{path}", headers=elsewhere).status_code == 404, path
    assert house.client.get("/api/v1/devices", headers=elsewhere).json()["items"] == []
    assert house.client.get("/api/v1/audit", headers=elsewhere).status_code == 403
    retire = house.client.post("/api/v1/devices/car-1:retire", json={}, headers=elsewhere)
    assert retire.status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_site_cannot_use_the_local_admin(house: House, headers: dict[str, str]) -> None:
    body = {"scope": "all", "reason": "x"}
    assert house.client.post("/api/v1/stop", json=body, headers=headers).status_code == 403


def test_the_local_admin_is_local(house: House) -> None:
    assert house.client_from("192.0.2.7").get("/api/v1/rollouts").status_code == 401


# -- hostile input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b'{"reason": 1}', 422),
        (b'{"reason": "x", "cowboy": true}', 422),
        (b'{"reason": "\\u0000"}', 422),
        (b'{"reason": "\\ud800"}', 422),
        (b'{"reason": "x", "ifRevision": NaN}', 422),
        (b'{"reason": "x", "ifRevision": 1e999}', 422),
        (b'{"reason": "' + b"x" * 3000 + b'"}', 422),
        (b"[" * 100_000, 422),
        (b"\xff\xfe", 422),
    ],
)
def test_hostile_bodies_are_refused(house: House, body: bytes, code: int) -> None:
    house.add_rollout()
    answer = house.client.post(
        "/api/v1/rollouts/cars:rollback",
        content=body,
        headers={"Content-Type": "application/json", "If-Match": "*"},
    )
    assert answer.status_code in (code, 400), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert house.client.get("/api/v1/rollouts/cars").json()["revision"] == 4


def test_what_is_no_json_is_told_with_its_place_and_no_pointer(house: House) -> None:
    answer = house.client.post(
        "/api/v1/stop", content=b'{"scope": ', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("no JSON: ")
    assert answer.json()["errors"][0]["pointer"] == ""


def test_an_unknown_field_is_named(house: House) -> None:
    answer = house.client.post("/api/v1/stop", json={"reason": "x", "scop": "all"})
    assert answer.json()["errors"] == [{"pointer": "/scop", "detail": "unknown field"}]


def test_bodies_have_a_size_and_a_type(house: House) -> None:
    json = {"Content-Type": "application/json"}
    big = house.client.post("/api/v1/stop", content=b" " * 2_000_000, headers=json)
    assert big.status_code == 413
    stream = house.client.post("/api/v1/stop", content=iter([b" " * 600_000] * 3), headers=json)
    assert stream.status_code == 413
    form = house.client.post("/api/v1/stop", data={"reason": "x"})
    assert form.status_code == 415


@pytest.mark.parametrize("device", ["../x", "a+b", "#", "A", "a/b", "", "x" * 64, "bw-ingest", XSS])
def test_no_device_has_such_a_name(house: House, device: str) -> None:
    answer = house.client.post("/api/v1/devices", json={"id": device, "fleet": "eu"})
    assert answer.status_code == 422


@pytest.mark.parametrize("cursor", ["x", "ÿ", "MTox", "!!!!", "MToA"])
def test_a_cursor_of_somebody_else_is_an_error(house: House, cursor: str) -> None:
    answer = house.client.get("/api/v1/devices:changes", params={"cursor": cursor})
    assert answer.status_code == 400


def test_nul_is_in_no_path(house: House) -> None:
    assert house.client.get("/api/v1/rollouts/a%00b").status_code == 400
    assert house.client.get("/api/v1/devices?cursor=%00").status_code == 400


def test_names_are_escaped_on_the_page(house: House) -> None:
    house.add_rollout(sentence=XSS, author=XSS)
    house.enrol()
    with writing(house.deps.engine) as conn:
        conn.execute(update(devices).values(fleet=XSS))
    page = house.client.get("/")
    assert page.status_code == 200, page.text
    assert "<script>" not in page.text
    assert "&lt;script&gt;" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


# -- services -------------------------------------------------------------------------------------


def test_an_artifact_is_published_and_fetched_in_parts(house: House) -> None:
    data = b"0123456789" * 100
    made = house.client.post(
        "/api/v1/releases:publish?component=autopilot&version=10.1.0",
        content=data,
        headers={"Content-Type": "application/octet-stream"},
    )
    assert made.status_code == 201, made.text
    digest = made.json()["digest"]
    whole = house.client.get(f"/artifacts/{digest}")
    assert whole.content == data
    part = house.client.get(
        f"/artifacts/{digest}", headers={"Range": "bytes=990-", "If-Range": whole.headers["etag"]}
    )
    assert (part.status_code, part.content) == (206, data[990:])
    assert house.client.get("/artifacts/sha256:" + "0" * 64).status_code == 404
    assert house.client.get("/artifacts/..%2f..%2fetc%2fpasswd").status_code == 404


def test_a_webhook_must_be_signed(house: House) -> None:
    body = b'{"ref":"refs/heads/main"}'
    right = "sha256=" + hmac.new(b"hush", body, hashlib.sha256).hexdigest()
    post = house.client.post
    assert post("/webhooks/git", content=body).status_code == 401
    wrong = post("/webhooks/git", content=body + b" ", headers={"X-Hub-Signature-256": right})
    assert wrong.status_code == 401
    assert not house.pokes
    done = post("/webhooks/git", content=body, headers={"X-Hub-Signature-256": right})
    assert done.status_code == 202
    assert post("/webhooks/git", headers={"X-Gitlab-Token": "hush"}).status_code == 202
    assert len(house.pokes) == 2


def test_probes_and_metrics_answer(house: House) -> None:
    house.enrol()
    assert house.client.get("/livez").status_code == 200
    assert house.client.get("/readyz").status_code == 200
    text = house.client.get("/metrics").text
    assert 'bellwether_devices{status="active"} 1.0' in text


def test_events_resume_after_the_last_one(house: House) -> None:
    house.enrol()
    from controller.http import services

    services.EVENTS_LAST = 0.5
    got = house.client.get("/api/v1/events", headers={"Last-Event-ID": "1"})
    assert "event: device.claim" in got.text
    assert "event: device.register" not in got.text
    assert house.client.get("/api/v1/events", headers={"Last-Event-ID": "x"}).status_code == 400


def test_events_are_of_the_fleets_that_a_person_sees(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controller.http import services

    monkeypatch.setattr(services, "EVENTS_LAST", 0.5)
    house.enrol("car-1", "eu")
    house.enrol("van-1", "us")
    house.add_rollout("cars", fleet="eu")
    house.add_rollout("vans", fleet="us")
    tokens.create(
        house.deps.engine, name="vans", role=Role.VIEWER, fleets=(), actor="ann", now=NOW
    )  # named as a rollout is: of no fleet all the same
    for name in ("cars", "vans"):
        url, body = f"/api/v1/rollouts/{name}:pause", {"reason": f"look at {name}"}
        assert house.client.post(url, json=body, headers={"If-Match": "*"}).status_code == 202
    some = {**house.token(Role.VIEWER, ("us",)), "Last-Event-ID": "0"}
    heard = house.client.get("/api/v1/events", headers=some)
    assert heard.status_code == 200
    assert "look at vans" in heard.text
    assert "van-1" in heard.text
    assert "car" not in heard.text
    assert "token.create" not in heard.text
    every = {**house.token(Role.AUDITOR), "Last-Event-ID": "0"}
    told = house.client.get("/api/v1/events", headers=every).text
    assert all(word in told for word in ("look at cars", "look at vans", "token.create"))


def test_a_plan_is_answered_with_its_digest_and_records_nothing(house: House) -> None:
    files = {str(path.relative_to(CARS)): path.read_text() for path in sorted(CARS.rglob("*.yaml"))}
    answer = house.client.post("/api/v1/plan", json={"head": {"revision": "x", "files": files}})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["rollouts"][0]["effect"] == "opens"
    assert found["digest"].startswith("sha256:")
    assert "NO MEMBERS" in found["text"]
    hostile = {
        "head": {"files": {"a.yaml": "kind: [", "b.yaml": "\x00", "../c.yaml": "x: &a [*a]"}}
    }
    assert house.client.post("/api/v1/plan", json=hostile).json()["errors"]
    assert house.client.post("/api/v1/plan", json={"head": {"files": []}}).status_code == 422
    some = house.token(Role.VIEWER, ("eu",))
    assert house.client.post("/api/v1/plan", json=hostile, headers=some).status_code == 403


def test_outcomes_are_there_before_any_rollout(house: House) -> None:
    found = house.client.get("/api/v1/outcomes", params={"days": 30}).json()
    assert found.pop("at") == "2027-01-15T08:00:00.000Z"
    assert found == {"days": 30, "items": [], "delivery": [], "next": None}
    refused = house.client.get("/api/v1/outcomes", params={"days": "nan"})
    assert refused.status_code == 422
