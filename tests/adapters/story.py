"""The loop on a real control database, told as a story: commits, time, and devices as plain data.

Devices here are rows of a reader: they obey the last order that was published to them when they are
told to `work`. Time is a number that the test moves.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
from sqlalchemy import Engine, insert, select

from controller import commands
from controller.keys import DirectorKey
from controller.loop import Loop, Ports
from controller.manifests.admission import admit
from controller.manifests.reader import read
from controller.orders import Issuer
from controller.rollout.world import Head
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import devices, rollouts
from device_agent.protocol import ComponentReport, HistoryEntry, State, open_envelope, parse_topic
from telemetry.report import DeviceRow, HealthRow, Totals
from telemetry.store.database import reading, writing
from telemetry.sums import Block, Layout, Sums

VERSIONS = ("1", "2", "3", "3.1", "b1", "b2")
DIGESTS = {v: "sha256:" + format(i, "064x") for i, v in enumerate(VERSIONS)}
MARGINS = {"failed": "30%", "lost": "30%"}


class World:
    """Git head, broker and telemetry as the loop sees them."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.rows: dict[str, DeviceRow] = {}
        self.health: list[HealthRow] = []
        self.batch = 0
        self.heard = 0.0
        self.now = 1_000_000.0
        self.orders: dict[str, list] = defaultdict(list)
        self.deaf_since: float | None = None
        self.broker_up = True
        self.broken: set[str] = set()  # versions that fail to boot

    # Heads
    def current(self) -> Head | None:
        return self.head

    # TelemetryReader
    def watermark(self) -> int:
        return self.batch

    def hearing(self) -> tuple[float, float]:
        return self.heard, self.deaf_since or self.now

    def devices_changed(self, since: int, *, limit: int | None = None) -> Sequence[DeviceRow]:
        return sorted((r for r in self.rows.values() if r.change > since), key=lambda r: r.change)

    def device(self, device: str) -> DeviceRow | None:
        return self.rows.get(device)

    def health_since(self, batch: int, *, limit: int = 20_000) -> Sequence[HealthRow]:
        return [row for row in self.health if row.batch > batch]

    def totals(self, *, since: float, until: float, names=None) -> Totals:
        return self.sums().since(Sums())

    def sums(self) -> Sums:
        names = sorted(self.rows)
        hours = Layout.of((), ("device_hour",), ())
        return Sums([Block(hours, names, np.full((1, len(names)), 100.0))])

    def checkpoints(self, since: float) -> Sequence[int]:
        return []

    def checkpoint(self, day: int) -> Sums:
        raise AssertionError("there is none")

    # Broker
    def publish(self, messages, *, qos=1, retain=True, timeout=10.0) -> list[bool]:
        if not self.broker_up:
            return [False] * len(messages)
        for topic, payload in messages:
            self.orders[parse_topic(topic)[0]].append(open_envelope(payload)[0])
        return [True] * len(messages)

    # devices
    def say(self, device: str, **changes) -> None:
        self.batch += 1
        self.rows[device] = replace(
            self.rows[device],
            change=self.batch,
            last_contact=self.now,
            heard_clock=self.heard,
            reported_at=self.now,
            **changes,
        )

    def join(self, device: str, components: dict[str, tuple[str, str]]) -> None:
        self.rows[device] = DeviceRow(
            device=device, change=0, last_contact=self.now, heard_clock=self.heard, online=True,
            sleeping_until=None, boot="b", boot_count=1, reported_at=self.now, state=State.IDLE,
        )  # fmt: skip
        self.say(device, components=_reports(components))

    def work(self, *names: str) -> None:
        """Each device (or those named) obeys its newest order at once."""
        for device in names or list(self.rows):
            if not self.orders[device]:
                self.say(device)
                continue
            order, row = self.orders[device][-1], self.rows[device]
            if row.generation == order.generation:
                self.say(device)
                continue
            wanted = {c: (o.release, o.digest) for c, o in order.components.items()}
            numbers = {
                "term": order.term, "generation": order.generation, "attempt": order.attempt,
            }  # fmt: skip
            changed = [c for c, (_, d) in wanted.items() if runs(row, c) != d]
            if any(wanted[c][1] in self.broken for c in changed):
                self.say(device, state=State.ROLLED_BACK, reason="boot_failed", **numbers)
                continue
            history = row.history + tuple(
                HistoryEntry(component=c, release=r, digest=d, at=self.now, event="activated")
                for c, (r, d) in wanted.items()
                if c in changed
            )
            components = {**row.components, **_reports(wanted)}
            self.say(
                device, state=State.COMMITTED, reason=None, components=components,
                history=history, **numbers,
            )  # fmt: skip


def _reports(components: dict[str, tuple[str, str]]) -> dict[str, ComponentReport]:
    return {
        c: ComponentReport(release=release, digest=digest, committed=True)
        for c, (release, digest) in components.items()
    }


def runs(row: DeviceRow, component: str) -> str | None:
    report = row.components.get(component)
    return report.digest if report else None


class Story:
    def __init__(self, directory: Path) -> None:
        self.world = World()
        self.engine: Engine = open_control(f"sqlite:///{directory / 'control.db'}")
        self.key = DirectorKey.load_or_create(directory / "key.pem")
        self.commits = 0
        self.registry = 0
        self.start()

    def start(self) -> None:
        with writing(self.engine) as conn:
            term = store.take_over(conn, 1)
        issuer = Issuer(
            key=self.key, term=term, base_url="http://localhost:1", lease=timedelta(hours=1)
        )
        ports = Ports(engine=self.engine, reader=self.world, heads=self.world, broker=self.world)
        self.loop = Loop(ports, issuer)

    def enrol(
        self, *names: str, fleet: str = "cars", status: str = "active", **labels: str
    ) -> None:
        with writing(self.engine) as conn:
            for name in names:
                self.registry += 1
                conn.execute(devices.delete().where(devices.c.id == name))
                conn.execute(
                    insert(devices).values(
                        id=name, fleet=fleet, labels=labels, status=status, created_at=0.0,
                        change=self.registry,
                    )
                )  # fmt: skip

    def commit(self, *documents: str) -> None:
        self.commits += 1
        reading_ = read({"fleet.yaml": "---\n".join(documents)})
        problems = [*reading_.problems, *admit(reading_)]
        errors = [str(p) for p in problems if p.severity == "error"]
        assert not errors, errors
        self.world.head = Head(
            commit=f"{self.commits:040x}", author="ann", manifests=reading_.manifests
        )

    def run(self, seconds: float = 1.0, step: float = 1.0, work: bool = True) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self.world.now += step
            self.world.heard += step
            self.loop.tick(self.world.now)
            if work:
                self.world.work()
            self.loop.tick(self.world.now)

    def rollout(self, name: str = "cars"):
        with reading(self.engine) as conn:
            return conn.execute(
                select(rollouts).where(rollouts.c.name == name).order_by(rollouts.c.id.desc())
            ).first()

    def versions(self, component: str = "app") -> dict[str, int]:
        counted: dict[str, int] = defaultdict(int)
        names = {digest: version for version, digest in DIGESTS.items()}
        for row in self.world.rows.values():
            counted[names[row.components[component].digest]] += 1
        return dict(counted)

    def command(self, kind: str, name: str = "cars", **more) -> None:
        commands.record(
            self.engine, kind=kind, rollout=name, body=more.pop("body", {}), actor="eve",
            reason="because", incident=None, if_revision=more.get("if_revision"),
            now=self.world.now,
        )  # fmt: skip


def forty(directory: Path) -> Story:
    """Forty cars on app-1, of which twelve are the canary ring."""
    made = Story(directory)
    names = [f"car-{i:02}" for i in range(40)]
    made.enrol(*names[:12], model="m3", ring="canary")
    made.enrol(*names[12:], model="m3")
    for name in names:
        made.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    return made


def base() -> list[str]:
    return [fleet(), policy(), *(release(v) for v in ("1", "2", "3", "3.1"))]


def fleet(component: str = "app", baseline: str = "app-1") -> str:
    return document(
        "Fleet",
        "cars",
        {
            "selector": {"matchLabels": {"model": "m3"}},
            "healthPolicy": "driving",
            "baseline": {component: baseline},
            "cohorts": [
                {"name": "canary", "select": {"matchLabels": {"ring": "canary"}}},
                {"name": "general", "rest": "true"},
            ],
        },
    )


def policy() -> str:
    return document(
        "HealthPolicy", "driving", {"gates": [{"metric": "update_ok", "type": "proportion"}]}
    )


def release(version: str, component: str = "app", artifact: str | None = None, **more) -> str:
    digest = DIGESTS[artifact or version]
    return document(
        "Release",
        more.pop("name", f"{component}-{version}"),
        {
            "version": version.removeprefix("b"),
            "artifacts": [{"component": component, "digest": digest, "size": "10"}],
            **more,
        },
    )


def rollout(name: str, to: str, steps: list | None = None, **more) -> str:
    strategy = {
        "steps": steps
        or [
            {"cohort": "canary", "soak": "3s", "maxSoak": "20s", "margins": MARGINS},
            {"cohort": "general", "soak": "3s", "maxSoak": "20s", "margins": MARGINS},
        ],
        "silentAfter": "30s",
        "maxFailed": "1%",
        **more.pop("strategy", {}),
    }
    return document("Rollout", name, {"fleet": "cars", "release": to, "strategy": strategy, **more})


def document(kind: str, name: str, spec: dict) -> str:
    head = {"apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": name}}
    # JSON is YAML: flow maps and quoted strings.
    return json.dumps({**head, "spec": spec}) + "\n"
