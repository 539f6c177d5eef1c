"""What two people decide, whom a rollback reaches, and a rollback of a part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from controller import approvals, commands, preview
from controller.commands import Refused
from controller.invariants import check
from controller.roles import Role
from controller.store import approvals as rows
from controller.store import snapshot
from controller.store.tables import approvals as table
from controller.store.tables import audit, holds, rollouts
from telemetry.store.database import reading, writing

from .story import DIGESTS, MARGINS, Story, document, policy, release, rollout

if TYPE_CHECKING:
    from conftest import House

BOTH = {"start": "2", "widen": "2", "lift": "2", "recall": "2"}
PAUSES = [
    {"cohort": "canary", "soak": "3s", "maxSoak": "20s", "margins": MARGINS, "pause": {}},
    {"cohort": "general", "soak": "3s", "maxSoak": "20s", "margins": MARGINS},
]


@pytest.fixture
def story(tmp_path: Path) -> Any:
    made = Story(tmp_path)
    canaries = [f"car-{i:02}" for i in range(12)]
    others = [f"car-{i:02}" for i in range(12, 40)]
    made.enrol(*canaries, model="m3", ring="canary", hardware="hw3")
    made.enrol(*others[:14], model="m3", hardware="hw3")
    made.enrol(*others[14:], model="m3", hardware="hw4")
    for name in canaries + others:
        made.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    return made


def fleet(rule: dict[str, str] | None = None) -> str:
    return document("Fleet", "cars", {
        "selector": {"matchLabels": {"model": "m3"}},
        "healthPolicy": "driving",
        "baseline": {"app": "app-1"},
        "cohorts": [
            {"name": "canary", "select": {"matchLabels": {"ring": "canary"}}},
            {"name": "general", "rest": "true"},
        ],
        **({"approvals": rule} if rule else {}),
    })  # fmt: skip


def commit(story: Any, rule: dict[str, str] | None, to: str = "app-2", **more: Any) -> None:
    releases = [release(v) for v in ("1", "2", "3", "3.1")]
    story.commit(fleet(rule), policy(), *releases, rollout("cars", to, **more))


def waiting(story: Any) -> Any:
    with reading(story.engine) as conn:
        query = select(table).where(table.c.state == "waiting").order_by(table.c.id.desc())
        return conn.execute(query).first()


def vote(story: Any, actor: str, **more: Any) -> approvals.Voted:
    row = waiting(story)
    return approvals.vote(
        story.engine,
        row.id,
        actor=actor,
        digest=more.pop("digest", row.digest),
        reason=more.pop("reason", "looked at it"),
        now=more.pop("now", story.world.now),
        **more,
    )


def actions(story: Any) -> list[str]:
    with reading(story.engine) as conn:
        return [a for (a,) in conn.execute(select(audit.c.action).order_by(audit.c.seq))]


def doctor(story: Any) -> list[str]:
    """What the checker says of the control database alone."""
    return [str(one) for one in check(snapshot.read(story.engine, None), now=story.world.now)]


# -- starts ---------------------------------------------------------------------------------------


def test_a_start_waits_for_somebody_else_than_its_author(story: Any) -> None:
    commit(story, BOTH)
    story.run(5)
    assert story.rollout().state == "Pending"
    assert story.versions() == {"1": 40}
    for name in ("ann", "Ann", " ann ", "ann (cli)"):
        with pytest.raises(Refused) as own:
            vote(story, name)
        assert own.value.code == 403, name
    assert vote(story, "bob").state == "granted"
    story.run(40)
    assert story.versions() == {"2": 40}
    assert "approval.ask" in actions(story)
    assert "approval.approve" in actions(story)


def test_a_vote_is_for_what_was_seen(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    with pytest.raises(Refused) as stale:
        vote(story, "bob", digest="sha256:" + "0" * 64)
    assert stale.value.code == 412
    assert waiting(story) is not None


def test_another_commit_makes_the_old_approval_worthless(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    first = waiting(story)
    commit(story, BOTH, to="app-3")
    story.run(3)
    with pytest.raises(Refused) as gone:
        approvals.vote(
            story.engine, first.id, actor="bob", digest=first.digest, reason="", now=story.world.now
        )
    assert gone.value.code == 409
    story.run(5)
    assert story.versions() == {"1": 40}
    vote(story, "bob")
    story.run(40)
    assert story.versions() == {"3": 40}


def test_what_waited_for_a_day_is_void(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    with pytest.raises(Refused, match="longer than a day"):
        vote(story, "bob", now=story.world.now + 90_000)
    anew = waiting(story)  # the start waits on: it asks again, without the votes of then
    assert (anew.kind, anew.needs) == ("start", 1)
    assert vote(story, "bob", now=story.world.now + 90_000).state == "granted"


def test_an_edited_plan_is_asked_for_anew_and_old_votes_are_void(story: Any) -> None:
    commit(story, {**BOTH, "start": "3"})
    story.run(3)
    first = waiting(story)
    vote(story, "bob")
    commit(story, {**BOTH, "start": "3"}, steps=PAUSES)  # the same release, other steps
    story.run(3)
    second = waiting(story)
    assert second.digest != first.digest
    with reading(story.engine) as conn:
        old = conn.execute(select(rollouts).where(rollouts.c.id == first.rollout)).one()
    assert old.sentence.startswith("SUPERSEDED — another plan for app-2")
    with pytest.raises(Refused) as gone:
        approvals.vote(
            story.engine, first.id, actor="eve", digest=first.digest, reason="", now=story.world.now
        )
    assert gone.value.code == 409
    with pytest.raises(Refused) as stale:
        vote(story, "eve", digest=first.digest)
    assert stale.value.code == 412
    assert vote(story, "eve").state == "waiting"  # bob's yes was to another plan
    story.run(5)
    assert story.versions() == {"1": 40}
    assert vote(story, "bob").state == "granted"


def test_a_commit_that_leaves_the_plan_alone_leaves_its_votes(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    first = waiting(story)
    story.commit(
        fleet(BOTH), policy(), *(release(v) for v in ("1", "2")),
        rollout("cars", "app-2"),
    )  # fmt: skip
    story.run(3)
    assert waiting(story).id == first.id
    assert vote(story, "bob").state == "granted"


def test_a_fleet_that_has_grown_since_is_looked_at_again(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    first = waiting(story)
    assert first.seen["devices"] == 40
    story.enrol(*(f"new-{i}" for i in range(4)), model="m3")  # a tenth more: as agreed
    with writing(story.engine) as conn:
        assert rows.active_devices(conn, "cars") == 44
    story.enrol("new-5", model="m3")
    with pytest.raises(Refused, match="45 devices now, it had 40") as gone:
        vote(story, "bob")
    assert gone.value.code == 409
    second = waiting(story)
    assert (second.digest, second.seen["devices"]) == (first.digest, 45)
    assert vote(story, "bob").state == "granted"


def test_pause_and_resume_are_no_way_around_the_second_person(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    for kind in ("pause", "resume"):
        story.command(kind)
        story.run(3)
    assert story.rollout().state == "Pending"
    assert story.versions() == {"1": 40}


def test_break_glass_starts_at_once_and_is_audited(story: Any) -> None:
    commit(story, BOTH)
    story.run(3)
    with pytest.raises(Refused):
        vote(story, "eve", break_glass=True, reason=" ")
    assert vote(story, "eve", break_glass=True, reason="cars on fire").state == "granted"
    story.run(40)
    assert story.versions() == {"2": 40}
    assert "break-glass" in actions(story)


def test_two_votes_of_one_person_are_one(story: Any) -> None:
    commit(story, {**BOTH, "start": "3"})
    story.run(3)
    for name in ("bob", "bob", "BOB", "bob (cli)", "bob <bob@example.org>"):
        assert vote(story, name).state == "waiting", name
    assert vote(story, "carol").state == "granted"


# -- verbs ----------------------------------------------------------------------------------------


def test_widening_by_hand_waits_and_a_stop_does_not(story: Any) -> None:
    commit(story, {"widen": "2", "lift": "2"}, steps=PAUSES)
    story.run(30)
    assert story.rollout().state == "Paused"
    asked = _record(story, "promote", actor="ann")
    assert asked.state == "awaiting"
    assert asked.digest == waiting(story).digest
    story.run(5)
    assert story.versions() == {"1": 28, "2": 12}
    with pytest.raises(Refused):
        vote(story, "ann")
    vote(story, "bob")
    story.run(30)
    assert story.versions() == {"2": 40}
    assert _record(story, "rollback", actor="eve").state == "recorded"
    story.run(5)
    assert story.versions() == {"1": 40}
    with reading(story.engine) as conn:
        (hold,) = conn.execute(select(holds.c.id)).scalars()
    assert f"ends {hold}; what it rejects goes out again" in _preview(story, "lift")["sentence"]
    assert _record(story, "lift", actor="eve").state == "awaiting"
    story.run(5)
    assert story.versions() == {"1": 40}
    vote(story, "ann")
    story.run(60)
    assert story.versions()["2"] >= 12
    assert doctor(story) == []


def test_what_has_moved_on_is_void(story: Any) -> None:
    commit(story, {"widen": "2"}, steps=PAUSES)
    story.run(30)
    _record(story, "promote", actor="ann")
    story.command("hold")
    story.run(3)
    with pytest.raises(Refused) as gone:
        vote(story, "bob")
    assert gone.value.code == 409
    assert story.versions() == {"1": 28, "2": 12}


def test_break_glass_promotes_alone(story: Any) -> None:
    commit(story, {"widen": "2"}, steps=PAUSES)
    story.run(30)
    with pytest.raises(Refused):
        _record(story, "promote", actor="eve", break_glass=True, reason="")
    assert _record(story, "promote", actor="eve", break_glass=True).state == "recorded"
    assert "break-glass" in actions(story)
    story.run(30)
    assert story.versions() == {"2": 40}
    assert doctor(story) == []


def test_a_tighter_rule_holds_at_once_and_a_looser_one_asks_the_old_one(story: Any) -> None:
    commit(story, None)
    story.run(40)
    commit(story, BOTH, to="app-2")
    story.run(3)
    commit(story, None, to="app-3")  # loosens the rule and starts, all by one person
    story.run(10)
    assert story.rollout().state == "Pending"
    assert story.versions() == {"2": 40}
    with reading(story.engine) as conn:
        kinds = {row.kind: row for row in conn.execute(select(table).order_by(table.c.id))}
    assert set(kinds) == {"rule", "start"}
    rule = kinds["rule"]
    with pytest.raises(Refused):
        approvals.vote(
            story.engine, rule.id, actor="ann", digest=rule.digest, reason="", now=story.world.now
        )
    approvals.vote(
        story.engine, rule.id, actor="bob", digest=rule.digest, reason="", now=story.world.now
    )
    with reading(story.engine) as conn:
        assert rows.load_rules(conn)["cars"]["start"] == 1
    commit(story, None, to="app-3.1")
    story.run(40)
    assert story.versions() == {"3.1": 40}


def _record(story: Any, kind: str, **more: Any) -> commands.Recorded:
    return commands.record(
        story.engine,
        kind=kind,
        rollout="cars",
        body=more.pop("body", {}),
        actor=more.pop("actor", "eve"),
        reason=more.pop("reason", "because"),
        incident=None,
        if_revision=None,
        now=story.world.now,
        **more,
    )


# -- a part of the fleet --------------------------------------------------------------------------


def versions_of(story: Any, *names: str) -> set[str]:
    known = {digest: version for version, digest in DIGESTS.items()}
    return {known[story.world.rows[name].components["app"].digest] for name in names}


@pytest.mark.parametrize(
    ("scope", "inside", "back"),
    [
        ({"devices": ["car-00", "car-01"]}, ("car-00", "car-01"), 2),
        ({"cohort": "canary"}, tuple(f"car-{i:02}" for i in range(12)), 12),
        ({"step": 0}, tuple(f"car-{i:02}" for i in range(12)), 12),
        ({"selector": {"matchLabels": {"hardware": "hw4"}}}, ("car-26", "car-39"), 14),
    ],
    ids=["devices", "cohort", "step", "selector"],
)
def test_a_rollback_of_a_part_leaves_the_rest_alone(
    story: Any, scope: dict[str, Any], inside: tuple[str, ...], back: int
) -> None:
    commit(story, None)
    story.run(12)
    assert story.versions() == {"2": 40}
    shown = _preview(story, "rollback", {"scope": scope})
    assert shown["devices"] == back
    assert shown["changes"]["count"] == back
    _record(story, "rollback", body={"scope": scope})
    story.run(5)
    assert story.versions() == {"1": back, "2": 40 - back}
    assert versions_of(story, *inside) == {"1"}
    assert story.rollout().state in ("Soaking", "Completed", "Progressing")
    story.run(30)
    assert story.rollout().state == "Completed"
    assert doctor(story) == []
    story.start()  # a restart finds the same
    story.run(3)
    assert story.versions() == {"1": back, "2": 40 - back}


def test_a_part_that_was_not_told_yet_never_is(story: Any) -> None:
    steps = [{**PAUSES[1], "cohort": "canary", "soak": "30s", "maxSoak": "90s"}, PAUSES[1]]
    commit(story, None, steps=steps)
    story.run(3)
    hw4 = {"selector": {"matchLabels": {"hardware": "hw4"}}}
    _record(story, "hold", body={"scope": hw4})
    story.run(90)
    assert story.versions() == {"1": 14, "2": 26}
    assert story.rollout().state == "Completed"


@pytest.mark.parametrize(
    "scope",
    [{}, {"everything": True}, {"all": False}, {"step": -1}, {"step": "x"}, {"step": 10**9},
     {"cohort": "../x"}, {"cohort": 7}, {"devices": []}, {"devices": ["A B"]},
     {"cohort": "cannary"}, {"step": 9}, {"devices": ["car-00", "car-0"]},
     {"devices": ["a"] * 1001}, {"selector": {}}, {"selector": {"matchLabel": {}}},
     {"selector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}},
     {"selector": {"matchLabels": {"a": "x\x01"}}}, {"selector": {"matchLabels": {"\x1b": "x"}}},
     {"selector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["\0"]}]}},
     {"all": True, "step": 1}],
)  # fmt: skip
def test_a_scope_that_is_none_is_refused_and_changes_nothing(story: Any, scope: Any) -> None:
    commit(story, None)
    story.run(3)
    with pytest.raises(Refused):
        _preview(story, "rollback", {"scope": scope})
    with pytest.raises(Refused) as refused:
        _record(story, "rollback", body={"scope": scope})
    assert refused.value.code == 422
    assert refused.value.pointer == "/scope"
    with reading(story.engine) as conn:
        assert conn.execute(select(holds)).first() is None


# -- the preview, and who is left -----------------------------------------------------------------


def _preview(story: Any, kind: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return preview.preview(
        story.engine,
        lambda: story.world.rows,
        kind=kind,
        rollout="cars",
        body=body or {},
        now=story.world.now,
    )


def test_the_preview_tells_who_changes_who_waits_and_who_cannot_go_back(story: Any) -> None:
    commit(story, None)
    story.run(30)
    rows_ = story.world.rows
    for name in ("car-00", "car-01", "car-02"):
        rows_[name] = replace(rows_[name], online=False)
    for name in ("car-03", "car-04"):
        rows_[name] = replace(rows_[name], blocked_by=("parked",))
    shown = _preview(story, "rollback")
    assert shown["offline"]["count"] == 3
    assert shown["waiting"] == {
        "count": 2, "reasons": {"parked": 2}, "devices": ["car-03", "car-04"],
    }  # fmt: skip
    assert shown["changes"]["count"] == 35
    assert shown["devices"] == 40
    assert "35 devices change now" in shown["sentence"]
    assert "2 wait for their own safety (parked)" in shown["sentence"]
    # What it foretold is what happens.
    story.command("rollback")
    story.run(3, work=False)
    story.world.work(*[n for n in rows_ if n not in ("car-00", "car-03")])
    story.run(1, work=False)
    assert story.versions() == {"1": 38, "2": 2}
    about, left = preview.recovery(
        story.engine, lambda: story.world.rows, rollout="cars", after="", limit=10,
        now=story.world.now,
    )  # fmt: skip
    assert about["count"] == 2
    assert {one.device for one in left} == {"car-00", "car-03"}
    assert {one.device: one.word for one in left}["car-03"] == "waiting"


def test_who_ran_nothing_before_cannot_go_back(story: Any) -> None:
    story.commit(
        fleet().replace('"baseline": {"app": "app-1"}', '"baseline": {}'), policy(),
        *(release(v) for v in ("1", "2", "3", "3.1")), rollout("cars", "app-2"),
    )  # fmt: skip
    for name in ("car-20", "car-21"):
        story.world.join(name, {})
    story.run(30)
    shown = _preview(story, "rollback")
    assert shown["cannot"]["count"] == 2
    assert shown["cannot"]["devices"] == ["car-20", "car-21"]
    assert "ran nothing before" in next(iter(shown["cannot"]["reasons"]))
    assert shown["devices"] == 38


def test_a_one_way_release_takes_nobody_back(story: Any) -> None:
    one_way = release("2", rollback={"allowed": "no", "reason": "database format"})
    others = [release(v) for v in ("1", "3", "3.1")]
    story.commit(fleet(), policy(), one_way, *others, rollout("cars", "app-2"))
    story.run(30)
    shown = _preview(story, "rollback")
    assert (shown["devices"], shown["cannot"]["count"]) == (0, 40)


def test_without_telemetry_the_preview_counts_what_it_can(story: Any) -> None:
    commit(story, None)
    story.run(30)

    def broken() -> Any:
        raise OSError("no such table")

    shown = preview.preview(
        story.engine, broken, kind="rollback", rollout="cars", body={}, now=story.world.now
    )
    assert shown["telemetry"] == "telemetry does not answer: OSError"
    assert shown["offline"]["count"] == 40


# -- over HTTP ------------------------------------------------------------------------------------


def test_two_people_over_http(house: House) -> None:
    house.add_rollout(state="Paused", flags={})
    with writing(house.deps.engine) as conn:
        rows.put_rule(conn, "eu", {"widen": 2})
    client = house.with_settings(auth="required", rate_limit=0.0)
    ann = house.token(Role.RELEASE_MANAGER)
    bob = {**house.token(Role.ADMIN)}
    asked = client.post(
        "/api/v1/rollouts/cars:promote", json={"reason": "good"}, headers={**ann, "If-Match": "*"}
    )
    assert asked.status_code == 202
    assert asked.json()["state"] == "awaiting"
    listed = client.get("/api/v1/approvals?state=waiting", headers=bob).json()["items"]
    assert [a["kind"] for a in listed] == ["promote"]
    url = f"/api/v1/approvals/{asked.json()['id']}"
    digest = {"digest": asked.json()["digest"]}
    assert client.post(f"{url}:approve", json=digest, headers=ann).status_code == 403
    viewer = house.token(Role.VIEWER)
    assert client.post(f"{url}:approve", json=digest, headers=viewer).status_code == 403
    oncall = house.token(Role.ON_CALL)
    assert client.post(f"{url}:approve", json=digest, headers=oncall).status_code == 403
    other = {"digest": "sha256:" + "0" * 64}
    assert client.post(f"{url}:approve", json=other, headers=bob).status_code == 412
    elsewhere = house.token(Role.ADMIN, ("us",))
    assert client.post(f"{url}:approve", json=digest, headers=elsewhere).status_code == 404
    done = client.post(f"{url}:approve", json=digest, headers=bob)
    assert done.json()["state"] == "granted", done.text
    assert client.post(f"{url}:approve", json=digest, headers=bob).status_code == 409
    shown = client.get(url, headers=bob).json()
    assert shown["approvedBy"] == ["t-admin"]
    assert house.pokes
