"""Rollback: from the HTTP call to the orders on the wire, while ingest works at half its rate.

Real processes on one machine: `serve --role api`, `controller` and `ingest`, a Mosquitto of its
own, SQLite. The call is a `POST /api/v1/rollouts/NAME:rollback`; the other end is a subscriber
that notes when the kernel handed it each order. Every order that came is opened and its signature
checked for its device afterwards. Completed rollouts are rolled back, one after the other, each of
a fleet of its own; a further fleet soaks, and the load is its telemetry. Afterwards the load is
counted: a measurement that ingest fell behind in says so.

Where the time goes: until the turn of the loop begins that carries the call out (the order says
when it was issued), and from there until it is on the wire (decided, signed, committed, published).

The floors are measured in the same run: as many messages published alone, pipelined; as many
signatures alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mqtt5
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from sqlalchemy import Engine, func, select

from bench import load, planted, servers
from bench.report import Options, Row
from bench.world import texts
from controller.keys import DirectorKey
from controller.store.database import open_control
from controller.store.tables import desired
from device_agent.protocol import Kind, open_envelope
from telemetry.store.database import open_engine, reading
from telemetry.store.tables import create_schema, health

SMALL = 10  # devices of a small rollout
CALLS = 120  # rollbacks of small rollouts
FIRST = 100.0  # milliseconds, p99, from the call to the first order
LARGE = {1_000: (500.0, 5), 10_000: (2_000.0, 3)}  # devices → (milliseconds to the last, fleets)
PATIENCE = 180.0


class Wrong(AssertionError):
    """An order is missing, or is not signed for its device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One rollback, in milliseconds from the call."""

    answer: float
    turn: float  # until the loop's turn began
    first: float
    last: float


def run(options: Options) -> list[Row]:
    calls = options.runs or CALLS
    fleets = [planted.Fleet(name=f"s{i:04d}", size=SMALL) for i in range(calls + 3)]
    large = [
        planted.Fleet(name=f"l{size}n{i}", size=size)
        for size, (_, n) in LARGE.items()
        for i in range(n)
    ]
    with (
        tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder,
        _system(Path(folder), [*fleets, *large], options) as system,
    ):
        for fleet in fleets[:3]:  # the first ones warm up
            system.rollback(fleet)
        load_began = system.load()
        small = [system.rollback(fleet) for fleet in fleets[3:]]
        sizes = {
            size: [system.rollback(fleet) for fleet in large if fleet.size == size]
            for size in LARGE
        }
        committed = system.load().since(load_began)
        system.check()
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        floors = list(_floors(Path(folder)))
    load_row = Row(
        name="load that ingest committed meanwhile",
        value=committed,
        unit="messages/s",
        limit=0.9 * system.rate,
        better="higher",
        peer="0.9 of half of what it takes alone",
    )
    return [*_rows(small, sizes), load_row, *floors]


def _rows(small: Sequence[Timed], sizes: dict[int, list[Timed]]) -> Iterator[Row]:
    first = sorted(timed.first for timed in small)
    yield Row(
        name=f"call to first order, p99 of {len(first)}",
        value=first[math.ceil(0.99 * len(first)) - 1],
        unit="ms",
        limit=FIRST,
        peer="promise",
        more={"p50": round(statistics.median(first), 1), "max": round(first[-1], 1)},
    )
    yield _stage("of it: until its turn of the loop, p99", [timed.turn for timed in small])
    yield _stage("of it: from there to the wire, p99", [t.first - t.turn for t in small])
    yield _stage("call to its answer, p99", [timed.answer for timed in small])
    for size, found in sizes.items():
        last = [timed.last for timed in found]
        yield Row(
            name=f"call to the last of {size:,} orders, worst of {len(last)}",
            value=max(last),
            unit="ms",
            limit=LARGE[size][0],
            peer="promise",
            more={
                "p50": round(statistics.median(last), 1),
                "first_max": round(max(timed.first for timed in found), 1),
                "turn_max": round(max(timed.turn for timed in found), 1),
            },
        )


def _stage(name: str, times: Sequence[float]) -> Row:
    times = sorted(times)
    return Row(
        name=name,
        value=times[math.ceil(0.99 * len(times)) - 1],
        unit="ms",
        more={"p50": round(statistics.median(times), 1), "max": round(times[-1], 1)},
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """How many messages ingest had committed, and when."""

    messages: int
    at: float

    def since(self, before: _Load) -> float:
        """Messages a second."""
        return (self.messages - before.messages) / (self.at - before.at)


@dataclass
class _System:
    port: int
    http: http.client.HTTPConnection
    ears: _Ears
    key: DirectorKey
    rate: float
    control: Engine
    reports: Engine
    told: list[planted.Fleet] = field(default_factory=list)

    def load(self) -> _Load:
        ((messages,),) = servers.rows(self.reports, f"SELECT count(*) FROM {health.name}")  # noqa: S608
        return _Load(int(str(messages)), time.monotonic())

    def rollback(self, fleet: planted.Fleet) -> Timed:
        body = json.dumps({"reason": "bench"}).encode()
        heard, began, clock = self.ears.heard, time.monotonic(), time.time()
        self.http.request(
            "POST",
            f"/api/v1/rollouts/{fleet.rollout}:rollback",
            body,
            {"Content-Type": "application/json", "If-Match": "*"},
        )
        answer = self.http.getresponse()
        text = answer.read()
        answered = time.monotonic()
        if answer.status != 202:
            raise Wrong(f"{fleet.name}: {answer.status} {text[:300]!r}")
        self.ears.wait(heard + fleet.size, fleet.name)
        times = self.ears.times[heard : heard + fleet.size]
        self.told.append(fleet)
        query = select(func.min(desired.c.at)).where(
            desired.c.device.startswith(fleet.name), desired.c.kind == str(Kind.ROLLBACK)
        )
        with reading(self.control) as conn:
            turn = conn.execute(query).scalar_one() - clock
        time.sleep(0.12 + (len(self.told) * 37 % 50) / 100)  # at any moment of a turn
        return Timed(
            answer=(answered - began) * 1_000,
            turn=turn * 1_000,
            first=(times[0] - began) * 1_000,
            last=(times[-1] - began) * 1_000,
        )

    def check(self) -> None:
        """Every device of every fleet was told, by an order that is signed for it."""
        orders = dict(self.ears.orders())
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key.public_hex))
        for fleet in self.told:
            for device in fleet.devices:
                body = orders.get(f"bw/v1/{device}/desired")
                if body is None:
                    raise Wrong(f"{device} was told nothing")
                order, signed, signatures = open_envelope(body)
                public.verify(bytes.fromhex(signatures[0].sig), signed)
                digests = [part.digest for part in order.components.values()]
                if (order.device, order.kind) != (device, Kind.ROLLBACK) or digests != [
                    texts.artifact(planted.OLD)
                ]:
                    raise Wrong(f"{device} was told {order}")


_PUBLISH = 3  # the type of a packet: the upper half of its first byte


def _end(data: bytes, start: int) -> int | None:
    """Where the packet that begins there ends; None: the rest is still on its way."""
    size = 0
    for place in range(4):  # the remaining length, seven bits a byte, the least first
        at = start + 1 + place
        if at >= len(data):
            return None
        size |= (data[at] & 0x7F) << (7 * place)
        if data[at] < 0x80:
            end = at + 1 + size
            return end if end <= len(data) else None
    raise Wrong("a packet whose length has no end")


class _Ears:
    """A subscriber that only notes: bytes and the moment at which they came."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._buffer = b""
        self.times: list[float] = []
        self._packets: list[bytes] = []
        self._more = threading.Condition()
        self._socket.sendall(
            mqtt5.ConnectPacket("bench-ears", clean_start=True, keep_alive=0).write()
        )
        wanted = [
            mqtt5.TopicFilter(
                "bw/v1/+/desired",
                max_qos=mqtt5.QoS.AT_MOST_ONCE,
                retain_handling=mqtt5.RetainHandling.SEND_NEVER,
            )
        ]
        self._socket.sendall(mqtt5.SubscribePacket(1, wanted).write())
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def heard(self) -> int:
        return len(self.times)

    def orders(self) -> Iterator[tuple[str, bytes]]:
        """(topic, payload) of all that came."""
        for raw in self._packets:
            packet, _ = mqtt5.read(memoryview(raw))
            if isinstance(packet, mqtt5.PublishPacket):
                yield packet.topic, bytes(packet.payload)

    def wait(self, until: int, what: str) -> None:
        with self._more:
            if not self._more.wait_for(lambda: self.heard >= until, PATIENCE):
                raise Wrong(f"{what}: {until - self.heard} orders are missing")

    def quiet(self, seconds: float) -> None:
        """Wait until nothing came for so long."""
        before = -1
        while before != self.heard:
            before = self.heard
            time.sleep(seconds)

    def _listen(self) -> None:
        while data := self._socket.recv(1 << 18):
            now = time.monotonic()
            self._buffer += data
            self._parse(now)

    def _parse(self, now: float) -> None:
        """Cut packets apart; what is in them is read afterwards, when nobody's time is taken."""
        data, start = self._buffer, 0
        while (end := _end(data, start)) is not None:
            if data[start] >> 4 == _PUBLISH:
                self._packets.append(data[start:end])
                self.times.append(now)
            start = end
        self._buffer = data[start:]
        with self._more:
            self._more.notify_all()


@contextlib.contextmanager
def _system(root: Path, fleets: Sequence[planted.Fleet], options: Options) -> Iterator[_System]:
    state = root / "state"
    state.mkdir()
    now = time.time()
    control = open_control(f"sqlite:///{state / 'control.db'}")
    reports = open_engine(f"sqlite:///{state / 'telemetry.db'}")
    create_schema(reports)
    key = DirectorKey.load_or_create(state / "keys" / "director.pem")
    soaking = planted.Fleet(name="car", size=options.devices or 1_000, state="Soaking")
    planted.plant(control, reports, [soaking, *fleets], key, now)
    # Those whose messages find out how fast ingest is: they belong to no rollout.
    servers.plant(state, None, load.Plan(seed=0, devices=1_000, messages=0).names).dispose()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(servers.broker(root / "broker"))
        ears = _Ears(port)
        api = servers.free_port()
        stack.enter_context(servers.ingest(state, port, None, reports))
        stack.enter_context(servers.role("api", state, port, listen=f"127.0.0.1:{api}"))
        stack.enter_context(servers.role("controller", state, port, repo=str(_repository(root))))
        connection = _connection(api)
        stack.callback(connection.close)
        total = soaking.size + sum(fleet.size for fleet in fleets)
        ears.wait(total, "the orders that the broker did not have")  # the cache is filled
        ears.quiet(1.0)
        rate = _calibrate(port, options.seed) / 2
        stack.enter_context(_load(port, rate, options.seed + 1))
        time.sleep(2.0)
        yield _System(
            port=port,
            http=connection,
            ears=ears,
            key=key,
            rate=rate,
            control=control,
            reports=reports,
        )


def _repository(root: Path) -> Path:
    """A fleet repository that wants nothing new."""
    work = root / "fleet"
    work.mkdir()
    (work / "policy.yaml").write_text(texts.policy())
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for words in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-qm", "bench"]):
        subprocess.run(["git", *words], cwd=work, check=True, capture_output=True)
    return work


def _connection(port: int) -> http.client.HTTPConnection:
    """Kept open, as a client would; the first request waits until the API is there."""

    def there() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return True
        return False

    servers.until(there, "the API", 180.0)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


def _calibrate(port: int, seed: int) -> float:
    """Messages a second that the ingest takes at most: from the first to the last one's ack."""
    plan = load.Plan(seed=seed, devices=1_000, messages=40_000, now=time.time())
    child = subprocess.Popen(
        load.arguments(port, plan, await_ack=True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None  # noqa: S101
    child.stdout.readline()
    said, _ = child.communicate("go\n", timeout=300)
    found = json.loads(said)
    return len(plan.stream) / float(found["acked"] - found["began"])


@contextlib.contextmanager
def _load(port: int, rate: float, seed: int) -> Iterator[None]:
    """Publishes at this rate until the measurement is over, however long that takes."""
    words = [sys.executable, "-m", "bench.pressure", str(port), f"{rate:.1f}", "inf"]
    child = subprocess.Popen([*words, str(seed)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None  # noqa: S101
        child.stdout.readline()  # it publishes
        yield
        if child.poll() is not None:
            raise Wrong("the load has broken off")
    finally:
        child.terminate()
        child.wait(20)


def _floors(folder: Path) -> Iterator[Row]:
    """What cannot be left out, alone, on a quiet machine: signing, and publishing pipelined."""
    n = max(LARGE)
    body, private = b"x" * 600, Ed25519PrivateKey.generate()
    began = time.monotonic()
    for _ in range(n):
        private.sign(body)
    yield Row(name=f"{n:,} signatures alone", value=(time.monotonic() - began) * 1_000, unit="ms")
    pieces = [
        mqtt5.PublishPacket(
            f"bench/floor/{i}", body, qos=mqtt5.QoS.AT_LEAST_ONCE, retain=True, packet_id=i + 1
        ).write()
        for i in range(n)
    ]
    with servers.broker(folder) as port:
        session = load.Session(port, "bench-floor")
        began = time.monotonic()
        session.publish(pieces)
        name = f"{n:,} retained messages alone"
        yield Row(name=name, value=(time.monotonic() - began) * 1_000, unit="ms")
