"""The registry on SQLite and PostgreSQL, with a broker that may be away."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from controller import audit
from controller.broker_admin import BrokerUnavailable
from controller.devices import DeviceRefused, NewDevice, Registry
from controller.store.database import open_control
from controller.store.tables import devices, enrolment_tokens
from telemetry.store.database import reading, writing

NOW = 1_800_000_000.0
SECRET = b"s" * 32
_BIN = Path("/usr/lib/postgresql/15/bin")


class Accounts:
    """What the broker knows; `away` is the broker that does not answer."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.away = False

    def ensure_services(self, secret: bytes) -> None:
        self._answer()

    def add_devices(self, devices: Iterable[tuple[str, str]]) -> None:
        self._answer()
        for device, password in devices:
            self.known.setdefault(device, password)

    def remove_devices(self, devices: Sequence[str]) -> None:
        self._answer()
        for device in devices:
            self.known.pop(device, None)

    def list_devices(self) -> set[str]:
        self._answer()
        return set(self.known)

    def _answer(self) -> None:
        if self.away:
            raise BrokerUnavailable("away")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    if not (_BIN / "initdb").exists():
        pytest.skip("PostgreSQL 15 is not installed")
    root = Path(tempfile.mkdtemp(prefix="bw-pg-"))
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(root, user.pw_uid, user.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = root / "data"
    subprocess.run(
        [_BIN / "initdb", "-D", data, "-U", "bw", "-A", "trust", "-N", "-E", "UTF8"],
        check=True, capture_output=True, cwd=root, **as_user,
    )  # fmt: skip
    control = [_BIN / "pg_ctl", "-D", data, "-w", "-l", root / "log"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root}"
    subprocess.run(
        [*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=root,
        **as_user,
    )  # fmt: skip
    yield f"postgresql+psycopg://bw@127.0.0.1:{port}/postgres"
    subprocess.run(
        [*control, "-m", "fast", "stop"], check=True, capture_output=True, cwd=root, **as_user
    )
    shutil.rmtree(root)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = open_control(f"sqlite:///{tmp_path}/control.db")
    else:
        engine = open_control(request.getfixturevalue("postgres"))
        with writing(engine) as conn:
            conn.exec_driver_sql("TRUNCATE devices, enrolment_tokens, audit, meta CASCADE")
    yield engine
    engine.dispose()


@pytest.fixture
def accounts() -> Accounts:
    return Accounts()


@pytest.fixture
def registry(engine: Engine, accounts: Accounts) -> Registry:
    return Registry(engine, accounts, SECRET)


def new(device: str = "car-1", fleet: str = "eu", **labels: str) -> NewDevice:
    return NewDevice(id=device, fleet=fleet, labels=labels)


def enrol(registry: Registry, device: str = "car-1") -> str:
    [issued] = registry.register([new(device)], actor="ann", now=NOW)
    return registry.claim(issued.token, now=NOW).password


def row_of(engine: Engine, device: str = "car-1") -> dict[str, object]:
    with reading(engine) as conn:
        return dict(conn.execute(select(devices).where(devices.c.id == device)).one()._mapping)


def test_only_the_hash_of_a_token_is_kept(engine: Engine, registry: Registry) -> None:
    [issued] = registry.register([new()], actor="ann", now=NOW)
    with reading(engine) as conn:
        rows = conn.execute(select(enrolment_tokens)).all()
    assert len(rows) == 1
    assert issued.token not in str(rows)


def test_a_token_expires(registry: Registry) -> None:
    [issued] = registry.register([new()], actor="ann", now=NOW, lifetime=60)
    with pytest.raises(DeviceRefused, match="expired"):
        registry.claim(issued.token, now=NOW + 61)


def test_a_newer_token_makes_the_older_one_worthless(registry: Registry) -> None:
    [first] = registry.register([new()], actor="ann", now=NOW)
    [second] = registry.register([new()], actor="ann", now=NOW)
    with pytest.raises(DeviceRefused):
        registry.claim(first.token, now=NOW)
    assert registry.claim(second.token, now=NOW).device == "car-1"


def test_of_two_claims_at_once_one_wins(registry: Registry) -> None:
    [issued] = registry.register([new()], actor="ann", now=NOW)

    def claim(_: int) -> bool:
        try:
            registry.claim(issued.token, now=NOW)
        except DeviceRefused:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(claim, range(4))) == [False, False, False, True]


def test_all_devices_of_a_request_come_in_or_none(engine: Engine, registry: Registry) -> None:
    enrol(registry)
    with pytest.raises(DeviceRefused) as refused:
        registry.register([new("car-2"), new("car-1")], actor="ann", now=NOW)
    assert (refused.value.code, refused.value.pointer) == (409, "/1/id")
    with reading(engine) as conn:
        assert conn.execute(select(devices.c.id)).scalars().all() == ["car-1"]


def test_every_change_has_a_number_above_all_before(engine: Engine, registry: Registry) -> None:
    registry.register([new(f"car-{i}") for i in range(5)], actor="ann", now=NOW)
    before = row_of(engine, "car-4")["change"]
    registry.move("car-0", fleet="us", labels=None, actor="ann", reason="", now=NOW)
    assert isinstance(before, int)
    assert row_of(engine, "car-0")["change"] == before + 1


def test_a_move_notes_the_moment_and_keeps_labels(engine: Engine, registry: Registry) -> None:
    registry.register([new("car-1", hardware="hw3")], actor="ann", now=NOW)
    registry.move("car-1", fleet="us", labels=None, actor="ann", reason="sold", now=NOW + 5)
    row = row_of(engine)
    assert (row["fleet"], row["moved_at"], row["labels"]) == ("us", NOW + 5, {"hardware": "hw3"})


def test_retired_and_quarantined_devices_lose_their_account(
    registry: Registry, accounts: Accounts
) -> None:
    password = enrol(registry)
    assert registry.password_matches("car-1", password)
    registry.quarantine("car-1", actor="ann", reason="odd", now=NOW)
    assert accounts.known == {}
    assert not registry.password_matches("car-1", password)


def test_who_comes_back_from_quarantine_starts_a_new_term(
    engine: Engine, registry: Registry
) -> None:
    old = enrol(registry)
    registry.quarantine("car-1", actor="ann", reason="odd", now=NOW)
    assert enrol(registry) != old
    row = row_of(engine)
    assert (row["status"], row["term"]) == ("active", 1)


def test_the_token_survives_a_broker_that_is_away(registry: Registry, accounts: Accounts) -> None:
    [issued] = registry.register([new()], actor="ann", now=NOW)
    fresh = Registry(registry._engine, accounts, SECRET)
    accounts.known.clear()
    accounts.away = True
    with pytest.raises(BrokerUnavailable):
        fresh.claim(issued.token, now=NOW)
    accounts.away = False
    claim = fresh.claim(issued.token, now=NOW)
    assert accounts.known == {"car-1": claim.password}


def test_sync_fills_a_broker_that_forgot(registry: Registry, accounts: Accounts) -> None:
    password = enrol(registry)
    accounts.known = {"stranger": "x"}
    assert registry.sync() == (1, 1)
    assert accounts.known == {"car-1": password}


def test_every_change_leaves_one_audit_row(engine: Engine, registry: Registry) -> None:
    enrol(registry)
    registry.move("car-1", fleet="us", labels=None, actor="ann", reason="sold", now=NOW)
    registry.replace("car-1", actor="bob", reason="burnt", now=NOW)
    registry.retire("car-1", actor="bob", reason="old", now=NOW)
    with reading(engine) as conn:
        actions = conn.exec_driver_sql("SELECT action FROM audit ORDER BY seq").scalars().all()
        assert audit.verify(conn) == []
    assert actions == [
        "device.register",
        "device.claim",
        "device.move",
        "device.replace",
        "device.retire",
    ]


def test_a_thousand_devices_come_in_one_request(registry: Registry, accounts: Accounts) -> None:
    issued = registry.register([new(f"car-{i:04d}") for i in range(1000)], actor="ann", now=NOW)
    assert len({i.token for i in issued}) == len(accounts.known) == 1000
    assert len(registry.passwords()) == 1000
