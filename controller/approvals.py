"""Asks for a second person and takes their word: starts, recalls, widening, lifts, looser rules.

Rules, in order:

1. A vote names the digest of what its person saw; another digest is 412. Of a start that is its
   plan: the release, to whom, in which steps and windows, behind which gates.
2. Nobody approves their own, and one person's votes are one.
3. What has moved on since it was asked for is void; so is what waited for longer than a day, and a
   start of which the fleet has a tenth more or fewer devices by now. A start that waits asks anew.
4. Break-glass grants at once, by one person with that right and a reason. It skips the waiting and
   nothing else: gates, holds, windows, device safety stay as they are. It is audited, and told.
5. A grant and what follows from it are one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row

from controller import audit, commands
from controller.commands import Refused
from controller.people import same_person
from controller.rollout import approval
from controller.rollout.model import Rollout
from controller.rollout.world import Head
from controller.store import approvals as store
from telemetry.store.database import writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    id: str
    state: str  # waiting | granted | void
    sentence: str


def vote(
    engine: Engine,
    name: str,
    *,
    actor: str,
    digest: str,
    reason: str,
    now: float,
    break_glass: bool = False,
    reject: bool = False,
) -> Voted:
    """Approve (or reject) what waits; raises Refused."""
    with writing(engine) as conn:
        row = _open(conn, name, digest)
        void = _void(conn, row, now)
        if void:
            store.decide(conn, row.id, "void", void, now)
            _note(conn, row, actor, "approval.void", now, {"why": void})
            outcome = Voted(
                id=row.id, state="void", sentence=f"void: {void}; {_anew(conn, row, now)}"
            )
        elif reject:
            outcome = _rejected(conn, row, actor, reason, now)
        else:
            outcome = _approved(conn, row, actor, reason, now, break_glass)
    if void:
        raise Refused(409, f"approval {row.id} is {outcome.sentence}")
    return outcome


def _open(conn: Connection, name: str, digest: str) -> Row[Any]:
    row = store.find(conn, name)
    if row is None:
        raise Refused(404, f"approval {name[:80]!r}: unknown, or nothing of it waits")
    if row.state != "waiting":
        raise Refused(409, f"approval {row.id} is {row.state} already: {row.result}")
    if digest != row.digest:
        raise Refused(
            412,
            f"approval {row.id} is of {row.digest}, not of {digest[:80]}: look at it again",
            "/digest",
        )
    return row


def _void(conn: Connection, row: Row[Any], now: float) -> str:
    """Why this is not what was asked for any more; empty when it still is."""
    if now >= row.expires_at:
        return "it waited for longer than a day"
    if row.kind in ("start", "recall"):
        about = commands.found(conn, row.rollout)
        if not _waits(about):
            return f"the rollout is {about['state']}"
        if approval.digest({**about["pinned"], "name": about["name"]}) != row.digest:
            return "its plan has changed"
        now_in, then = store.active_devices(conn, row.fleet), row.seen.get("devices")
        if approval.outgrown(then, now_in):
            return f"{row.fleet} has {now_in} devices now, it had {then} when it was asked for"
    elif row.kind in commands.RULED:
        if (
            approval.digest(commands.seen(conn, row.kind, row.rollout, row.seen["body"]))
            != row.digest
        ):
            return "it has moved on since it was asked for"
    elif row.kind == "rule" and store.load_rules(conn).get(row.fleet) != row.seen["from"]:
        return "the rule has changed since"
    return ""


def _approved(
    conn: Connection, row: Row[Any], actor: str, reason: str, now: float, break_glass: bool
) -> Voted:
    if break_glass:
        if not reason.strip():
            raise Refused(422, "reason: break-glass needs one", "/reason")
        _note(conn, row, actor, "break-glass", now, {"reason": reason})
        return _grant(conn, row, f"break-glass by {actor}: {reason}", actor, now)
    if same_person(row.proposer, actor):
        raise Refused(403, f"{actor} asked for it: somebody else approves", "")
    voted = store.voters(conn, [row.id])[row.id]
    known = any(same_person(one, actor) for one in voted)  # by another of their names
    n = len(voted) if known else store.add_vote(conn, row.id, actor, reason, now)
    _note(conn, row, actor, "approval.approve", now, {"reason": reason, "digest": row.digest})
    if n < row.needs:
        return Voted(
            id=row.id, state="waiting", sentence=f"{n} of {row.needs} have approved {row.kind}"
        )
    people = " and ".join(store.voters(conn, [row.id])[row.id])
    return _grant(conn, row, f"asked by {row.proposer}, approved by {people}", people, now)


def _grant(conn: Connection, row: Row[Any], words: str, by: str, now: float) -> Voted:
    sentence = words
    if row.kind in commands.RULED:
        sentence = commands.carry_out(
            conn,
            kind=row.kind,
            rollout=row.rollout or None,
            body=row.seen["body"],
            actor=f"{row.proposer}, approved by {by}"[:128],
            reason=row.reason,
            now=now,
        )
    elif row.kind == "rule":
        store.put_rule(conn, row.fleet, row.seen["to"])
        sentence = f"the rule of {row.fleet} is {_rule(row.seen['to'])}: {words}"
    store.decide(conn, row.id, "granted", words, now)
    return Voted(id=row.id, state="granted", sentence=sentence)


def _rejected(conn: Connection, row: Row[Any], actor: str, reason: str, now: float) -> Voted:
    words = f"rejected by {actor}" + (f": {reason}" if reason else "")
    store.decide(conn, row.id, "void", words, now)
    _note(conn, row, actor, "approval.reject", now, {"reason": reason})
    return Voted(id=row.id, state="void", sentence=words)


def ask_for_start(conn: Connection, rollout: Rollout, now: float) -> None:
    """A rollout that opened Pending asks for its people; in the transaction of its opening."""
    _ask(conn, asdict(rollout), now)


def _anew(conn: Connection, row: Row[Any], now: float) -> str:
    """What a person can do about what is void. A start that still waits asks again at once."""
    if row.kind not in ("start", "recall"):
        return "ask again"
    about = commands.found(conn, row.rollout)
    if not _waits(about):
        return "nothing of it waits any more"
    name, _ = _ask(conn, about, now)
    return f"look again, then approve {name}"


def _waits(about: Mapping[str, Any]) -> bool:
    return "awaits" in about["flags"] and about["state"] in ("Pending", "Paused")


def _ask(conn: Connection, about: Mapping[str, Any], now: float) -> tuple[str, str]:
    """`about`: the rollout, as its row has it."""
    awaits = about["flags"]["awaits"]
    return store.ask(
        conn,
        kind=awaits["kind"],
        fleet=about["fleet"],
        rollout=about["id"],
        seen={
            **about["pinned"], "name": about["name"],
            "devices": store.active_devices(conn, about["fleet"]),
        },
        proposer=about["author"] or awaits["proposer"] or "unknown author",
        reason=f"commit {about['commit'][:7]}",
        needs=awaits["needs"],
        now=now,
    )  # fmt: skip


def take_rules(
    conn: Connection, head: Head, old: Mapping[str, Mapping[str, int]], now: float
) -> dict[str, dict[str, int]]:
    """The rules in force after this commit. A looser one asks the people of the old one first."""
    rules = {fleet: dict(rule) for fleet, rule in old.items()}
    for fleet in head.manifests.fleets.values():
        wanted = approval.rule_of(fleet)
        before = rules.get(fleet.name)
        rules[fleet.name] = approval.in_force(before, wanted)
        if rules[fleet.name] != wanted:
            _ask_for_rule(conn, fleet.name, rules[fleet.name], wanted, head.author, now)
        if rules[fleet.name] != before:
            store.put_rule(conn, fleet.name, rules[fleet.name])
    return rules


def _ask_for_rule(
    conn: Connection,
    fleet: str,
    old: Mapping[str, int],
    wanted: Mapping[str, int],
    author: str,
    now: float,
) -> None:
    seen = {"name": fleet, "from": dict(old), "to": dict(wanted)}
    if store.waiting(conn, "rule", fleet, approval.digest(seen)):
        return
    store.ask(
        conn,
        kind="rule",
        fleet=fleet,
        rollout="",
        seen=seen,
        proposer=author or "unknown author",
        reason=f"approvals of {fleet}: {_rule(old)} → {_rule(wanted)}",
        needs=max(1, approval.people_to_change(old) - 1),
        now=now,
    )


def _rule(rule: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {n}" for kind, n in sorted(rule.items()))


def _note(
    conn: Connection, row: Row[Any], actor: str, action: str, now: float, more: Mapping[str, Any]
) -> None:
    audit.append(
        conn,
        at=now,
        actor=actor[:128],
        action=action,
        subject=str(row.seen.get("name") or row.fleet)[:128],
        detail={"approval": row.id, "kind": row.kind, "fleet": row.fleet, **more},
    )
