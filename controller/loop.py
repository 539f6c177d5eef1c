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
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from controller import approvals, audit, ulid
from controller.commands import add_hold
from controller.evidence import Evidence
from controller.manifests.kinds import Release
from controller.orders import Broker, Issuer, Outbox, build
from controller.registry_copy import RECOVERED
from controller.rollout import desired, holdout, reconcile, recovery, scope, standing
from controller.rollout.ears import Ears
from controller.rollout.model import (
    ActiveHold,
    ActiveStop,
    Arm,
    Device,
    MemberState,
    Order,
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
from device_agent.protocol import Kind, Reason, State
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
# Seconds before one order is issued again: a rollback that failed on its device, and a lease that
# has passed by the device's clock (one that is wrong by years would ask for ever, at each report).
AGAIN = 300.0
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
        self._made = 0
        self.stopping = False  # does this turn carry out a stop? Then it may use the last room

    def tick(self, now: float) -> int:
        """One turn; answers how many actions it took."""
        try:
            if not self._loaded:
                self._load(now)
            dirty = self._observe(now)
            self._rollcall.pass_time(self._world(), now)
            taken = self._decide(now, dirty)
        except BaseException:
            self._loaded = False  # the database is the truth: read it again
            raise
        self._outbox.publish(frozenset(self._composed_under()), forward=self._asked)
        return taken

    def _composed_under(self) -> Iterator[str]:
        """Ids of the holds and stops that this turn knew."""
        yield from (hold.id for hold in self._holds)
        yield from (stop.id for stop in self._stops)

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
        self._again: dict[str, float] = {}  # device → when its order is issued once more
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
        self._loaded = True

    def _observe(self, now: float) -> set[str]:
        """Take in what changed; answers the devices whose order may have to change."""
        with reading(self._ports.engine) as conn:
            changed, self._registry = store.load_devices(conn, self._registry)
            commands = store.load_commands(conn)
            holds, rejected = store.load_holds(conn)
            stops = store.load_stops(conn)
            rules, granted = approval_rows.load_rules(conn), approval_rows.load_granted(conn)
            self._revise(store.revisions(conn))
        dirty = {device.id for device in changed}
        self._devices |= {device.id: device for device in changed}
        people = holds != self._holds or stops != self._stops
        people |= rules != self._rules or granted != self._granted
        self._rules, self._granted = rules, granted
        self._holds, self._stops, self._commands = holds, stops, commands
        self._rejected = rejected
        was_blind = self._blind
        words, heard = self._listen(now)
        dirty |= words
        head = self._ports.heads.current()
        wanted = people or head is not self._head
        self._head = head
        asked, self._asked = self._asked, head is not None and head.asked
        world = self._world()
        if self._first or was_blind is not self._blind or asked is not self._asked:
            self._first, self._observed = False, now
            self._rollcall.take(world, now)
            return set(self._devices)
        self._rollcall.devices(world, sorted(dirty), now)
        self._rollcall.contacts(world, heard, now)
        if wanted:
            self._rollcall.people(world, now)
        if people:
            dirty |= set(self._devices)
        waited = holdout.ended(self._rollouts.values(), self._pinned, self._observed, now)
        if waited:
            dirty |= {d.id for d in self._devices.values() if d.fleet in waited}
        self._observed = now
        return dirty | self._due(now)

    def _revise(self, revisions: Mapping[str, int]) -> None:
        """The API raises the revision of a rollout when it records a command."""
        for rollout, revision in revisions.items():
            known = self._rollouts.get(rollout)
            if known is not None and known.revision != revision:
                self._rollouts[rollout] = replace(known, revision=revision)

    def _due(self, now: float) -> set[str]:
        """Devices whose order is issued once more."""
        due = {name for name, at in self._again.items() if at <= now}
        self._again = {name: at for name, at in self._again.items() if name not in due}
        return due

    def _listen(self, now: float) -> tuple[set[str], list[str]]:
        """Take in telemetry: (devices that said something new, those that were only heard).

        Without it the loop goes on, blind: it acts on holds and stops.
        """
        reader = self._ports.reader
        words: set[str] = set()
        heard: list[str] = []
        try:
            if self._blind:
                self._begin_listening()
            for row in reader.devices_changed(self._change):
                before = self._seen.get(row.device)
                self._seen[row.device] = row
                self._change = max(self._change, row.change)
                self._last_word = max(self._last_word, row.heard_clock)
                if before is not None and row.says_the_same(before):
                    heard.append(row.device)
                else:
                    words.add(row.device)
                self._heed(row, now)
            self._ears.hear(
                reader.hearing(), self._last_word, now, quiet=self._quiet(), crowd=self._crowd
            )
            self._evidence.read()
        except (SQLAlchemyError, OSError) as error:
            if not self._blind or self._first:
                log.error("telemetry_unavailable", detail=str(error).splitlines()[0])
            self._blind, self._scores = True, {}
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
        )

    def _decide(self, now: float, dirty: set[str]) -> int:
        new_head = self._head is not None and self._head.commit != self._commit
        self._score(now)
        actions = [] if new_head else self._ask(now)
        silent = all(isinstance(action, Notice) for action in actions)
        if silent and not (new_head or dirty or self._unheeded or self._notices != self._noted):
            return 0
        taken = 0
        self.stopping = bool(self._commands) or any(map(_is_stop, actions))
        with writing(self._ports.engine) as conn:
            store.fence(conn, self._issuer.term)
            if self._recovered and self._recovered_at is None:
                self._recovered_at = now
                store.put_meta(conn, "recovered_at", now)
            if new_head and self._head is not None:
                dirty |= self._accept(conn, self._head, now)
                actions = self._ask(now)
            for _ in range(MOST_ROUNDS):
                actions = [a for a in actions if not isinstance(a, Notice)]
                if not actions:
                    break
                for action in actions:
                    dirty |= self._apply(conn, action, now)
                taken += len(actions)
                self._score(now)
                actions = self._ask(now)
            self._order(conn, dirty, now)
            if self._notices != self._noted:
                store.put_meta(conn, "notices", self._notices)
                self._noted = self._notices
            store.unpublish(conn, sorted(self._unheeded))
            done = self._recovered and self._head is not None and not self._head.blocked
            if done:
                store.delete_meta(conn, RECOVERED)
        self._recovered = self._recovered and not done
        self._restored = False
        self._unheeded = set()
        return taken

    def _ask(self, now: float) -> list[Action]:
        """What those that may have something to say answer."""
        world = self._world()
        awake = self._rollcall.awake(world, now)
        actions = reconcile.decide(world, now, awake)
        self._rollcall.answered(world, awake, actions, now)
        if awake.opening:
            self._notices = {a.name: a.sentence for a in actions if isinstance(a, Notice)}
        return actions

    def _accept(self, conn: Connection, head: Head, now: float) -> set[str]:
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
        self._rollcall.people(self._world(), now)
        for fleet in head.manifests.fleets.values():
            self._baseline(conn, fleet.name, fleet.baseline, now)
        self._rules = approvals.take_rules(conn, head, self._rules, now)
        store.put_meta(conn, "head_commit", head.commit)
        self._commit = head.commit
        return set(self._devices)

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

    def _apply(self, conn: Connection, action: Action, now: float) -> set[str]:
        """Record one action and take it into the snapshot; answers the devices it touches."""
        match action:
            case Open():
                return self._open(conn, action, now)
            case Change():
                return self._change_rollout(conn, action.rollout, now)
            case Put():
                return self._put(conn, action, now)
            case Decision():
                self._record(conn, action, now)
            case Reject():
                return self._reject(conn, action, now)
            case Prove():
                key = (action.fleet, action.component, action.hardware)
                self._proven[key] = action.proven
                store.prove(conn, *key, action.proven, None)
                return {d.id for d in self._devices.values() if d.fleet == action.fleet}
            case Finish():
                kind = next((c.kind for c in self._commands if c.id == action.command), "?")
                metrics.count("bellwether_commands_total", kind=kind, result=action.state)
                store.finish_command(conn, action.command, action.state, action.result, now)
                self._commands = [c for c in self._commands if c.id != action.command]
            case Look():
                store.insert_look(conn, action.rollout, now, action.numbers)
            case Notice():
                pass
        return set()

    def _open(self, conn: Connection, action: Open, now: float) -> set[str]:
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
        return set()

    def _change_rollout(self, conn: Connection, after: Rollout, now: float) -> set[str]:
        before = self._rollouts[after.id]
        store.update_rollout(conn, before, after)
        self._rollouts[after.id] = after
        if before.active and not after.active:
            self._evidence.close(after.id)
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
            return set(self._members.get(after.id, {}))
        return set()

    def _put(self, conn: Connection, action: Put, now: float) -> set[str]:
        store.put_members(conn, action.rollout, action.members)
        known = self._members.setdefault(action.rollout, {})
        for member in action.members:
            before = known.get(member.device)
            known[member.device] = member
            self._evidence.member(action.rollout, before, member)
        self._rollcall.put(self._world(), action.rollout, action.members, now)
        return {m.device for m in action.members if m.arm in _ACTING}

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

    def _reject(self, conn: Connection, action: Reject, now: float) -> set[str]:
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
        self._rollcall.people(self._world(), now)
        return set(self._members.get(rollout.id, {}))

    # -- orders -----------------------------------------------------------------------------------

    def _order(self, conn: Connection, dirty: Iterable[str], now: float) -> None:
        """Compose and sign the orders of these devices, where they differ from the last ones."""
        rows, gone = [], []
        for name in sorted(set(dirty)):
            device = self._devices.get(name)
            if device is None:
                continue
            if not device.governed or self._moved_since_order(device):
                gone += [name] if self._orders.pop(name, None) else []
            if not device.governed:
                continue
            made = self._order_of(device, now)
            if made is not None:
                self._orders[name] = made[0]
                rows.append(made[1])
        if gone:
            store.clear_orders(conn, gone)
        if rows:
            store.put_orders(conn, rows)
        self._rollcall.devices(self._world(), [*gone, *(row["device"] for row in rows)], now)

    def _moved_since_order(self, device: Device) -> bool:
        order = self._orders.get(device.id)
        return order is not None and device.moved_at is not None and device.moved_at > order.at

    def _order_of(self, device: Device, now: float) -> tuple[Order, dict[str, Any]] | None:
        row, last = self._seen.get(device.id), self._orders.get(device.id)
        place = self._place(device, row, last, now)
        target = desired.compose(place, self._catalog, now)
        if target is None:
            return None
        running = row.components if row else {}
        again = place.foreign or self._stale(last, row, now)
        if not (again or desired.differs(target, last, running)):
            return None
        if last is None and row is None:
            return None  # never heard and never told: its first report says what it runs
        if not self._may_go(place, target):
            return None
        return build(self._issuer, device, target, self._catalog, last, row, now)

    def _stale(self, last: Order | None, row: DeviceRow | None, now: float) -> bool:
        """Must the same order go out again, under a new generation? Not yet: noted."""
        if last is None or not _asks_again(last, row):
            return False
        if now > last.at + AGAIN:
            return True
        self._again[last.device] = last.at + AGAIN + 1
        return False

    def _may_go(self, place: desired.Place, target: desired.Target) -> bool:
        """Going back always; forward, or by a lost memory, only with Git and telemetry at hand."""
        head = self._head
        if target.kind is Kind.ROLLBACK:
            return True
        if place.foreign:
            return head is not None and head.heard and not self._blind
        if not desired.moves(target, place.running):
            return True
        return head is not None and head.asked and not self._blind

    def _place(
        self, device: Device, row: DeviceRow | None, last: Order | None, now: float
    ) -> desired.Place:
        speaking, past = [], {}
        for rollout_id, members in self._members.items():
            member = members.get(device.id)
            if member is None:
                continue
            rollout = self._rollouts[rollout_id]
            if rollout.active and rollout.fleet == device.fleet:
                speaking.append((rollout, member))
            if member.previous is not None and member.state is not MemberState.DRAWN:
                past[rollout.name] = member
        fleet = self._head.manifests.fleets.get(device.fleet) if self._head else None
        return desired.Place(
            device=device,
            running=row.components if row else {},
            last=last,
            memberships=speaking,
            past=past,
            holds=[h for h in self._holds if h.fleet == device.fleet and self._holds_it(h, device)],
            stops=self._stops,
            proven=self._proven_for(device, now),
            on_unknown=str(fleet.on_unknown) if fleet else "keep",
            foreign=recovery.foreign(device, row, last, self._recovered_at),
        )

    def _holds_it(self, hold: ActiveHold, device: Device) -> bool:
        """Is the device in the hold's scope? Steps and cohorts are those of the hold's rollout."""
        if hold.whole:
            return True
        for name, rollout in self._rollouts.items():
            if rollout.name == hold.rollout and rollout.digest == hold.digest:
                member = self._members.get(name, {}).get(device.id)
                if scope.covers(hold.scope, device, member, self._pinned.get(name)):
                    return True
        return False

    def _proven_for(self, device: Device, now: float) -> dict[str, Proven]:
        found: dict[str, Proven] = {}
        rollouts = self._rollouts.values()
        withheld = holdout.withheld(rollouts, self._pinned, device.fleet, device.id, now)
        for (fleet, component, hardware), proven in self._proven.items():
            if proven.release in withheld:
                continue
            if fleet == device.fleet and hardware in ("", device.hardware):
                best = found.get(component)
                if best is None or proven.at > best.at or hardware:
                    found[component] = proven
        return found


def _is_stop(action: Action) -> bool:
    if isinstance(action, Change):
        return action.rollout.state in (RolloutState.ROLLING_BACK, RolloutState.HELD)
    return isinstance(action, Reject)


def _asks_again(last: Order | None, row: DeviceRow | None) -> bool:
    """Does it wait for a lease, or could it not go back for want of a download or a disk?"""
    if last is None or row is None or row.generation != last.generation:
        return False
    if last.kind == Kind.INSTALL:
        return Reason.LEASE_EXPIRED in row.blocked_by
    return last.kind == Kind.ROLLBACK and row.state is State.FAILED
