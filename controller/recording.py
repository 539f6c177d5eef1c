"""Writes what was decided: each action into the caller's transaction, and into the loop's memory.

What an action concerns is touched: whose order may be another one now waits in the dispatch, and
whom the rollcall must ask again is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection

from controller import approvals, audit, engine, ulid
from controller.commands import add_hold
from controller.dispatch import Dispatch
from controller.listening import Listening
from controller.manifests.kinds import Fleet, Release
from controller.memory import Memory
from controller.rollout.model import Arm, Draw, Member, Proven, Rollout, RolloutState
from controller.rollout.rollcall import Rollcall
from controller.rollout.world import (
    Action,
    Change,
    Decision,
    Finish,
    Head,
    Look,
    Notice,
    Open,
    Prove,
    Put,
    Reject,
    World,
)
from controller.store import rollouts as store
from telemetry import metrics

log = structlog.get_logger()

_ACTING = frozenset({Arm.EXPOSED, Arm.RETURNING})


def _back(rollout: Rollout) -> tuple[object, object]:
    """How far the way back is open."""
    return rollout.flags.get("back_step"), rollout.flags.get("frozen")


class Recording:
    def __init__(
        self,
        memory: Memory,
        listening: Listening,
        dispatch: Dispatch,
        rollcall: Rollcall,
        world: Callable[[], World],
        *,
        term: int,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._memory = memory
        self._listening = listening
        self._dispatch = dispatch
        self._rollcall = rollcall
        self._world = world
        self._term = term
        self._entropy = entropy
        self._made = 0
        self._turned: list[tuple[Rollout, Rollout]] = []  # (before, after): to be followed
        self._fleets: dict[str, Fleet] | None = None  # as the last accepted commit declares them

    def touch(self, devices: Iterable[str], now: float) -> None:
        """What is known of these devices, or wanted of them, is not what it was."""
        names = list(devices)
        self._dispatch.touch(names)
        self._rollcall.devices(self._world(), names, now)

    def apply(self, conn: Connection, action: Action, now: float) -> None:
        match action:
            case Open():
                self._open(conn, action, now)
            case Change():
                self._change(conn, action.rollout, now)
            case Put():
                self._put(conn, action, now)
            case Decision():
                self._decision(conn, action, now)
            case Reject():
                self._reject(conn, action, now)
            case Prove():
                key = (action.fleet, action.component, action.hardware)
                self._memory.proven[key] = action.proven
                store.prove(conn, *key, action.proven, None)
                self.touch(self._memory.of_fleet(action.fleet), now)
            case Finish():
                self._finish(conn, action, now)
            case Look():
                store.insert_look(conn, action.rollout, now, action.numbers)
            case Notice():
                pass

    def accept(self, conn: Connection, head: Head, now: float) -> None:
        """A new accepted commit: its releases, holds and lifts become ours."""
        memory, new = self._memory, dict[str, Release]()
        for name, release in sorted(head.manifests.releases.items()):
            known = memory.documents.get(name)
            if known is not None and known == release:
                continue
            store.put_release(
                conn,
                name,
                {
                    "digest": release.digest,
                    "document": release.model_dump(mode="json"),
                    "commit": head.commit,
                    "seen_at": now,
                },
            )
            new[name] = release
        memory.adopt(new)
        for fleet in head.manifests.fleets.values():
            self._baseline(conn, fleet.name, fleet.baseline)
        memory.rules = approvals.take_rules(conn, head, memory.rules, now)
        store.put_meta(conn, "head_commit", head.commit)
        memory.commit = head.commit
        fleets = dict(head.manifests.fleets)
        changed, self._fleets = new or fleets != self._fleets, fleets
        if changed:  # what is proven, who brings an artifact, what is done about an unknown one
            self._dispatch.touch(sorted(memory.devices))
            self._rollcall.people(self._world(), now)
        else:  # of orders it says nothing by itself: rollouts and holds touch whom they concern
            self._rollcall.commit(self._world(), now)

    def _baseline(self, conn: Connection, fleet: str, baseline: Mapping[str, str]) -> None:
        """What a fleet calls proven before any rollout has completed."""
        memory = self._memory
        kinds = {memory.devices[d].hardware for d in memory.of_fleet(fleet)} | {""}
        for component, name in baseline.items():
            release = memory.documents.get(name)
            artifact = release.components.get(component) if release else None
            if artifact is None:
                continue
            for hardware in kinds:
                if (fleet, component, hardware) not in memory.proven:
                    value = Proven(release=name, digest=artifact.digest, at=0.0)
                    memory.proven[fleet, component, hardware] = value
                    store.prove(conn, fleet, component, hardware, value, None)

    def _open(self, conn: Connection, action: Open, now: float) -> None:
        memory, evidence = self._memory, self._listening.evidence
        rollout = replace(action.rollout, id=self._id(now))
        rollout = replace(rollout, flags={**rollout.flags, "watermark": evidence.watermark})
        store.insert_rollout(conn, rollout)
        if "awaits" in rollout.flags:
            approvals.ask_for_start(conn, rollout, now)
        memory.rollouts[rollout.id] = rollout
        memory.pinned[rollout.id] = action.pinned
        memory.members[rollout.id] = {}
        if rollout.active:
            evidence.open(rollout, action.pinned, ())
        self._rollcall.changed(self._world(), None, rollout, now)
        opened = Decision(
            rollout=rollout.id, kind="open", verdict="opened", sentence=rollout.sentence
        )
        self._decision(conn, opened, now)

    def _change(self, conn: Connection, after: Rollout, now: float) -> None:
        before = self._memory.rollouts[after.id]
        store.update_rollout(conn, before, after)
        self._memory.rollouts[after.id] = after
        if before.active and not after.active:
            self._listening.evidence.close(after.id)
        turned = before.state is not after.state or _back(before) != _back(after)
        if turned and after.state is RolloutState.ROLLING_BACK:
            members = self._memory.members.get(after.id, {}).values()
            self._dispatch.touch((m.device for m in members if _goes_back(m)), urgent=True)
            self._turned.append((before, after))
        else:
            self._turn(before, after, now)
        if before.state is not after.state:
            log.info(
                "rollout",
                rollout=after.id,
                name=after.name,
                state=str(after.state),
                sentence=after.sentence,
                commit=after.commit,
            )

    def follow(self, now: float) -> None:
        """Work out whom it concerns that rollouts have turned round.

        Not at once: their first orders leave before that, and the caller asks nobody before it.
        """
        for before, after in self._turned:
            self._turn(before, after, now)
        self._turned.clear()

    def _turn(self, before: Rollout, after: Rollout, now: float) -> None:
        """In another state all its members may be ordered otherwise."""
        if before.state is not after.state or _back(before) != _back(after):
            members = self._memory.members.get(after.id, {})
            back = after.state is RolloutState.ROLLING_BACK
            waiting = (d for d, m in members.items() if not (back and _goes_back(m)))
            self.touch((d for d in sorted(waiting) if d not in self._dispatch), now)
        self._rollcall.changed(self._world(), before, after, now)

    def _put(self, conn: Connection, action: Put, now: float) -> None:
        store.put_members(conn, action.rollout, action.members)
        known = self._memory.members.setdefault(action.rollout, {})
        for member in action.members:
            before = known.get(member.device)
            known[member.device] = member
            self._listening.evidence.member(action.rollout, before, member)
        self._dispatch.joined(action.rollout, (m.device for m in action.members))
        self._dispatch.touch(m.device for m in action.members if m.arm in _ACTING)
        self._rollcall.put(self._world(), action.rollout, action.members, now)

    def _finish(self, conn: Connection, action: Finish, now: float) -> None:
        memory = self._memory
        kind = next((c.kind for c in memory.commands if c.id == action.command), "?")
        metrics.count("bellwether_commands_total", kind=kind, result=action.state)
        store.finish_command(conn, action.command, action.state, action.result, now)
        memory.commands = [c for c in memory.commands if c.id != action.command]

    def _id(self, now: float) -> str:
        """A ULID; those of one millisecond sort in the order in which they were made."""
        self._made = (self._made + 1) % (1 << 32)
        return ulid.new(now, self._made.to_bytes(4) + self._entropy(6))

    def _decision(self, conn: Connection, decision: Decision, now: float) -> None:
        rollout = self._memory.rollouts[decision.rollout]
        pinned = self._memory.pinned[decision.rollout]
        name = self._id(now)
        if decision.kind == "draw":
            drawn = Draw.recorded(decision.inputs, now)
            self._memory.draws.setdefault(decision.rollout, []).append(drawn)
        store.insert_decision(
            conn,
            {
                "id": name,
                "rollout": decision.rollout,
                "at": now,
                "kind": decision.kind,
                "verdict": decision.verdict,
                "sentence": decision.sentence,
                "inputs": dict(decision.inputs),
                "numbers": dict(decision.numbers),
                "watermark": self._listening.evidence.watermark,
                "commit": rollout.commit,
                "policy": {"name": pinned.policy.name, "engine": engine.present()},
                "term": self._term,
            },
        )
        audit.append(
            conn,
            at=now,
            actor="controller",
            action=f"{decision.kind}:{decision.verdict}",
            subject=rollout.name,
            detail={"decision": name, "rollout": rollout.id, "sentence": decision.sentence},
        )
        metrics.count("bellwether_decisions_total", verdict=decision.verdict)
        log.info(
            "decision",
            rollout=rollout.id,
            name=rollout.name,
            kind=decision.kind,
            verdict=decision.verdict,
            sentence=decision.sentence,
            commit=rollout.commit,
        )

    def _reject(self, conn: Connection, action: Reject, now: float) -> None:
        rollout = self._memory.rollouts[action.rollout]
        row: dict[str, Any] = {
            "name": rollout.name,
            "fleet": rollout.fleet,
            "release": rollout.release,
            "digest": rollout.digest,
            "artifacts": rollout.artifacts,
            "flags": rollout.flags,
        }
        hold = add_hold(
            conn,
            row,
            to=action.to,
            actor=action.actor,
            reason=action.reason,
            incident=None,
            now=now,
        )
        after = replace(rollout, flags={**rollout.flags, "hold": hold, "cause": action.reason})
        store.update_rollout(conn, rollout, after)
        self._memory.rollouts[rollout.id] = after
        before = self._memory.holds
        self._memory.read_holds(conn)
        self._dispatch.touch(self._memory.members.get(rollout.id, {}))
        # Others may run it as well: from the factory, by an earlier rollout, by a lost memory.
        self._dispatch.touch(self._memory.concerned(before, self._listening.seen))
        self._rollcall.people(self._world(), now, {rollout.fleet})


def _goes_back(member: Member) -> bool:
    """Was it told what its rollout now takes back?"""
    return member.arm in _ACTING and bool(member.told_at)
