"""`bellwether doctor` on the databases of a system that lived: sound, and tampered with.

The system is the simulated world's, its databases copied into a state directory as `serve` has it.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from bench.world import texts
from bench.world.databases import Databases
from bench.world.server import KEY
from bench.world.world import World
from controller import engine
from controller.cli import app, doctor
from controller.invariants import check
from controller.store import snapshot
from device_agent.protocol import ComponentOrder, Desired, Health, Kind, open_envelope
from telemetry.store.database import open_engine
from telemetry.store.fold import Batch, Heard
from telemetry.store.reports import Store

MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "3s", "maxSoak": "60s", "margins": MARGINS}
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]


@pytest.fixture(scope="module")
def lived(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory: 2 completed, 3 rolled back in the canary, and its fix completed."""
    world = World(databases, "doctor")
    for n in range(8):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}))
    base = {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy()}
    world.commit({**base, "1.yaml": texts.release("1")})
    world.start()
    world.run(6)
    for version in ("2", "3"):
        world.commit(
            {
                f"{version}.yaml": texts.release(version),
                "cars.yaml": texts.rollout(version, STEPS, {"silentAfter": "20s"}),
            }
        )
        world.run(45 if version == "2" else 8)
    world.ask("rollback")
    world.run(40)
    state = tmp_path_factory.mktemp("state")
    for each in (databases.control, databases.telemetry.engine):
        each.dispose()
    for name in ("control", "telemetry"):
        shutil.copyfile(databases.root / f"{name}.now", state / f"{name}.db")
    (state / "keys").mkdir()
    pem = KEY._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (state / "keys" / "director.pem").write_bytes(pem)
    return state


@pytest.fixture
def state(lived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to tamper with."""
    monkeypatch.setattr(doctor, "AGAIN", 0.0)
    return Path(shutil.copytree(lived, tmp_path / "state"))


def look(state: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    done = CliRunner().invoke(
        app, ["doctor", "--state-dir", str(state), "--output", "json", "--grace", "1", *more]
    )
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout)["findings"]


def sql(state: Path, text: str, *values: object, name: str = "control") -> list[tuple]:
    with sqlite3.connect(state / f"{name}.db") as conn:
        return conn.execute(text, values).fetchall()


def order_of(state: Path, device: str) -> Desired:
    return open_envelope(sql(state, "SELECT body FROM desired WHERE device = ?", device)[0][0])[0]


def write_order(state: Path, order: Desired, at: float) -> None:
    """As the controller would: signed, and its row says the same."""
    told = {
        c: {"release": o.release, "digest": o.digest, "at": at, "rollout": None}
        for c, o in order.components.items()
    }
    sql(
        state,
        "UPDATE desired SET body=?, kind=?, generation=?, attempt=?, components=?, at=? "
        "WHERE device=?",
        KEY.sign(order), str(order.kind), order.generation, order.attempt, json.dumps(told), at,
        order.device,
    )  # fmt: skip


def rejected_order(state: Path, device: str = "car-5") -> Desired:
    order = order_of(state, device)
    told = ComponentOrder(release="app-3", digest=texts.artifact("3"), size=10, urls=("http://x",))
    return replace(
        order, kind=Kind.INSTALL, components={texts.COMPONENT: told},
        generation=order.generation + 1, not_after="2027-01-16T00:00:00Z",
    )  # fmt: skip


def after_the_hold(state: Path) -> None:
    write_order(state, rejected_order(state), at=held_at(state) + 10)


def before_the_hold(state: Path) -> None:
    """The order from before the hold is still in force: this device was forgotten."""
    write_order(state, rejected_order(state, "car-0"), at=held_at(state) - 3)
    sql(state, "UPDATE rollouts SET updated_at = updated_at + 100")


def held_at(state: Path) -> float:
    return float(sql(state, "SELECT created_at FROM holds")[0][0])


def one_more_member(state: Path) -> None:
    sql(
        state,
        "INSERT INTO members SELECT rollout, 'car-99', step, arm, drawn_at, hardware, band, score,"
        " previous, state, reason, attempt, told_at, exposed_at, left_at, updated_at FROM members "
        "WHERE arm = 'exposed' LIMIT 1",
    )


def counted_twice(state: Path) -> None:
    names = [row[1] for row in sql(state, "PRAGMA table_info(telemetry_health)", name="telemetry")]
    chosen = ", ".join("batch + 100000" if name == "batch" else name for name in names)
    sql(
        state,
        f"INSERT INTO telemetry_health SELECT {chosen} FROM telemetry_health LIMIT 3",  # noqa: S608
        name="telemetry",
    )


def forgotten_boots(state: Path) -> None:
    sql(state, "UPDATE telemetry_boots SET high = 0, missing = x''", name="telemetry")


def audit_edited(state: Path) -> None:
    sql(state, "UPDATE audit SET actor = 'nobody' WHERE seq = 3")


def audit_shortened(state: Path) -> None:
    sql(state, "DELETE FROM audit WHERE seq = 4")


def command_unrecorded(state: Path) -> None:
    sql(
        state,
        "INSERT INTO commands SELECT 'another', kind, rollout, body, actor, reason, incident, at, "
        "state, result, done_at FROM commands LIMIT 1",
    )


def term_lowered(state: Path) -> None:
    sql(state, "UPDATE leases SET term = term - 1")


def order_altered(state: Path) -> None:
    sql(state, "UPDATE desired SET body = CAST(replace(body, 'app-2', 'app-1') AS BLOB)")


def order_unsigned(state: Path) -> None:
    body = sql(state, "SELECT body FROM desired WHERE device = 'car-1'")[0][0]
    bare = json.loads(body) | {"signatures": []}
    sql(state, "UPDATE desired SET body = ? WHERE device = 'car-1'", json.dumps(bare).encode())


def row_beside_its_order(state: Path) -> None:
    sql(state, "UPDATE desired SET generation = generation + 5 WHERE device = 'car-1'")


def unknown_artifact(state: Path) -> None:
    order = order_of(state, "car-1")
    told = replace(order.components[texts.COMPONENT], digest="sha256:" + "e" * 64)
    changed = replace(order, components={texts.COMPONENT: told})
    write_order(state, changed, at=held_at(state) + 1)


def sentence_rewritten(state: Path) -> None:
    sql(state, "UPDATE decisions SET sentence = 'all was well' WHERE kind = 'draw'")


def inputs_rewritten(state: Path) -> None:
    sql(
        state,
        "UPDATE decisions SET numbers = json_set(numbers, '$.total', 0.123) WHERE kind = 'verdict'",
    )


def step_raised(state: Path) -> None:
    sql(state, "UPDATE rollouts SET step = 1 WHERE release = 'app-3'")


def other_digest(state: Path) -> None:
    sql(state, "UPDATE rollouts SET digest = 'sha256:' || hex(zeroblob(32)) WHERE step = 0")


def told_in_a_stop(state: Path) -> None:
    sql(
        state,
        "INSERT INTO stops (id, scope, value, reason, actor, at) SELECT 's', 'all', '', 'x', "
        "'eve', min(told_at) - 10 FROM members",
    )


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an order after the hold": (after_the_hold, "I1"),
    "an order from before it": (before_the_hold, "I3"),
    "a member more than drawn": (one_more_member, "I2"),
    "messages counted twice": (counted_twice, "I5"),
    "what was counted is forgotten": (forgotten_boots, "I5"),
    "an audit record changed": (audit_edited, "I13"),
    "an audit record removed": (audit_shortened, "I13"),
    "a command without a record": (command_unrecorded, "I13"),
    "the term lowered": (term_lowered, "I8"),
    "an order altered": (order_altered, "I7"),
    "an order unsigned": (order_unsigned, "I7"),
    "a row that says another thing than its order": (row_beside_its_order, "I7"),
    "an artifact that no commit has shown": (unknown_artifact, "I11"),
    "a decision's sentence rewritten": (sentence_rewritten, "I5"),
    "a decision's numbers rewritten": (inputs_rewritten, "I6"),
    "a step raised": (step_raised, "I14"),
    "a rollout with another digest": (other_digest, "I11"),
    "a device told during a stop": (told_in_a_stop, "I12"),
}


def test_a_sound_system_has_no_findings(state: Path) -> None:
    assert look(state) == (0, [])
    shown = CliRunner().invoke(app, ["doctor", "--state-dir", str(state)])
    assert shown.stdout.startswith("every promise is kept: 8 devices, 2 rollouts, 8 orders")


@pytest.mark.parametrize("table", ["telemetry_sums", "telemetry_rollups"])
def test_sums_beside_their_messages_are_found(state: Path, table: str) -> None:
    """What every history of the simulation is asked."""

    control, telemetry = (
        open_engine(f"sqlite:///{state}/{name}.db") for name in ("control", "telemetry")
    )
    store = Store(telemetry)

    def found() -> set[str]:
        tables = snapshot.read(control, store, sums=True)
        return {f.invariant for f in check(tables, now=now)}

    now = store.hearing()[1]
    said = Health(boot="new", boot_count=99, seq=1, components={}, t0=now, dt=1.0)
    store.write(Batch(heard=[Heard("car-1", [replace(said, counters={"incident": 2})])]), now)
    assert "I5" not in found()
    sql(state, f"UPDATE {table} SET sums = zeroblob(length(sums))", name="telemetry")  # noqa: S608
    assert "I5" in found()
    control.dispose()
    telemetry.dispose()


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_is_found(state: Path, name: str) -> None:
    tamper, invariant = TAMPERED[name]
    tamper(state)
    code, findings = look(state)
    assert code == 1
    assert invariant in {one["invariant"] for one in findings}, findings
    assert all(one["do"] for one in findings)


@pytest.mark.parametrize(("by", "named"), [("0.0.1+feedbeef00", True), (None, False)])
def test_another_engines_decision_breaks_no_promise(
    state: Path, by: str | None, named: bool
) -> None:
    """The present engine would have judged otherwise: a note says who recorded it, and how many."""
    inputs_rewritten(state)
    sql(state, "UPDATE decisions SET policy = json_set(policy, '$.engine', ?)", by)
    assert look(state) == (0, [])
    done = CliRunner().invoke(app, ["doctor", "--state-dir", str(state), "--output", "json"])
    (note,) = json.loads(done.stdout)["notes"]
    n = sql(state, "SELECT count(*) FROM decisions WHERE kind = 'verdict'")[0][0]
    assert f"judges {n} of them otherwise" in note
    assert ("engine 0.0.1+feedbeef00" in note) is named
    shown = CliRunner().invoke(app, ["doctor", "--state-dir", str(state)])
    assert shown.stdout.startswith("note: ")


def test_every_decision_names_the_engine_that_made_it(state: Path) -> None:
    recorded = {json.loads(row[0])["engine"] for row in sql(state, "SELECT policy FROM decisions")}
    assert recorded == {engine.present()}


def test_it_leaves_nothing_behind_and_says_what_is_missing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--state-dir", str(tmp_path / "nowhere")])
    assert done.exit_code != 0
    assert "no such file" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_without_the_key_it_says_that_signatures_are_not_checked(state: Path) -> None:
    shutil.rmtree(state / "keys")
    order_unsigned(state)
    done = CliRunner().invoke(app, ["doctor", "--state-dir", str(state)])
    assert "signatures not checked" in done.stdout


def test_an_offline_fleet_and_a_resting_service_are_sound(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(databases, "offline")
    for n in range(6):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 3 else {}))
    base = {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy()}
    world.commit({**base, "1.yaml": texts.release("1"), "2.yaml": texts.release("2")})
    world.start()
    world.run(6)
    for device in world.devices.values():
        device.lose_network(10_000)
    world.commit({"cars.yaml": texts.rollout("2", STEPS, {"silentAfter": "20s"})})
    world.run(60)
    world.ask("rollback")
    world.run(60)
    assert world.check() == []
    world.controller_away(500)
    world.ingest_away(500)
    world.run(200)
    assert world.check() == []
