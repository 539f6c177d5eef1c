"""The server's MQTT sessions and the ingest process against a real Mosquitto and a real store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from device_agent import protocol
from device_agent.protocol import Ack
from telemetry.broker import Connection, Options, Publisher, Received
from telemetry.ingest import Limits
from telemetry.ingest_role import Process, Role
from telemetry.ingest_role import run as serve
from telemetry.store.database import open_engine, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema
from telemetry.wire import MAX_PACKET

NOW = 1_800_000_000.0
DIGEST = "sha256:" + "a" * 64
REGISTRY = {f"car-{n}": "active" for n in range(50)}


class Mosquitto:
    """An own broker child that can be killed and started again on the same port and data."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._config = root / "mosquitto.conf"
        user = "user root\n" if os.geteuid() == 0 else ""
        self._config.write_text(
            f"{user}listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {root}/\nautosave_interval 100\nautosave_on_changes true\n"
            "max_queued_messages 0\nmax_inflight_messages 0\n"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["/usr/sbin/mosquitto", "-c", str(self._config)], stderr=subprocess.DEVNULL
        )
        while True:
            assert self._process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    yield broker
    broker.stop()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(f"sqlite:///{tmp_path / 'telemetry.db'}")
    create_schema(engine)
    yield engine
    engine.dispose()


def health(seq: int, **more: Any) -> bytes:
    message = {
        "v": 1,
        "boot": "b1",
        "bootCount": 1,
        "seq": seq,
        "components": {"autopilot": DIGEST},
        "t0": NOW - 60,
        "dt": 10,
        "counters": {"disengagement": 1},
        "exposure": {"device_hour": 1},
    }
    return json.dumps(message | more, separators=(",", ":")).encode()


async def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def connected(
    url: str, name: str, *topics: str, hear: Callable[[Received], None] | None = None, **more: Any
) -> AsyncIterator[Connection]:
    options = Options(url=url, client_id=name, subscribe=topics, **more)
    connection = Connection(options, hear)
    task = asyncio.create_task(connection.run())
    try:
        yield connection
    finally:
        connection.stop()
        await task


@contextlib.asynccontextmanager
async def ingesting(url: str, engine: Engine, **more: Any) -> AsyncIterator[Process]:
    # The clock stands still, so no bucket is ever refilled.
    limits = Limits(per_second=1.0, burst=1e9)
    values = {"registry": lambda: REGISTRY, "clock": lambda: NOW, "limits": limits} | more
    process = Process(Role(url=url, store=Store(engine), **values))
    stop = asyncio.Event()
    task = asyncio.create_task(process.run(stop))
    try:
        await asyncio.wait_for(process.connection.up.wait(), 20)
        yield process
    finally:
        stop.set()
        await task


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await story()

    asyncio.run(bounded())


def counted(engine: Engine) -> list[tuple[str, int]]:
    rows = Store(engine).health_since(0, limit=1_000_000)
    return sorted((row.device, row.seq) for row in rows)


def test_what_devices_publish_is_counted_and_acknowledged(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        acks: list[Received] = []
        async with (
            ingesting(mosquitto.url, engine),
            connected(mosquitto.url, "dev", "bw/v1/+/ack", hear=acks.append) as device,
        ):
            await device.up.wait()
            messages = [(f"bw/v1/car-{n % 50}/health", health(n)) for n in range(2000)]
            again = [*messages, *messages[::-1]]  # repeats, and out of order
            assert all(await device.publish_many(again, retain=False))
            await until(lambda: len(counted(engine)) == 2000)
            expected = {(f"car-{n % 50}", n) for n in range(2000)}
            assert set(counted(engine)) == expected

            def acknowledged() -> set[tuple[str, int]]:
                found = set()
                for message in acks:
                    name = protocol.parse_topic(message.topic)[0]
                    for first, last in protocol.decode(Ack, message.payload).ranges:
                        found |= {(name, n) for n in range(first, last + 1)}
                return found

            # The clock stands still at NOW, so each device gets one ack of its first batch.
            await until(lambda: len({m.topic for m in acks}) == 50)
            assert acknowledged() <= expected

    run(story)


def test_messages_survive_an_absent_ingest_and_a_restarted_broker(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        async with ingesting(mosquitto.url, engine):
            pass  # its session exists now
        async with connected(mosquitto.url, "dev") as device:
            first = [("bw/v1/car-1/health", health(n)) for n in range(100)]
            assert all(await device.publish_many(first, retain=False, timeout=60))
            mosquitto.stop()
            mosquitto.start()
            async with ingesting(mosquitto.url, engine):
                await until(lambda: len(counted(engine)) == 100)

    run(story)


def test_a_broker_that_forgot_who_listens_costs_only_a_repetition(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    # Measured: Mosquitto 2.0.11 keeps a session and its queue over a restart, but not its shared
    # subscriptions. It takes messages with "no matching subscribers" until the ingest is back:
    # a PUBACK is no acknowledgement, and the agent sends again what has no ack of ours.
    async def story() -> None:
        async with ingesting(mosquitto.url, engine):
            pass
        mosquitto.stop()
        mosquitto.start()
        messages = [("bw/v1/car-1/health", health(n)) for n in range(100)]
        async with connected(mosquitto.url, "dev") as device:
            assert all(await device.publish_many(messages, retain=False, timeout=60))
            async with ingesting(mosquitto.url, engine):
                assert all(await device.publish_many(messages, retain=False, timeout=60))
                await until(lambda: len(counted(engine)) == 100)

    run(story)


def test_a_broker_killed_in_the_middle_loses_no_acknowledged_message(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        async with (
            ingesting(mosquitto.url, engine),
            connected(mosquitto.url, "dev") as device,
        ):
            await device.up.wait()
            for turn in range(3):
                numbers = range(turn * 300, turn * 300 + 300)
                messages = [("bw/v1/car-2/health", health(n)) for n in numbers]
                sending = asyncio.create_task(
                    device.publish_many(messages, retain=False, timeout=60)
                )
                await until(lambda: sending.done() or len(counted(engine)) > turn * 300)  # noqa: B023
                mosquitto.stop(signal.SIGKILL)
                mosquitto.start()
                await sending
                while len(counted(engine)) < turn * 300 + 300:
                    # As an agent does: what the server did not acknowledge is sent again.
                    await device.publish_many(messages, retain=False, timeout=60)
                    with contextlib.suppress(TimeoutError):
                        await until(lambda: len(counted(engine)) == turn * 300 + 300, 1)  # noqa: B023
        assert [seq for _, seq in counted(engine)] == list(range(900))

    run(story)


def test_a_stalled_database_acknowledges_nothing_and_loses_nothing(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        acks: list[Received] = []
        async with (
            ingesting(mosquitto.url, engine, receive_maximum=100, batch_max=30) as role,
            connected(mosquitto.url, "dev", "bw/v1/+/ack", hear=acks.append) as device,
        ):
            await device.up.wait()
            with engine.connect() as lock:  # BEGIN IMMEDIATE: nobody else may write
                transaction = lock.begin()
                messages = [("bw/v1/car-3/health", health(n)) for n in range(1000)]
                assert all(await device.publish_many(messages, retain=False))
                await until(lambda: len(role._queue) >= 40)  # two batches are under way
                assert len(role._queue) <= 100
                assert acks == []
                transaction.rollback()
            await until(lambda: len(counted(engine)) == 1000)
            await until(lambda: acks)

    run(story)


def test_a_flood_before_a_stalled_database_fills_the_queue_and_no_more(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        acks: list[Received] = []
        async with (
            ingesting(mosquitto.url, engine, queue_max=500) as role,
            connected(mosquitto.url, "dev", "bw/v1/+/ack", hear=acks.append) as device,
        ):
            await device.up.wait()
            with engine.connect() as lock:  # BEGIN IMMEDIATE: nobody else may write
                transaction = lock.begin()
                numbers = range(10_000)
                messages = [("bw/v1/car-3/health", health(n)) for n in numbers]
                messages[1::2] = [(f"bw/v1/car-{n % 9}/health", health(n)) for n in numbers[1::2]]
                assert all(await device.publish_many(messages, retain=False, timeout=60))
                await until(lambda: len(role._queue) >= 500)
                await asyncio.sleep(1.0)  # what may come in this time is what must not come
                longest = 500 + 4 * MAX_PACKET // len(health(0))  # and one read of the socket
                assert len(role._queue) <= longest < 5_000
                assert acks == []
                assert counted(engine) == []
                transaction.rollback()
            await until(lambda: len(counted(engine)) == 10_000, 60)
            await until(lambda: acks)
            assert Store(engine).refusals() == {}

    run(story)


def test_a_queue_of_few_large_messages_is_full_by_their_bytes(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    async def story() -> None:
        async with (
            ingesting(mosquitto.url, engine, queue_bytes=100_000, batch_max=2) as role,
            connected(mosquitto.url, "dev") as device,
        ):
            await device.up.wait()
            with engine.connect() as lock:
                transaction = lock.begin()
                large = {f"x{n}": "y" * 1000 for n in range(40)}
                messages = [("bw/v1/car-3/health", health(n, **large)) for n in range(400)]
                assert all(await device.publish_many(messages, retain=False, timeout=60))
                await until(lambda: role._bytes >= 100_000)
                await asyncio.sleep(0.5)
                assert role._bytes <= 100_000 + 4 * MAX_PACKET
                transaction.rollback()
            await until(lambda: len(counted(engine)) == 400, 60)

    run(story)


def test_a_store_that_fails_is_tried_again(mosquitto: Mosquitto, engine: Engine) -> None:
    async def story() -> None:
        async with (
            ingesting(mosquitto.url, engine),
            connected(mosquitto.url, "dev") as device,
        ):
            await device.up.wait()
            with writing(engine) as connection:
                connection.execute(text("ALTER TABLE telemetry_health RENAME TO away"))
            assert await device.publish_many([("bw/v1/car-1/health", health(1))]) == [True]
            from telemetry import metrics

            def failures() -> float:
                name = "bellwether_ingest_store_errors_total"
                return metrics.REGISTRY.get_sample_value(name) or 0.0

            before = failures()
            await until(lambda: failures() > before)
            with writing(engine) as connection:
                connection.execute(text("ALTER TABLE away RENAME TO telemetry_health"))
            await until(lambda: counted(engine) == [("car-1", 1)])

    run(story)


def test_two_ingest_processes_share_the_work_and_count_once(
    mosquitto: Mosquitto, engine: Engine, tmp_path: Path
) -> None:
    async def story() -> None:
        other = open_engine(str(engine.url))
        try:
            async with (
                ingesting(mosquitto.url, engine),
                ingesting(mosquitto.url, other, client_id="bw-ingest-2"),
                connected(mosquitto.url, "dev") as device,
            ):
                await device.up.wait()
                messages = [(f"bw/v1/car-{n % 7}/health", health(n)) for n in range(1000)]
                assert all(await device.publish_many([*messages, *messages], retain=False))
                await until(lambda: len(counted(engine)) == 1000)
        finally:
            other.dispose()

    run(story)


def test_the_probe_proves_that_the_server_hears(mosquitto: Mosquitto, engine: Engine) -> None:
    async def story() -> None:
        ticks = iter(range(10_000))
        async with ingesting(mosquitto.url, engine, clock=lambda: NOW + next(ticks) / 100):
            await until(lambda: Store(engine).hearing()[0] > 0)

    run(story)


def test_the_role_serves_in_a_thread_until_it_is_told_to_stop(
    mosquitto: Mosquitto, engine: Engine
) -> None:
    role = Role(url=mosquitto.url, store=Store(engine), registry=lambda: REGISTRY)
    stopping = threading.Event()
    thread = threading.Thread(target=serve, args=(role, stopping))
    thread.start()
    publisher = Publisher(mosquitto.url, None, None, "dev")
    publisher.start()
    while counted(engine) != [("car-1", 1)]:  # again, until somebody listens
        publisher.publish([("bw/v1/car-1/health", health(1))], retain=False, timeout=5)
    publisher.stop()
    stopping.set()
    thread.join()


def test_hostile_topics_and_bytes_disturb_nobody(mosquitto: Mosquitto, engine: Engine) -> None:
    async def story() -> None:
        async with (
            ingesting(mosquitto.url, engine),
            connected(mosquitto.url, "dev") as device,
        ):
            await device.up.wait()
            bad = [b"", b"\xff" * 100, b"[" * 60_000, b'{"v":1e999}', b"x" * 120_000]
            hostile = [("bw/v1/car-1/health", payload) for payload in bad]
            hostile += [("bw/v1/nobody/health", health(1)), ("bw/v1/CAR/presence", b"{}")]
            good = [("bw/v1/car-2/health", health(n)) for n in range(10)]
            assert all(await device.publish_many([*hostile, *good], retain=False))
            await until(lambda: len(counted(engine)) == 10)
            assert sum(Store(engine).refusals().values()) == len(hostile)

    run(story)


def test_a_session_that_is_taken_over_says_so_and_comes_back(mosquitto: Mosquitto) -> None:
    async def story() -> None:
        async with connected(mosquitto.url, "twin") as first:
            await first.up.wait()
            async with connected(mosquitto.url, "twin"):
                await until(lambda: first.last_error)
            await until(lambda: first.connected)

    run(story)


def test_a_silent_broker_is_left_and_found_again(mosquitto: Mosquitto) -> None:
    async def story() -> None:
        async with connected(mosquitto.url, "dev", keep_alive=1) as device:
            await device.up.wait()
            mosquitto.send(signal.SIGSTOP)
            await until(lambda: not device.connected)
            mosquitto.send(signal.SIGCONT)
            await until(lambda: device.connected)

    run(story)


def test_a_large_window_of_orders_arrives_retained(mosquitto: Mosquitto) -> None:
    publisher = Publisher(mosquitto.url, None, None, "controller")
    publisher.start()
    orders = [(f"bw/v1/d-{n}/desired", f"order {n}".encode()) for n in range(5000)]
    assert publisher.publish(orders, timeout=60) == [True] * 5000
    assert publisher.connected
    assert publisher.publish([], timeout=1) == []
    publisher.stop()
    publisher.stop()
    assert publisher.publish(orders[:2]) == [False, False]


def test_the_publisher_answers_false_in_time_without_a_broker(mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    publisher = Publisher(mosquitto.url, None, None, "controller")
    publisher.start()
    assert publisher.publish([("bw/v1/d/desired", b"x")], timeout=0.3) == [False]
    assert publisher.last_error
    results: list[list[bool]] = []
    later = threading.Thread(
        target=lambda: results.append(publisher.publish([("bw/v1/d/desired", b"y")], timeout=60))
    )
    later.start()
    mosquitto.start()
    later.join()
    assert results == [[True]]
    publisher.stop()


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:1883", "mqtt://", ""])
def test_what_is_no_broker_url_is_said_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="mqtt://HOST"):
        Connection(Options(url=url, client_id="x"))
