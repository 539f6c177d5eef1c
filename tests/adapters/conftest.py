"""For the tests beside this file: a story on the loop, and the HTTP service.

The service stands over a real database and a real broker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import insert
from starlette.testclient import TestClient

from controller import tokens
from controller.broker_admin import ADMIN, BrokerAdmin, BrokerChild
from controller.devices import Registry
from controller.http.app import Deps, create_app
from controller.keys import DirectorKey
from controller.settings import Settings
from controller.store.database import open_control
from controller.store.tables import rollouts
from controller.tokens import Role
from telemetry.store.database import open_engine, writing
from telemetry.store.fold import Batch, Heard
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

from .story import Story, forty

NOW = 1_800_000_000.0


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return forty(tmp_path)


class Files:
    """A content store of two lines: the real one is tested where it lives."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, digest: str) -> Path:
        return self._root / digest

    def add(self, source: Path) -> tuple[str, int]:
        data = source.read_bytes()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.path(digest).write_bytes(data)
        return digest, len(data)


@dataclass
class House:
    deps: Deps
    app: FastAPI
    client: TestClient
    pokes: list[int]

    def with_settings(self, **changes: Any) -> TestClient:
        settings = self.deps.settings.model_copy(update=changes)
        return _client(create_app(replace(self.deps, settings=settings)))

    def client_from(self, address: str) -> TestClient:
        return _client(self.app, address)

    def token(self, role: Role, fleets: tuple[str, ...] = ()) -> dict[str, str]:
        made = tokens.create(
            self.deps.engine, name=f"t-{role}", role=role, fleets=fleets, actor="test", now=NOW
        )
        return {"Authorization": f"Bearer {made.token}"}

    def hear(self, device: str, message: Any) -> None:
        """A message of a device, as the ingest writes it."""
        self.store.write(Batch(heard=[Heard(device, [message])]), NOW)

    @property
    def store(self) -> Store:
        assert isinstance(self.deps.reader, Store)
        return self.deps.reader

    def add_rollout(self, name: str = "cars", state: str = "Soaking", **values: Any) -> str:
        """A rollout that waits in its first step; answers its id."""
        return add_rollout(self, name, state, **values)

    def enrol(self, device: str = "car-1", fleet: str = "eu") -> dict[str, Any]:
        return enrol(self, device, fleet)


def _client(app: FastAPI, address: str = "127.0.0.1") -> TestClient:
    return TestClient(
        app,
        base_url="http://127.0.0.1:8420",
        client=(address, 50_000),
        raise_server_exceptions=False,
    )


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerChild]:
    with BrokerChild(tmp_path_factory.mktemp("broker")) as child:
        yield child


@pytest.fixture
def house(tmp_path: Path, broker: BrokerChild) -> Iterator[House]:
    engine = open_control(f"sqlite:///{tmp_path}/control.db")
    telemetry = open_engine(f"sqlite:///{tmp_path}/telemetry.db")
    create_schema(telemetry)
    admin = BrokerAdmin(broker.url, *broker.credentials(ADMIN))
    admin.sync([])
    pokes: list[int] = []
    (tmp_path / "hook").write_text("hush\n")
    (tmp_path / "content").mkdir()
    deps = Deps(
        engine=engine,
        reader=Store(telemetry),
        registry=Registry(engine, admin, broker.secret),
        content=Files(tmp_path / "content"),
        key=DirectorKey.load_or_create(tmp_path / "director.pem"),
        settings=Settings(
            state_dir=tmp_path, broker=broker.url, webhook_secret_file=tmp_path / "hook"
        ),
        clock=lambda: NOW,
        poke=lambda: pokes.append(1),
    )
    app = create_app(deps)
    yield House(deps, app, _client(app), pokes)
    admin.close()
    engine.dispose()
    telemetry.dispose()


def add_rollout(house: House, name: str = "cars", state: str = "Soaking", **values: Any) -> str:
    row = {
        "id": f"01{name}".ljust(26, "0"),
        "name": name,
        "fleet": "eu",
        "release": "fsd-2",
        "digest": "sha256:" + "a" * 64,
        "artifacts": {"autopilot": "sha256:" + "b" * 64},
        "commit": "c" * 40,
        "author": "ann",
        "state": state,
        "sentence": "SOAKING — 3 of 10",
        "revision": 4,
        "step": 0,
        "opened_at": NOW,
        "step_at": NOW,
        "soak": 0.0,
        "updated_at": NOW,
        "seed": "s",
        "pinned": {},
        "flags": {},
        **values,
    }
    with writing(house.deps.engine) as conn:
        conn.execute(insert(rollouts).values(**row))
    return str(row["id"])


def enrol(house: House, device: str = "car-1", fleet: str = "eu") -> dict[str, Any]:
    made = house.client.post("/api/v1/devices", json={"id": device, "fleet": fleet})
    assert made.status_code == 201, made.text
    answer = house.client.post("/api/v1/devices:enrol", json={"token": made.json()["token"]})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())
