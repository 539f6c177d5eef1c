"""The registry survives its database: wiped, restored from an older backup, or another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, select

from controller import audit
from controller.devices import NewDevice, Registry
from controller.registry_copy import RECOVERED, RegistryCopy
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import devices, enrolment_tokens, metadata
from telemetry.store.database import reading, writing

NOW = 1_000_000.0
SECRET = b"s" * 32
OPEN: list[Engine] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().dispose()


class Broker:
    """The accounts of a broker: name → password."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def add_devices(self, pairs) -> None:
        self.known |= dict(pairs)

    def remove_devices(self, names) -> None:
        for name in names:
            self.known.pop(name, None)

    def list_devices(self) -> set[str]:
        return set(self.known)

    def ensure_services(self, secret: bytes) -> None:
        pass


class Server:
    """The part of a service that knows devices, on one state directory."""

    def __init__(self, url: str, state_dir: Path) -> None:
        self.engine: Engine = open_control(url)
        OPEN.append(self.engine)
        self.copy = RegistryCopy(self.engine, state_dir)
        self.broker = Broker()
        self.back = self.copy.open(NOW)
        self.registry = Registry(self.engine, self.broker, SECRET, changed=self.copy.catch_up)

    def enrol(self, *names: str) -> dict[str, str]:
        """name → password."""
        wanted = [NewDevice(id=name, fleet="eu", labels={"model": "m3"}) for name in names]
        issued = self.registry.register(wanted, actor="ann", now=NOW)
        return {i.device: self.registry.claim(i.token, now=NOW).password for i in issued}

    def rows(self) -> dict[str, tuple]:
        with reading(self.engine) as conn:
            return {
                row.id: (row.fleet, row.labels, row.status, row.password_issue, row.term)
                for row in conn.execute(select(devices))
            }


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Server:
    return Server(database_url, tmp_path)


def again(server: Server, tmp_path: Path, url: str | None = None) -> Server:
    server.engine.dispose()
    return Server(url or server.engine.url.render_as_string(hide_password=False), tmp_path)


def wipe(server: Server) -> None:
    with writing(server.engine) as conn:
        for table in reversed(metadata.sorted_tables):
            conn.execute(delete(table))


def test_a_restart_changes_nothing(server: Server, tmp_path: Path) -> None:
    server.enrol("car-1", "car-2")
    before = server.rows()
    for _ in range(3):
        server = again(server, tmp_path)
        assert server.back == 0
    assert server.rows() == before
    with reading(server.engine) as conn:
        assert store.get_meta(conn, RECOVERED) is None


def test_a_wiped_registry_comes_back_with_the_same_passwords(
    server: Server, tmp_path: Path
) -> None:
    passwords = server.enrol("car-1", "car-2", "car-3")
    server.registry.move("car-2", fleet="us", labels=None, actor="a", reason="sold", now=NOW)
    server.registry.retire("car-3", actor="a", reason="old", now=NOW)
    before = server.rows()
    wipe(server)
    server = again(server, tmp_path)
    assert server.back == 3
    assert server.rows() == before
    assert server.registry.password_matches("car-1", passwords["car-1"])
    assert not server.registry.password_matches("car-3", passwords["car-3"])
    with reading(server.engine) as conn:
        assert store.get_meta(conn, RECOVERED)["devices"] == 3
        assert audit.verify(conn) == []
    server.enrol("car-4")  # and its counter goes on above all that was
    server = again(server, tmp_path)
    assert set(server.rows()) == {"car-1", "car-2", "car-3", "car-4"}


def test_an_older_backup_gets_what_it_lacks(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/control.db"
    server = Server(url, tmp_path)
    server.enrol("car-1")
    server.engine.dispose()
    shutil.copy(tmp_path / "control.db", tmp_path / "backup.db")
    server = Server(url, tmp_path)
    server.enrol("car-2")
    server.registry.quarantine("car-1", actor="a", reason="odd", now=NOW)
    before = server.rows()
    server.engine.dispose()
    for file in tmp_path.glob("control.db*"):
        file.unlink()
    shutil.copy(tmp_path / "backup.db", tmp_path / "control.db")
    server = Server(url, tmp_path)
    assert server.back == 2
    assert server.rows() == before
    with reading(server.engine) as conn:
        assert store.get_meta(conn, RECOVERED) is None  # its rollouts are known: restored, not new


def test_another_database_keeps_its_own_devices(tmp_path: Path) -> None:
    server = Server(f"sqlite:///{tmp_path}/control.db", tmp_path)
    server.enrol("car-1")
    (tmp_path / "other").mkdir()
    other = Server(f"sqlite:///{tmp_path}/other/control.db", tmp_path / "other")
    other.enrol("bus-1")
    other = again(other, tmp_path)  # the state directory of the first one
    assert set(other.rows()) == {"bus-1"}
    kept = list(tmp_path.glob("registry.????????.jsonl"))
    assert len(kept) == 1
    assert "car-1" in kept[0].read_text()


def test_a_line_that_a_kill_cut_off_is_none(server: Server, tmp_path: Path) -> None:
    server.enrol("car-1", "car-2")
    file = tmp_path / "registry.jsonl"
    text = file.read_text()
    file.write_text(text[:-20])
    server.enrol("car-3")
    wipe(server)
    server = again(server, tmp_path)
    assert set(server.rows()) == {"car-1", "car-2", "car-3"}


def test_what_was_committed_and_not_copied_is_copied_later(server: Server, tmp_path: Path) -> None:
    server.registry._changed = lambda: None  # killed between commit and copy
    server.enrol("car-1")
    server = again(server, tmp_path)
    wipe(server)
    server = again(server, tmp_path)
    assert set(server.rows()) == {"car-1"}


@pytest.mark.parametrize("garbage", ["", "\0\0\0", "not json\n", "[]\n", '{"a": 1}\n{"b": 2}\n'])
def test_a_spoilt_copy_is_made_anew(server: Server, tmp_path: Path, garbage: str) -> None:
    server.enrol("car-1")
    (tmp_path / "registry.jsonl").write_text(garbage)
    server = again(server, tmp_path)
    lines = (tmp_path / "registry.jsonl").read_text().splitlines()
    assert "database" in json.loads(lines[0])
    assert {json.loads(line)["id"] for line in lines[1:]} == {"car-1"}


def test_an_empty_registry_cuts_nobody_off(server: Server, tmp_path: Path) -> None:
    """Database and copy are lost: the broker's accounts are all that devices have left."""
    server.enrol("car-1", "car-2")
    accounts = dict(server.broker.known)
    wipe(server)
    assert server.registry.sync() == (0, 0)
    assert server.broker.known == accounts
    # Enrolled again by hand, a device keeps its password: it is derived, not drawn.
    again_known = server.enrol("car-1")
    assert again_known["car-1"] == accounts["car-1"]


def test_tokens_are_not_copied(server: Server, tmp_path: Path) -> None:
    server.registry.register([NewDevice(id="car-9", fleet="eu")], actor="a", now=NOW)
    wipe(server)
    server = again(server, tmp_path)
    with reading(server.engine) as conn:
        assert conn.execute(select(enrolment_tokens)).all() == []
    assert server.rows()["car-9"][2] == "pending"
    assert "bwe_" not in (tmp_path / "registry.jsonl").read_text()
