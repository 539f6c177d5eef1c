"""Pages over a large estate: the slowest one beside the static floor of the same server.

100,000 devices and 600 rollouts in the database, one process that serves HTTP. Each page and each
list of the API is asked several times, one after the other; its median stands beside the median of
`/livez` and of a static file in the same run. Then 500 pages are held open at once, something
changes, and it is counted how many of them hear of it, and how quickly a page is still answered.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx2
from fastapi.routing import APIRoute
from sqlalchemy import Engine, select, update

from bench import estate
from bench.report import Options, Row
from controller.http.dashboard import pages as dashboard
from controller.store.database import open_control
from controller.store.tables import approvals, decisions, rollouts
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.tables import create_schema

DEVICES, ROLLOUTS, RUNS, STREAMS = 100_000, 600, 7, 500
PAGE_LIMIT = 300.0  # ms: research/ux-and-libraries, acceptance 6
HEARD_WITHIN = 15.0  # seconds in which a change must have come to every stream


@dataclass(frozen=True, slots=True)
class _Served:
    url: str
    engine: Engine
    estate: estate.Estate


def run(options: Options) -> list[Row]:
    devices, runs = options.devices or DEVICES, options.runs or RUNS
    with (
        tempfile.TemporaryDirectory(prefix="bellwether-pages-") as folder,
        _served(Path(folder), devices, options.seed) as site,
    ):
        rows = _answers(site, runs)
        return rows + asyncio.run(_streams(site, STREAMS))


@contextmanager
def _served(root: Path, devices: int, seed: int) -> Iterator[_Served]:
    engine = open_control(f"sqlite:///{root / 'control.db'}")
    telemetry = open_engine(f"sqlite:///{root / 'telemetry.db'}")
    create_schema(telemetry)
    filled = estate.fill(
        engine, telemetry, devices=devices, rollouts=ROLLOUTS, now=time.time(), seed=seed
    )
    telemetry.dispose()
    port = _free_port()
    child = subprocess.Popen(
        [
            sys.executable, "-m", "controller.cli", "serve", "--role", "api",
            "--repo", str(root / "none.git"), "--state-dir", str(root),
            "--listen", f"127.0.0.1:{port}", "--broker", f"mqtt://127.0.0.1:{_free_port()}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url, child)
        yield _Served(url, engine, filled)
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        engine.dispose()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await(url: str, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300  # the registry of 100,000 devices is copied first
    while child.poll() is None and time.monotonic() < until:
        try:
            if httpx2.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server did not start")


# -- answers --------------------------------------------------------------------------------------


def _answers(site: _Served, runs: int) -> list[Row]:
    rollout = site.estate.rollouts["model-3-eu"][-1]
    with httpx2.Client(base_url=site.url, timeout=120) as client:
        began = time.perf_counter()
        client.get("/").raise_for_status()
        first = time.perf_counter() - began
        floor = _timed(client, "/livez", runs * 3)[1]
        static = _timed(client, _static(client), runs * 3)[1]
        lists = {path: _timed(client, path, runs) for path in _lists(site, client)}
        # The board comes last: it starts a measurement that takes a core for some seconds.
        measured = {path: _timed(client, path, runs) for path in _pages(site)}
        exact = _timed(client, f"/rollouts/{rollout}/rollback?exact=1", 3)[1]
    return [
        Row(name="static floor", value=floor, unit="ms", peer="/livez of the same server"),
        Row(name="static file", value=static, unit="ms", peer="the style sheet"),
        *_shown(measured, "page", floor),
        *_shown(lists, "list", floor),
        Row(name="the first page after a start", value=first, unit="s",
            more={"what": "waits until the last word of every device is read"}),
        Row(name="a preview that looks at each device", value=exact, unit="ms",
            more={"devices of the fleet": len(site.estate.devices["model-3-eu"]),
                  "times the floor": round(exact / floor, 1)}),
    ]  # fmt: skip


def _pages(site: _Served) -> list[str]:
    """Every page that the application has, and the filters of its lists."""
    rollout = site.estate.rollouts["model-3-eu"][-1]
    routes = [
        str(route.path)
        for router in dashboard.routers
        for route in router.routes
        if isinstance(route, APIRoute) and "GET" in (route.methods or ())
    ]
    found = [
        path for route in routes if not route.startswith(("/live", "/static"))
        for path in [_filled(site, route)]
    ]  # fmt: skip
    found += [
        "/rollouts?state=RolledBack", f"/rollouts/{rollout}/promote", "/devices?fleet=vans-nordic",
        f"/devices?rollout={rollout}&member=failed", "/devices?q=model-3-eu-0300",
    ]  # fmt: skip
    return sorted(found, key=lambda path: (path == "/board", path))


def _lists(site: _Served, client: httpx2.Client) -> list[str]:
    """Every list of the API: what answers `items`; and the filters that read the most."""
    document = client.get("/api/v1/openapi.json").json()
    found = []
    for route, verbs in document["paths"].items():
        answer = verbs.get("get", {}).get("responses", {}).get("200", {}).get("content", {})
        shape = answer.get("application/json", {}).get("schema", {}).get("$ref", "")
        known = document["components"]["schemas"].get(shape.rpartition("/")[2], {})
        if "items" in known.get("properties", ()):
            found.append(_filled(site, route))
    filters = "fleet=vans-nordic", "state=FAILED", "label=region%3Dch", "online=false"
    return found + [f"/api/v1/devices?{one}" for one in filters]


def _filled(site: _Served, route: str) -> str:
    """A route with the names of things that this estate has."""
    fleet = "model-3-eu"
    back = site.estate.rollouts["model-y-us"][-1]
    rollout = back if route.endswith("/recovery") else site.estate.rollouts[fleet][-1]
    with reading(site.engine) as conn:
        approval = conn.execute(select(approvals.c.id).limit(1)).scalar_one()
        of_this = decisions.c.rollout == rollout, decisions.c.kind == "verdict"
        decision = conn.execute(select(decisions.c.id).where(*of_this).limit(1)).scalar_one()
    names = {
        "rollout": rollout, "fleet": fleet, "device": site.estate.devices[fleet][-1],
        "release": f"autopilot-{fleet}-10.2.0", "verb": "rollback", "approval": approval,
        "decision": decision,
    }  # fmt: skip
    return route.format(**names)


def _static(client: httpx2.Client) -> str:
    text = client.get("/").text
    return "/static/" + text.partition('href="/static/')[2].partition('"')[0]


def _timed(client: httpx2.Client, path: str, runs: int) -> tuple[float, float]:
    """(the first answer, the median of the following) in ms."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        answer = client.get(path)
        times.append((time.perf_counter() - began) * 1000)
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code}")
    return times[0], median(times[1:])


def _shown(measured: Mapping[str, tuple[float, float]], kind: str, floor: float) -> list[Row]:
    slowest = max(measured, key=lambda path: measured[path][1])
    rows = [
        Row(
            name=f"slowest {kind}",
            value=measured[slowest][1],
            unit="ms",
            limit=PAGE_LIMIT,
            peer="promise",
            more={
                "path": _named(slowest),
                "times the floor": round(measured[slowest][1] / floor, 1),
            },
        )
    ]
    rows += [
        Row(
            name=f"{kind} {_named(path)}",
            value=times[1],
            unit="ms",
            more={"times the floor": round(times[1] / floor, 1), "first ms": round(times[0], 1)},
        )
        for path, times in measured.items()
    ]
    return rows


def _named(path: str) -> str:
    """Without the ids of this run: the same row in every result."""
    return "/".join(
        "{id}" if len(part) == 26 and part.isalnum() else part for part in path.split("/")
    )


# -- streams --------------------------------------------------------------------------------------


async def _streams(site: _Served, wanted: int) -> list[Row]:
    """Hold pages open, change something, and see who hears of it."""
    rollout, mark = site.estate.rollouts["model-3-eu"][-1], "BENCH — something has changed"
    opened, heard = asyncio.Semaphore(0), asyncio.Semaphore(0)
    times: list[float] = []
    tasks = [
        asyncio.create_task(
            _follow(site.url, f"/live/rollout/{rollout}", mark, opened, heard, times)
        )
        for _ in range(wanted)
    ]
    live = 0
    try:
        for _ in range(wanted):
            await asyncio.wait_for(opened.acquire(), 60)
            live += 1
    except TimeoutError:
        pass
    latency = await _latency(site.url, rollout)
    changed = time.perf_counter()
    await asyncio.to_thread(_change, site.engine, rollout, mark)
    told = 0
    try:
        for _ in range(live):
            left = HEARD_WITHIN - (time.perf_counter() - changed)
            await asyncio.wait_for(heard.acquire(), max(0.01, left))
            told += 1
    except TimeoutError:
        pass
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    last = (max(times) - changed) * 1000 if times else float("nan")
    return [
        Row(name="streams that heard of a change", value=told, unit="streams", limit=wanted,
            better="higher", peer=f"{wanted} open pages", more={"open": live}),
        Row(name="the last of them after", value=last, unit="ms"),
        Row(name="a page while they hang on", value=latency, unit="ms", limit=PAGE_LIMIT,
            peer="promise"),
    ]  # fmt: skip


async def _follow(
    url: str, path: str, mark: str, opened: asyncio.Semaphore, heard: asyncio.Semaphore,
    times: list[float],
) -> None:  # fmt: skip
    """One open page: a plain socket, as cheap as can be on this side."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    try:
        lines = f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Accept: text/event-stream", "", ""
        writer.write("\r\n".join(lines).encode())
        await reader.readuntil(b"data:")
        opened.release()
        await reader.readuntil(mark.encode())
        times.append(time.perf_counter())
        heard.release()
        await reader.read()
    finally:
        writer.close()


async def _latency(url: str, rollout: str) -> float:
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            await client.get(f"/rollouts/{rollout}")
            times.append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.1)
    return median(times)


def _change(engine: Engine, rollout: str, sentence: str) -> None:
    with writing(engine) as conn:
        conn.execute(
            update(rollouts)
            .where(rollouts.c.id == rollout)
            .values(sentence=sentence, updated_at=time.time() + 1)
        )
