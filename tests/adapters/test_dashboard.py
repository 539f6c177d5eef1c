"""The pages over HTTP: who sees what, what a form must carry, what a program gets instead."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, insert, select, update
from starlette.testclient import TestClient

from bench import estate
from controller.http import paging
from controller.http.app import create_app
from controller.http.dashboard import rendering
from controller.http.dashboard.census import Census
from controller.http.dashboard.live import Live
from controller.http.dashboard.measured import Measured
from controller.http.devicebook import DeviceBook
from controller.rollout.model import Arm, Member, MemberState
from controller.store import approvals, lookups, views
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import (
    audit,
    commands,
    devices,
    holds,
    member_counts,
    members,
    rollouts,
)
from controller.tokens import Role
from telemetry.store import tables as heard
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

NOW = 1_800_000_000.0
HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, Engine, estate.Estate]]:
    root = tmp_path_factory.mktemp("estate")
    control = open_control(f"sqlite:///{root / 'control.db'}")
    telemetry = open_engine(f"sqlite:///{root / 'telemetry.db'}")
    create_schema(telemetry)
    filled = estate.fill(control, telemetry, devices=120, rollouts=12, now=NOW)
    yield control, telemetry, filled
    control.dispose()
    telemetry.dispose()


def form(client: TestClient, path: str) -> dict[str, str]:
    """The hidden fields of the dialog on a page."""
    text = client.get(path, headers=HTML).text
    found = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', text)
    return dict(found)


def test_a_form_without_its_token_changes_nothing(house: Any) -> None:
    house.add_rollout()
    path = "/rollouts/cars/rollback"
    fields = {**form(house.client, path), "reason": "brakes"}
    bad = house.client.post(path, data={**fields, "csrf": "of somebody else"}, headers=HTML)
    assert bad.status_code == 403
    assert "text/html" in bad.headers["content-type"]
    foreign = house.client.post(
        path, data=fields, headers={**HTML, "Origin": "https://evil.example"}
    )
    assert foreign.status_code == 403
    with reading(house.deps.engine) as conn:
        assert conn.execute(select(func.count()).select_from(commands)).scalar_one() == 0
    good = house.client.post(path, data=fields, headers=HTML, follow_redirects=False)
    assert good.status_code == 303
    assert good.headers["location"] == "/rollouts/cars"
    assert house.pokes


def test_a_stale_preview_is_412_and_keeps_what_was_typed(house: Any) -> None:
    house.add_rollout()
    path = "/rollouts/cars/rollback"
    fields = {**form(house.client, path), "reason": "brakes <late>"}
    with writing(house.deps.engine) as conn:
        conn.execute(update(rollouts).values(revision=rollouts.c.revision + 1))
    stale = house.client.post(path, data=fields, headers=HTML)
    assert stale.status_code == 412
    assert "brakes &lt;late&gt;" in stale.text
    assert f'name="revision" value="{int(fields["revision"]) + 1}"' in stale.text
    for wrong in ("", "x", "9" * 40, "-1"):
        assert house.client.post(path, data={**fields, "revision": wrong}).status_code == 412


def test_a_refused_verb_is_the_dialog_again(house: Any) -> None:
    house.add_rollout()
    path = "/rollouts/cars/rollback"
    fields = form(house.client, path)
    assert house.client.post(path, data={**fields, "reason": "  "}).status_code == 422
    assert house.client.post(path, data={**fields, "reason": "x" * 5000}).status_code == 422
    assert house.client.post("/rollouts/cars/nonsense", data=fields).status_code == 404
    assert house.client.get("/rollouts/cars/resume", headers=HTML).status_code == 409
    for scope in ("step:x", "devices:a", "cohort:" + "x" * 100, ":"):
        answer = house.client.get(path, params={"scope": scope}, headers=HTML)
        assert answer.status_code == 422, scope


def test_a_lift_shows_the_holds_that_it_ends(house: Any) -> None:
    house.add_rollout()
    path = "/rollouts/cars/lift"
    nothing = house.client.get(path, headers=HTML)
    assert nothing.status_code == 409
    assert "nothing to lift" in nothing.text
    fields = {**form(house.client, "/rollouts/cars/hold"), "reason": "brakes"}
    assert house.client.post("/rollouts/cars/hold", data=fields).status_code == 200
    with reading(house.deps.engine) as conn:
        hold = conn.execute(select(holds.c.id)).scalar_one()
    shown = house.client.get(path, headers=HTML)
    assert f"ends {hold}; what it rejects goes out again" in shown.text


def test_a_step_alone_is_rolled_back(house: Any) -> None:
    house.add_rollout()
    path = "/rollouts/cars/rollback"
    fields = {**form(house.client, path + "?scope=step:0"), "reason": "canary only"}
    assert fields["scope"] == "step:0"
    assert house.client.post(path, data=fields, follow_redirects=False).status_code == 303
    with reading(house.deps.engine) as conn:
        assert conn.execute(select(commands.c.body)).scalar_one() == {"scope": {"step": 0}}


def test_who_sees_some_fleets_sees_no_other(house: Any) -> None:
    house.add_rollout(name="ours", fleet="eu")
    house.add_rollout(name="theirs", fleet="us", sentence="SECRET")
    mine = {**house.token(Role.RELEASE_MANAGER, ("eu",)), **HTML}
    for path in ("/", "/rollouts", "/oncall", "/decisions", "/board", "/releases", "/devices"):
        answer = house.client.get(path, headers=mine)
        assert answer.status_code == 200, path
        assert "SECRET" not in answer.text
        assert "theirs" not in answer.text, path
    for path in ("/rollouts/theirs", "/rollouts/theirs/rollback", "/live/rollout/theirs"):
        assert house.client.get(path, headers=mine).status_code == 404, path
    assert house.client.get("/audit", headers=mine).status_code == 403
    assert house.client.get("/stop", headers=mine).status_code == 403


def test_people_get_pages_and_programs_get_problems(house: Any) -> None:
    page = house.client.get("/rollouts/none", headers=HTML)
    assert page.status_code == 404
    assert "<main" in page.text
    for path, headers in (("/rollouts/none", {}), ("/api/v1/rollouts/none", HTML)):
        answer = house.client.get(path, headers=headers)
        assert answer.headers["content-type"].startswith("application/problem+json"), path
    assert house.client.get("/live/nothing", headers=HTML).status_code == 404


def test_hostile_queries_are_refused_or_empty(house: Any) -> None:
    for query in ("cursor=%27", "cursor=" + "a" * 600, "fleet=" + "x" * 200, "days=1e9"):
        for path in ("/devices", "/rollouts", "/releases", "/decisions", "/audit", "/board"):
            status = house.client.get(f"{path}?{query}", headers=HTML).status_code
            assert status in (200, 400, 422), (path, query)
    assert house.client.get("/devices?q=%F0%9F%91%BB'--&status=x", headers=HTML).status_code == 200


@pytest.mark.parametrize("digits", ["²", "٣", "9" * 200, "-1", "1.5", ""])
def test_digits_that_are_no_number_are_refused(house: Any, digits: str) -> None:
    """`²`.isdigit() is true, and a number of 200 digits fits into no column: both were a 500."""
    house.add_rollout()
    dialog = "/rollouts/cars/rollback"
    cursor = paging.cursor(digits) if digits else "MTo"
    asked = {"/audit": {"cursor": cursor}, dialog: {"scope": f"step:{digits}"}}
    for path, query in asked.items():
        status = house.client.get(path, params=query, headers=HTML).status_code
        assert status in (400, 422) or (not digits and path == "/audit"), path
    fields = {**form(house.client, dialog), "reason": "x", "revision": digits}
    assert house.client.post(dialog, data=fields, headers=HTML).status_code == 412


def test_static_files_are_ours_and_keep_their_digest(house: Any) -> None:
    url = rendering.static_url("bellwether.css")
    answer = house.client.get(url)
    assert answer.status_code == 200
    assert "immutable" in answer.headers["cache-control"]
    assert hashlib.sha256(answer.content).hexdigest().startswith(url.split("/")[2])
    for name in ("../rendering.py", "vendor/vendor.lock", "vendor/htmx.LICENSE", "%2e%2e/x.css"):
        assert house.client.get(f"/static/{url.split('/')[2]}/{name}").status_code == 404


def test_vendored_files_are_what_their_authors_published() -> None:
    folder = rendering.STATIC / "vendor"
    locked = dict(
        reversed(line.split()) for line in (folder / "vendor.lock").read_text().splitlines()
    )
    assert set(locked) == {f.name for f in folder.iterdir()} - {"vendor.lock", "README.md"}
    for name, digest in locked.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_templates_hold_no_inline_script_style_or_handler() -> None:
    for file in Path(rendering.__file__).parent.glob("templates/*.html"):
        text = file.read_text()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|hx-on", text), (
            file
        )


def test_what_two_people_must_want_waits_for_the_second(house: Any) -> None:
    house.add_rollout()
    with writing(house.deps.engine) as conn:
        approvals.put_rule(conn, "eu", {"start": 1, "recall": 1, "widen": 2, "lift": 1})
    fields = {**form(house.client, "/rollouts/cars/promote"), "reason": "no time <b>"}
    house.client.post("/rollouts/cars/promote", data=fields)
    with reading(house.deps.engine) as conn:
        assert conn.execute(select(func.count()).select_from(commands)).scalar_one() == 0
        (waiting,) = lookups.waiting_approvals(conn, frozenset(), 9)
    path = f"/approvals/{waiting['id']}"
    for page in ("/", "/oncall", "/rollouts/cars"):
        assert path in house.client.get(page, headers=HTML).text, page
    assert "somebody else approves" in house.client.get(path, headers=HTML).text
    own = house.client.post(f"{path}/approve", data=form(house.client, path), headers=HTML)
    assert own.status_code == 403

    second = house.client_from("127.0.0.1")
    token = house.token(Role.RELEASE_MANAGER, ("eu",))["Authorization"].removeprefix("Bearer ")
    second.post("/login", data={**form(second, "/login"), "token": token})
    given = form(second, path)
    old = second.post(f"{path}/approve", data={**given, "digest": "sha256:" + "0" * 64})
    assert old.status_code == 412
    done = second.post(f"{path}/approve", data=given, follow_redirects=False)
    assert done.status_code == 303
    with reading(house.deps.engine) as conn:
        command = conn.execute(select(commands)).one()
    assert (command.kind, command.reason) == ("promote", "no time <b>")
    assert "GRANTED" in second.get(path, headers=HTML).text


def test_every_page_is_read_from_both_databases(house: Any, database_url: str) -> None:
    """The same estate in SQLite and in PostgreSQL, where both stores share one database."""
    control = open_control(database_url)
    telemetry = open_engine(database_url.replace("test.db", "telemetry.db"))
    create_schema(telemetry)
    filled = estate.fill(control, telemetry, devices=60, rollouts=12, now=NOW)
    deps = replace(house.deps, engine=control, reader=Store(telemetry))
    client = TestClient(
        create_app(deps),
        base_url="http://127.0.0.1:8420",
        client=("127.0.0.1", 50_000),
        headers=HTML,
    )
    rollout = filled.rollouts["model-y-us"][-1]
    with reading(control) as conn:
        decision = lookups.decisions_of(conn, rollout, 2)[1].id
        approval = lookups.waiting_approvals(conn, frozenset(), 1)[0]["id"]
    for path in (
        "/", "/oncall", "/stop", "/board", "/audit?subject=lab-000001", "/releases", "/decisions",
        "/rollouts?state=Paused&fleet=trams-zurich", f"/rollouts/{rollout}",
        f"/rollouts/{rollout}/lift",
        f"/devices?rollout={rollout}&member=updated", "/devices?fleet=lab&status=active&q=lab-",
        f"/devices/{filled.devices['lab'][1]}", "/releases/autopilot-lab-10.1.0",
        f"/decisions/{decision}", f"/approvals/{approval}",
        f"/rollouts/{filled.rollouts['model-3-eu'][-1]}/rollback",
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text[:500])
    control.dispose()
    telemetry.dispose()


# -- counters -------------------------------------------------------------------------------------


def test_counters_agree_with_the_rows_they_count(house: Any) -> None:
    rollout = house.add_rollout()

    def drawn(name: str, state: MemberState, arm: Arm = Arm.EXPOSED, step: int = 0) -> Member:
        return Member(
            device=name, step=step, arm=arm, drawn_at=NOW, hardware="", band=0, score=None,
            state=state,
        )  # fmt: skip

    turns = [
        [
            drawn("a", MemberState.DRAWN),
            drawn("b", MemberState.DRAWN),
            drawn("c", MemberState.DRAWN, Arm.CONTROL),
        ],
        [drawn("a", MemberState.TOLD), drawn("c", MemberState.TOLD, step=1)],
        [drawn("a", MemberState.UPDATED), drawn("b", MemberState.LEFT)],
    ]
    for turn in turns:
        with writing(house.deps.engine) as conn:
            store.put_members(conn, rollout, turn)
            kept = {
                (r.step, r.arm, r.state): r.n for r in conn.execute(select(member_counts)) if r.n
            }
            key = (members.c.step, members.c.arm, members.c.state)
            query = select(*key, func.count()).group_by(*key)
            assert kept == {(s, a, m): n for s, a, m, n in conn.execute(query)}
            assert views.count_members(conn, [rollout])[rollout]["control"] == (turn is turns[0])


def test_the_census_follows_what_changes(built: tuple[Engine, Engine, estate.Estate]) -> None:
    control, telemetry, filled = built
    book = DeviceBook(Store(telemetry), lambda: NOW)
    census = Census(book)
    with reading(control) as conn:
        before = census.fleets(conn)["lab"]
        total, online = before.active, before.online
    assert total == len(filled.devices["lab"])
    moved, gone = filled.devices["lab"][:2]
    with writing(control) as conn:
        conn.execute(update(devices).where(devices.c.id == moved).values(fleet="new", change=10**6))
        conn.execute(
            update(devices).where(devices.c.id == gone).values(status="retired", change=10**6)
        )
    with writing(telemetry) as conn:
        contacts = heard.contacts
        conn.execute(
            update(contacts).where(contacts.c.device == moved).values(online=False, change=9)
        )
    with reading(control) as conn:
        after = census.fleets(conn)
    assert (after["lab"].active, after["lab"].status["retired"]) == (total - 2, 1)
    assert (after["new"].active, after["new"].online) == (1, 0)
    assert after["lab"].online <= online
    assert sum(after["lab"].runs["autopilot"].values()) == total - 2


def test_fleets_that_are_shown_together_are_read_once(
    built: tuple[Engine, Engine, estate.Estate], monkeypatch: pytest.MonkeyPatch
) -> None:
    control, telemetry, filled = built
    reports, readings = Store(telemetry), []
    read = reports.sums
    monkeypatch.setattr(reports, "sums", lambda: readings.append(1) or read())
    ticks = itertools.count(NOW)
    book = DeviceBook(reports, lambda: next(ticks))
    with reading(control) as conn:
        found = book.scores(conn, set(filled.devices))
        (row,) = views.list_devices(conn, after="", limit=1, fleets=frozenset())
        (shown,) = book.describe(conn, [row])
    assert len(readings) == 1
    assert shown["score"]["value"] == found[row.id]
    assert shown["score"]["exposureHours"] == 40.0


# -- live, measured -------------------------------------------------------------------------------


def test_a_stream_sends_what_differs_and_shares_the_work() -> None:
    marks, rendered = [0], []

    async def first(live: Live, n: int) -> list[bytes]:
        async def part() -> bytes:
            stream = await live.join("page", lambda: (rendered.append(1), f"v{marks[0]}\nline")[1])
            async for event in stream:
                if event.startswith(b"data: v1"):
                    return event
            return b""

        tasks = [asyncio.create_task(part()) for _ in range(n)]
        await asyncio.sleep(0.2)
        marks[0] = 1
        found = await asyncio.gather(*tasks)
        await live.close()
        return found

    events = asyncio.run(first(Live(lambda: marks[0]), 50))
    assert set(events) == {b"data: v1\ndata: line\n\n"}
    assert len(rendered) <= 4  # not once for each of the fifty


def test_a_measurement_is_not_waited_for() -> None:
    import threading

    gate, now = threading.Event(), [0.0]
    measured = Measured(lambda: now[0])
    assert measured.get("a", lambda: gate.wait(10)) is None
    gate.set()
    while (result := measured.get("a", lambda: "again")) is None:
        pass
    assert result.value is True
    now[0] = 1000.0
    later = threading.Event()
    slow = measured.get("a", lambda: later.wait(10) and "again")
    assert slow is not None
    assert slow.value is True  # the last one, while the next is measured
    later.set()
    while measured.get("a", lambda: "again").value != "again":  # type: ignore[union-attr]
        pass
    measured.close()


def test_one_device_alone_is_rolled_back_from_its_page(house: Any) -> None:
    house.add_rollout()
    house.enrol("car-1")
    house.enrol("car-2")
    member = Member(
        device="car-1", step=0, arm=Arm.EXPOSED, drawn_at=NOW, hardware="", band=0, score=None,
        state=MemberState.UPDATED,
    )  # fmt: skip
    with writing(house.deps.engine) as conn:
        store.put_members(conn, "01cars".ljust(26, "0"), [member])
    page = house.client.get("/devices/car-1", headers=HTML).text
    found = re.search(r'href="([^"]+)">.*Roll back this device', page)
    assert found is not None
    path = found[1].replace("&amp;", "&")
    assert "Roll back this device" not in house.client.get("/devices/car-2", headers=HTML).text
    viewer = house.client.get("/devices/car-1", headers={**HTML, **house.token(Role.VIEWER)})
    assert "Roll back this device" not in viewer.text
    fields = {**form(house.client, path), "reason": "brakes late"}
    assert fields["scope"] == "device:car-1"
    assert house.client.post(path.partition("?")[0], data=fields).status_code == 200
    with reading(house.deps.engine) as conn:
        (hold,) = conn.execute(select(holds)).all()
    assert (hold.scope, hold.to) == ({"devices": ["car-1"]}, "previous")
    for scope in ("device:", "device:../x", "device:A", "devices:car-1"):
        refused = house.client.post(path.partition("?")[0], data={**fields, "scope": scope})
        assert refused.status_code == 422, scope


def test_a_stop_blocks_the_devices_that_are_in_it_alone(house: Any) -> None:
    house.add_rollout()
    house.enrol("car-1")
    for value, blocks in (("hw9", False), ("eu", True)):
        scope = "product" if value == "eu" else "hardware"
        said = {"scope": scope, "value": value, "reason": "smoke"}
        assert house.client.post("/api/v1/stop", json=said).status_code == 202
        page = house.client.get("/devices/car-1", headers=HTML).text
        assert (f"Stop of {scope} {value}" in page.partition("<h2")[2]) == blocks, value


def test_a_stop_that_stops_nothing_says_so_on_the_page(house: Any) -> None:
    house.enrol("car-1")
    for value, status in (("eu", 303), ("ue", 200)):
        said = {**form(house.client, "/stop"), "scope": "product", "value": value, "reason": "x"}
        said.pop("lift", None)
        done = house.client.post("/stop", data=said, headers=HTML, follow_redirects=False)
        assert done.status_code == status
    assert "NOTHING that we know is in it" in done.text
    assert "In force: product ue" in done.text


def test_a_stop_from_its_page_names_its_incident(house: Any) -> None:
    said = {**form(house.client, "/stop"), "scope": "all", "reason": "smoke", "incident": "INC-7"}
    said.pop("lift", None)
    assert house.client.post("/stop", data=said, headers=HTML).status_code == 200
    with reading(house.deps.engine) as conn:
        told = conn.execute(select(audit.c.detail).where(audit.c.action == "stop")).scalars().all()
    assert [one["incident"] for one in told] == ["INC-7"]


def test_a_notice_is_one_text_beside_its_sign(house: Any) -> None:
    """The line is a row of boxes: each `name` in its sentence was a column of its own."""
    with writing(house.deps.engine) as conn:
        store.put_meta(conn, "notices", {"cars": "rejected (`x` and `y`): name another"})
    page = house.client.get("/", headers=HTML).text
    notice = page.partition('<p class="notice">')[2].partition("</p>")[0]
    assert notice.rpartition("</svg>")[2].startswith("<span><b>cars</b> rejected (<code>x</code>")
    assert notice.count("<span>") == 1


def test_a_list_is_there_for_programs_page_by_page(house: Any) -> None:
    house.client.post(
        "/api/v1/devices", json=[{"id": f"car-{i:03}", "fleet": "eu"} for i in range(70)]
    )
    first = house.client.get("/devices?fleet=eu&format=csv")
    assert first.headers["content-type"] == "text/csv; charset=utf-8"
    assert first.text.splitlines()[1].startswith("car-000,eu,pending,")
    following = re.fullmatch(r'<(.+)>; rel="next"', first.headers["link"])
    assert following is not None
    rest = house.client.get(following[1])
    assert len(first.text.splitlines()) + len(rest.text.splitlines()) == 70 + 2
    assert "link" not in rest.headers
    for name in ("rollouts", "devices", "releases", "decisions", "audit"):
        found = house.client.get(f"/{name}?format=json")
        assert isinstance(found.json()["items"], list), name
        assert f"/{name}?format=csv" in house.client.get(f"/{name}", headers=HTML).text
    assert house.client.get("/devices?format=xml").status_code == 400


def test_a_list_leads_from_page_to_page_to_its_end(house: Any) -> None:
    with writing(house.deps.engine) as conn:
        conn.execute(
            insert(devices),
            [
                {"id": f"car-{i:03}", "fleet": "eu", "labels": {}, "status": "active",
                 "password_issue": 1, "term": 0, "created_at": NOW, "change": i + 1}
                for i in range(120)
            ],
        )  # fmt: skip
    seen: list[str] = []
    path = "/devices?fleet=eu"
    while path:
        text = house.client.get(path, headers=HTML).text
        seen += re.findall(r'<a href="/devices/(car-\d+)"', text)
        found = re.search(r'href="([^"]+)" rel="next"', text)
        path = found[1].replace("&amp;", "&") if found else ""
    assert seen == [f"car-{i:03}" for i in range(120)]
