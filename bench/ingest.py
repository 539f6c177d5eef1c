"""Ingest: what the real process counts and acknowledges a second, beside `mosquitto_sub`.

Both receive the same load from the same kind of broker, in turns, on the same machine: QoS 1, from
1,000 topics and more, one sample of about 300 bytes a message, 1 % duplicates, 1 % hostile. A run
lasts from the first packet published until the ack of the last message is back at its device;
for the peer until it has printed the last message. Afterwards the counts and the device states must
equal what was published, or the benchmark fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from sqlalchemy import Engine

from bench import servers
from bench.load import SENTINEL, Plan, arguments
from bench.report import Options, Row
from telemetry.store.reports import Store

SQLITE, POSTGRES = 0.6, 0.5  # of mosquitto_sub
BATCHED = 400_000  # samples a second with ten in a message
TOPICS = ("bw/v1/+/health", "bw/v1/+/reported")


class Wrong(AssertionError):
    """What was counted is not what was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Messages a second of one run."""

    ingest: float
    peer: float
    sent: float  # how fast the load was published while the ingest received it
    cpu: float  # µs of processor time that the ingest process spent on a message


def run(options: Options) -> list[Row]:
    devices = options.devices or 1_000
    one = Plan(seed=options.seed, devices=devices, messages=max(300_000, 3 * devices))
    ten = replace(one, messages=max(200_000, 3 * devices), samples=10)
    runs = options.runs or 3
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        root = Path(folder)
        if options.database is None:
            rows.append(_compared("into SQLite", one, None, SQLITE, root / "one", runs))
            rows.append(_batched(ten, None, root / "ten", runs))
            rows.append(_shared(one, root / "two"))
        with _postgres(options, root) as server:
            if server is not None:
                place = root / "pg"
                rows.append(_compared("into PostgreSQL", one, server, POSTGRES, place, runs))
    return [*rows, Row(name="correct", value=1, unit="", limit=1, better="higher")]


@contextlib.contextmanager
def _postgres(options: Options, root: Path) -> Iterator[str | None]:
    if options.database is not None:
        yield options.database
        return
    try:
        server = servers.postgres(root)
        with server as url:
            yield url
    except servers.Missing as error:
        print(f"no PostgreSQL row: {error}", flush=True)
        yield None


def _compared(
    name: str, plan: Plan, server: str | None, share: float, root: Path, runs: int
) -> Row:
    measured = [_measure(plan, server, root / str(number)) for number in range(runs)]
    own = statistics.median(m.ingest for m in measured)
    peer = statistics.median(m.peer for m in measured)
    return Row(
        name=name,
        value=own,
        unit="messages/s",
        limit=share * peer,
        better="higher",
        peer=f"{share} × mosquitto_sub",
        more=_more(measured, own, peer),
    )


def _batched(plan: Plan, server: str | None, root: Path, runs: int) -> Row:
    measured = [_measure(plan, server, root / str(number)) for number in range(runs)]
    own = statistics.median(m.ingest for m in measured)
    peer = statistics.median(m.peer for m in measured)
    return Row(
        name=f"into SQLite, {plan.samples} samples a message",
        value=own * plan.samples,
        unit="samples/s",
        limit=BATCHED,
        better="higher",
        peer="promise",
        more=_more(measured, own, peer),
    )


def _more(measured: list[Measured], own: float, peer: float) -> dict[str, object]:
    return {
        "of_peer": round(own / peer, 3),
        "peer_messages_per_s": round(peer),
        "cpu_us_per_message": round(statistics.median(m.cpu for m in measured), 1),
        "load_1m": round(os.getloadavg()[0], 1),  # of a machine that others may use as well
        "spread": " ".join(f"{m.ingest / m.peer:.2f}" for m in measured),
    }


def _shared(plan: Plan, root: Path) -> Row:
    """Two processes behind one shared subscription: nothing lost, nothing twice."""
    plan = fresh(replace(plan, messages=min(plan.messages, 30 * plan.devices)))
    engine = servers.plant(root, None, plan.names)
    with servers.broker(root) as port, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(servers.ingest(root, port, None, engine))
        told = _publish(port, plan)
        honest = len(plan.stream) - sum(plan.refused.values())
        servers.until(lambda: _settled(engine, plan), "two ingest processes")
        seconds = time.monotonic() - told["began"]
    check(engine, plan)
    engine.dispose()
    return Row(
        name="two processes, one subscription",
        value=honest / seconds,
        unit="messages/s",
        more={"counted": honest},
    )


def _settled(engine: Engine, plan: Plan) -> bool:
    """Is everything counted or refused? Nobody's last message is the last of two processes."""
    reports = 2 * plan.devices  # neither health nor refused: seen by the state that they leave
    last = f"SELECT count(*) FROM telemetry_reports WHERE generation = {plan.each - 1}"  # noqa: S608
    counts = ("SELECT count(*) FROM telemetry_health", "SELECT sum(n) FROM telemetry_refusals")
    numbers = [int(str(servers.rows(engine, query)[0][0] or 0)) for query in (*counts, last)]
    return numbers[0] + numbers[1] + reports >= len(plan.stream) and numbers[2] == plan.devices


def _measure(plan: Plan, server: str | None, root: Path) -> Measured:
    plan = fresh(plan)
    peer = _peer(plan, root / "peer")
    state = root / "ingest"
    with servers.database(server) as database:
        engine = servers.plant(state, database, plan.names)
        with servers.broker(state) as port, servers.ingest(state, port, database, engine) as child:
            process = psutil.Process(child.pid)
            before = sum(process.cpu_times()[:2])
            told = _publish(port, plan, await_ack=True)
            cpu = sum(process.cpu_times()[:2]) - before
        check(engine, plan)
        engine.dispose()
    count = len(plan.stream)
    return Measured(
        ingest=count / (told["acked"] - told["began"]),
        peer=peer,
        sent=count / (told["sent"] - told["began"]),
        cpu=1e6 * cpu / count,
    )


def _peer(plan: Plan, root: Path) -> float:
    """Messages a second that `mosquitto_sub` receives of the same load."""
    binary = servers.program("mosquitto_sub", "mosquitto-clients")
    with servers.broker(root) as port:
        words = [binary, "-V", "5", "-h", "127.0.0.1", "-p", str(port), "-q", "1"]
        words += ["-i", "bench-peer", "-C", str(len(plan.stream))]
        for topic in TOPICS:
            words += ["-t", topic]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as receiver:
            time.sleep(0.5)  # it says nothing when its subscription stands
            told = _publish(port, plan)
            receiver.wait(300)
            return len(plan.stream) / (time.monotonic() - told["began"])


def _publish(port: int, plan: Plan, *, await_ack: bool = False) -> dict[str, float]:
    words = arguments(port, plan, await_ack=await_ack)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdin is not None and load.stdout is not None  # noqa: S101, PT018
        load.stdout.readline()
        load.stdin.write("go\n")
        load.stdin.flush()
        said = load.stdout.readline()
    if not said:
        raise RuntimeError("the load generator died")
    told: dict[str, float] = json.loads(said)
    return told


def fresh(plan: Plan) -> Plan:
    """The same plan, with samples of the last hour."""
    return replace(plan, now=float(int(time.time()) - 3600))


def check(engine: Engine, plan: Plan) -> None:
    """Raises Wrong unless the store holds exactly what was published."""
    store = Store(engine)
    last = plan.each - 1
    counted = sorted((str(d), int(str(s))) for d, s in servers.rows(engine, _COUNTED))
    wanted = [(device, seq) for device in plan.names[:-1] for seq in range(1, last)]
    if counted != sorted([*wanted, (SENTINEL, 0)]):
        raise Wrong(f"{len(counted)} health messages counted, {len(wanted) + 1} published")
    if store.refusals() != dict(plan.refused):
        raise Wrong(f"refused {store.refusals()}, published {dict(plan.refused)}")
    states = {row.device: row for row in store.devices_changed(0)}
    for device in plan.names[:-1]:
        row, told = states[device], plan.report(device, last)
        if (row.generation, row.attempt, row.boot) != (last, told["attempt"], told["boot"]):
            raise Wrong(f"{device} is {row}, and last said {told}")
    if len(states) != len(plan.names):
        raise Wrong(f"{len(states)} devices known, {len(plan.names)} spoke")
    _check_totals(engine, store)


def _check_totals(engine: Engine, store: Store) -> None:
    """The rollups that the score reads say the same as the raw messages."""
    totals = store.totals(since=0, until=time.time() + 3600)
    raw = sum(row.counters.get("disengagement", 0) for row in store.health_since(0, limit=10**9))
    rolled = totals.counters["disengagement"].sum()
    if raw != rolled:
        raise Wrong(f"rollups say {rolled} disengagements, the messages {raw}")


_COUNTED = "SELECT device, seq FROM telemetry_health"
