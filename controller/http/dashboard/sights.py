"""Reads the rows of each page and hands them to the functions that shape them.

One function a page, in a transaction of its own; what it answers holds nothing of the person who
asked but what their grants let them see and do: the same answer serves everybody with these grants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Connection, Row

from controller import commands
from controller.http.dashboard import device as device_page
from controller.http.dashboard import evidence, overview
from controller.http.dashboard import rollout as rollout_page
from controller.http.dashboard.census import Census, Counts
from controller.http.dashboard.shares import over_time
from controller.http.dashboard.signs import of_device, of_rollout, of_verdict
from controller.http.dashboard.tally import members as member_tally
from controller.http.devicebook import DeviceBook
from controller.http.ports import Deps
from controller.http.problems import Problem
from controller.roles import Principal, Right
from controller.rollout.model import Device
from controller.store import lookups, views
from controller.store import stops as stop_rows
from controller.store.devices import get_many
from telemetry.store.database import reading

Plain = dict[str, Any]
DECISIONS_SHOWN = 12
POINTS_SHOWN = 200  # of the chart
_HAS_IT = frozenset({"told", "updated", "failed", "silent"})  # members that were told the release


@dataclass(frozen=True, slots=True)
class Eyes:
    """What a sight is read with."""

    deps: Deps
    book: DeviceBook
    census: Census
    who: Principal
    conn: Connection

    @property
    def now(self) -> float:
        return self.deps.clock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A page that can be looked at, and followed live."""

    template: str
    read: Callable[[Eyes, str], Plain]  # (…, the page's argument: a rollout, a device) → shown


def look(
    sight: Sight, deps: Deps, book: DeviceBook, census: Census, who: Principal, what: str
) -> Plain:
    """Everything a page shows; raises Problem 404 for what this person does not see."""
    with reading(deps.engine) as conn:
        eyes = Eyes(deps, book, census, who, conn)
        return {"stops": views.active_stops(conn), **sight.read(eyes, what)}


# -- overview -------------------------------------------------------------------------------------


def _overview(eyes: Eyes, _: str) -> Plain:
    conn, seen = eyes.conn, eyes.who.fleets
    counts = {
        name: one for name, one in eyes.census.fleets(conn).items() if not seen or name in seen
    }
    newest = lookups.newest_of_fleets(conn, seen)
    moving = lookups.in_states(conn, sorted(overview.MOVING), seen, 50)
    told = {row.id: one for row, one in zip(moving, told_of(conn, moving), strict=True)}
    by_fleet = {row.fleet: one for row, one in zip(newest, told_of(conn, newest), strict=True)}
    proven, git = lookups.proven_of(conn), views.git(conn)
    labels = {row.fleet: row.pinned.get("fleet", {}).get("labels", {}) for row in newest}
    cards = [
        overview.fleet_card(
            name, counts.get(name, Counts()), by_fleet.get(name), proven.get(name, {}),
            labels.get(name, {}),
        )
        for name in sorted({*counts, *by_fleet})
    ]  # fmt: skip
    waiting = lookups.waiting_approvals(conn, seen, 50)
    asks = overview.asks(told.values(), _paging(conn, list(told)), git, waiting)
    return {
        "fleets": cards,
        "devices": sum(card.total for card in cards),
        "online": sum(card.online for card in cards),
        "asks": asks,
        "shares": [
            (share, overview.tones(share, by_fleet.get(name)))
            for name, one in sorted(counts.items())
            for component, days in sorted(one.moves.items())
            for share in (over_time(name, component, days, eyes.now),)
        ],
        "moving": rows_of(told.values()),
        "orders": lookups.orders_pending(conn),
        "git": git,
        "decisions": decided(conn, seen, 8),
    }


def told_of(conn: Connection, rows: Sequence[Row[Any]]) -> list[Plain]:
    """Rollouts as the API tells them, with their counts and no holds."""
    counts = views.count_members(conn, [row.id for row in rows])
    return [views.rollout(row, counts[row.id], ()) for row in rows]


def rows_of(told: Any) -> list[Plain]:
    return [
        {
            "told": one,
            "sign": of_rollout(one["state"]),
            "tally": member_tally(one["members"]["devices"]),
            "steps": len(one["steps"]) + bool(one["fixes"]),
        }
        for one in told
    ]


def _paging(conn: Connection, ids: Sequence[str]) -> frozenset[str]:
    """Rollouts whose last verdict asks for a person."""
    found = lookups.last_verdicts(conn, ids)
    return frozenset(name for name, row in found.items() if row.numbers.get("page"))


def decided(conn: Connection, seen: frozenset[str], limit: int, before: str = "") -> list[Plain]:
    return [
        {
            "id": row.id,
            "at": views.when(row.at),
            "rollout": row.rollout,
            "name": row.name,
            "release": row.release,
            "sentence": row.sentence,
            "commit": row.commit,
            "kind": row.kind,
            "sign": of_verdict(row.verdict),
        }
        for row in lookups.list_decisions(conn, before=before, limit=limit, fleets=seen)
    ]


# -- rollout --------------------------------------------------------------------------------------


def _rollout(eyes: Eyes, name: str) -> Plain:
    conn = eyes.conn
    row = found_rollout(eyes, name)
    held = [h for h in views.holds_of(conn, [row.name])[row.name] if h["digest"] == row.digest]
    one = views.rollout(row, views.count_members(conn, [row.id])[row.id], held)
    fixes = row.pinned.get("fixes")
    decisions = [
        views.decision(entry, whole=False)
        for entry in lookups.decisions_of(conn, row.id, DECISIONS_SHOWN)
    ]
    judged = lookups.judged(conn, row.id, POINTS_SHOWN)
    rails = evidence.guardrails(judged[-1][1]) if judged else ()
    traces = evidence.traces(judged)
    active = any(hold["liftedAt"] is None for hold in held)
    before = (row.flags or {}).get("before") or {}
    return {
        "one": one,
        "sign": of_rollout(row.state),
        "steps": rollout_page.steps(
            one, fixes, eyes.book.cohort_sizes(row.fleet), (row.flags or {}).get("standing") or {}
        ),
        "verbs": rollout_page.verbs(one, eyes.who, active),
        "failures": lookups.failures(conn, row.id, 8),
        "waiting": lookups.waiting_commands(conn, row.id),
        "approvals": [
            one
            for one in lookups.waiting_approvals(conn, eyes.who.fleets, 50)
            if one["rollout"] == row.id
        ],
        "fixes": fixes,
        "after": sorted(_owners(conn, before)),
        "total": member_tally(one["members"]["devices"]),
        "rails": rails,
        "judged_at": judged[-1][0] if judged else None,
        "harm": judged[-1][1].get("harm") if judged else None,
        "harm_limit": judged[-1][1].get("harm_limit") if judged else None,
        "traces": traces,
        "chart": evidence.first(traces, rails),
        "decisions": rollout_page.decision_rows(decisions),
        "title": f"{row.name} → {row.release}",
    }


def found_rollout(eyes: Eyes, name: str) -> Row[Any]:
    row = views.find_rollout(eyes.conn, name)
    if row is None or not eyes.who.sees(row.fleet):
        raise Problem(404, f"rollout {name[:80]!r}: unknown; the list of rollouts has them all")
    return row


def _owners(conn: Connection, before: Mapping[str, str]) -> set[str]:
    """Names of the releases that bring these artifacts, as far as something was proven by them."""
    wanted = set(before.values())
    return {
        entry["release"]
        for parts in lookups.proven_of(conn).values()
        for hardware in parts.values()
        for entry in hardware.values()
        if entry["digest"] in wanted
    }


# -- device ---------------------------------------------------------------------------------------


def _stops_of(conn: Connection, device: Any, newest: Any) -> list[Plain]:
    """The stops that are in the way of its fleet's newest rollout, on this device."""
    if newest is None:
        return []
    known = Device(id=device.id, fleet=device.fleet, labels=device.labels, status=device.status)
    brings = {newest.digest, *newest.artifacts.values()}
    ours = {stop.id for stop in stop_rows.load(conn) if stop.covers(known, brings)}
    return [stop for stop in views.active_stops(conn) if stop["id"] in ours]


def _device(eyes: Eyes, name: str) -> Plain:
    conn = eyes.conn
    row = get_many(conn, [name]).get(name)
    if row is None or not eyes.who.sees(row.fleet):
        raise Problem(404, f"device {name[:80]!r}: unknown")
    told = eyes.book.describe(conn, [row])[0]
    newest_row = lookups.newest_of_fleet(conn, row.fleet)
    newest = None if newest_row is None else told_of(conn, [newest_row])[0]
    fixes = None if newest_row is None else newest_row.pinned.get("fixes")
    holds = [] if newest is None else views.holds_of(conn, [newest["name"]])[newest["name"]]
    checks = device_page.why_not(told, newest, fixes, holds, _stops_of(conn, row, newest_row))
    audited = lookups.newest_audit(conn, before=None, limit=20, subject=name)
    return {
        "one": told,
        "sign": of_device(told["status"], told["online"], told["state"]),
        "components": device_page.components(told),
        "newest": newest,
        "checks": checks,
        "back": _way_back(eyes, told),
        "score": eyes.book.explain(conn, row.fleet, name),
        "timeline": device_page.timeline(told, lookups.memberships_of(conn, name, 20), audited),
        "title": name,
    }


def _way_back(eyes: Eyes, told: Plain) -> str:
    """The dialog that takes this device alone back from its newest rollout; empty: there is none,
    or this person may not."""
    member = told["membership"]
    if member is None or member["arm"] == "control" or member["state"] not in _HAS_IT:
        return ""
    row = views.find_rollout(eyes.conn, member["rollout"])
    if row is None or not commands.allowed("rollback", row.state):
        return ""
    if not eyes.who.may(Right.STOP, told["fleet"]):
        return ""
    return f"/rollouts/{row.id}/rollback?" + urlencode({"scope": f"device:{told['id']}"})


# -- on call --------------------------------------------------------------------------------------


def _oncall(eyes: Eyes, _: str) -> Plain:
    conn, seen = eyes.conn, eyes.who.fleets
    moving = lookups.in_states(conn, sorted(overview.MOVING), seen, 20)
    told = told_of(conn, moving)
    paging, git = _paging(conn, [row.id for row in moving]), views.git(conn)
    urgent = [
        {
            **row,
            "verbs": rollout_page.verbs(row["told"], eyes.who, held=False),
            "asks": row["told"]["id"] in paging or row["told"]["state"] in overview.ASKS,
        }
        for row in rows_of(told)
    ]
    urgent.sort(key=lambda row: (not row["asks"], row["told"]["state"] != "RollingBack"))
    return {
        "rollouts": urgent,
        "git": git,
        "git_asks": overview.asks([], frozenset(), git, lookups.waiting_approvals(conn, seen, 20)),
        "decisions": decided(conn, seen, 20),
        "title": "On call",
    }


SIGHTS: Mapping[str, Sight] = {
    "overview": Sight(template="overview.html", read=_overview),
    "rollout": Sight(template="rollout.html", read=_rollout),
    "device": Sight(template="device.html", read=_device),
    "oncall": Sight(template="oncall.html", read=_oncall),
}

__all__ = ["SIGHTS", "Eyes", "Sight", "found_rollout", "look"]
