"""The server's MQTT 5 sessions: asyncio over the `mqtt5` codec, acknowledged by hand, in batches.

Rules, in order:

1. A received QoS 1 message is acknowledged to the broker only by `ack`, after its commit. An ack
   that belongs to a connection that is gone is dropped: the broker will send the message again.
2. One write carries all PUBACKs of a batch (one by one they cost seven times as much).
3. `pause` stops reading: what comes waits in the sockets and then at the broker, so that memory
   stays flat when the database stalls. `receive_maximum` alone does not do it: QoS 0 passes by it,
   and Mosquitto 2.0 sends a whole window more for each PUBACK of a full one (measured).
4. Published QoS 1 messages go out in a window of `WINDOW` or the server's receive maximum; what a
   lost connection left open goes out again on the next one, until the caller's time is over.
5. A lost or refused connection is tried again after a random pause that doubles up to `MAX_PAUSE`.
   A refused subscription counts as a refused connection: it would otherwise be silent for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import SystemRandom
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mqtt5
import msgspec
import structlog

from telemetry import metrics
from telemetry.wire import MAX_PACKET, Wire, pubacks

WINDOW = 1000  # published messages on their way
MAX_PAUSE = 15.0  # seconds between two attempts

log = structlog.get_logger("bellwether.broker")
T = TypeVar("T")


class BrokerUnavailable(Exception):
    """The connection could not be opened, or was lost; trying again may help."""


class Received(msgspec.Struct, frozen=True, gc=False):
    topic: str
    payload: bytes
    packet_id: int | None  # None: QoS 0, nothing to acknowledge
    session: int  # the connection it came on


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    url: str  # mqtt://host[:port] or mqtts://host[:port]
    client_id: str
    username: str | None = None
    password: str | None = None
    subscribe: tuple[str, ...] = ()
    clean_start: bool = False  # a session begun with True is not kept by Mosquitto
    session_expiry: int = 7 * 86_400
    keep_alive: int = 20
    receive_maximum: int = 2000
    ca_file: str | None = None

    def address(self) -> tuple[str, int, ssl.SSLContext | None]:
        """Host, port and TLS; raises ValueError for what is no MQTT URL."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise ValueError(f"{self.url!r}: use mqtt://HOST:PORT or mqtts://HOST:PORT")
        if parts.scheme == "mqtt":
            return parts.hostname, parts.port or 1883, None
        return parts.hostname, parts.port or 8883, ssl.create_default_context(cafile=self.ca_file)


@dataclass(slots=True)
class _Job:
    """One `publish_many`: which of its messages the broker has."""

    results: list[bool]
    left: int
    done: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: bool = False

    def settle(self, index: int, *, taken: bool) -> None:
        self.results[index] = taken
        self.left -= 1
        if self.left == 0:
            self.done.set()


@dataclass(frozen=True, slots=True)
class _Outgoing:
    job: _Job
    index: int
    topic: str
    payload: bytes
    retain: bool


class Connection:
    """One session that is kept alive by `run` until `stop`."""

    def __init__(
        self,
        options: Options,
        on_message: Callable[[Received], None] | None = None,
        on_messages: Callable[[list[Received]], None] | None = None,
    ):
        """`on_messages` gets what one read brought at once; `on_message` one after the other."""
        options.address()  # a bad URL is the caller's mistake: say so now
        self._options = options
        self._on_message = on_message
        self._on_messages = on_messages
        self._session = 0
        self._opened = 0
        self._wire: Wire | None = None
        self._connack: asyncio.Future[mqtt5.ConnAckPacket] | None = None
        self._suback: asyncio.Future[mqtt5.SubAckPacket] | None = None
        self._stopping = asyncio.Event()
        self.up = asyncio.Event()
        self.last_error: str | None = None
        self._window = WINDOW
        self._keep_alive = options.keep_alive
        self._free: deque[int] = deque()
        self._waiting: deque[_Outgoing] = deque()
        self._open: dict[int, _Outgoing] = {}

    @property
    def connected(self) -> bool:
        return self.up.is_set()

    @property
    def connections(self) -> int:
        """How often a session was opened: a new one may be with a broker that forgot all."""
        return self._opened

    async def run(self) -> None:
        """Connect, serve, connect again, until `stop`."""
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._open_session()
                failures = 0
                await self._serve()
            except (OSError, BrokerUnavailable, TimeoutError) as error:
                self.last_error = str(error) or type(error).__name__
                log.warning("broker_lost", client=self._options.client_id, error=self.last_error)
            finally:
                await self._close_session()
            if self._stopping.is_set():
                return
            failures += 1
            pause = SystemRandom().uniform(0.05, min(MAX_PAUSE, 0.25 * 2 ** min(failures, 10)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    def stop(self) -> None:
        """Ask `run` to disconnect in order and return."""
        self._stopping.set()
        if self._wire is not None:
            self._wire.ended.set()

    def ack(self, received: Sequence[Received]) -> None:
        """Tell the broker that these are ours now: one write for all."""
        wire = self._wire
        if wire is None:
            return
        session = self._session
        packet_ids = [
            message.packet_id
            for message in received
            if message.packet_id is not None and message.session == session
        ]
        if packet_ids:
            wire.write(pubacks(packet_ids))

    def pause(self) -> None:
        """Read no more until `resume`; a new connection reads."""
        if self._wire is not None:
            self._wire.pause()

    def resume(self) -> None:
        if self._wire is not None:
            self._wire.resume()

    async def publish_many(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> list[bool]:
        """Which of the messages the broker has taken (QoS 0: which were sent) within `timeout`."""
        if not messages:
            return []
        if qos == 0:
            return await self._send(messages, retain=retain, timeout=timeout)
        job = _Job([False] * len(messages), len(messages))
        self._waiting.extend(
            _Outgoing(job, index, topic, payload, retain)
            for index, (topic, payload) in enumerate(messages)
        )
        self._pump()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.done.wait(), timeout)
        finally:
            job.given_up = True
        metrics.count("bellwether_broker_published_total", sum(job.results))
        return list(job.results)

    # -- one connection ----------------------------------------------------------------------------

    async def _open_session(self) -> None:
        options = self._options
        host, port, tls = options.address()
        loop = asyncio.get_running_loop()
        self._connack, self._suback = loop.create_future(), loop.create_future()
        async with asyncio.timeout(10):
            _, self._wire = await loop.create_connection(
                lambda: Wire(self._packets), host, port, ssl=tls
            )
            self._session += 1
            self._wire.write(self._connect_packet())
            answer = await self._answer(self._connack)
            if answer.reason_code != mqtt5.ConnAckReasonCode.SUCCESS:
                raise BrokerUnavailable(f"broker refuses: {answer.reason_code!r}")
            await self._subscribe()
        self._window = max(1, min(WINDOW, answer.receive_max))
        self._free = deque(range(1, self._window + 1))
        keep_alive = answer.server_keep_alive
        self._keep_alive = options.keep_alive if keep_alive is None else keep_alive
        self.last_error = None
        self._opened += 1
        self.up.set()
        metrics.gauge("bellwether_broker_connected", 1, client=options.client_id)
        metrics.count("bellwether_broker_connects_total", client=options.client_id)
        log.info("broker_connected", client=options.client_id, resumed=answer.session_present)
        self._pump()

    async def _subscribe(self) -> None:
        filters = [
            mqtt5.TopicFilter(
                pattern,
                max_qos=mqtt5.QoS.AT_LEAST_ONCE,
                retain_handling=mqtt5.RetainHandling.SEND_NEVER,
            )
            for pattern in self._options.subscribe
        ]
        if not filters:
            return
        assert self._wire is not None and self._suback is not None  # noqa: S101, PT018
        # 65535 lies outside of the window: the ids of subscriptions and messages never meet.
        self._wire.write(mqtt5.SubscribePacket(65_535, filters).write())
        answer = await self._answer(self._suback)
        refused = [
            f"{wanted.pattern}: {code!r}"
            for wanted, code in zip(filters, answer.reason_codes, strict=True)
            if int(code) >= 128  # no IntEnum, whatever its stub says
        ]
        if refused:
            raise BrokerUnavailable(f"broker refuses to let us hear {', '.join(refused)}")

    async def _serve(self) -> None:
        """Until the end: ping when due, and give up on a broker that no longer answers."""
        assert self._wire is not None  # noqa: S101
        beat = self._keep_alive / 2 if self._keep_alive else 3600.0
        silent = 0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wire.ended.wait(), beat)
            if self._stopping.is_set():
                return
            if self._wire.ended.is_set():
                raise BrokerUnavailable(self._wire.error or "connection lost")
            silent = 0 if self._wire.heard or self._wire.paused else silent + 1
            self._wire.heard = False
            if silent >= 3:
                raise BrokerUnavailable("the broker is silent")
            self._wire.write(mqtt5.PingReqPacket().write())

    async def _close_session(self) -> None:
        self.up.clear()
        metrics.gauge("bellwether_broker_connected", 0, client=self._options.client_id)
        wire, self._wire = self._wire, None
        if wire is not None:
            if self._stopping.is_set():
                wire.write(mqtt5.DisconnectPacket().write())
                if wire.transport is not None:
                    wire.transport.close()
            else:
                wire.end("closed")
        for future in (self._connack, self._suback):
            if future is not None:
                future.cancel()
        # In order, and before what has not been sent yet: the newest order of a device stays last.
        self._waiting.extendleft(reversed(self._open.values()))
        self._open.clear()

    async def _answer(self, future: asyncio.Future[T]) -> T:
        """The broker's answer, or the end of the connection, whichever comes first."""
        assert self._wire is not None  # noqa: S101
        ended = asyncio.ensure_future(self._wire.ended.wait())
        either: list[asyncio.Future[Any]] = [ended, future]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not future.done():
            raise BrokerUnavailable(self._wire.error or "connection lost")
        return future.result()

    def _connect_packet(self) -> bytes:
        options = self._options
        return mqtt5.ConnectPacket(
            options.client_id,
            username=options.username,
            password=None if options.password is None else options.password.encode(),
            clean_start=options.clean_start,
            keep_alive=options.keep_alive,
            session_expiry_interval=0 if options.clean_start else options.session_expiry,
            receive_max=options.receive_maximum,
            max_packet_size=MAX_PACKET,
        ).write()

    # -- packets -----------------------------------------------------------------------------------

    def _packets(self, packets: list[mqtt5.Packet]) -> None:
        received: list[Received] = []
        session = self._session
        for packet in packets:
            if isinstance(packet, mqtt5.PublishPacket):
                received.append(Received(packet.topic, packet.payload, packet.packet_id, session))
            else:
                self._packet(packet)
        if not received:
            return
        if self._on_messages is not None:
            self._on_messages(received)
        if self._on_message is not None:
            for message in received:
                self._on_message(message)

    def _packet(self, packet: mqtt5.Packet) -> None:
        if isinstance(packet, mqtt5.PubAckPacket):
            self._taken(packet)
        elif isinstance(packet, mqtt5.ConnAckPacket):
            _resolve(self._connack, packet)
        elif isinstance(packet, mqtt5.SubAckPacket):
            _resolve(self._suback, packet)
        elif isinstance(packet, mqtt5.DisconnectPacket) and self._wire is not None:
            self._wire.end(f"broker disconnects: {packet.reason_code!r}")

    def _taken(self, packet: mqtt5.PubAckPacket) -> None:
        outgoing = self._open.pop(packet.packet_id, None)
        if outgoing is None:
            return
        self._free.append(packet.packet_id)
        outgoing.job.settle(outgoing.index, taken=int(packet.reason_code) < 128)
        # Refill in large pieces: a packet per PUBACK would be a system call per packet.
        if len(self._free) * 4 >= self._window or not self._open:
            self._pump()

    def _pump(self) -> None:
        wire = self._wire
        if wire is None or not self.connected:
            return
        data: list[bytes] = []
        while self._waiting and self._free:
            outgoing = self._waiting.popleft()
            if outgoing.job.given_up:
                continue
            packet_id = self._free.popleft()
            self._open[packet_id] = outgoing
            data.append(
                mqtt5.PublishPacket(
                    outgoing.topic,
                    outgoing.payload,
                    qos=mqtt5.QoS.AT_LEAST_ONCE,
                    retain=outgoing.retain,
                    packet_id=packet_id,
                ).write()
            )
        if data:
            wire.write(b"".join(data))

    async def _send(
        self, messages: Sequence[tuple[str, bytes]], *, retain: bool, timeout: float
    ) -> list[bool]:
        """QoS 0, a window at a time, so that a slow broker does not fill our memory."""
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                for first in range(0, len(messages), WINDOW):
                    if self._wire is None or not self.connected:
                        break
                    some = messages[first : first + WINDOW]
                    packets = [mqtt5.PublishPacket(t, p, retain=retain).write() for t, p in some]
                    self._wire.write(b"".join(packets))
                    sent += len(some)
                    await self._wire.writable.wait()
        return [index < sent for index in range(len(messages))]


def _resolve(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


class Publisher:
    """A synchronous publisher for threads: its own Connection on a loop in its own thread."""

    def __init__(
        self, url: str, username: str | None, password: str | None, client_id: str
    ) -> None:
        # Nothing to receive, so nothing to keep: what is unacknowledged is in the caller's outbox.
        self._options = Options(
            url=url, username=username, password=password, client_id=client_id, clean_start=True
        )
        self._options.address()
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._connection = Connection(self._options)

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def connections(self) -> int:
        return self._connection.connections

    @property
    def last_error(self) -> str | None:
        return self._connection.last_error

    def start(self) -> None:
        """Connect in the background; returns at once, whether or not the broker is there."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()

    def publish(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> list[bool]:
        """Which of the messages the broker has taken within `timeout`; never raises for it."""
        return self.begin(messages, qos=qos, retain=retain, timeout=timeout)()

    def begin(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> Callable[[], list[bool]]:
        """`publish`, whose answer is waited for later."""
        if self._thread is None or not self._thread.is_alive():
            return lambda: [False] * len(messages)
        work = self._connection.publish_many(messages, qos=qos, retain=retain, timeout=timeout)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result

    def stop(self) -> None:
        """Disconnect in order and end the thread."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._connection.stop)
        self._thread.join()
        self._thread = None
        self._loop.close()

    def _work(self) -> None:
        self._loop.run_until_complete(self._connection.run())
