"""The agent's core: events in, effects out. No sockets, no threads, no clock of its own.

Whoever owns the machine (`device_agent.machine.Runner`, or the simulator) does this, on one thread:

    agent = Agent(identity, Journal(dir / "journal.db"), Outbox(dir / "outbox.db"), settings)
    for effect in agent.handle(Started(boot=uuid4().hex), now): execute(effect)
    # then for ever: event → agent.handle(event, now) → execute each effect

`now` is Unix seconds by the device's clock. It may jump: time that passes is counted from call to
call and at most `MAX_STEP` seconds each, so call `handle(Tick(), now)` about once a second.

Events
    Started(boot, machine,     first, once; `boot` is a fresh id (32 hex digits do) of this start,
            active)            `machine` the machine's own boot and `active` what its slots run
                               (component → digest), where these can be known
    Connected / Disconnected   the MQTT session; subscribe to `agent.subscriptions` before Connected
    DesiredArrived(payload)    bytes of `…/desired`, from the broker or from the HTTPS fallback
    AckArrived(payload)        bytes of `…/ack`
    Tick(facts)                about each second; facts: precondition → True | False | None
    HealthSampled(...)         one interval's samples; `components` = `agent.running()` at its start
    Fact(fact)                 the machine's answer to an effect: work.Done, Failed,
                               SelfTestsDone, LinkProbed (see the table)

Effects
    Publish(topic, payload, qos, retain)     dropped when the link is down: the outbox sends again
    Fetch, Install, Activate, SwitchBack     answer Done(attempt, work) or Failed(attempt, work, …)
        with work = State.DOWNLOADING, INSTALLING, ACTIVATING, ROLLING_BACK in that order
    RunSelfTests   answer SelfTestsDone        ProbeLink   answer LinkProbed(alive)
    Cancel         stop that attempt's work     Cleanup     drop cached artifacts but these
    Every effect may come again after a restart and must then be harmless.
    `device_agent.machine.Disk.execute(effect)` does all of them but Publish, Fetch's transfer and
    ProbeLink, for both owners.

The will of the MQTT session is `agent.will()` after Started. The journal is saved before `handle`
returns effects: an exception from `handle` (a full disk) means that nothing may be executed; make
a new Agent on the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from device_agent import protocol, trust, update, work
from device_agent.outbox import Waiting
from device_agent.protocol import (
    Ack,
    Channel,
    ComponentReport,
    Health,
    Presence,
    ProtocolError,
    Reported,
    State,
)
from device_agent.record import Limits, Record, Update
from device_agent.update import World
from device_agent.work import Echoed, Passed

MAX_STEP = 30.0  # seconds that one call can make pass, whatever the clock says


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What enrolment gave this device; `identity.json`, mode 0600."""

    device: str
    keys: tuple[str, ...]  # the director's public keys, raw Ed25519 in hex: pinned
    server: str  # base URL of the HTTP API: fallback and downloads
    broker_url: str
    broker_username: str
    broker_password: str = field(repr=False)
    fleet: str = ""

    @classmethod
    def from_enrolment(cls, body: Mapping[str, Any], server: str) -> Identity:
        """From the answer of `POST /devices:enrol`; raises ValueError for what is none."""
        try:
            broker = body["broker"]
            identity = cls(
                device=str(body["device"]),
                keys=tuple(str(key["public"]) for key in body["keys"]),
                server=str(body.get("server") or server).rstrip("/"),
                broker_url=str(broker["url"]),
                broker_username=str(broker["username"]),
                broker_password=str(broker["password"]),
                fleet=str(body.get("fleet") or ""),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the server's answer is no enrolment: {error!r}") from None
        if not protocol.ID.fullmatch(identity.device):
            raise ValueError(f"{identity.device!r} is no device id")
        trust.keyring(identity.keys)
        if not identity.keys:
            raise ValueError("the server named no director key to pin")
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Raises ValueError or OSError when there is no usable identity."""
        body = json.loads(path.read_text())
        if not isinstance(body, dict):
            raise ValueError(f"{path}: an object is expected")
        return cls.from_enrolment(body, "")

    def to_json(self) -> str:
        body = {
            "device": self.device,
            "fleet": self.fleet,
            "server": self.server,
            "broker": {
                "url": self.broker_url,
                "username": self.broker_username,
                "password": self.broker_password,
            },
            "keys": [
                {"keyid": keyid, "public": public}
                for keyid, public in trust.keyring(self.keys).items()
            ],
        }
        return json.dumps(body, indent=2) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    limits: Limits = field(default_factory=Limits)
    in_flight: int = 20  # unacknowledged messages on the link at once
    resend_after: float = 30.0  # seconds without an ack
    facts_fresh: float = 10.0  # seconds; an older fact is unknown
    installers: frozenset[str] = frozenset({"slots"})


class JournalPort(Protocol):
    def load(self) -> Record: ...
    def save(self, record: Record) -> None: ...


class OutboxPort(Protocol):
    def put(
        self, boot: str, seq: int, channel: Channel, payload: bytes, tells: int = 0
    ) -> None: ...
    def oldest(self, limit: int, *, without: Any = ()) -> list[Waiting]: ...
    def acknowledge(self, boot: str, ranges: Any) -> None: ...
    def take_lost(self) -> int: ...


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    boot: str
    machine: str = ""  # "": unknown; then each start counts as one of the machine
    active: Mapping[str, str] | None = None  # component → digest that its slots run now


@dataclass(frozen=True, slots=True)
class Connected:
    pass


@dataclass(frozen=True, slots=True)
class Disconnected:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredArrived:
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AckArrived:
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    facts: Mapping[str, bool | None] | None = None  # None: not read this time


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSampled:
    components: Mapping[str, str]  # `agent.running()` when the interval began
    t0: float
    dt: float
    columns: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    exposure: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fact:
    fact: work.Fact


Event = (
    Started | Connected | Disconnected | DesiredArrived | AckArrived | Tick | HealthSampled | Fact
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


Effect = Publish | work.Effect


class Agent:
    def __init__(
        self,
        identity: Identity,
        journal: JournalPort,
        outbox: OutboxPort,
        settings: Settings | None = None,
    ) -> None:
        self.identity = identity
        self.settings = settings or Settings()
        self.record = journal.load()
        self._journal = journal
        self._outbox = outbox
        self._keys = trust.keyring(identity.keys)
        self._boot = ""
        self._seq = 0
        self._now: float | None = None
        self._connected = False
        self._sent: dict[tuple[str, int], float] = {}  # on the link, unacknowledged → age, seconds
        self._facts: Mapping[str, bool | None] = {}
        self._facts_age = 0.0
        self._last_refusal = ""
        self._newest_report: tuple[str, int] = ("", 0)
        self._nonce_age = 0.0

    @property
    def subscriptions(self) -> tuple[str, ...]:
        device = self.identity.device
        return (
            protocol.topic(device, Channel.DESIRED),
            protocol.topic(device, Channel.ACK),
        )

    @property
    def state(self) -> State:
        return State.IDLE if self.record.update is None else self.record.update.state

    def running(self) -> dict[str, str]:
        """component → digest that runs now."""
        return {component: report.digest for component, report in self.record.running.items()}

    def will(self) -> tuple[str, bytes]:
        return self._presence(online=False)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What must be done about this event; the record behind it is durable already."""
        seconds = 0.0 if self._now is None else min(max(0.0, now - self._now), MAX_STEP)
        self._now = now
        self._facts_age += seconds
        self._nonce_age += seconds
        self._sent = {key: age + seconds for key, age in self._sent.items()}
        effects: list[Effect] = list(self._work(event, now, seconds))
        if self._connected:
            effects += self._send()
        return effects

    # -- one event --------------------------------------------------------------------------------

    def _work(self, event: Event, now: float, seconds: float) -> list[Effect]:
        passed = self._learn(Passed(seconds=seconds), now) if seconds else []
        match event:
            case Started():
                return self._start(event, now)
            case Connected():
                return passed + self._connect()
            case Disconnected():
                self._connected = False
            case DesiredArrived(payload=payload):
                return passed + self._judge(payload, now)
            case AckArrived(payload=payload):
                return passed + self._acknowledge(payload, now)
            case Tick(facts=facts):
                if facts is not None:
                    self._facts, self._facts_age = facts, 0.0
                return passed + self._tick()
            case HealthSampled():
                self._health(event)
            case Fact(fact=fact):
                return passed + self._learn(fact, now)
        return passed

    def _start(self, event: Started, now: float) -> list[Effect]:
        self._boot = event.boot
        record, effects = update.restart(self.record, self._world(now), event.machine, event.active)
        self._keep(record)
        self._report()
        return list(effects)

    def _connect(self) -> list[Effect]:
        self._connected = True
        self._sent = {}
        if self._wants_echo():
            self._report()
        topic, payload = self._presence(online=True)
        return [Publish(topic=topic, payload=payload, retain=True)]

    def _judge(self, payload: bytes, now: float) -> list[Effect]:
        verdict = trust.judge(payload, self._known())
        if isinstance(verdict, trust.Repeated):
            return []
        if isinstance(verdict, trust.Refused):
            self._refuse(payload, verdict)
            return []
        order, order_hash = verdict.order, verdict.order_hash
        return self._step(update.obey(self.record, order, order_hash, self._world(now)))

    def _acknowledge(self, payload: bytes, now: float) -> list[Effect]:
        try:
            ack = protocol.decode(Ack, payload)
        except ProtocolError:
            return []
        self._outbox.acknowledge(ack.boot, ack.ranges)
        self._sent = {
            (boot, seq): age
            for (boot, seq), age in self._sent.items()
            if boot != ack.boot or not any(first <= seq <= last for first, last in ack.ranges)
        }
        if ack.nonce is None or ack.nonce != self._nonce() or self.record.update is None:
            return []
        return self._learn(Echoed(attempt=self.record.update.order.attempt), now)

    def _tick(self) -> list[Effect]:
        late = [key for key, age in self._sent.items() if age > self.settings.resend_after]
        for key in late:
            del self._sent[key]
        # An ack travels with QoS 0: a trial that waits for its echo asks again.
        if self._connected and self._wants_echo() and self._nonce_age > 10.0:
            self._report()
        return []

    def _health(self, sampled: HealthSampled) -> None:
        if dict(sampled.components) != self.running():
            return  # the set changed within this interval: it is evidence for neither
        self._seq += 1
        message = Health(
            boot=self._boot,
            boot_count=self.record.boot_count,
            seq=self._seq,
            components=dict(sampled.components),
            attempt=self._attempt(),
            t0=sampled.t0,
            dt=sampled.dt,
            columns=dict(sampled.columns),
            counters=dict(sampled.counters),
            exposure=dict(sampled.exposure),
            dropped=self._outbox.take_lost(),
        )
        self._post(Channel.HEALTH, message, tells=message.dropped)

    # -- steps ------------------------------------------------------------------------------------

    def _learn(self, fact: work.Fact, now: float) -> list[Effect]:
        return self._step(update.learn(self.record, fact, self._world(now)))

    def _step(self, step: update.Step) -> list[Effect]:
        record, effects = step
        before = self.record
        if record is before:  # as nearly always: time passed, and nothing came of it
            return list(effects)
        if _durable(record) != _durable(before):
            self._keep(record)
        self.record = record
        if self._visible(before) != self._visible(record):
            self._report()
        return list(effects)

    def _keep(self, record: Record) -> None:
        self._journal.save(record)
        self.record = record

    def _world(self, now: float) -> World:
        fresh = self._facts_age <= self.settings.facts_fresh
        return World(now=now, facts=self._facts if fresh else {}, limits=self.settings.limits)

    def _known(self) -> trust.Known:
        record = self.record
        return trust.Known(
            device=self.identity.device,
            keys=self._keys,
            term=record.term,
            generation=record.generation,
            order_hash=record.order_hash,
            security_epoch=record.security_epoch,
            known_bad=record.known_bad,
            installers=self.settings.installers,
        )

    def _refuse(self, payload: bytes, refused: trust.Refused) -> None:
        """Say so, once; a word that no director said for us changes nothing else."""
        key = f"{refused.reason}:{sha256(payload).hexdigest()}"
        if key == self._last_refusal:
            return
        self._last_refusal = key
        order = refused.order
        if order is None:
            attempt, place = None, (self.record.term, self.record.generation)
        else:
            attempt, place = order.attempt, (order.term, order.generation)
            self._keep(
                replace(
                    self.record,
                    term=order.term,
                    generation=order.generation,
                    order_hash=refused.order_hash,
                )
            )
        self._report(
            state=State.REJECTED,
            reason=str(refused.reason),
            attempt=attempt,
            term=place[0],
            generation=place[1],
            blocked_by=(),
            log=refused.detail[:200],
        )
        if order is not None and self.state in update.TERMINAL:
            rejected = Update(order=order, state=State.REJECTED, reason=str(refused.reason))
            self._keep(replace(self.record, update=rejected))
            return
        self._report()  # the last word stays what the device really does

    # -- messages ---------------------------------------------------------------------------------

    def _attempt(self) -> str | None:
        return None if self.record.update is None else self.record.update.order.attempt

    def _nonce(self) -> str | None:
        """The same for one attempt in one boot: an echo from before a reboot proves nothing."""
        seed = f"{self.identity.device}:{self._attempt()}:{self._boot}"
        return sha256(seed.encode()).hexdigest()[:32]

    def _wants_echo(self) -> bool:
        current = self.record.update
        return current is not None and current.state is State.TRIAL and not current.echoed

    def _visible(self, record: Record) -> tuple[object, ...]:
        current = record.update
        if current is None:
            return (record.generation, record.running)
        return (
            record.term,
            record.generation,
            current.order.attempt,
            current.state,
            current.reason,
            current.blocked_by,
            record.running,
        )

    def _report(self, **changes: Any) -> None:
        current, record = self.record.update, self.record
        self._seq += 1
        message = Reported(
            boot=self._boot,
            boot_count=record.boot_count,
            seq=self._seq,
            attempt=self._attempt(),
            term=record.term,
            generation=record.generation,
            state=self.state,
            reason=current.reason if current else None,
            blocked_by=current.blocked_by if current else (),
            components=dict(record.running),
            history=record.history,
            log=current.log if current else "",
            nonce=self._nonce() if self._wants_echo() else None,
        )
        self._nonce_age = 0.0
        self._newest_report = (self._boot, self._seq)
        self._post(Channel.REPORTED, replace(message, **changes))

    def _post(self, channel: Channel, message: Reported | Health, tells: int = 0) -> None:
        self._outbox.put(message.boot, message.seq, channel, protocol.encode(message), tells)

    def _presence(self, *, online: bool) -> tuple[str, bytes]:
        message = Presence(online=online, boot=self._boot, boot_count=self.record.boot_count)
        return protocol.topic(self.identity.device, Channel.PRESENCE), protocol.encode(message)

    def _send(self) -> list[Publish]:
        room = self.settings.in_flight - len(self._sent)
        if room <= 0:
            return []
        publishes = []
        for waiting in self._outbox.oldest(room, without=self._sent.keys()):
            key = (waiting.boot, waiting.seq)
            self._sent[key] = 0.0
            publishes.append(
                Publish(
                    topic=protocol.topic(self.identity.device, waiting.channel),
                    payload=waiting.payload,
                    # An old report sent again must not replace the retained newest one.
                    retain=key == self._newest_report,
                )
            )
        return publishes


def _durable(record: Record) -> Record:
    """The record without what only this boot needs to know."""
    if record.update is None:
        return record
    volatile = replace(record.update, elapsed=0.0, tests_ok=False, echoed=False)
    return replace(record, update=volatile)


__all__ = ["Agent", "ComponentReport", "Identity", "Settings"]
