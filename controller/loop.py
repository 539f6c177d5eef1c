"""The one writer of rollout state: observe → decide → record → act. Safe to kill anywhere.

A tick reads only what changed since the last one (registry rows, device rows and health batches
page by change numbers), asks `reconcile.decide` until it has nothing more to say, writes all of it
with the orders that follow in one transaction, and only then publishes. Whatever is lost by a kill
is found again in the database at the next start; what was published twice is ignored by devices.

The tick's caller owns the clock. One loop at a time: every write is fenced by the term.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from controller import approvals, audit, ulid
from controller.commands import add_hold
from controller.dispatch import Dispatch, Part
from controller.evidence import Evidence
from controller.manifests.kinds import Release
from controller.orders import Broker, Issuer, Outbox
from controller.registry_copy import RECOVERED
from controller.rollout import desired, holdout, reconcile, recovery, standing
from controller.rollout.ears import Ears
from controller.rollout.model import (
    ActiveHold,
    ActiveStop,
    Arm,
    Device,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.rollcall import Rollcall
from controller.rollout.waves import Pinned
from controller.rollout.world import (
    Action,
    Change,
    Command,
    Decision,
    Finish,
    Head,
    Look,
    Notice,
    Open,
    Prove,
    Put,
    Reject,
    Scored,
    World,
)
from controller.store import approvals as approval_rows
from controller.store import rollouts as store
from telemetry import metrics
from telemetry.report import DeviceRow, TelemetryReader
from telemetry.score import bands, score
from telemetry.score_days import ScoreDays
from telemetry.store.database import reading, writing

log = structlog.get_logger()

MOST_ROUNDS = 24  # of decide in one tick; what is left waits for the next one
LATELY = 3600.0  # seconds: a device out of contact for longer is off
CROWD = 5  # devices: fewer tell nothing about the road to them
HEED = 30.0  # seconds after which a report of an older order means that ours was not received
SCORES_LAST = 10.0  # seconds that a fleet's scores are used before they are computed again
FIRST = 64  # orders of a rollback that are on the wire before the others are composed
PART = 1_000  # devices whose orders are composed in one transaction
PARTS = 8  # in one tick: then whoever pressed a button meanwhile is heard first
PAGE = 2_000  # rows of devices read in one tick, about; and messages of health
_ACTING = frozenset({Arm.EXPOSED, Arm.RETURNING})


class Heads(Protocol):
    """Where the accepted commit comes from: `controller.gitwatch`, or the simulation."""

    def current(self) -> Head | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Everything that the loop touches."""

    engine: Engine
    reader: TelemetryReader
    heads: Heads
    broker: Broker
    entropy: Callable[[int], bytes] = secrets.token_bytes


class Loop:
    def __init__(self, ports: Ports, issuer: Issuer) -> None:
        self._ports = ports
        self._issuer = issuer
        self._outbox = Outbox(ports.engine, ports.broker, term=issuer.term)
        self._loaded = False
        self._more = False
        self._made = 0
        self.stopping = False  # does this turn carry out a stop? Then it may use the last room

    @property
    def behind(self) -> bool:
        """Is there more to read or to compose than one tick took? Then the next should not wait."""
        return self._more or bool(self._loaded and self._dispatch)

    def tick(self, now: float) -> int:
        """One turn; answers how many actions it took."""
        try:
            if not self._loaded:
                self._load(now)
            self._observe(now)
            self._rollcall.pass_time(self._world(), now)
            taken = self._decide(now)
            for _ in range(PARTS):
                if not self._dispatch:
                    break
                self._compose(now)
        except BaseException:
            self._loaded = False  # the database is the truth: read it again
            raise
        self._outbox.publish(self._composed_under(), forward=self._asked)
        return taken

    def _composed_under(self) -> frozenset[str]:
        """Ids of the holds and stops that this turn knew."""
        return frozenset([*(hold.id for hold in self._holds), *(stop.id for stop in self._stops)])

    # -- observe ----------------------------------------------------------------------------------

    def _load(self, now: float) -> None:
        with reading(self._ports.engine) as conn:
            self._rollouts = store.load_rollouts(conn)
            self._members = store.load_members(conn)
            self._orders = store.load_orders(conn)
            self._proven = store.load_proven(conn)
            self._documents = {
                name: Release.model_validate(document)
                for name, document in store.load_releases(conn).items()
            }
            self._commit = store.get_meta(conn, "head_commit")
            self._recovered_at: float | None = store.get_meta(conn, "recovered_at")
            self._recovered = store.get_meta(conn, RECOVERED) is not None
        self._catalog = desired.Catalog(releases=self._documents)
        self._pinned = {r.id: Pinned.from_json(r.pinned) for r in self._rollouts.values()}
        self._devices: dict[str, Device] = {}
        self._registry = 0
        self._seen: dict[str, DeviceRow] = {}
        self._change = 0
        self._health = 0
        self._scores: dict[str, Scored] = {}
        self._days = ScoreDays(self._ports.reader)
        self._ears = Ears(0.0, now)
        self._last_word = 0.0
        self._holds: list[ActiveHold] = []
        self._stops: list[ActiveStop] = []
        self._commands: list[Command] = []
        self._rules: dict[str, dict[str, int]] = {}
        self._granted: dict[str, str] = {}
        self._rejected: frozenset[str] = frozenset()
        self._head: Head | None = None
        self._notices: dict[str, str] = {}
        self._noted: dict[str, str] = {}  # as the database has them
        self._evidence = Evidence(self._ports.reader)
        self._blind = True  # until telemetry was read
        self._asked = False  # until Git was asked
        self._restored = False
        self._unheeded: set[str] = set()
        self._resent: dict[str, float] = {}
        self._first = True
        self._observed = now
        self._rollcall = Rollcall()
        oldest_first = ((name, self._members.get(name, {})) for name in self._rollouts)
        self._dispatch = Dispatch(self._issuer, dict(oldest_first))
        self._loaded = True

    def _observe(self, now: float) -> None:
        """Take in what changed. What people want comes first: then telemetry waits for a turn."""
        wants = self._read_people(now)
        head = self._ports.heads.current()
        wanted, self._head = head is not self._head, head
        asked, self._asked = self._asked, head is not None and head.asked
        was_blind = self._blind
        if wants and not self._first and not self._blind:
            self._more = True
        else:
            words, heard = self._listen(now)
            self._touch(words, now)
            self._rollcall.contacts(self._world(), heard, now)
        if self._first or was_blind is not self._blind or asked is not self._asked:
            self._first = False
            self._rollcall.take(self._world(), now)
            self._dispatch.touch(sorted(self._devices))
        elif wanted:
            self._rollcall.people(self._world(), now)
        waited = holdout.ended(self._rollouts.values(), self._pinned, self._observed, now)
        if waited:
            self._touch((d.id for d in self._devices.values() if d.fleet in waited), now)
        self._touch(self._dispatch.due(now), now)
        self._observed = now

    def _read_people(self, now: float) -> bool:
        """Registry, commands, holds, stops, rules; answers whether somebody wants something new."""
        with reading(self._ports.engine) as conn:
            changed, self._registry = store.load_devices(conn, self._registry)
            commands = store.load_commands(conn)
            holds, rejected = store.load_holds(conn)
            stops = store.load_stops(conn)
            rules, granted = approval_rows.load_rules(conn), approval_rows.load_granted(conn)
            self._revise(store.revisions(conn))
        self._devices.update((device.id, device) for device in changed)
        before = self._holds, self._stops, self._rules, self._granted
        self._rules, self._granted = rules, granted
        self._holds, self._stops, self._commands = holds, stops, commands
        self._rejected = rejected
        if self._first:
            return False
        self._touch((device.id for device in changed), now)
        if before == (holds, stops, rules, granted):
            return bool(commands)
        self._dispatch.touch(
            self._concerned(before[0], holds) if before[1] == stops else self._devices
        )
        self._rollcall.people(self._world(), now)
        return True

    def _revise(self, revisions: Mapping[str, int]) -> None:
        """The API raises the revision of a rollout when it records a command."""
        for rollout, revision in revisions.items():
            known = self._rollouts.get(rollout)
            if known is not None and known.revision != revision:
                self._rollouts[rollout] = replace(known, revision=revision)

    def _touch(self, devices: Iterable[str], now: float) -> None:
        """What is known of these devices, or wanted of them, is not what it was."""
        names = list(devices)
        self._dispatch.touch(names)
        self._rollcall.devices(self._world(), names, now)

    def _concerned(self, before: list[ActiveHold], after: list[ActiveHold]) -> Iterator[str]:
        """Devices that a new hold may send elsewhere, and the fleets of holds that were lifted."""
        lifted = {hold.fleet for hold in before if hold not in after}
        new = {digest for hold in after if hold not in before for digest in hold.artifacts}
        for name, device in self._devices.items():
            if device.fleet in lifted or (new and self._has(name, new)):
                yield name

    def _has(self, device: str, digests: set[str]) -> bool:
        """Does this device run, or was it told, one of these?"""
        row, order = self._seen.get(device), self._orders.get(device)
        running = row.components.values() if row is not None else ()
        told = order.components.values() if order is not None else ()
        return any(c.digest in digests for c in running) or any(c.digest in digests for c in told)

    def _listen(self, now: float) -> tuple[list[str], list[str]]:
        """Take in telemetry: (devices that said something new, those that were only heard).

        A page of it: what is left is read in the next turn. Without telemetry the loop goes on,
        blind: it acts on holds and stops.
        """
        reader = self._ports.reader
        words: list[str] = []
        heard: list[str] = []
        try:
            page = None if self._blind else PAGE
            if self._blind:
                self._begin_listening()
            rows = reader.devices_changed(self._change, limit=page)
            for row in rows:
                before = self._seen.get(row.device)
                self._seen[row.device] = row
                self._change = max(self._change, row.change)
                self._last_word = max(self._last_word, row.heard_clock)
                if before is not None and row.says_the_same(before):
                    heard.append(row.device)
                else:
                    words.append(row.device)
                self._heed(row, now)
            self._ears.hear(
                reader.hearing(), self._last_word, now, quiet=self._quiet(), crowd=self._crowd
            )
            whole = self._evidence.read(page)
            self._more = not whole or (page is not None and len(rows) >= page)
        except (SQLAlchemyError, OSError) as error:
            if not self._blind or self._first:
                log.error("telemetry_unavailable", detail=str(error).splitlines()[0])
            self._blind, self._scores, self._more = True, {}, False
        else:
            if self._blind:
                self._blind = False
                self._find_what_was_lost()
        return words, heard

    def _quiet(self) -> float:
        """Seconds without any contact that are worth a question."""
        world = self._world()
        patient = [standing.patience(world, r) for r in self._rollouts.values() if r.active]
        return min(patient, default=math.inf) / 2

    def _crowd(self) -> bool:
        """Were devices heard lately to whom no current step has done anything?"""
        touched = {
            member.device
            for rollout in self._rollouts.values()
            if rollout.active
            for member in self._members.get(rollout.id, {}).values()
            if member.step == rollout.step and member.arm is Arm.EXPOSED
        }
        since = self._last_word - LATELY
        lately = (d for d, row in self._seen.items() if row.heard_clock > since)
        return sum(device not in touched for device in lately) >= CROWD

    def _heed(self, row: DeviceRow, now: float) -> None:
        """A report of an older order, long after ours was out: the broker may keep another one.

        A leader that was stopped and woke up may have sent it; at most once in a while, because
        who refuses our order reports just so.
        """
        order = self._orders.get(row.device)
        if order is None or (row.term, row.generation) >= (order.term, order.generation):
            self._resent.pop(row.device, None)
            return
        since = max(order.at, self._resent.get(row.device, 0.0))
        if (row.reported_at or 0.0) > since + HEED:
            self._resent[row.device] = now
            self._unheeded.add(row.device)

    def _begin_listening(self) -> None:
        """Read evidence from its beginning: what an outage left half read counts once."""
        if self._change == 0:
            self._ears = Ears(*self._ports.reader.hearing())
        self._evidence = Evidence(self._ports.reader)
        for rollout in self._rollouts.values():
            if rollout.active:
                members = self._members.get(rollout.id, {}).values()
                self._evidence.open(rollout, self._pinned[rollout.id], members)

    def _find_what_was_lost(self) -> None:
        """Do devices obey words that the database does not know? It was wiped, or is a backup."""
        lost = any(
            recovery.foreign(
                device,
                self._seen.get(device.id),
                self._orders.get(device.id),
                self._recovered_at,
            )
            for device in self._devices.values()
        )
        if lost and self._rollouts:
            self._restored = True
            log.warning("restored", detail="devices obey newer orders than the database knows")
        self._recovered = self._recovered or (lost and not self._rollouts)

    def _score(self, now: float) -> None:
        """Scores for the fleets whose rollouts are about to draw."""
        if self._blind:
            return
        for rollout in self._rollouts.values():
            drawing = rollout.active and rollout.flags.get("drawn") != rollout.step
            if drawing:
                self._score_fleet(rollout.fleet, self._pinned[rollout.id], now)

    def _score_fleet(self, fleet: str, pinned: Pinned, now: float) -> None:
        known = self._scores.get(fleet)
        if known is not None and now - known.at < SCORES_LAST:
            return
        spec = pinned.policy.score
        if spec is None:
            return
        # Quintiles are of this fleet: another fleet's devices must not move its bands.
        ours = {name for name, d in self._devices.items() if d.fleet == fleet}
        result = score([day.of(ours) for day in self._days.read(spec, now)], spec)
        quintiles = bands(result)
        values: dict[str, tuple[float | None, int]] = {
            name: (None if value != value else float(value), int(band))
            for name, value, band in zip(result.devices, result.value, quintiles, strict=True)
        }
        fleet_size = sum(d.fleet == fleet and d.governed for d in self._devices.values())
        with_score = sum(value is not None for value, _ in values.values())
        self._scores[fleet] = Scored(
            at=now,
            values=values,
            unscored=fleet_size - with_score,
            min_exposure=float(spec.min_exposure),
        )
        self._rollcall.scored(self._world(), fleet)

    # -- decide and record ------------------------------------------------------------------------

    def _world(self) -> World:
        return World(
            head=self._head,
            devices=self._devices,
            seen=self._seen,
            hearing=self._ears.clock,
            heard_at=self._ears.heard_at,
            deaf=self._ears.deaf,
            rollouts=self._rollouts,
            members=self._members,
            pinned=self._pinned,
            orders=self._orders,
            holds=self._holds,
            rejected=self._rejected,
            stops=self._stops,
            commands=self._commands,
            proven=self._proven,
            catalog=self._catalog,
            scores=self._scores,
            observations=self._evidence.observations(),
            watermark=self._evidence.watermark,
            recovered=self._recovered,
            rules=self._rules,
            granted=self._granted,
            restored=self._restored,
            blind=self._blind,
            musters=self._rollcall.musters,
            ended=self._rollcall.ended,
            unordered=self._dispatch,
        )

    def _decide(self, now: float) -> int:
        """Ask, record and order until nothing is left to say: mostly in one transaction.

        A rollback's first orders do not wait for the rest of it: they leave after its first round.
        """
        taken, rounds = 0, MOST_ROUNDS
        self._score(now)
        new_head = self._head is not None and self._head.commit != self._commit
        actions = [] if new_head else self._ask(now)
        # A stop, and what a rollback still has to bring out, may use the last room.
        self.stopping = bool(self._commands) or any(map(_is_stop, actions)) or self._dispatch.urgent
        while new_head or (actions and rounds > 0) or self._notices != self._noted:
            with self._recording(now) as conn:
                if new_head and self._head is not None:
                    self._accept(conn, self._head, now)
                    new_head, actions = False, self._ask(now)
                while actions and rounds > 0:
                    rounds -= 1
                    taken += len(actions)
                    for action in actions:
                        self._apply(conn, action, now)
                    actions = []
                    if self._dispatch.urgent:
                        break
                    self._score(now)
                    actions = self._ask(now)
                urgent = self._dispatch.urgent
                part = self._part(conn, FIRST if urgent else PART, now)
                if self._notices != self._noted:
                    store.put_meta(conn, "notices", self._notices)
                    self._noted = self._notices
            self._outbox.send(part.rows, self._composed_under(), forward=self._asked)
            if urgent:
                actions = self._ask(now)
        self._end_recovery(now)
        return taken

    def _end_recovery(self, now: float) -> None:
        """What a lost memory asked for is done; whom an order never reached gets it again."""
        done = self._recovered and self._head is not None and not self._head.blocked
        if done or self._unheeded:
            with self._recording(now) as conn:
                store.unpublish(conn, sorted(self._unheeded))
                if done:
                    store.delete_meta(conn, RECOVERED)
        self._recovered = self._recovered and not done
        self._restored = False
        self._unheeded = set()

    @contextmanager
    def _recording(self, now: float) -> Iterator[Connection]:
        """One transaction of this controller's term."""
        with writing(self._ports.engine) as conn:
            store.fence(conn, self._issuer.term)
            if self._recovered and self._recovered_at is None:
                self._recovered_at = now
                store.put_meta(conn, "recovered_at", now)
            self._outbox.settle(conn)
            yield conn

    def _compose(self, now: float) -> None:
        """The next part of the orders that wait, recorded and sent."""
        with self._recording(now) as conn:
            part = self._part(conn, PART, now)
        self._outbox.send(part.rows, self._composed_under(), forward=self._asked)

    def _part(self, conn: Connection, most: int, now: float) -> Part:
        """Compose the next orders, record them, and take them into the snapshot."""
        part = self._dispatch.compose(self._world(), most, now, before=self._recovered_at)
        if part.gone:
            store.clear_orders(conn, part.gone)
        if part.rows:
            store.put_orders(conn, part.rows)
        for name in part.gone:
            del self._orders[name]
        self._orders.update((order.device, order) for order in part.orders)
        self._rollcall.devices(self._world(), part.devices, now)
        return part

    def _ask(self, now: float) -> list[Action]:
        """What those that may have something to say answer."""
        world = self._world()
        awake = self._rollcall.awake(world, now)
        actions = reconcile.decide(world, now, awake)
        self._rollcall.answered(world, awake, actions, now)
        if awake.opening:
            self._notices = {a.name: a.sentence for a in actions if isinstance(a, Notice)}
        return [action for action in actions if not isinstance(action, Notice)]

    def _accept(self, conn: Connection, head: Head, now: float) -> None:
        """A new accepted commit: its releases, holds and lifts become ours."""
        for name, release in sorted(head.manifests.releases.items()):
            known = self._documents.get(name)
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
            self._documents[name] = release
        self._catalog = desired.Catalog(releases=self._documents)
        for fleet in head.manifests.fleets.values():
            self._baseline(conn, fleet.name, fleet.baseline, now)
        self._rules = approvals.take_rules(conn, head, self._rules, now)
        store.put_meta(conn, "head_commit", head.commit)
        self._commit = head.commit
        self._dispatch.touch(sorted(self._devices))
        self._rollcall.people(self._world(), now)

    def _baseline(
        self, conn: Connection, fleet: str, baseline: Mapping[str, str], now: float
    ) -> None:
        """What a fleet calls proven before any rollout has completed."""
        kinds = {d.hardware for d in self._devices.values() if d.fleet == fleet} | {""}
        for component, name in baseline.items():
            release = self._documents.get(name)
            artifact = release.components.get(component) if release else None
            if artifact is None:
                continue
            for hardware in kinds:
                if (fleet, component, hardware) not in self._proven:
                    value = Proven(release=name, digest=artifact.digest, at=0.0)
                    self._proven[fleet, component, hardware] = value
                    store.prove(conn, fleet, component, hardware, value, None)

    def _apply(self, conn: Connection, action: Action, now: float) -> None:
        """Record one action and take it into the snapshot; touch the devices it concerns."""
        match action:
            case Open():
                self._open(conn, action, now)
            case Change():
                self._change_rollout(conn, action.rollout, now)
            case Put():
                self._put(conn, action, now)
            case Decision():
                self._record(conn, action, now)
            case Reject():
                self._reject(conn, action, now)
            case Prove():
                key = (action.fleet, action.component, action.hardware)
                self._proven[key] = action.proven
                store.prove(conn, *key, action.proven, None)
                self._touch((d.id for d in self._devices.values() if d.fleet == action.fleet), now)
            case Finish():
                kind = next((c.kind for c in self._commands if c.id == action.command), "?")
                metrics.count("bellwether_commands_total", kind=kind, result=action.state)
                store.finish_command(conn, action.command, action.state, action.result, now)
                self._commands = [c for c in self._commands if c.id != action.command]
            case Look():
                store.insert_look(conn, action.rollout, now, action.numbers)
            case Notice():
                pass

    def _open(self, conn: Connection, action: Open, now: float) -> None:
        rollout = replace(action.rollout, id=self._id(now))
        rollout = replace(rollout, flags={**rollout.flags, "watermark": self._evidence.watermark})
        store.insert_rollout(conn, rollout)
        if "awaits" in rollout.flags:
            approvals.ask_for_start(conn, rollout, now)
        self._rollouts[rollout.id] = rollout
        self._pinned[rollout.id] = action.pinned
        self._members[rollout.id] = {}
        if rollout.active:
            self._evidence.open(rollout, action.pinned, ())
        self._rollcall.changed(self._world(), None, rollout, now)
        opened = Decision(
            rollout=rollout.id, kind="open", verdict="opened", sentence=rollout.sentence
        )
        self._record(conn, opened, now)

    def _change_rollout(self, conn: Connection, after: Rollout, now: float) -> None:
        before = self._rollouts[after.id]
        store.update_rollout(conn, before, after)
        self._rollouts[after.id] = after
        if before.active and not after.active:
            self._evidence.close(after.id)
        if before.state is not after.state:
            self._turn_round(after, now)
        self._rollcall.changed(self._world(), before, after, now)
        if before.state is not after.state:
            log.info(
                "rollout",
                rollout=after.id,
                name=after.name,
                state=str(after.state),
                sentence=after.sentence,
                commit=after.commit,
            )

    def _turn_round(self, rollout: Rollout, now: float) -> None:
        """Its state is another one: all its members may be ordered otherwise, who goes back now."""
        members = self._members.get(rollout.id, {})
        if rollout.state is RolloutState.ROLLING_BACK:
            told = (m.device for m in members.values() if m.arm in _ACTING and m.told_at)
            self._dispatch.touch(told, urgent=True)
        self._touch((name for name in sorted(members) if name not in self._dispatch), now)

    def _put(self, conn: Connection, action: Put, now: float) -> None:
        store.put_members(conn, action.rollout, action.members)
        known = self._members.setdefault(action.rollout, {})
        for member in action.members:
            before = known.get(member.device)
            known[member.device] = member
            self._evidence.member(action.rollout, before, member)
        self._dispatch.joined(action.rollout, (m.device for m in action.members))
        self._dispatch.touch(m.device for m in action.members if m.arm in _ACTING)
        self._rollcall.put(self._world(), action.rollout, action.members, now)

    def _id(self, now: float) -> str:
        """A ULID; those of one millisecond sort in the order in which they were made."""
        self._made = (self._made + 1) % (1 << 32)
        return ulid.new(now, self._made.to_bytes(4) + self._ports.entropy(6))

    def _record(self, conn: Connection, decision: Decision, now: float) -> None:
        rollout = self._rollouts[decision.rollout]
        pinned = self._pinned[decision.rollout]
        name = self._id(now)
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
                "watermark": self._evidence.watermark,
                "commit": rollout.commit,
                "policy": {"name": pinned.policy.name},
                "term": self._issuer.term,
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
        rollout = self._rollouts[action.rollout]
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
        self._rollouts[rollout.id] = after
        self._holds, self._rejected = store.load_holds(conn)
        self._dispatch.touch(self._members.get(rollout.id, {}))
        self._rollcall.people(self._world(), now)


def _is_stop(action: Action) -> bool:
    if isinstance(action, Change):
        return action.rollout.state in (RolloutState.ROLLING_BACK, RolloutState.HELD)
    return isinstance(action, Reject)
