"""One device as a test drives it: the real core on real slots, journal and outbox."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controller.keys import DirectorKey
from device_agent.agent import (
    AckArrived,
    Agent,
    Connected,
    Event,
    Fact,
    Identity,
    Publish,
    Settings,
    Started,
    Tick,
)
from device_agent.journal import Journal
from device_agent.machine import Disk, FetchRefused, hash_file
from device_agent.outbox import Outbox
from device_agent.protocol import (
    Ack,
    ComponentOrder,
    Desired,
    Health,
    Kind,
    Reason,
    Reported,
    decode,
    encode,
)
from device_agent.record import Limits
from device_agent.reserve import Reserve
from device_agent.work import Item

NOW = 1_800_000_000.0
KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
IDENTITY = Identity(
    device="car-1",
    keys=(KEY.public_hex,),
    server="http://127.0.0.1:1",
    broker_url="mqtt://127.0.0.1:1",
    broker_username="car-1",
    broker_password="x",
)
LIMITS = Limits(trial_soak=2.0, trial_deadline=60.0)


class Server:
    """Bundles by digest, and which of them were fetched."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.fetched: list[str] = []
        root.mkdir()

    def bundle(self, version: str, *, passes: bool = True) -> ComponentOrder:
        path = self._root / f"{version}.tar.gz"
        test = f"#!/bin/sh\ntest -f version || exit 2\nexit {0 if passes else 1}\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, text, mode in (
                ("version", version, 0o644),
                ("selftest/one", test, 0o755),
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(text), mode
                archive.addfile(info, io.BytesIO(text.encode()))
        digest = hash_file(path)
        path.rename(self._root / digest)
        size = (self._root / digest).stat().st_size
        return ComponentOrder(release=version, digest=digest, size=size, urls=("http://x/a",))

    def __call__(self, item: Item, target: Path) -> None:
        source = self._root / item.digest
        if not source.exists():
            raise FetchRefused(Reason.DOWNLOAD_REFUSED, "404")
        self.fetched.append(item.release)
        target.write_bytes(source.read_bytes())


class Device:
    """One device directory; `boot` is a power cycle."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root, self.server, self.now, self.boots = root, server, NOW, 0
        self.reports: list[Reported] = []
        self.samples: list[Health] = []
        self.echo = True
        self.boot()

    def boot(self, journal: Journal | None = None) -> None:
        self.boots += 1
        self.root.mkdir(exist_ok=True)
        self.reserve = Reserve(self.root / "reserve")
        self.journal = journal or Journal(self.root / "journal.db", self.reserve)
        self.outbox = Outbox(self.root / "outbox.db", self.reserve)
        self.disk = Disk(self.root, self.server)
        self.agent = Agent(IDENTITY, self.journal, self.outbox, Settings(limits=LIMITS))

    def power_on(self) -> None:
        self.do(Started(boot=f"boot{self.boots}", active=self.disk.digests()))
        self.do(Connected())

    def power_off(self) -> None:
        self.journal.close()
        self.outbox.close()

    def do(self, event: Event) -> None:
        queue = [event]
        while queue:
            for effect in self.agent.handle(queue.pop(0), self.now):
                if not isinstance(effect, Publish):
                    fact = self.disk.execute(effect)
                    queue += [] if fact is None else [Fact(fact)]
                elif effect.topic.endswith(("/reported", "/health")):
                    queue.append(self._commit(effect))

    def _commit(self, effect: Publish) -> Event:
        said: Reported | Health
        if effect.topic.endswith("/health"):
            said, nonce = decode(Health, effect.payload), None
            self.samples.append(said)
        else:
            said = decode(Reported, effect.payload)
            nonce = said.nonce if self.echo else None
            self.reports.append(said)
        ack = Ack(boot=said.boot, ranges=((said.seq, said.seq),), nonce=nonce)
        return AckArrived(payload=encode(ack))

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.do(Tick(facts={}))

    def runs(self) -> dict[str, str]:
        return {c: (p / "version").read_text() for c, p in self.disk.active().items()}


def order(
    generation: int, components: dict[str, ComponentOrder], kind: Kind = Kind.INSTALL
) -> bytes:
    return KEY.sign(
        Desired(
            device="car-1",
            term=1,
            generation=generation,
            attempt=f"try-{generation}",
            kind=kind,
            components=components,
            issued_at="2027-01-15T08:00:00Z",
            not_after="2027-01-15T09:00:00Z" if kind is Kind.INSTALL else None,
        )
    )
