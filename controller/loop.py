"""The one writer of rollout state: observe → decide → record → act. Safe to kill anywhere.

A tick reads only what changed since the last one (registry rows, device rows and health batches
page by change numbers), asks `reconcile.decide` until it has nothing more to say, writes all of it
with the orders that follow in one transaction, and only then publishes. Whatever is lost by a kill
is found again in the database at the next start; what was published twice is ignored by devices.

The tick's caller owns the clock. One loop at a time: every write is fenced by the term.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import structlog
from sqlalchemy import Connection, Engine

from controller.dispatch import Dispatch, Part
from controller.listening import Listening
from controller.memory import Memory
from controller.orders import Broker, Issuer, Outbox
from controller.recording import Recording
from controller.registry_copy import RECOVERED
from controller.rollout import holdout, reconcile
from controller.rollout.model import RolloutState
from controller.rollout.rollcall import Rollcall
from controller.rollout.world import Action, Change, Head, Notice, Reject, World
from controller.scores import Scores
from controller.store import rollouts as store
from telemetry.report import TelemetryReader
from telemetry.store.database import reading, writing

log = structlog.get_logger()

MOST_ROUNDS = 24  # of decide in one tick; what is left waits for the next one
FIRST = 64  # orders of a rollback that are on the wire before the others are composed
PART = 1_000  # devices whose orders are composed in one transaction; a rollback's
UNHURRIED = 500  # the same, where nobody waits for them: a turn makes room sooner
EARS_NOTED = 5.0  # seconds between two notes of what is heard during a rollout
PARTS = 12  # in one tick: then whoever pressed a button meanwhile is heard first


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
    # Has somebody asked for something since this turn began? Then what can wait is left for later.
    rung: Callable[[], bool] = lambda: False


class Loop:
    def __init__(self, ports: Ports, issuer: Issuer) -> None:
        self._ports = ports
        self._issuer = issuer
        self._outbox = Outbox(ports.engine, ports.broker, term=issuer.term)
        self._loaded = False
        self._more = False  # was telemetry left for the next turn?
        self.stopping = False  # does this turn carry out a stop? Then it may use the last room

    @property
    def behind(self) -> bool:
        """Is there more to read or to compose than one tick took? Then the next should not wait."""
        return self._more or bool(self._loaded and self._dispatch)

    def waits(self, until: float) -> bool:
        """Does the clock alone make it send an order by then?"""
        return bool(self._loaded and self._dispatch.waits(until))

    def tick(self, now: float) -> int:
        """One turn; answers how many actions it took."""
        try:
            if not self._loaded:
                self._load(now)
            self._observe(now)
            self._rollcall.pass_time(self._world(), now)
            taken = self._decide(now)
            for _ in range(PARTS):
                if not self._dispatch or self._ports.rung():
                    break
                self._compose(now)
            self._publish()  # whom this concerns is derived when the orders are out
            self._rederive(now)
            self._recording.follow(now)
        except BaseException:
            self._loaded = False  # the database is the truth: read it again
            raise
        return taken

    @property
    def _forward(self) -> bool:
        """May what leads forward leave? Git may have a hold that this database does not know."""
        asked = self._head is not None and self._head.asked
        return asked and not self._listening.blind and not self._doubts

    @property
    def _doubts(self) -> bool:
        """Is this database older than what devices obey, and has Git not told us what it lacks?"""
        return self._lost and not (self._head is not None and self._head.heard)

    def _publish(self) -> None:
        if self._outbox.idle and not self._memory.orders_wait:
            return
        world = self._world()
        self._outbox.publish(
            self._memory.in_force,
            forward=self._forward,
            withholds=lambda device: self._dispatch.withholds(world, device),
        )

    # -- observe ----------------------------------------------------------------------------------

    def _load(self, now: float) -> None:
        with reading(self._ports.engine) as conn:
            self._memory = Memory(conn)
        self._listening = Listening(self._ports.reader, self._memory, now)
        self._scores = Scores(self._ports.reader, self._memory)
        self._rollcall = Rollcall()
        members = self._memory.members
        oldest_first = ((name, members.get(name, {})) for name in self._memory.rollouts)
        self._dispatch = Dispatch(self._issuer, dict(oldest_first))
        self._recording = Recording(
            self._memory,
            self._listening,
            self._dispatch,
            self._rollcall,
            self._world,
            term=self._issuer.term,
            entropy=self._ports.entropy,
        )
        self._composed: dict[str, None] = {}  # devices that were, since somebody was asked
        self._head: Head | None = None
        self._notices: dict[str, str] = {}
        self._noted: dict[str, str] = {}  # as the database has them
        self._ears_noted_at = now
        self._asked = False  # until Git was asked
        self._lost = False  # do devices obey words that the database does not know?
        self._first = True
        self._observed = now
        self._loaded = True

    def _observe(self, now: float) -> None:
        """Take in what changed. What people want comes first: then telemetry waits for a turn."""
        wants = self._read_people(now)
        head = self._ports.heads.current()
        wanted, self._head = head is not self._head, head
        asked, self._asked = self._asked, head is not None and head.asked
        was_blind = self._listening.blind
        if (wants or self._ports.rung()) and not self._first and not was_blind:
            self._more = True
        else:
            self._listen(now)
        if self._first or was_blind is not self._listening.blind or asked is not self._asked:
            self._first = False
            self._rollcall.take(self._world(), now)
            self._dispatch.touch(sorted(self._memory.devices))
        elif wanted:
            self._rollcall.commit(self._world(), now)
        memory, touch = self._memory, self._recording.touch
        waited = holdout.ended(memory.rollouts.values(), memory.pinned, self._observed, now)
        for fleet in sorted(waited):
            touch(memory.of_fleet(fleet), now)
        touch(self._dispatch.due(now), now)
        self._observed = now

    def _read_people(self, now: float) -> bool:
        """Registry, commands, holds, stops, rules; answers whether somebody wants something new."""
        memory = self._memory
        before = memory.wishes
        with reading(self._ports.engine) as conn:
            changed = memory.read(conn)
        if self._first:
            return False
        self._recording.touch((device.id for device in changed), now)
        if before == memory.wishes:
            return bool(memory.commands)
        self._listening.unheeded |= self._outbox.released()
        if replace(before, holds=memory.holds) == memory.wishes:
            self._dispatch.touch(memory.concerned(before.holds, self._listening.seen))
            self._rollcall.people(self._world(), now, memory.newly_held(before.holds))
            return True
        same_stops = before.stops == memory.stops
        self._dispatch.touch(
            memory.concerned(before.holds, self._listening.seen) if same_stops else memory.devices
        )
        self._rollcall.people(self._world(), now)
        return True

    def _listen(self, now: float) -> None:
        heard = self._listening.listen(self._world, now, self._ports.rung)
        self._more = self._listening.more
        if self._listening.blind:
            self._scores.of.clear()
        if heard.sight_regained:
            lost = self._memory.find_what_was_lost(self._listening.seen)
            self._lost = self._lost or lost
            if lost:
                log.warning("restored", detail="devices obey newer orders than the database knows")
        self._recording.touch(heard.words, now)
        self._dispatch.heard(heard.contacts)
        self._rollcall.contacts(self._world(), heard.contacts, now)

    # -- decide and record ------------------------------------------------------------------------

    def _world(self) -> World:
        memory, listening = self._memory, self._listening
        return World(
            head=self._head,
            devices=memory.devices,
            seen=listening.seen,
            hearing=listening.ears.clock,
            heard_at=listening.ears.heard_at,
            deaf=listening.ears.deaf,
            rollouts=memory.rollouts,
            members=memory.members,
            pinned=memory.pinned,
            orders=memory.orders,
            holds=memory.holds,
            rejected=memory.rejected,
            stops=memory.stops,
            commands=memory.commands,
            proven=memory.proven,
            catalog=memory.catalog,
            scores=self._scores.of,
            observations=listening.evidence.observations(),
            watermark=listening.evidence.watermark,
            recovered=memory.recovered,
            rules=memory.rules,
            granted=memory.granted,
            restored=memory.restored,
            blind=listening.blind,
            musters=self._rollcall.musters,
            ended=self._rollcall.ended,
            unordered=self._dispatch,
        )

    def _decide(self, now: float) -> int:
        """Ask, record and order until nothing is left to say: mostly in one transaction.

        A rollback's orders do not wait for the rest of it: they leave after its first round.
        """
        taken, rounds, memory = 0, MOST_ROUNDS, self._memory
        self._score(now)
        new_head = self._head is not None and self._head.commit != memory.commit
        actions = [] if new_head else self._ask(now)
        # A stop, and what a rollback still has to bring out, may use the last room.
        self.stopping = (
            bool(memory.commands) or any(map(_is_stop, actions)) or self._dispatch.urgent
        )
        while new_head or (actions and rounds > 0) or self._must_note(now):
            with self._transaction(now) as conn:
                if new_head and self._head is not None:
                    self._recording.accept(conn, self._head, now)
                    new_head, actions = False, self._ask(now)
                while actions and rounds > 0:
                    rounds -= 1
                    taken += len(actions)
                    for action in actions:
                        self._recording.apply(conn, action, now)
                    actions = []
                    if self._dispatch.urgent:
                        break
                    self._recording.follow(now)
                    self._score(now)
                    actions = self._ask(now)
                urgent = self._dispatch.urgent
                part = self._part(conn, FIRST if urgent else UNHURRIED, now)
                self._note(conn, now)
            self._outbox.send(part.rows, memory.in_force, forward=self._forward)
            if urgent:  # the rest of its orders first; what else there is to say, in the next turn
                self._more = True
                break
        self._end_recovery(now)
        return taken

    def _must_note(self, now: float) -> bool:
        if self._notices != self._noted or self._doubts is not self._memory.doubted:
            return True
        if self._listening.blind:
            return False
        if not self._rollcall.musters:  # nobody's silence is judged
            return self._memory.ears is not None
        return now - self._ears_noted_at >= EARS_NOTED

    def _note(self, conn: Connection, now: float) -> None:
        """What people read, and what the next one must know who looks after us."""
        if self._notices != self._noted:
            store.put_meta(conn, "notices", self._notices)
            self._noted = self._notices
        if self._doubts is not self._memory.doubted:
            self._memory.doubted = self._doubts
            store.put_meta(conn, "doubted", self._doubts)
        if not self._listening.blind:
            under_way = bool(self._rollcall.musters)
            self._memory.ears = self._listening.ears.note(now) if under_way else None
            store.put_meta(conn, "ears", self._memory.ears)
            self._ears_noted_at = now

    def _score(self, now: float) -> None:
        if self._listening.blind:
            return
        for fleet in self._scores.refresh(now):
            self._rollcall.scored(self._world(), fleet)

    def _ask(self, now: float) -> list[Action]:
        """What those that may have something to say answer."""
        self._rederive(now)
        world = self._world()
        awake = self._rollcall.awake(world, now)
        actions = reconcile.decide(world, now, awake)
        self._rollcall.answered(world, awake, actions, now)
        if awake.opening:
            self._notices = {a.name: a.sentence for a in actions if isinstance(a, Notice)}
        return [action for action in actions if not isinstance(action, Notice)]

    def _end_recovery(self, now: float) -> None:
        """What a lost memory asked for is done; whom an order never reached gets it again."""
        memory, unheeded = self._memory, self._listening.unheeded
        done = memory.recovered and self._head is not None and not self._head.blocked
        if done or unheeded:
            with self._transaction(now) as conn:
                store.unpublish(conn, sorted(unheeded))
                memory.orders_wait = memory.orders_wait or bool(unheeded)
                if done:
                    store.delete_meta(conn, RECOVERED)
        memory.recovered = memory.recovered and not done
        memory.restored = False
        unheeded.clear()

    @contextmanager
    def _transaction(self, now: float) -> Iterator[Connection]:
        """One transaction of this controller's term."""
        with writing(self._ports.engine) as conn:
            store.fence(conn, self._issuer.term)
            if self._memory.recovered and self._memory.recovered_at is None:
                self._memory.recovered_at = now
                store.put_meta(conn, "recovered_at", now)
            self._outbox.settle(conn)
            yield conn

    def _compose(self, now: float) -> None:
        """The next part of the orders that wait, recorded and sent."""
        with self._transaction(now) as conn:
            part = self._part(conn, PART if self._dispatch.urgent else UNHURRIED, now)
        self._outbox.send(part.rows, self._memory.in_force, forward=self._forward)

    def _part(self, conn: Connection, most: int, now: float) -> Part:
        """Compose the next orders, record them, and take them into the snapshot."""
        memory, world = self._memory, self._world()
        part = self._dispatch.compose(world, most, now, before=memory.recovered_at)
        if part.gone:
            store.clear_orders(conn, part.gone)
        if part.rows:
            store.put_orders(conn, part.rows)
        for name in part.gone:
            del memory.orders[name]
        memory.orders.update((order.device, order) for order in part.orders)
        self._composed.update(dict.fromkeys(part.devices))
        return part

    def _rederive(self, now: float) -> None:
        """Those whose orders were composed may stand differently now."""
        composed, self._composed = self._composed, {}
        self._rollcall.devices(self._world(), composed, now)


def _is_stop(action: Action) -> bool:
    if isinstance(action, Change):
        return action.rollout.state in (RolloutState.ROLLING_BACK, RolloutState.HELD)
    return isinstance(action, Reject)
