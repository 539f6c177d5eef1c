"""A safety recall over a fleet of 1,000, decided on plain data with a clock that the test moves."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from controller.manifests.admission import admit
from controller.manifests.reader import read
from controller.rollout import reconcile, scope
from controller.rollout.desired import Catalog
from controller.rollout.model import (
    ActiveHold,
    Device,
    Member,
    MemberState,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.replay import replay
from controller.rollout.waves import Pinned
from controller.rollout.world import (
    Change,
    Decision,
    Finish,
    Head,
    Notice,
    Open,
    Put,
    Reject,
    World,
)
from device_agent.protocol import ComponentReport, State
from telemetry.report import DeviceRow

OLD, NEW = "sha256:" + "1" * 64, "sha256:" + "2" * 64
START = 1_800_000_000.0  # a Friday evening: in the Deny window, which is always
URGENT = {
    "level": "recall",
    "reason": "brakes may fail",
    "expires": "2027-02-01",
    "approvedBy": ["ann", "bob"],
}


def document(kind: str, name: str, spec: dict[str, Any]) -> str:
    head = {"apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": name}}
    return json.dumps({**head, "spec": spec}) + "\n"


def manifests(urgency: dict[str, Any] | None, **fleet: Any) -> list[str]:
    digests = {"1": OLD, "2": NEW}
    steps = [
        {"cohort": "canary", "soak": "24h", "maxSoak": "72h"},
        {"cohort": "general", "percent": "10%", "soak": "24h", "maxSoak": "72h", "pause": {}},
        {"cohort": "general", "soak": "24h", "maxSoak": "72h"},
    ]
    rollout = {
        "fleet": "cars",
        "release": "app-2",
        "strategy": {
            "steps": steps,
            "maxFailed": "1%",
            "abortFailed": {"count": "3", "share": "5%"},
            "silentAfter": "120s",
        },
        "windows": [{"kind": "Deny", "schedule": "0 0 * * *", "duration": "24h"}],
        "holdout": {"percent": "5", "for": "14d"},
        **({"urgency": urgency} if urgency else {}),
    }
    return [
        document("Fleet", "cars", {
            "selector": {"matchLabels": {"model": "m3"}},
            "healthPolicy": "driving",
            "baseline": {"app": "app-1"},
            "cohorts": [
                {"name": "canary", "select": {"matchLabels": {"ring": "canary"}}},
                {"name": "general", "rest": "true"},
            ],
            **fleet,
        }),
        document("HealthPolicy", "driving", {
            "gates": [
                {"metric": "update_ok", "type": "proportion"},
                {"metric": "disengagement", "type": "rate", "margin": {"ratio": "1.5"}},
            ]
        }),
        *(
            document("Release", f"app-{v}", {
                "version": v,
                "artifacts": [{"component": "app", "digest": d, "size": "10"}],
            })
            for v, d in digests.items()
        ),
        document("Rollout", "cars", rollout),
    ]  # fmt: skip


class Fleet:
    """1,000 devices that obey 20 seconds after they were told; those in `broken` fail to boot."""

    def __init__(self, urgency: dict[str, Any] | None, *, size: int = 1000, **fleet: Any) -> None:
        reading = read({"fleet.yaml": "---\n".join(manifests(urgency, **fleet))})
        self.problems = [*reading.problems, *admit(reading)]
        self.now, self.broken, self.away = START, 0.0, 0.0
        self.rollouts: dict[str, Rollout] = {}
        self.members: dict[str, dict[str, Member]] = {}
        self.pinned: dict[str, Pinned] = {}
        self.holds: list[ActiveHold] = []
        self.decisions: list[Decision] = []
        self.notices: list[str] = []
        self.rules: dict[str, dict[str, int]] = {}
        self.granted: dict[str, str] = {}
        self.head = Head(commit="c" * 40, author="ann", manifests=reading.manifests)
        self.devices = {
            name: Device(
                id=name,
                fleet="cars",
                labels={"model": "m3", "hardware": "hw3", "ring": "canary" if i < 50 else "x"},
                status="active",
            )
            for i, name in enumerate(f"car-{i:04}" for i in range(size))
        }
        self.seen = {name: self._row(name, OLD, State.IDLE) for name in self.devices}
        self.telling: list[tuple[float, str]] = []

    def _row(self, name: str, digest: str, state: State, **more: Any) -> DeviceRow:
        part = ComponentReport(release="app", digest=digest, committed=state is not State.TRIAL)
        return DeviceRow(
            device=name, change=1, last_contact=self.now, heard_clock=self.now, online=True,
            sleeping_until=None, boot="b", boot_count=1, reported_at=self.now, state=state,
            components={"app": part}, **more,
        )  # fmt: skip

    def world(self) -> World:
        return World(
            head=self.head, devices=self.devices, seen=self.seen, hearing=self.now,
            heard_at=self.now, deaf=(), rollouts=self.rollouts, members=self.members,
            pinned=self.pinned, orders={}, holds=self.holds, rejected=frozenset(), stops=(),
            commands=(), proven={("cars", "app", ""): Proven(release="app-1", digest=OLD, at=0.0)},
            catalog=Catalog(releases=dict(self.head.manifests.releases)), scores={},
            observations={}, watermark=0, rules=self.rules, granted=self.granted,
        )  # fmt: skip

    def turn(self) -> None:
        for _ in range(40):
            actions = reconcile.decide(self.world(), self.now)
            self.notices = [a.sentence for a in actions if isinstance(a, Notice)]
            actions = [a for a in actions if not isinstance(a, Notice)]
            if not actions:
                return
            for action in actions:
                self._apply(action)
        raise AssertionError("it never comes to rest")

    def _apply(self, action: Any) -> None:
        match action:
            case Open():
                name = f"r{len(self.rollouts)}"
                self.rollouts[name] = replace(action.rollout, id=name)
                self.pinned[name], self.members[name] = action.pinned, {}
            case Change():
                self.rollouts[action.rollout.id] = action.rollout
            case Put():
                for member in action.members:
                    before = self.members[action.rollout].get(member.device)
                    self.members[action.rollout][member.device] = member
                    if member.state is MemberState.TOLD and (
                        before is None or before.state is not MemberState.TOLD
                    ):
                        self.telling.append((self.now + 20, member.device))
            case Decision():
                self.decisions.append(action)
            case Reject():
                rollout = self.rollouts[action.rollout]
                self.holds.append(
                    ActiveHold(
                        id="h", rollout=rollout.name, fleet="cars", release=rollout.release,
                        digest=rollout.digest, artifacts=frozenset(rollout.artifacts.values()),
                        to=action.to, reason=action.reason, actor=action.actor,
                        created_at=self.now,
                    )
                )  # fmt: skip
            case Finish():
                pass

    def run(self, seconds: float, step: float = 5.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self._devices_work()
            self.turn()

    def _devices_work(self) -> None:
        for name, row in self.seen.items():
            if int(name[-4:]) >= len(self.devices) * (1 - self.away):
                continue
            self.seen[name] = replace(row, last_contact=self.now, heard_clock=self.now)
        due = {name for at, name in self.telling if at <= self.now}
        self.telling = [entry for entry in self.telling if entry[1] not in due]
        for name in due:
            member = next(m[name] for m in reversed(self.members.values()) if name in m)
            if int(name[-4:]) % 1000 < 1000 * self.broken:
                self.seen[name] = self._row(
                    name, OLD, State.ROLLED_BACK, reason="boot_failed", attempt=member.attempt
                )
            else:
                self.seen[name] = self._row(name, NEW, State.COMMITTED, attempt=member.attempt)

    @property
    def last(self) -> Rollout:
        return self.rollouts[max(self.rollouts)]

    def updated(self) -> int:
        return sum(row.components["app"].digest == NEW for row in self.seen.values())


def test_a_recall_reaches_a_thousand_devices_within_minutes_through_windows_and_soaks() -> None:
    fleet = Fleet(URGENT)
    assert not [p for p in fleet.problems if p.severity == "error"]
    ramp = []
    while fleet.updated() < 1000 and fleet.now < START + 3600:
        fleet.run(5)
        told = sum(m.state is not MemberState.DRAWN for m in fleet.members["r0"].values())
        if not ramp or told != ramp[-1]:
            ramp.append(told)
    assert fleet.updated() == 1000
    assert fleet.now - START < 600
    assert ramp[:3] == [10, 100, 1000]
    fleet.run(60)
    assert fleet.last.state is RolloutState.COMPLETED
    assert fleet.decisions[0].kind == "draw"
    assert all(d.sentence for d in fleet.decisions)


def test_the_decisions_of_a_recall_replay() -> None:
    fleet = Fleet(URGENT)
    fleet.run(300)
    rows = [
        {
            "id": str(i), "kind": d.kind, "verdict": d.verdict, "sentence": d.sentence,
            "inputs": json.loads(json.dumps(d.inputs)),
            "numbers": json.loads(json.dumps(d.numbers)),
        }
        for i, d in enumerate(fleet.decisions)
    ]  # fmt: skip
    found = replay(rows)
    assert len(found) >= 4
    assert [one.sentence for one in found if not one.same] == []


def test_without_urgency_the_same_commit_waits_for_its_window() -> None:
    fleet = Fleet(None)
    fleet.run(3600, step=60)
    assert fleet.updated() == 0


def test_a_recall_still_stops_on_failures() -> None:
    fleet = Fleet(URGENT)
    fleet.broken = 0.5
    fleet.run(600)
    assert fleet.last.state in (RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK)
    assert fleet.holds
    assert fleet.updated() <= 100
    assert "abortFailed" in fleet.holds[0].reason or "evidence of harm" in fleet.holds[0].reason


def test_a_recall_stops_on_evidence_that_no_brake_names() -> None:
    """10 % of the updates fail: the first ten may be clean, the hundred are not."""
    fleet = Fleet(URGENT)
    fleet.broken = 0.10
    fleet.run(900)
    assert fleet.holds
    assert fleet.updated() <= 100


def test_those_out_of_reach_block_nobody_and_get_it_when_they_come() -> None:
    fleet = Fleet(URGENT)
    fleet.seen = {
        name: replace(row, heard_clock=START - 9999) if int(name[-4:]) >= 700 else row
        for name, row in fleet.seen.items()
    }
    fleet.away = 0.3
    fleet.run(900)
    assert fleet.updated() == 700


def test_an_expired_urgency_is_none() -> None:
    fleet = Fleet({**URGENT, "expires": "2027-01-01"})
    fleet.run(1800, step=60)
    assert fleet.updated() == 0
    assert not fleet.pinned["r0"].recall


def test_a_recall_that_expires_on_its_way_tells_nobody_else() -> None:
    fleet = Fleet({**URGENT, "expires": "2027-01-15T08:00:40Z"})
    fleet.run(900)
    assert 0 < fleet.updated() < 1000
    assert "expired" in fleet.last.sentence


def test_the_pinned_recall_reads_back_as_it_was() -> None:
    fleet = Fleet(URGENT)
    fleet.run(5)
    pinned = fleet.pinned["r0"]
    again = Pinned.from_json(json.loads(json.dumps(pinned.to_json())))
    assert again.waves == pinned.waves
    assert [wave.ramp for wave in again.waves] == [10, 100, 1000, None]
    assert again.to_json() == pinned.to_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"approvedBy": ["ann"]}, "two different people"),
        ({"approvedBy": ["ann", " ANN "]}, "two different people"),
        ({"approvedBy": ["Ann <ann@example.org>", "ann@example.org"]}, "two different people"),
        ({"approvedBy": ["Ann", "a@x.org", "Ann <a@x.org>"]}, "two different people"),
        ({"approvedBy": []}, "two different people"),
        ({"expires": "soon"}, "no time"),
        ({"level": "panic"}, "level"),
    ],
)
def test_a_recall_that_is_none_is_an_error_with_its_place(
    change: dict[str, Any], says: str
) -> None:
    fleet = Fleet({**URGENT, **change})
    errors = [str(p) for p in fleet.problems if p.severity == "error"]
    assert errors
    assert says in errors[0]
    assert "fleet.yaml:" in errors[0]


# -- approvals ------------------------------------------------------------------------------------


def test_a_fleet_that_asks_for_two_starts_nothing_alone() -> None:
    fleet = Fleet(URGENT)
    fleet.rules = {"cars": {"start": 2, "recall": 2, "widen": 1, "lift": 1}}
    fleet.run(300)
    assert fleet.last.state is RolloutState.PENDING
    assert fleet.updated() == 0
    assert "waits for one more person" in fleet.last.sentence
    fleet.granted = {"r0": "asked by ann, approved by bob"}
    fleet.run(600)
    assert fleet.updated() == 1000


def test_a_stop_ends_what_still_waits_for_its_second_person() -> None:
    fleet = Fleet(URGENT)
    fleet.rules = {"cars": {"recall": 2}}
    fleet.run(10)
    rollout = fleet.last
    fleet.holds.append(
        ActiveHold(
            id="h", rollout="cars", fleet="cars", release="app-2", digest=rollout.digest,
            artifacts=frozenset(rollout.artifacts.values()), to="previous", reason="no",
            actor="eve", created_at=fleet.now,
        )
    )  # fmt: skip
    fleet.granted = {"r0": "asked by ann, approved by bob"}
    fleet.run(60)
    assert fleet.updated() == 0
    assert fleet.last.state is RolloutState.ROLLED_BACK


def test_a_part_of_a_recall_is_named_by_step_or_device_alone() -> None:
    fleet = Fleet(URGENT)
    fleet.turn()
    (pinned,) = (one.to_json() for one in fleet.pinned.values())
    assert "not by cohorts" in scope.empty({"cohort": "canary"}, pinned)
    assert not scope.empty({"step": 3}, pinned)
    assert "its last one is step 4" in scope.empty({"step": 4}, pinned)


def test_a_cohort_of_which_no_step_is_has_nobody_in_it() -> None:
    fleet = Fleet(None)
    fleet.turn()
    (pinned,) = (one.to_json() for one in fleet.pinned.values())
    steps = pinned["rollout"]["strategy"]["steps"]
    pinned["rollout"]["strategy"]["steps"] = steps[:1]
    assert "no step of it is of cohort general" in scope.empty({"cohort": "general"}, pinned)
    assert not scope.empty({"cohort": "canary"}, pinned)
