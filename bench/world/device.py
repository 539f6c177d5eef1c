"""One simulated device: the agent's own core, on a machine that can sleep, crash, lie and die.

Its clock is the world's plus a skew; what its releases do to it (`Nature`) follows from the digest
alone. `arrive`, `cut` and the effects are what a real device's threads would call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from bench.world.heap import Heap
from bench.world.machine import MemoryDisk, MemoryJournal, MemoryOutbox, Started, answer
from bench.world.points import Killed, Points
from bench.world.wire import Wire
from controller.facts import Seen, Start
from device_agent import agent, update, work
from device_agent.agent import Agent, Effect, Event, Identity, Publish, Settings
from device_agent.protocol import Channel, ComponentReport, Kind, Reason, State
from device_agent.record import Limits, Record
from device_agent.trust import lease_holds

HEARTBEAT = 6.0  # seconds between health messages
RECONNECT = 1.5
SETTINGS = Settings(
    limits=Limits(trial_soak=1.0, trial_deadline=40.0), resend_after=8.0, facts_fresh=30.0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nature:
    """What an artifact does to the devices that run it."""

    boots: float = 1.0  # share of devices that it starts on
    silent: float = 0.0  # share that it cuts off
    events: float = 0.0  # incidents per health message


class Device:
    def __init__(
        self,
        name: str,
        heap: Heap,
        points: Points,
        wire: Wire,
        chance: Random,
        *,
        keys: tuple[str, ...],
        images: Mapping[str, tuple[str, str]],  # component → (release, digest)
        natures: Mapping[str, Nature],
        trace: Callable[[str], None],
    ) -> None:
        self.name = name
        self.labels: dict[str, str] = {}
        self.skew = 0.0
        self.alive = True  # False: dead for good
        self.reachable = True
        self.liar = ""
        self.flaky = 0.0  # share of downloads that fail for good
        self.guards: dict[str, bool | None] = {"parked": True, "landed": True}
        self.acknowledged: set[tuple[str, int]] = set()
        self.asleep_until = 0.0
        self._heap, self._points, self._wire, self._chance = heap, points, wire, chance
        self._natures, self._trace = natures, trace
        self._identity = Identity(
            device=name, keys=keys, server="http://world", broker_url="mqtt://world",
            broker_username=name, broker_password="",
        )  # fmt: skip
        self.journal = MemoryJournal(points)
        self.outbox = MemoryOutbox(points)
        self.disk = MemoryDisk(points)
        self.disk.factory({c: digest for c, (_, digest) in images.items()})
        running = {
            c: ComponentReport(release=release, digest=digest, committed=True)
            for c, (release, digest) in images.items()
        }
        self.journal.save(Record(running=running))
        self._agent: Agent | None = None
        self._life = 0  # raised at each start: what an earlier life began is void
        self._boots = 0
        self._connected = False
        self._sampled = 0.0
        self._ran: dict[str, str] = {}
        self._about_now: Started | None = None  # how things stood when the agent said Activate
        self._late: set[str] = set()  # attempts that began to install without a lease
        self._said: list[tuple[str, bytes]] = []  # what a liar may say again

    @property
    def agent(self) -> Agent | None:
        return self._agent

    @property
    def in_service(self) -> bool:
        """Not dead, and not cut off by what it runs."""
        return self.alive and not self._silenced()

    @property
    def settled(self) -> bool:
        """Nothing under way, and in touch."""
        core = self._agent
        return core is not None and core.state in update.TERMINAL and self._connected

    @property
    def awaits_lease(self) -> bool:
        """In touch, and the lease passed by its clock? A new one comes after minutes, if ever."""
        current = self._agent.record.update if self._agent is not None else None
        expired = current is not None and current.blocked_by == (Reason.LEASE_EXPIRED,)
        return expired and self._connected

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        if not self.alive or self._agent is not None:
            return
        self._life += 1
        self._boots += 1
        boot = f"{self._boots:04x}{self._chance.getrandbits(64):016x}"
        with self._points.by(self.name):
            try:
                self._agent = Agent(self._identity, self.journal, self.outbox, SETTINGS)
                self._take(agent.Started(boot=boot, active=dict(self.disk.active)))
            except Killed:
                self._crashed()
                return
        self._sampled = self._heap.now
        self._later(self._chance.random(), self._reconnect)
        self._later(self._chance.random() * HEARTBEAT, self._beat)

    def crash(self) -> None:
        """The power is cut; it starts again."""
        if self._agent is None:
            return
        self._crashed()

    def die(self) -> None:
        self._down()
        self.alive = False

    def sleep(self, seconds: float) -> None:
        """Switched off, and on again."""
        if self._agent is None:
            return
        self._down()
        self.asleep_until = self._heap.now + seconds
        self._heap.after(seconds, self.start)

    def _crashed(self) -> None:
        self._down()
        self.outbox.power_cut(self._chance.choice((0, 0, 0, 1, 2)))
        self._heap.after(1.0 + self._chance.random() * 3, self.start)

    def _down(self) -> None:
        self._agent = None
        self._life += 1
        if self._connected:
            self._connected = False
            self._wire.disconnect(self.name)

    def park(self, parked: bool) -> None:
        """It stands, or it drives: the agent reads that at once."""
        self.guards = {"parked": parked, "landed": True}
        self.hear(agent.Tick(facts=dict(self.guards)))

    # -- the network ------------------------------------------------------------------------------

    def arrive(self, channel: Channel, payload: bytes) -> None:
        if channel is Channel.ACK:
            self._acked(payload)
            self.hear(agent.AckArrived(payload=payload))
        else:
            self.hear(agent.DesiredArrived(payload=payload))

    def cut(self) -> None:
        self._connected = False
        self.hear(agent.Disconnected())
        self._later(RECONNECT * (0.5 + self._chance.random()), self._reconnect)

    def lose_network(self, seconds: float) -> None:
        self.reachable = False
        if self._connected:
            self._wire.disconnect(self.name)
            self.cut()
        self._heap.after(seconds, self._network_back)

    def _network_back(self) -> None:
        self.reachable = True
        if self._agent is not None and not self._connected:
            self._reconnect()

    def _reconnect(self) -> None:
        if self._connected or self._agent is None or not self.reachable:
            return
        if self._silenced():
            return
        if self._wire.connect(self):
            self._connected = True
            self.hear(agent.Connected())
        else:
            self._later(RECONNECT * (0.5 + self._chance.random()), self._reconnect)

    def _silenced(self) -> bool:
        return any(
            self._share(digest, "silent") < self._nature(digest).silent
            for digest in self.disk.active.values()
        )

    def _acked(self, payload: bytes) -> None:
        body = json.loads(payload)
        for first, last in body["ranges"]:
            self.acknowledged.update((body["boot"], n) for n in range(first, last + 1))

    # -- the agent --------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        """Hand an event to the agent, and do what it says."""
        if self._agent is None:
            return
        with self._points.by(self.name):
            try:
                self._take(event)
            except Killed:
                self._trace(f"{self.name} died: {self._points.killed[-1][1]}")
                self._crashed()

    def _take(self, event: Event) -> None:
        core = self._agent
        if core is None:
            return
        life = self._life
        for effect in core.handle(event, self._heap.now + self.skew):
            if self._life == life:
                self._execute(effect)

    def _execute(self, effect: Effect) -> None:
        match effect:
            case Publish():
                self._publish(effect)
            case work.Fetch():
                self._work(effect, State.DOWNLOADING, 0.6)
            case work.Install():
                self._note_lease(effect.attempt)
                self._work(effect, State.INSTALLING, 0.4)
            case work.Activate():
                self._about_now = self._about(None)
                self._work(effect, State.ACTIVATING, 0.3)
            case work.SwitchBack():
                self._work(effect, State.ROLLING_BACK, 0.3)
            case work.RunSelfTests():
                self._later(0.2 + 0.5 * self._chance.random(), lambda: self._tested(effect))
            case work.ProbeLink():
                alive = self.reachable
                self._later(
                    0.1, lambda: self.fact(work.LinkProbed(attempt=effect.attempt, alive=alive))
                )

    def fact(self, fact: work.Fact) -> None:
        self.hear(agent.Fact(fact))

    def _publish(self, effect: Publish) -> None:
        if not self._connected or self._silenced():
            return
        if self.liar:
            self._lie(effect)
            return
        self._wire.say(self.name, effect.topic, effect.payload)

    def _work(self, effect: work.Effect, state: State, seconds: float) -> None:
        self._later(seconds * (0.5 + self._chance.random()), lambda: self._do(effect, state))

    def _do(self, effect: work.Effect, state: State) -> None:
        with self._points.by(self.name):
            try:
                reason = self._disk(effect)
            except Killed:
                self._trace(f"{self.name} died: {self._points.killed[-1][1]}")
                self._crashed()
                return
        self.fact(answer(effect, state, reason))

    def _disk(self, effect: work.Effect) -> Reason | None:
        match effect:
            case work.Fetch():
                there = all(self.disk.holds(item) for item in effect.items)
                fails = not there and self._chance.random() < self.flaky
                return Reason.DOWNLOAD_FAILED if fails else None
            case work.Install():
                self.disk.install(effect.items)
            case work.Activate():
                to: dict[str, str | None] = {i.component: i.digest for i in effect.items}
                about = replace(self._about_now or self._about(None), at=self._heap.now)
                reason = self.disk.switch(to, about)
                self._fade()
                return reason
            case work.SwitchBack():
                for component, digest in effect.to.items():
                    if digest is not None:  # lost slots come from the cache
                        self.disk.slots.setdefault(component, set()).add(digest)
                reason = self.disk.switch(effect.to, self._about("back"))
                self._fade()
                return reason
        return None

    def _fade(self) -> None:
        """A release that cuts its device off does so when it starts; until another one does."""
        if not self._silenced():
            self._later(RECONNECT * (0.5 + self._chance.random()), self._reconnect)
        elif self._connected:
            self._wire.disconnect(self.name)
            self._connected = False
            self.hear(agent.Disconnected())

    def _note_lease(self, attempt: str) -> None:
        current = self._agent.record.update if self._agent else None
        order = current.order if current else None
        if order is not None and not lease_holds(order, self._heap.now + self.skew):
            self._late.add(attempt)

    def _about(self, kind: str | None) -> Started:
        current = self._agent.record.update if self._agent else None
        order = current.order if current else None
        asked = order.preconditions if order else ()
        if order is not None and order.kind is Kind.ROLLBACK:
            asked = tuple(p for p in asked if p in update.SAFETY)
        false = tuple(p for p in asked if self.guards.get(p) is not True)
        return Started(
            at=self._heap.now,
            digest="",
            kind=kind or (str(order.kind) if order else "?"),
            term=order.term if order else 0,
            generation=order.generation if order else 0,
            guards=false if kind is None else (),
            late=order is not None and order.attempt in self._late,
        )

    def _tested(self, effect: work.RunSelfTests) -> None:
        ok = all(
            self._share(digest, "boots") < self._nature(digest).boots
            for digest in self.disk.active.values()
        )
        reason = Reason.SELF_TEST_FAILED if ok else Reason.BOOT_FAILED
        self.fact(work.SelfTestsDone(attempt=effect.attempt, ok=ok, reason=reason))

    # -- a heartbeat ------------------------------------------------------------------------------

    def _beat(self) -> None:
        core = self._agent
        if core is None:
            return
        self.hear(agent.Tick(facts=dict(self.guards)))
        if self._agent is core and self._heap.now - self._sampled >= HEARTBEAT - 0.01:
            self._sample(core)
        if self._agent is core:
            busy = core.state not in update.TERMINAL
            self._later(1.0 if busy else HEARTBEAT, self._beat)

    def _sample(self, core: Agent) -> None:
        seconds, began = self._heap.now - self._sampled, self._sampled
        self._sampled = self._heap.now
        rate = sum(self._nature(d).events for d in self.disk.active.values())
        incidents = sum(self._chance.random() < rate for _ in range(2)) if rate else 0
        self.hear(
            agent.HealthSampled(
                components=self._ran or core.running(),
                t0=began + self.skew,
                dt=seconds,
                counters={"incident": incidents} if incidents else {},
                exposure={"device_hour": seconds / 6.0},
            )
        )
        if self._agent is not None:
            self._ran = self._agent.running()

    # -- seen from outside ------------------------------------------------------------------------

    def seen(self) -> Seen:
        """The truth about this device, whatever it reports."""
        record = self.journal.saved or Record()
        return Seen(
            device=self.name,
            active=dict(self.disk.active),
            running={c: report.digest for c, report in record.running.items()},
            had=frozenset(self.disk.whole),
            starts=tuple(
                Start(at=s.at, digest=s.digest, kind=s.kind, guards=s.guards, late=s.late)
                for s in self.disk.started
            ),
            acknowledged=frozenset(self.acknowledged),
            settled=self.settled,
            honest=not self.liar,
        )

    # -- lies -------------------------------------------------------------------------------------

    def _lie(self, effect: Publish) -> None:
        """A device that says what it likes: the wire does not care, the service must."""
        self._said = [*self._said[-20:], (effect.topic, effect.payload)]
        payload = effect.payload
        try:
            body = json.loads(payload)
        except ValueError:
            body = {}
        if self.liar == "garbage" and self._chance.random() < 0.5:
            payload = bytes(self._chance.getrandbits(8) for _ in range(20))
        elif self.liar == "replay" and self._chance.random() < 0.5:
            topic, payload = self._chance.choice(self._said)
            self._wire.say(self.name, topic, payload)
            payload = effect.payload
        elif self.liar == "future" and "generation" in body:
            body["generation"] += 1_000
            payload = json.dumps(body).encode()
        elif self.liar == "harm" and "counters" in body:
            body["counters"] = {"incident": 9}
            payload = json.dumps(body).encode()
        elif self.liar == "failed" and body.get("state") == "COMMITTED":
            body |= {"state": "FAILED", "reason": "install_failed"}
            payload = json.dumps(body).encode()
        self._wire.say(self.name, effect.topic, payload)

    # -- small things -----------------------------------------------------------------------------

    def _nature(self, digest: str) -> Nature:
        return self._natures.get(digest, _PLAIN)

    def _share(self, digest: str, what: str) -> float:
        return _share(f"{self.name}/{digest}/{what}")

    def _later(self, seconds: float, deed: Callable[[], None]) -> None:
        life = self._life

        def still() -> None:
            if self._life == life:
                deed()

        self._heap.after(seconds, still)


_PLAIN = Nature()


@lru_cache(maxsize=10_000)
def _share(what: str) -> float:
    """The same luck whenever it is asked for."""
    return Random(what).random()
