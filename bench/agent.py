"""The agent: what it costs the device, beside a Python that does nothing, measured in the same run.

The real agent runs against a real broker and a real ingest process that acknowledges it, with one
sample a second. Memory and processor time are read after it has obeyed a signed order and settled;
the start is the time from its begin to the first byte of its CONNECT at a listener of ours.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mqtt5
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine

from bench import servers
from bench.load import Session
from bench.report import Options, Row
from controller.keys import DirectorKey
from device_agent.agent import Identity
from device_agent.protocol import Channel, Desired, Kind, timestamp, topic
from telemetry.store.reports import Store

GOALS = {"rss_mib": 32.0, "uss_mib": 16.0, "cpu_ms_per_s": 2.0, "start_ms": 250.0}
UNITS = {"rss_mib": "MiB", "uss_mib": "MiB", "cpu_ms_per_s": "ms/s", "start_ms": "ms"}
DEVICE = "car-0001"
SECONDS = 30.0
_SETTLE = 8.0  # seconds: connected, first acks, caches warm
_STARTS = 7
_MIB = 1 << 20
_KEY = DirectorKey(Ed25519PrivateKey.generate())
Environment = Mapping[str, str]
_BARE = "import time\nwhile True: time.sleep(1)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    rss_mib: float
    uss_mib: float
    cpu_ms_per_s: float
    start_ms: float

    def of(self, name: str) -> float:
        return round(float(getattr(self, name)), 3)


def run(options: Options) -> list[Row]:
    seconds, starts = options.seconds or SECONDS, options.runs or _STARTS
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        root = Path(folder)
        environment = _installed(root)
        bare = _bare(environment, seconds, starts)
        agent = _agent(environment, root, seconds, starts)
    columns = {name: agent.of(name) for name in GOALS}
    rows = [
        Row(
            name=name,
            value=agent.of(name),
            unit=UNITS[name],
            limit=goal,
            peer="goal of the device",
            more={"bare_python": bare.of(name), **columns},
        )
        for name, goal in GOALS.items()
    ]
    nothing = {name: bare.of(name) for name in GOALS}
    return [*rows, Row(name="bare python", value=bare.of("rss_mib"), unit="MiB", more=nothing)]


def _installed(root: Path) -> dict[str, str]:
    """The environment of a device: byte code is on its disk, as an installation leaves it."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(root / "byte-code")}


def _bare(environment: Environment, seconds: float, starts: int) -> Cost:
    words = [sys.executable, "-c", _BARE]
    with subprocess.Popen(words, env=environment) as child:
        time.sleep(1.0)
        try:
            rss, uss, cpu = _watched(child.pid, min(seconds, 5.0))
        finally:
            child.terminate()
    hello = [sys.executable, "-c", "import sys; sys.stdout.write('x'); sys.stdout.flush()"]
    return Cost(
        rss_mib=rss,
        uss_mib=uss,
        cpu_ms_per_s=cpu,
        start_ms=_median(starts, lambda: _hello(hello, environment)),
    )


def _agent(environment: Environment, root: Path, seconds: float, starts: int) -> Cost:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30.0)
        port = int(listener.getsockname()[1])
        words = _command(_enrolled(root / "start", port))
        start = _median(starts, lambda: _until_connect(words, environment, listener))
    state = root / "state"
    engine = servers.plant(state, None, [DEVICE])
    with servers.broker(root) as port, servers.ingest(state, port, None, engine):
        words = _command(_enrolled(root / "steady", port))
        _order(port)
        with subprocess.Popen(words, env=environment) as child:
            try:
                servers.until(lambda: _obeyed(engine), "the agent obeys its order")
                time.sleep(_SETTLE)
                rss, uss, cpu = _watched(child.pid, seconds)
            finally:
                child.terminate()
    heard = int(str(servers.rows(engine, "SELECT count(*) FROM telemetry_health")[0][0]))
    engine.dispose()
    if heard < 0.7 * seconds:
        raise RuntimeError(f"{heard} samples heard in {seconds:g} s: the agent did not work")
    return Cost(rss_mib=rss, uss_mib=uss, cpu_ms_per_s=cpu, start_ms=start)


def _order(port: int) -> None:
    """A signed order that waits for the device, so that it has verified one when we look."""
    order = Desired(
        device=DEVICE,
        term=1,
        generation=1,
        attempt="bench",
        kind=Kind.NONE,
        components={},
        issued_at=timestamp(datetime.now(UTC)),
    )
    packet = mqtt5.PublishPacket(
        topic(DEVICE, Channel.DESIRED),
        _KEY.sign(order),
        qos=mqtt5.QoS.AT_LEAST_ONCE,
        retain=True,
        packet_id=1,
    )
    Session(port, "bench-director").publish([packet.write()])


def _obeyed(engine: Engine) -> bool:
    row = Store(engine).device(DEVICE)
    return row is not None and row.generation == 1


def _command(directory: Path) -> list[str]:
    words = [sys.executable, "-m", "device_agent", "run", "--dir", str(directory)]
    return [*words, "--health-interval", "1"]


def _enrolled(directory: Path, port: int) -> Path:
    """A device directory as enrolment leaves it."""
    directory.mkdir(parents=True)
    identity = Identity(
        device=DEVICE,
        keys=(_KEY.public_hex,),
        server="http://127.0.0.1:9",
        broker_url=f"mqtt://127.0.0.1:{port}",
        broker_username=DEVICE,
        broker_password="bench",  # noqa: S106 - the broker takes anybody
    )
    (directory / "identity.json").write_text(identity.to_json())
    return directory


def _watched(pid: int, seconds: float) -> tuple[float, float, float]:
    """(RSS MiB, USS MiB, ms of processor time a second) of a process that has settled."""
    process = psutil.Process(pid)
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, elapsed = process.cpu_times(), time.monotonic() - began
    memory = process.memory_full_info()
    spent = (after.user + after.system) - (before.user + before.system)
    return memory.rss / _MIB, memory.uss / _MIB, 1000 * spent / elapsed


def _median(times: int, once: Callable[[], float]) -> float:
    once()  # byte code and page cache
    return statistics.median(once() for _ in range(times))


def _hello(words: Sequence[str], environment: Environment) -> float:
    began = time.monotonic()
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None  # noqa: S101
        child.stdout.read(1)
        return 1000 * (time.monotonic() - began)


def _until_connect(
    words: Sequence[str], environment: Environment, listener: socket.socket
) -> float:
    began = time.monotonic()
    with subprocess.Popen(words, env=environment) as child:
        try:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1)
                return 1000 * (time.monotonic() - began)
        finally:
            child.terminate()
