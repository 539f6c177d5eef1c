"""An estate as it stands after months of work: fleets, devices, rollouts, decisions, audit.

`fill` writes it into empty databases, with the numbers and sentences of the real gate, so that
pages are measured and looked at with what they will have to show. All chance follows from `seed`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Engine, Table, insert

from bench.estate_evidence import Told, story
from controller import audit, ulid
from controller.manifests.kinds import Fleet, HealthPolicy, Release, Rollout
from controller.rollout.waves import pin
from controller.store import approvals, tables
from controller.store.rollouts import put_meta
from telemetry.store import bulk, sums
from telemetry.store import tables as heard
from telemetry.store.database import writing
from telemetry.store.fold import Known
from telemetry.store.rollups import Hour, Rollups

DAY = 86_400.0
_BATCH = 500  # devices that spoke in one batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A product line: fleet, team, share of the devices, state of its newest rollout."""

    fleet: str
    component: str
    product: str
    team: str
    share: float
    newest: str  # state of its newest rollout
    models: tuple[str, ...]

    @property
    def rollout(self) -> str:
        return f"{self.fleet}-{self.component}"


LINES = (
    Line(
        fleet="model-3-eu", component="autopilot", product="autopilot", team="driving",
        share=0.40, newest="Soaking", models=("m3-hw3", "m3-hw4"),
    ),
    Line(
        fleet="model-y-us", component="autopilot", product="autopilot", team="driving",
        share=0.25, newest="RollingBack", models=("my-hw3", "my-hw4"),
    ),
    Line(
        fleet="vans-nordic", component="telematics", product="telematics", team="logistics",
        share=0.15, newest="Completed", models=("v-2",),
    ),
    Line(
        fleet="drones-alps", component="flight", product="flight-control", team="flight",
        share=0.10, newest="Inconclusive", models=("d-1", "d-2"),
    ),
    Line(
        fleet="trams-zurich", component="signals", product="signalling", team="rail",
        share=0.07, newest="Paused", models=("t-9",),
    ),
    Line(
        fleet="lab", component="autopilot", product="autopilot", team="platform",
        share=0.03, newest="Completed", models=("m3-hw4",),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    devices: Mapping[str, Sequence[str]]  # fleet → ids
    rollouts: Mapping[str, Sequence[str]]  # fleet → ids, oldest first


def fill(
    control: Engine, telemetry: Engine, *, devices: int, rollouts: int, now: float, seed: int = 1
) -> Estate:
    """Write an estate of so many devices and rollouts that ends at `now` (Unix seconds)."""
    chance = random.Random(seed)
    told = {name: story(name, seed) for name in ("clean", "harmful", "thin")}
    found: dict[str, list[str]] = {}
    opened: dict[str, list[str]] = {line.fleet: [] for line in LINES}
    with writing(control) as conn, writing(telemetry) as tele:
        put_meta(conn, "git", _git(now))
        for line in LINES:
            found[line.fleet] = [
                f"{line.fleet}-{i:06d}" for i in range(max(4, int(devices * line.share)))
            ]
        number = 0
        while number < rollouts:
            for line in LINES:
                number += 1
                if number <= rollouts:
                    opened[line.fleet].append("")
        for line in LINES:
            history = _History(line, found[line.fleet], len(opened[line.fleet]), now, chance, told)
            opened[line.fleet] = history.write(conn)
            _devices(conn, tele, history, chance)
        last = 2 + devices // _BATCH
        tele.execute(heard.state.update().values(batch=last, hearing=now, hearing_at=now))
        _people(conn, now)
        if opened["drones-alps"]:
            _second_person(conn, opened["drones-alps"][-1], now)
    return Estate(devices=found, rollouts=opened)


def _git(now: float) -> dict[str, Any]:
    return {
        "accepted": _hex("head")[:40],
        "author": "J. Doe",
        "accepted_at": now - 1_800,
        "head": _hex("head")[:40],
        "checked_at": now - 9,
        "heard_at": now - 9,
        "problems": [],
    }


def _put(conn: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    """Rows in the order of the table's columns; JSON columns hold plain data."""
    names = [column.name for column in table.columns]
    if rows:
        conn.execute(insert(table), [dict(zip(names, row, strict=True)) for row in rows])


@cache
def _hex(text: str) -> str:
    return sha256(text.encode()).hexdigest()


# -- rollouts -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _History:
    """The rollouts of one line, oldest first."""

    line: Line
    devices: Sequence[str]
    count: int
    now: float
    chance: random.Random
    told: Mapping[str, Sequence[Told]]

    def version(self, index: int) -> str:
        return f"{10 + index // 20}.{index % 20}.0"

    def release(self, index: int) -> Release:
        name = f"{self.line.component}-{self.line.fleet}-{self.version(index)}"
        return Release.model_validate(
            {
                "name": name[:63],
                "version": self.version(index),
                "artifacts": [
                    {
                        "component": self.line.component,
                        "digest": "sha256:" + _hex(name),
                        "size": 1_900_000_000 + index,
                    }
                ],
                "notes": f"Smoother lane changes, take {index}; see the initiative’s page.",
                "metrics": {"capabilityLevel": index % 4},
                "labels": {"initiative": f"lanes-{index // 10}"},
            }
        )

    def write(self, conn: Connection) -> list[str]:
        names = []
        for index in range(self.count + 1):  # the first release was there before any rollout
            release = self.release(index)
            at = self._at(index)
            conn.execute(
                insert(tables.releases).values(
                    name=release.name,
                    digest=release.digest,
                    document=release.model_dump(mode="json"),
                    commit=_hex(f"{release.name}")[:40],
                    seen_at=at - 60,
                )
            )
            if index:
                names.append(self._rollout(conn, index, release, at))
        return names

    def _at(self, index: int) -> float:
        return self.now - DAY * 1.25 - (self.count - index) * DAY * 1.5

    def _state(self, index: int) -> str:
        if index == self.count:
            return self.line.newest
        return ("Completed", "Completed", "Completed", "RolledBack", "Completed", "Superseded")[
            index % 6
        ]

    def _rollout(self, conn: Connection, index: int, release: Release, at: float) -> str:
        state, line = self._state(index), self.line
        rollout = ulid.new(at, _hex(f"{line.rollout}/{index}")[:10].encode())
        told = self.told[
            "harmful" if state in ("RolledBack", "RollingBack") else
            "thin" if state == "Inconclusive" else "clean"
        ]  # fmt: skip
        pinned = pin(
            Rollout.model_validate(_wanted(line, release)),
            Fleet.model_validate(_fleet(line)),
            HealthPolicy.model_validate(_policy()),
            release,
        )
        running = state in ("Soaking", "Paused", "Inconclusive", "RollingBack")
        step = 1 if running else len(pinned.waves) - 1 if state == "Completed" else 0
        sentence = _sentence(state, release, told, len(self.devices))
        before = self.release(index - 1)
        commit = _hex(f"{line.rollout}/{index}/commit")[:40]
        conn.execute(
            insert(tables.rollouts).values(
                id=rollout,
                name=line.rollout,
                fleet=line.fleet,
                release=release.name,
                digest=release.digest,
                artifacts={a.component: a.digest for a in release.artifacts},
                commit=commit,
                author=self.chance.choice(("A. Meier", "J. Doe", "S. Okafor")),
                state=state,
                sentence=sentence,
                revision=3 + index,
                step=step,
                opened_at=at,
                step_at=at + DAY / 4,
                soak=50_000.0,
                soak_mark=self.now if state == "Soaking" else None,
                finished_at=None if running else at + DAY,
                updated_at=self.now - 4 if running else at + DAY,
                seed=_hex(rollout),
                pinned=pinned.to_json(),
                flags={"before": {a.component: a.digest for a in before.artifacts}},
            )
        )
        self._members(conn, rollout, index, state, at)
        _decisions(conn, rollout, told, state, at, commit, sentence)
        if state in ("RolledBack", "RollingBack"):
            self._hold(conn, rollout, release, at, told)
        if state == "Completed":
            self._prove(conn, rollout, release, at)
        return rollout

    def _members(self, conn: Connection, rollout: str, index: int, state: str, at: float) -> None:
        """Old rollouts keep a canary's rows; the newest has a row for each device it reached."""
        newest = index == self.count
        share = 0.55 if newest else min(1.0, 200 / len(self.devices))
        reached = self.devices[: max(3, int(len(self.devices) * share))]
        previous = {
            a.component: {"release": self.release(index - 1).name, "digest": a.digest}
            for a in self.release(index - 1).artifacts
        }
        rows = [
            self._member(rollout, place, device, state, at, previous, len(reached))
            for place, device in enumerate(reached)
        ]
        _put(conn, tables.members, rows)
        if newest:
            self._draw(conn, rollout, rows, at)
        counted = Counter((row[2], row[3], row[9]) for row in rows)
        _put(conn, tables.member_counts, [(rollout, *key, n) for key, n in sorted(counted.items())])

    def _draw(
        self, conn: Connection, rollout: str, rows: Sequence[tuple[Any, ...]], at: float
    ) -> None:
        """The first draw as the loop records it: with every device."""
        first = [row for row in rows if row[2] == 0]
        drawn = {arm: [row[1] for row in first if row[3] == arm] for arm in ("exposed", "control")}
        conn.execute(
            insert(tables.decisions).values(
                id=ulid.new(at + 1, _hex(f"{rollout}/draw")[:10].encode()),
                rollout=rollout,
                at=at + 1,
                kind="draw",
                verdict="drawn",
                sentence=f"DRAWN — {len(drawn['exposed'])} devices of canary, "
                f"{len(drawn['control'])} as control",
                inputs=drawn,
                numbers={},
                watermark=1,
                commit="",
                policy={"name": "driving"},
                term=1,
            )
        )

    def _member(
        self, rollout: str, place: int, device: str, state: str, at: float,
        previous: Mapping[str, Any], of: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        control = place % 6 == 5
        step = 0 if place < of * 0.2 else 1
        word, reason = _member_state(state, place)
        return (
            rollout,
            device,
            step,
            "control" if control else "exposed",
            at,
            self.line.models[place % len(self.line.models)],
            place % 5,
            100.0 - (place % 400) / 10,
            dict(previous),
            "drawn" if control else word,
            "" if control else reason,
            None if control or word == "drawn" else f"{rollout}.{step}",
            None if control or word == "drawn" else at + 300,
            at + 1_200,
            None,
            at + 2_000,
        )

    def _hold(
        self, conn: Connection, rollout: str, release: Release, at: float, told: Sequence[Told]
    ) -> None:
        conn.execute(
            insert(tables.holds).values(
                id=ulid.new(at + DAY / 2, _hex(rollout)[:10].encode()),
                rollout=self.line.rollout,
                fleet=self.line.fleet,
                release=release.name,
                digest=release.digest,
                artifacts=[a.digest for a in release.artifacts],
                to="previous",
                scope={"all": True},
                reason=told[-1].sentence,
                actor="policy driving",
                created_at=at + DAY / 2,
                commit=_hex(f"{rollout}/hold")[:40],
            )
        )

    def _prove(self, conn: Connection, rollout: str, release: Release, at: float) -> None:
        proven = tables.proven
        conn.execute(proven.delete().where(proven.c.fleet == self.line.fleet))
        for model in self.line.models:
            conn.execute(
                insert(proven).values(
                    fleet=self.line.fleet,
                    component=self.line.component,
                    hardware=model,
                    release=release.name,
                    digest=release.artifacts[0].digest,
                    rollout=rollout,
                    at=at + DAY,
                )
            )


def _member_state(state: str, place: int) -> tuple[str, str]:
    if place % 97 == 3:
        return "failed", "SELFTEST_FAILED"
    if place % 211 == 7:
        return "silent", "no contact for 360 s"
    if state == "RollingBack":
        return ("back", "") if place % 3 == 0 else ("updated", "")
    if state == "RolledBack":
        return "back", ""
    if place % 17 == 4:
        return "told", "parked" if place % 2 else ""
    if state in ("Soaking", "Paused") and place % 23 == 11:
        return "drawn", "window closed until 01:00"
    return "updated", ""


def _sentence(state: str, release: Release, told: Sequence[Told], size: int) -> str:
    last = told[-1].sentence
    away = max(1, size // 90)
    return {
        "Completed": f"COMPLETED — {release.name} on {size - away} of {size} devices, {away} not "
        "reached yet: each gets it at its next contact; 58 of 58 devices updated and heard",
        "Superseded": "SUPERSEDED — the next release was committed in its place; its devices keep "
        "what they have",
        "Paused": "PAUSED — early 10% is proven, the step waits for `promote`; " + last,
        "Inconclusive": last,
        "RollingBack": last,
        "RolledBack": last,
    }.get(state, told[max(0, len(told) - 3)].sentence)


def _decisions(
    conn: Connection, rollout: str, told: Sequence[Told], state: str, at: float, commit: str,
    sentence: str,
) -> None:  # fmt: skip
    plain = [("open", "open", f"OPENED — 4 steps at commit {commit[:7]}")]
    rows: list[dict[str, Any]] = [
        {"kind": kind, "verdict": verdict, "sentence": said, "inputs": {}, "numbers": {}}
        for kind, verdict, said in plain
    ]
    picked = [told[0], *told[2:-1:6], told[-1]] if len(told) > 2 else list(told)
    rows += [
        {"kind": "verdict", "verdict": one.verdict, "sentence": one.sentence,
         "inputs": one.inputs, "numbers": one.numbers}
        for one in picked
    ]  # fmt: skip
    rows.append(
        {"kind": "state", "verdict": state, "sentence": sentence, "inputs": {}, "numbers": {}}
    )
    for place, row in enumerate(rows):
        moment = at + place * DAY / (2 * len(rows))
        conn.execute(
            insert(tables.decisions).values(
                id=ulid.new(moment, _hex(f"{rollout}/{place}")[:10].encode()),
                rollout=rollout,
                at=moment,
                watermark=place,
                commit=commit,
                policy={"name": "driving"},
                term=1,
                **row,
            )
        )


# -- manifests ------------------------------------------------------------------------------------


def _wanted(line: Line, release: Release) -> dict[str, Any]:
    return {
        "name": line.rollout,
        "fleet": line.fleet,
        "release": release.name,
        "strategy": {
            "steps": [
                {"cohort": "canary", "soak": "24h", "maxSoak": "72h"},
                {"cohort": "early", "percent": "10%", "soak": "24h", "maxSoak": "72h", "pause": {}},
                {"cohort": "early", "percent": "100%", "soak": "24h", "maxSoak": "72h"},
                {"cohort": "general", "percent": "100%", "maxPerMinute": 500, "soak": "24h"},
            ],
            "maxFailed": "0.5%",
        },
    }


def _fleet(line: Line) -> dict[str, Any]:
    return {
        "name": line.fleet,
        "labels": {"product": line.product, "team": line.team},
        "selector": {"matchLabels": {"fleet": line.fleet}},
        "healthPolicy": "driving",
        "cohorts": [
            {"name": "canary", "select": {"score": {"min": "97"}}, "limit": 1000},
            {"name": "early", "select": {"score": {"min": "80"}}},
            {"name": "general", "rest": True},
        ],
    }


def _policy() -> dict[str, Any]:
    from bench.estate_evidence import POLICY

    goals = [{"metric": "disengagement", "type": "rate", "per": "1000h", "direction": "decrease"}]
    return {"name": POLICY.name, "judged": POLICY, "goals": goals}


# -- devices --------------------------------------------------------------------------------------


def _devices(conn: Connection, tele: Connection, history: _History, chance: random.Random) -> None:
    line, now = history.line, history.now
    proven, newest = history.release(history.count - 1), history.release(history.count)
    reached = int(len(history.devices) * 0.55)
    registry, contacts, reports, orders = [], [], [], []
    for place, device in enumerate(history.devices):
        hardware = line.models[place % len(line.models)]
        labels = {"fleet": line.fleet, "hardware": hardware, "region": ("eu", "ch")[place % 2]}
        change = len(history.devices) + place + 1
        registry.append(
            (device, line.fleet, labels, "active", 1, 0, now - 90 * DAY, now - 89 * DAY,
             None, None, change)
        )  # fmt: skip
        online = chance.random() > 0.12
        ago = chance.random() * (60 if online else DAY * 4)
        batch = 1 + place // _BATCH
        contacts.append((device, batch, now - ago, now, online, None, "b1", 1, 0))
        new = (
            place < reached
            and place % 17 != 4
            and place % 97 != 3
            and history.line.newest != "RollingBack"
        )
        runs = newest if new else proven
        reports.append(_report(device, runs, proven, "COMMITTED" if new else "IDLE", now))
        orders.append(_order(device, runs, now))
    _put(conn, tables.devices, registry)
    bulk.insert(tele, heard.contacts, contacts)
    bulk.insert(tele, heard.reports, reports)
    _put(conn, tables.desired, orders)
    sums.write(tele, _measured(history.devices, now, chance).devices, Known())


def _measured(devices: Sequence[str], now: float, chance: random.Random) -> Rollups:
    """What each device said of the hour before the last."""
    found = Rollups()
    for device in devices:
        hour = Hour(exposure={"device_hour": 40.0})
        if events := int(chance.random() < 0.3) * chance.randint(1, 6):
            hour.counters["disengagement"] = events
        found.of(device).hours[int(now // 3_600) - 2] = hour
    return found


def _report(device: str, runs: Release, before: Release, state: str, now: float) -> tuple[Any, ...]:
    part = runs.artifacts[0]
    components = {part.component: {"release": runs.name, "digest": part.digest, "committed": True}}
    history = [
        {"component": part.component, "release": release.name,
         "digest": release.artifacts[0].digest, "at": now - at, "event": "activated"}
        for release, at in ((before, 3 * DAY), *(((runs, DAY / 2),) if runs != before else ()))
    ]  # fmt: skip
    return (
        device, "b1", 1, 7, now - 30, state, None, "[]", None, 1, 1, json.dumps(components),
        json.dumps(history), "selftest: 14 of 14 passed",
    )  # fmt: skip


def _order(device: str, runs: Release, now: float) -> tuple[Any, ...]:
    part = runs.artifacts[0]
    components = {part.component: {"release": runs.name, "digest": part.digest, "at": now - DAY}}
    return (device, 1, 1, "a.0", "install", components, None, b"{}", now - DAY, True)


def _second_person(conn: Connection, rollout: str, now: float) -> None:
    """A promotion that waits for somebody's yes."""
    approvals.ask(
        conn,
        kind="promote",
        fleet="drones-alps",
        rollout=rollout,
        seen={"kind": "promote", "name": "drones-alps-flight", "step": 1, "state": "Inconclusive"},
        proposer="jon",
        reason="the fleet is too small to prove it; flown for a week without a word",
        needs=1,
        now=now - 1_200,
    )


def _people(conn: Connection, now: float) -> None:
    for place, (actor, action, subject, reason) in enumerate(
        (
            ("maya", "rollback", "model-y-us-autopilot", "disengagements up, INC-4711"),
            ("jon", "pause", "trams-zurich-signals", "track works this weekend"),
            ("maya", "lift", "vans-nordic-telematics", "root cause was the modem, not the release"),
        )
    ):
        audit.append(
            conn,
            at=now - 5_000 + place * 700,
            actor=actor,
            action=action,
            subject=subject,
            detail={"reason": reason, "incident": None},
        )
