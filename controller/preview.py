"""What a verb would reach before anybody does it; and whom it has not reached.

Where telemetry does not answer, the preview says so and counts what it can; the verbs themselves
never ask it. Who is reached, and what it means for them, is `controller.reach`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine

from controller.commands import Refused, found, in_force, may, scope_of
from controller.reach import WORDS, Heard, Reached, load, reached
from controller.rollout import scope
from controller.rollout.model import ActiveHold, Arm, MemberState
from controller.store.views import count_members
from telemetry.store.database import reading

SHOWN = 200  # devices named in each group; all are counted
_NOT_TOLD = frozenset({"drawn", "left"})


def preview(
    engine: Engine,
    heard: Heard | None,
    *,
    kind: str,
    rollout: str,
    body: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """The blast radius of a verb on this rollout, without doing it; raises Refused."""
    with reading(engine) as conn:
        row = found(conn, rollout)
        may(row, kind)
        part = scope_of(conn, row, body)
        ended = in_force(conn, row, body) if kind == "lift" else []
        states = count_members(conn, [row["id"]])[row["id"]]["devices"]
        hold = _hold(row, body, kind, part, now)
        if kind in ("rollback", "hold"):
            fleet = load(conn, row["id"], heard)
            who = reached(conn, fleet, hold, now)
    answer: dict[str, Any] = {
        "kind": kind,
        "rollout": row["id"],
        "name": row["name"],
        "fleet": row["fleet"],
        "release": row["release"],
        "revision": row["revision"],
        "members": dict(states),
        "scope": part,
        "at": now,
    }
    if kind not in ("rollback", "hold"):
        open_ends = states.get("drawn", 0) + states.get("told", 0)
        sentence = f"{kind} {row['release']}: {open_ends} devices are not updated yet"
        if ended:
            sentence = f"lift: ends {', '.join(ended)}; what it rejects goes out again, at once "
            sentence += "where Git names it"
        return {
            **answer, "telemetry": "not asked", "devices": sum(states.values()),
            "sentence": sentence,
        }  # fmt: skip
    groups = {word: [r for r in who if r.word == word] for word in WORDS}
    untold = [
        m
        for m in fleet.members.values()
        if m.state is MemberState.DRAWN and m.arm is Arm.EXPOSED and fleet.covers(hold, m.device)
    ]
    return {
        **answer,
        "telemetry": fleet.telemetry or "ok",
        "to": hold.to,
        "devices": len(who) if kind == "hold" else len(who) - len(groups["cannot"]),
        "told": sum(n for state, n in states.items() if state not in _NOT_TOLD),
        "untold": len(untold),
        **{word: _group(group) for word, group in groups.items()},
        "also": dict(Counter(name for r in who for name in r.also)),
        "sentence": _sentence(kind, row, groups, len(untold), part),
    }


def recovery(
    engine: Engine, heard: Heard, *, rollout: str, after: str, limit: int, now: float
) -> tuple[dict[str, Any], list[Reached]]:
    """(the rollout and its hold, the devices that a rollback has not reached, by id)."""
    with reading(engine) as conn:
        row = found(conn, rollout)
        fleet = load(conn, row["id"], heard, running=True)
        holds = [h for h in fleet.holds if h.digest == row["digest"] and h.to != "stay"]
        if not holds:
            raise Refused(409, f"{row['name']}: no rollback of {row['release']} is in force")
        left: dict[str, Reached] = {}
        for hold in holds:
            for one in reached(conn, fleet, hold, now):
                left.setdefault(one.device, one)
    names = sorted(name for name in left if name > after)[:limit]
    counted = Counter(one.word for one in left.values())
    about = {
        "rollout": row["id"],
        "name": row["name"],
        "release": row["release"],
        "state": row["state"],
        "count": len(left),
        "groups": dict(counted),
        "telemetry": fleet.telemetry or "ok",
    }
    return about, [left[name] for name in names]


def _hold(
    row: Mapping[str, Any], body: Mapping[str, Any], kind: str, part: Mapping[str, Any], now: float
) -> ActiveHold:
    """The hold that the verb would make."""
    before = dict((row["flags"] or {}).get("before", {}))
    changed = [d for c, d in row["artifacts"].items() if before.get(c) != d]
    return ActiveHold(
        id="preview",
        rollout=row["name"],
        fleet=row["fleet"],
        release=row["release"],
        digest=row["digest"],
        artifacts=frozenset(changed or row["artifacts"].values()),
        to=str(body.get("to") or "previous") if kind == "rollback" else "stay",
        reason="preview",
        actor="preview",
        created_at=now,
        scope=part,
    )


def _group(group: list[Reached]) -> dict[str, Any]:
    return {
        "count": len(group),
        "reasons": dict(Counter(one.why for one in group if one.why).most_common(20)),
        "devices": [one.device for one in group[:SHOWN]],
    }


def _fit(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _untold(n: int) -> str:
    return _fit(n, "more is not told", "more are not told")


def _sentence(
    kind: str,
    row: Mapping[str, Any],
    groups: Mapping[str, list[Reached]],
    untold: int,
    part: Mapping[str, Any],
) -> str:
    n = {word: len(group) for word, group in groups.items()}
    where = scope.words(part)
    head = f"{kind} {row['release']}" + (f" for {where}" if where else "")
    if kind == "hold":
        stay = _fit(sum(n.values()), "device stays as it is", "devices stay as they are")
        return f"{head}: {stay}, {_untold(untold)}"
    said = [_fit(n["changes"], "device changes now", "devices change now")]
    if n["offline"]:
        said.append(
            _fit(n["offline"], "is offline and goes back at its next contact",
                 "are offline and go back at their next contact")
        )  # fmt: skip
    if n["waiting"]:
        why = Counter(one.why for one in groups["waiting"]).most_common(1)[0][0]
        waits = _fit(n["waiting"], "waits for its own safety", "wait for their own safety")
        said.append(f"{waits} ({why})")
    if n["cannot"]:
        why = Counter(one.why for one in groups["cannot"]).most_common(1)[0][0]
        said.append(f"{n['cannot']} cannot go back ({why})")
    if untold:
        said.append(_untold(untold))
    return f"{head}: " + "; ".join(said)
