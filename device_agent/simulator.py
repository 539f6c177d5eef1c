"""Many simulated devices in one process: each runs the agent's own core, over asyncio.

Every device has its own directory (identity, journal, outbox, slots opened on use) and its own MQTT
session; what one leaves behind, `bellwether-agent run` can continue, and the other way round. Only
the machine is simulated: driving, boot and silence (`simulated_machine`), and scripted faults. At
most `MOST` devices a process. Nothing here decides about updates: that is `device_agent.agent`.

Faults are a JSON list: {"at": SECONDS, "do": "offline" | "restart" | "clock", "for": SECONDS,
"devices": "car-00*" | "share": 0.1, "by": SECONDS}. `at` counts from the start of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import fnmatch
import json
import os
import resource
import signal
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from device_agent import protocol, work
from device_agent.agent import (
    AckArrived,
    Agent,
    Connected,
    DesiredArrived,
    Disconnected,
    Event,
    Fact,
    Identity,
    Publish,
    Settings,
    Started,
    Tick,
)
from device_agent.download import Downloader, Patience
from device_agent.journal import Journal, JournalBroken
from device_agent.link import SESSION_SECONDS
from device_agent.machine import Disk, boot_id, hash_file
from device_agent.mqtt import PacketTypes, Properties, mqtt, secure
from device_agent.outbox import Outbox
from device_agent.protocol import Channel, ComponentReport, HistoryEntry, ProtocolError, Reason
from device_agent.record import Limits, Record
from device_agent.simulated_machine import DAY, Driver, Vehicle, share
from device_agent.work import SelfTestsDone

MOST = 1_000  # devices in one process
KEEPALIVE = 60
_TICK = 1.0
_RESTART = 5.0  # seconds after which a supervisor starts an agent that has ended
_FACTORY_BOOT = "factory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a device left the factory with."""

    component: str
    release: str
    bundle: str  # path of the artifact file


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One scripted fault."""

    at: float
    do: str
    lasting: float = 0.0
    devices: str = "*"
    share: float = 1.0
    by: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Script:
        """Raises ValueError that names the field."""
        known = {"at", "do", "for", "devices", "share", "by"}
        for name in data:
            if name not in known:
                raise ValueError(f"faults: {name}: unknown; known: {', '.join(sorted(known))}")
        if data.get("do") not in ("offline", "restart", "clock"):
            raise ValueError('faults: do: "offline", "restart" or "clock" is expected')
        try:
            return cls(
                at=float(data["at"]),
                do=str(data["do"]),
                lasting=float(data.get("for", 0.0)),
                devices=str(data.get("devices", "*")),
                share=float(data.get("share", 1.0)),
                by=float(data.get("by", 0.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"faults: {error!r}: a number is expected") from None

    def meets(self, device: str) -> bool:
        named = fnmatch.fnmatchcase(device, self.devices)
        return named and share("fault", self.at, device) < self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one process simulates; travels as JSON."""

    root: str  # directory that holds one directory a device
    devices: tuple[str, ...]
    seed: str = "1"
    pace: float = 8.0  # hours of driving a second
    history_days: int = 0
    health_interval: float = 1.0
    trial_soak: float = 1.0
    trial_deadline: float = 600.0
    connects_per_second: float = 100.0
    images: tuple[Image, ...] = ()
    faults: tuple[Script, ...] = ()
    careful: float = 0.4

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        body = json.loads(text)
        body["devices"] = tuple(body["devices"])
        body["images"] = tuple(Image(**image) for image in body["images"])
        body["faults"] = tuple(Script(**fault) for fault in body["faults"])
        return cls(**body)


class AsyncLink:
    """paho over an asyncio loop: one session, no thread. Connecting again is the caller's."""

    def __init__(
        self,
        identity: Identity,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Event], None],
    ) -> None:
        url = urlsplit(identity.broker_url)
        if url.scheme not in ("mqtt", "mqtts") or not url.hostname:
            raise ValueError(f"{identity.broker_url!r}: mqtt://host:port is expected")
        self._host = url.hostname
        self._port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        self._loop = loop
        self._deliver = deliver
        self._topics: tuple[str, ...] = ()
        self.up = False
        self.open = False
        self._cut = False
        self._deaf = False
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=identity.device,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.username_pw_set(identity.broker_username, identity.broker_password)
        self._client.max_inflight_messages_set(20)
        if url.scheme == "mqtts":
            secure(self._client)
        self._client.on_socket_open = self._socket_open
        self._client.on_socket_close = self._socket_close
        self._client.on_socket_register_write = self._register_write
        self._client.on_socket_unregister_write = self._unregister_write
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    def connect(self, topics: tuple[str, ...], will: tuple[str, bytes]) -> None:
        """Raises OSError when nobody listens."""
        self._topics = topics
        self._cut = self._deaf = False
        self._client.will_set(will[0], will[1], qos=1, retain=True)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_SECONDS
        self._client.connect(
            self._host, self._port, KEEPALIVE, clean_start=False, properties=properties
        )

    def publish(self, message: Publish) -> None:
        if self.up and not self._cut:
            self._client.publish(
                message.topic, message.payload, qos=message.qos, retain=message.retain
            )

    def misc(self) -> None:
        """Keep-alive; about once a second."""
        if self.open:
            self._client.loop_misc()

    def cut(self) -> None:
        """The network is gone: no goodbye, the broker speaks our will.

        paho notices when its socket is read next; until then nothing passes, in neither direction.
        We may stand inside one of its callbacks here, so it must not be entered again.
        """
        sock: Any = self._client.socket()
        if sock is not None:
            self._cut = True
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def fade(self) -> None:
        """Hear nothing from now on; what was said a moment ago still leaves, then all is cut."""
        self._deaf = True  # paho writes at the loop's next turn
        self._loop.call_later(0.02, self.cut)

    def abandon(self) -> None:
        """Cut, and never heard of again: its owner has crashed."""
        self._deliver = lambda _event: None
        self.cut()

    def close(self, last_word: tuple[str, bytes]) -> None:
        """An orderly end."""
        if self._cut:
            return
        if self.up:
            self._client.publish(last_word[0], last_word[1], qos=1, retain=True)
        self._client.disconnect()
        if self.open:
            self._client.loop_write()

    def _socket_open(self, _client: Any, _data: Any, sock: Any) -> None:
        self.open = True
        self._loop.add_reader(sock, self._read)

    def _socket_close(self, _client: Any, _data: Any, sock: Any) -> None:
        self.open = False
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)

    def _register_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._loop.add_writer(sock, self._write)

    def _unregister_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._loop.remove_writer(sock)

    def _read(self) -> None:
        self._client.loop_read()

    def _write(self) -> None:
        self._client.loop_write()

    def _on_connect(self, client: Any, _data: Any, _flags: Any, reason: Any, _props: Any) -> None:
        if not reason.is_failure:
            client.subscribe([(topic, mqtt.SubscribeOptions(qos=1)) for topic in self._topics])

    def _on_subscribe(self, *_: Any) -> None:
        self.up = True
        self._deliver(Connected())

    def _on_disconnect(self, *_: Any) -> None:
        if self.up:
            self.up = False
            self._deliver(Disconnected())

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        if self._cut or self._deaf:
            return
        try:
            _device, channel = protocol.parse_topic(message.topic)
        except ProtocolError:
            return
        if channel is Channel.DESIRED and message.payload:
            self._deliver(DesiredArrived(payload=bytes(message.payload)))
        elif channel is Channel.ACK:
            self._deliver(AckArrived(payload=bytes(message.payload)))


class Device:
    """One simulated device: the real core, the real disk, a simulated machine around it."""

    def __init__(
        self,
        identity: Identity,
        plan: Plan,
        loop: asyncio.AbstractEventLoop,
        workers: ThreadPoolExecutor,
    ) -> None:
        self.name = identity.device
        self._identity = identity
        self._plan = plan
        self._loop = loop
        self._workers = workers
        self._directory = Path(plan.root) / identity.device
        credentials = (identity.broker_username, identity.broker_password)
        patience = Patience(deadline=120.0, first_wait=0.5, longest_wait=5.0)
        transfer = Downloader(server=identity.server, credentials=credentials, patience=patience)
        self._disk = Disk(self._directory, transfer, self_tests=self._self_tests)
        driver = Driver(careful=plan.careful)
        self.vehicle = Vehicle(self.name, seed=plan.seed, pace=plan.pace, driver=driver)
        self._effects: asyncio.Queue[work.Effect] = asyncio.Queue()
        self._skew = 0.0
        self._offline_until = 0.0
        self._wait = 0.5
        self._connect_at = 0.0
        self._began = 0.0
        self._ran: dict[str, str] = {}
        self._crashes = 0
        self._working: asyncio.Task[None] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._journal: Journal | None = None
        self._outbox: Outbox | None = None
        self._agent: Agent | None = None
        self._link = AsyncLink(identity, loop, self._handle)

    # -- life -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """On a worker, before the first start: factory image, and the history it recorded."""
        fresh = not (self._directory / "journal.db").exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        if fresh and self._plan.images:
            self._leave_factory()

    def start(self) -> None:
        limits = Limits(trial_soak=self._plan.trial_soak, trial_deadline=self._plan.trial_deadline)
        try:
            self._journal = Journal(self._directory / "journal.db")
            self._outbox = Outbox(self._directory / "outbox.db", max_messages=20_000)
            settings = Settings(limits=limits)
            self._agent = Agent(self._identity, self._journal, self._outbox, settings)
        except (sqlite3.Error, JournalBroken) as error:
            self._fail(error)
            return
        self._follow_slots()
        self._working = self._loop.create_task(self._work())
        # The simulated machine boots when a script cuts its power, not when we are killed.
        machine = f"{self._crashes}.{boot_id()}" if boot_id() else ""
        self._handle(Started(boot=uuid.uuid4().hex, machine=machine, active=self._disk.digests()))

    async def stop(self) -> None:
        """The orderly end; everything that matters is on the disk already."""
        if self._agent is not None:
            self._link.close(self._agent.will())
        await self._put_down()

    async def crash(self) -> None:
        """The power is cut; the next start continues from the journal."""
        self._crashes += 1
        await self._begin_again()

    def _fail(self, error: Exception) -> None:
        """What ends an agent's process ends this device's alone, and its supervisor starts it."""
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            sys.stderr.write(f"{self.name}: {error}; again in {_RESTART:g} s\n")
        self._agent = None
        self._restart = self._loop.create_task(self._recover())

    async def _recover(self) -> None:
        self._link.abandon()
        await asyncio.sleep(_RESTART)
        await self._begin_again()

    async def _begin_again(self) -> None:
        self._link.abandon()
        await self._put_down()
        self._effects = asyncio.Queue()
        self._link = AsyncLink(self._identity, self._loop, self._handle)
        self._connect_at = 0.0
        self.start()

    async def _put_down(self) -> None:
        self._agent = None
        for task in (self._working, self._restart):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        for store in (self._journal, self._outbox):
            if store is not None:
                store.close()
        self._journal = self._outbox = None

    # -- faults -----------------------------------------------------------------------------------

    def go_offline(self, seconds: float) -> None:
        self._offline_until = time.monotonic() + seconds
        self._link.cut()

    def shift_clock(self, seconds: float) -> None:
        self._skew = seconds

    @property
    def reachable(self) -> bool:
        """Is there a network at all?"""
        return time.monotonic() >= self._offline_until and not self.vehicle.silent

    # -- a second ---------------------------------------------------------------------------------

    def tick(self) -> bool:
        """Once a second. Answers whether it would connect now (`connect` is paced by the owner)."""
        if self._agent is None:
            return False
        self._link.misc()
        now = self._now()
        self._handle(Tick(facts={"parked": True, "landed": True, "disarmed": True}))
        if self._agent is not None and now - self._began >= self._plan.health_interval:
            self._sample(now)
        due = time.monotonic() >= self._connect_at
        return self.reachable and not self._link.open and due

    def connect(self) -> None:
        if self._agent is None:
            return
        spread = 0.5 + share(self.name, time.monotonic())
        self._connect_at = time.monotonic() + self._wait * spread
        self._wait = min(self._wait * 2, 30.0)
        try:
            self._link.connect(self._agent.subscriptions, self._agent.will())
        except OSError:
            return

    def _sample(self, now: float) -> None:
        seconds, began = now - self._began, self._began
        self._began = now
        if 0 < seconds < 3_600:
            self._handle(self.vehicle.drive(self._ran, began, seconds))

    # -- events and effects -----------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        agent = self._agent
        if agent is None:
            return
        if isinstance(event, Connected):
            self._wait = 0.5
        try:
            effects = agent.handle(event, self._now())
        except sqlite3.Error as error:
            self._fail(error)
            return
        for effect in effects:
            if isinstance(effect, Publish):
                self._link.publish(effect)
            elif not isinstance(effect, work.Cancel):
                self._effects.put_nowait(effect)
        if agent.running() != self._ran:
            self._follow_slots()

    async def _work(self) -> None:
        while True:
            effect = await self._effects.get()
            if isinstance(effect, work.ProbeLink):
                # A car without a network finds no other road either.
                alive = self.reachable and await self._server_answers()
                self._handle(Fact(work.LinkProbed(attempt=effect.attempt, alive=alive)))
                continue
            fact = await self._loop.run_in_executor(self._workers, self._disk.execute, effect)
            if fact is not None:
                self._handle(Fact(fact))  # a switch that changed what runs is followed in there

    async def _server_answers(self) -> bool:
        url = urlsplit(self._identity.server)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            _reader, writer = await asyncio.open_connection(url.hostname, port)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        writer.close()
        return True

    def _switched(self) -> None:
        """The links point elsewhere: what the car does follows from there, from this moment."""
        slots = {c: self._disk.slots.active(c) for c in self._disk.slots.components()}
        paths = {c: slot.path for c, slot in slots.items() if slot is not None}
        digests = {c: slot.digest for c, slot in slots.items() if slot is not None}
        self.vehicle.switched(paths, digests)
        if self.vehicle.silent and self._agent is not None:
            self._link.fade()

    def _follow_slots(self) -> None:
        """Another set runs: a new interval begins, nothing of it belongs to the old one."""
        self._switched()
        self._began = self._now()
        self._ran = self._agent.running() if self._agent is not None else {}

    def _self_tests(self, slots: Mapping[str, Path], attempt: str) -> SelfTestsDone:
        ok, said = self.vehicle.boots()
        return SelfTestsDone(attempt=attempt, ok=ok, log=said, reason=Reason.BOOT_FAILED)

    def _now(self) -> float:
        return time.time() + self._skew

    # -- factory ----------------------------------------------------------------------------------

    def _leave_factory(self) -> None:
        """Slot a holds the image, the journal says so, the outbox is full of recorded days.

        The journal comes last, and at once: killed before it, the device leaves the factory again.
        """
        now = time.time()
        for begun in self._directory.glob("outbox.db*"):
            begun.unlink()
        days = self._plan.history_days
        running: dict[str, ComponentReport] = {}
        entries = []
        for image in self._plan.images:
            bundle = Path(image.bundle)
            digest = hash_file(bundle)
            self._disk.slots.install(image.component, image.release, digest, bundle)
            self._disk.slots.switch({image.component: digest})
            running[image.component] = ComponentReport(
                release=image.release, digest=digest, committed=True
            )
            entries.append(
                HistoryEntry(
                    component=image.component,
                    release=image.release,
                    digest=digest,
                    at=now - (days + 1) * DAY,
                    event="activated",
                )
            )
        self._switched()
        digests = {component: report.digest for component, report in running.items()}
        outbox = Outbox(self._directory / "outbox.db", max_messages=20_000)
        for message in self.vehicle.past(digests, days, now, _FACTORY_BOOT):
            payload = protocol.encode(message)
            outbox.put(message.boot, message.seq, Channel.HEALTH, payload)
        outbox.close()
        made = self._directory / "journal.new"
        made.unlink(missing_ok=True)
        journal = Journal(made)
        journal.save(replace(Record(), running=running, history=tuple(entries)))
        journal.close()
        made.rename(self._directory / "journal.db")

    def recorded(self) -> int:
        """Days of recorded history that the server has not acknowledged yet."""
        if self._outbox is None:
            return self._plan.history_days
        return sum(waiting.boot == _FACTORY_BOOT for waiting in self._outbox.oldest(1))


class Fleet:
    """The devices of one process: started, ticked, connected at a pace, ended."""

    def __init__(self, plan: Plan, say: Callable[[Mapping[str, Any]], None]) -> None:
        if len(plan.devices) > MOST:
            raise ValueError(f"{len(plan.devices)} devices: at most {MOST} in one process")
        self._plan = plan
        self._say = say
        self._stop = asyncio.Event()
        self.devices: list[Device] = []

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="disk") as workers:
            await self._start(loop, workers)
            scripts = [loop.create_task(self._play(script)) for script in self._plan.faults]
            told = loop.create_task(self._tell_history())
            try:
                await self._beat()
            finally:
                for task in (*scripts, told):
                    task.cancel()
                await asyncio.gather(*(device.stop() for device in self.devices))

    async def _start(self, loop: asyncio.AbstractEventLoop, workers: ThreadPoolExecutor) -> None:
        for name in self._plan.devices:
            identity = Identity.load(Path(self._plan.root) / name / "identity.json")
            self.devices.append(Device(identity, self._plan, loop, workers))
        await asyncio.gather(*(loop.run_in_executor(workers, d.prepare) for d in self.devices))
        for device in self.devices:
            device.start()
        self._say({"event": "started", "devices": len(self.devices)})

    async def _beat(self) -> None:
        """Each device once a second, spread over the second; connects no faster than their pace."""
        room, slices = 0.0, 10
        turn = 0
        next_at = time.monotonic()
        while not self._stop.is_set():
            room = min(room + self._plan.connects_per_second * _TICK / slices, 50.0)
            for device in self.devices[turn::slices]:
                if device.tick() and room >= 1.0:
                    room -= 1.0
                    device.connect()
            turn = (turn + 1) % slices
            next_at = max(next_at + _TICK / slices, time.monotonic() - _TICK)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), max(0.001, next_at - time.monotonic()))

    async def _tell_history(self) -> None:
        """Say once when all of the recorded history is in the server's store."""
        while any(device.recorded() for device in self.devices):
            await asyncio.sleep(0.5)
        self._say({"event": "history", "devices": len(self.devices)})

    async def _play(self, script: Script) -> None:
        await asyncio.sleep(script.at)
        for device in self.devices:
            if not script.meets(device.name):
                continue
            if script.do == "offline":
                device.go_offline(script.lasting)
            elif script.do == "clock":
                device.shift_clock(script.by)
            else:
                await device.crash()


def _say(word: Mapping[str, Any]) -> None:
    """One JSON line for each thing that the parent waits for."""
    with contextlib.suppress(OSError):  # on a full disk nobody reads of it
        sys.stdout.write(json.dumps(word) + "\n")
        sys.stdout.flush()


def scripts(data: object) -> tuple[Script, ...]:
    """A faults file's content; raises ValueError."""
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ValueError("faults: a list of objects is expected")
    return tuple(Script.from_json(entry) for entry in data)


def split(devices: Sequence[str], processes: int) -> Iterable[tuple[str, ...]]:
    """The devices of each process; more processes than asked for where `MOST` demands it."""
    count = max(processes, -(-len(devices) // MOST), 1)
    parts = [tuple(devices[i::count]) for i in range(count)]
    return [part for part in parts if part]


async def _main(plan: Plan, parent: int) -> None:
    fleet = Fleet(plan, _say)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, fleet.stop)
    orphaned = loop.create_task(_until_orphaned(parent))
    orphaned.add_done_callback(lambda _: fleet.stop())
    await fleet.run()
    orphaned.cancel()


async def _until_orphaned(parent: int) -> None:
    """Whoever started us was killed: it, started again, starts another one of us."""
    while os.getppid() == parent:
        await asyncio.sleep(0.25)


def main() -> int:
    """`python -m device_agent.simulator PLAN.json`, until SIGTERM or until its parent is gone."""
    parent, file = os.getppid(), Path(sys.argv[1])
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with file.open() as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)  # a process that is still ending has these devices
        asyncio.run(_main(Plan.from_json(plan.read()), parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
