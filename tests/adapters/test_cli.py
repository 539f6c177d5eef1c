"""The command line against a real HTTP server, and against a state directory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from sqlalchemy import insert, select

from controller.devices import Registry
from controller.http.app import Deps, create_app
from controller.keys import DirectorKey
from controller.manifests.kinds import Release
from controller.settings import Settings, SettingsError, load
from controller.store import approvals
from controller.store.database import open_control
from controller.store.tables import commands, decisions, holds, releases, rollouts
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

NOW = 1_800_000_000.0
ROOT = Path(__file__).parents[2]


class Accounts:
    """A broker that takes everything."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def ensure_services(self, secret: bytes) -> None: ...

    def add_devices(self, devices: Iterable[tuple[str, str]]) -> None:
        self.known |= {name for name, _ in devices}

    def remove_devices(self, devices: Sequence[str]) -> None:
        self.known -= set(devices)

    def list_devices(self) -> set[str]:
        return set(self.known)


class Content:
    def path(self, digest: str) -> Path:
        raise KeyError(digest)

    def add(self, source: Path) -> tuple[str, int]:
        raise ValueError(source)


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BELLWETHER_")}
    return subprocess.run(
        [sys.executable, "-m", "controller.cli", *args],
        capture_output=True, text=True, cwd=ROOT, env={**clean, **environment}, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Path:
    engine = open_control(f"sqlite:///{tmp_path}/control.db")
    with writing(engine) as conn:
        conn.execute(insert(rollouts).values(**_rollout("r" * 26, "cars", "Soaking")))
        conn.execute(insert(rollouts).values(**_rollout("b" * 26, "back", "RolledBack")))
        conn.execute(insert(rollouts).values(**_rollout("d" * 26, "done", "Completed")))
        conn.execute(insert(rollouts).values(**_rollout("h" * 26, "held", "Held")))
        conn.execute(
            insert(decisions).values(
                id="e" * 26, rollout="r" * 26, at=NOW, kind="verdict", verdict="wait",
                sentence="WAIT — 3 of 10 devices", inputs={"a": 1}, numbers={"n": 3},
                watermark=7, commit="c" * 40, policy={}, term=1,
            )
        )  # fmt: skip
    engine.dispose()
    return tmp_path


def _rollout(identity: str, name: str, state: str) -> dict[str, Any]:
    return {
        "id": identity, "name": name, "fleet": "eu", "release": "fsd-2",
        "digest": "sha256:" + "a" * 64, "artifacts": {"autopilot": "sha256:" + "b" * 64},
        "commit": "c" * 40, "author": "ann", "state": state, "sentence": f"{state} — so",
        "revision": 4, "step": 0, "opened_at": NOW, "step_at": NOW, "soak": 0.0,
        "updated_at": NOW, "seed": "s", "pinned": {}, "flags": {},
    }  # fmt: skip


@pytest.fixture
def server(state: Path) -> Iterator[str]:
    engine = open_control(f"sqlite:///{state}/control.db")
    telemetry = open_engine(f"sqlite:///{state}/telemetry.db")
    create_schema(telemetry)
    deps = Deps(
        engine=engine,
        reader=Store(telemetry),
        registry=Registry(engine, Accounts(), b"s" * 32),
        content=Content(),
        key=DirectorKey.load_or_create(state / "director.pem"),
        settings=Settings(state_dir=state, broker="mqtt://127.0.0.1:1"),
        clock=lambda: NOW,
        poke=lambda: None,
    )
    service = uvicorn.Server(
        uvicorn.Config(create_app(deps), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    while not service.started and thread.is_alive():
        thread.join(0.02)
    port = service.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    service.should_exit = True
    thread.join()
    engine.dispose()
    telemetry.dispose()


def test_status_shows_the_sentence(server: str) -> None:
    plain = run("status", BELLWETHER_SERVER=server)
    assert plain.returncode == 0, plain.stderr
    assert "Soaking — so" in plain.stdout
    found = json.loads(run("status", "cars", "-o", "json", BELLWETHER_SERVER=server).stdout)
    assert found["v"] == 1
    assert found["rollout"]["state"] == "Soaking"


def test_a_rollback_carries_the_revision_that_was_seen(server: str, state: Path) -> None:
    stale = run("rollback", "cars", "--reason", "x", "--if-revision", "3", "--server", server)
    assert stale.returncode == 1
    assert "stale" in stale.stderr
    plan = run("rollback", "cars", "--dry-run", "-o", "json", "--server", server)
    assert json.loads(plan.stdout)["kind"] == "rollback"
    done = run(
        "rollback", "cars", "--reason", "it brakes", "--incident", "INC-1", "--server", server
    )
    assert done.returncode == 0, done.stderr
    assert _holds(state) == [("it brakes", "INC-1")]


def test_a_rollback_without_the_api_writes_the_same_command(state: Path) -> None:
    done = run("rollback", "cars", "--reason", "it brakes", "--state-dir", str(state))
    assert done.returncode == 0, done.stderr
    assert _holds(state) == [("it brakes", None)]
    stop = run("stop", "--reason", "recall", "--state-dir", str(state))
    assert stop.returncode == 0, stop.stderr
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        kinds = conn.execute(select(commands.c.kind).order_by(commands.c.id)).scalars().all()
    engine.dispose()
    assert kinds == ["rollback", "stop"]


def test_a_reason_is_held_to_the_same_with_and_without_the_api(server: str, state: Path) -> None:
    """What it becomes, a hold's file in Git, must be readable: after a wipe it is all there is."""
    for where in (("--server", server), ("--state-dir", str(state))):
        for wrong in ("\x1b[31mred", "\x9b31mred", "x" * 2001):
            done = run("rollback", "cars", "--reason", wrong, *where)
            assert done.returncode == 1, (where, done.stderr)
            assert "reason" in done.stderr
            assert "Traceback" not in done.stderr
        latin = b"gepr\xfcft".decode(errors="surrogateescape")
        stopped = run("stop", "--reason", latin, "--incident", latin, *where)
        assert stopped.returncode == 0, stopped.stderr
    assert _holds(state) == []


def test_a_stop_is_previewed_and_ended_with_and_without_the_api(server: str, state: Path) -> None:
    for where in (("--server", server), ("--state-dir", str(state))):
        words = ("stop", "--scope", "digest", "--value", "sha256:" + "b" * 64, "--reason", "x")
        shown = run(*words, "--dry-run", "-o", "json", *where)
        assert [one["name"] for one in json.loads(shown.stdout)["rollouts"]] == ["cars"]
        assert run(*words, "--end", *where).returncode == 1  # nothing was stopped yet
        done = run(*words, "--incident", "INC-7", *where)
        assert done.returncode == 0, done.stderr
        assert run(*words, "--end", "--break-glass", *where).returncode == 0
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        kept = conn.execute(select(commands.c.incident).order_by(commands.c.id)).scalars().all()
    engine.dispose()
    assert sorted(map(str, kept)) == ["INC-7", "INC-7", "None", "None"]


def test_a_part_of_the_fleet_is_named_by_one_option(server: str, state: Path) -> None:
    wrong = run("hold", "cars", "--reason", "x", "--cohort", "a", "--step", "1", "--server", server)
    assert wrong.returncode == 2
    assert "one of --cohort" in wrong.stderr
    seen = run("hold", "cars", "--dry-run", "--label", "hardware=hw4", "-o", "json",
               "--server", server)  # fmt: skip
    selector = json.loads(seen.stdout)["scope"]["selector"]
    assert selector["matchLabels"] == {"hardware": "hw4"}
    for name in ("car-1", "car-2"):
        run("device", "enrol", name, "--fleet", "eu", "--server", server)
    slip = run("rollback", "cars", "--reason", "x", "--device", "car-l", "--state-dir", str(state))
    assert slip.returncode == 1
    assert "fleet eu has no device car-l" in slip.stderr
    done = run("rollback", "cars", "--reason", "two burn", "--device", "car-1", "--device", "car-2",
               "--state-dir", str(state))  # fmt: skip
    assert done.returncode == 0, done.stderr
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        assert conn.execute(select(holds.c.scope)).scalar_one() == {"devices": ["car-1", "car-2"]}
    engine.dispose()


def test_a_preview_without_the_api_says_when_telemetry_is_away(state: Path) -> None:
    shown = run("rollback", "cars", "--dry-run", "-o", "json", "--state-dir", str(state))
    assert shown.returncode == 0, shown.stderr
    assert "does not answer" in json.loads(shown.stdout)["telemetry"]


def test_a_second_person_approves_what_the_first_one_asked_for(server: str, state: Path) -> None:
    engine = open_control(f"sqlite:///{state}/control.db")
    with writing(engine) as conn:
        approvals.put_rule(conn, "eu", {"widen": 2})
    engine.dispose()
    made = run("token", "create", "ann", "--role", "release-manager", "--state-dir", str(state))
    ann = made.stdout.strip()
    asked = run("promote", "cars", "--reason", "good", "--server", server, BELLWETHER_TOKEN=ann)
    assert asked.returncode == 0, asked.stderr
    assert "waits for one more person" in asked.stdout
    assert "promote" in run("approvals", "--server", server).stdout
    own = run("approve", "cars", "--server", server, BELLWETHER_TOKEN=ann)
    assert own.returncode == 6
    assert "somebody else approves" in own.stderr
    other = run("approve", "cars", "--digest", "sha256:" + "0" * 64, "--server", server)
    assert other.returncode == 1
    assert "look at it again" in other.stderr
    done = run("approve", "cars", "--reason", "looked", "--server", server)
    assert done.returncode == 0, done.stderr
    assert "granted" in done.stdout


def test_recovery_lists_whom_a_rollback_has_not_reached(server: str) -> None:
    none = run("recovery", "cars", "--server", server)
    assert none.returncode == 1
    assert "no rollback" in none.stderr
    run("rollback", "cars", "--reason", "x", "--server", server)
    found = run("recovery", "cars", "--server", server)
    assert found.returncode == 0, found.stderr
    assert "0 devices still run fsd-2" in found.stdout


def test_wait_tells_the_end_by_its_exit_code(server: str) -> None:
    codes = {"done": 0, "back": 4, "cars": 5, "nothing": 5, "held": 6}
    for name, code in codes.items():
        ended = run("wait", name, "--timeout", "0", "--server", server)
        assert ended.returncode == code, (name, ended.stderr)


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[str]:
    """The URL of a server that gives one answer after the other, the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{service.server_port}"
        finally:
            service.shutdown()
            thread.join()


def test_wait_outlives_a_service_that_is_started_again() -> None:
    """Two answers of a rollout under way, a restart, then its end."""
    soaking, over = (json.dumps(_told(s)).encode() for s in ("Soaking", "Completed"))
    with answering((200, soaking), (503, b"{}"), (200, over)) as url:
        ended = run("wait", "cars", "--timeout", "20", "--interval", "0.1", "--server", url)
    assert ended.returncode == 0, ended.stderr
    wrong = run("wait", "cars", "--timeout", "20", "--server", "http://127.0.0.1:1")
    assert wrong.returncode == 1


def test_another_server_is_not_waited_for_nor_told_what_to_list() -> None:
    with answering((404, b"<h1>Not Found</h1>")) as url:
        ended = run("wait", "cars", "--timeout", "5", "--server", url)
        shown = run("device", "show", "car-1", "--server", url)
    for done in (ended, shown):
        assert done.returncode == 1, done.stderr
        assert done.stderr.rstrip().endswith("is this a Bellwether server?")


def _told(state: str) -> dict[str, str]:
    return {"name": "cars", "release": "fsd-2", "state": state, "sentence": "so"}


def test_explain_and_export_show_the_decision(server: str, tmp_path: Path) -> None:
    assert "WAIT — 3 of 10" in run("explain", "cars", "--server", server).stdout
    assert '"n": 3' in run("explain", "e" * 26, "--server", server).stdout
    out = tmp_path / "evidence.json"
    done = run("evidence", "export", "cars", "--out", str(out), "--server", server)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["decisions"][0]["inputs"] == {"a": 1}


def test_the_life_of_a_device(server: str) -> None:
    env = {"BELLWETHER_SERVER": server}
    token = run("device", "enrol", "car-1", "--fleet", "eu", "--label", "hardware=hw3", **env)
    assert token.stdout.startswith("bwe_"), token.stderr
    shown = json.loads(run("device", "show", "car-1", "-o", "json", **env).stdout)
    assert shown["labels"] == {"hardware": "hw3"}
    assert run("device", "move", "car-1", "--fleet", "us", **env).returncode == 0
    assert "us" in run("device", "list", **env).stdout
    assert run("device", "retire", "car-1", "--reason", "old", **env).returncode == 0
    again = run("device", "retire", "car-1", **env)
    assert again.returncode == 1
    assert "retired" in again.stderr
    assert run("device", "enrol", "x", "--fleet", "eu", "--label", "no", **env).returncode == 2


def test_tokens_are_made_without_a_running_service(state: Path, server: str) -> None:
    made = run("token", "create", "ci", "--role", "viewer", "--state-dir", str(state))
    token = made.stdout.strip()
    assert run("status", "--server", server, "--token", token).returncode == 0
    denied = run("stop", "--reason", "x", "--server", server, "--token", token)
    assert denied.returncode == 6
    assert "ci" in run("token", "list", "--state-dir", str(state)).stdout
    assert run("token", "revoke", "ci", "--state-dir", str(state)).returncode == 0
    assert run("status", "--server", server, "--token", token).returncode == 6
    assert run("token", "create", "x", "--role", "king", "--state-dir", str(state)).returncode == 2
    whole = run("evidence", "verify", "--state-dir", str(state))
    assert "whole" in whole.stdout


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    away = run("status", "--server", "http://127.0.0.1:1")
    assert away.returncode == 1
    assert "bellwether serve" in away.stderr
    assert "Traceback" not in away.stderr
    assert run("rollback", "x", "--state-dir", str(tmp_path / "no")).returncode == 2
    assert run("status", "--server", "nonsense").returncode == 1
    assert run("no-such-command").returncode == 2


@pytest.mark.parametrize(
    ("command", "code", "then"),
    [
        ("device show nobody", 1, "bellwether device list"),
        ("device retire nobody --reason x", 1, "bellwether device list"),
        ("status nothing", 1, "bellwether status"),
        ("approve nothing", 1, "bellwether approvals"),
        ("resume cars", 1, "bellwether status"),
        ("rollback back --reason x", 1, "bellwether status"),
        ("rollback cars --reason x --if-revision 3", 1, "bellwether status"),
        ("lift cars --reason x", 1, "bellwether status"),
        ("status --token wrong", 6, "bellwether token create"),
    ],
)
def test_a_refusal_names_the_next_command(server: str, command: str, code: int, then: str) -> None:
    done = run(*command.split(), BELLWETHER_SERVER=server)
    assert done.returncode == code, done.stderr
    assert f"`{then}" in done.stderr


def test_releases_are_told_to_people(server: str, state: Path) -> None:
    artifact = {"component": "autopilot", "digest": "sha256:" + "b" * 64, "size": 1_900_000}
    document = Release(name="fsd-2", version="2.0", artifacts=(artifact,), notes="smoother")  # type: ignore[arg-type]
    engine = open_control(f"sqlite:///{state}/control.db")
    with writing(engine) as conn:
        conn.execute(
            insert(releases).values(
                name="fsd-2", digest="sha256:" + "a" * 64, commit="c" * 40, seen_at=NOW,
                document=document.model_dump(mode="json"),
            )
        )  # fmt: skip
    engine.dispose()
    listed = run("release", "list", BELLWETHER_SERVER=server)
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [
        ["fsd-2", "2.0", "autopilot"]
    ]
    shown = run("release", "show", "fsd-2", BELLWETHER_SERVER=server).stdout
    assert f"artifact autopilot  sha256:{'b' * 64}, 1,900,000 bytes" in shown
    assert "signed by           nobody" in shown
    assert "{" not in shown


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pause cars --reason x --cohort canary", "only rollback and hold can take it"),
        ("promote cars --reason x --to previous", "only rollback can take it"),
        ("stop --reason x --scope prodct", "one of all, product, hardware, digest"),
        ("approvals --state none", "one of waiting, granted, void"),
        ("replay nothing/evidence.json", "nothing/evidence.json: no such file"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(
    server: str, command: str, says: str
) -> None:
    done = run(*command.split(), BELLWETHER_SERVER=server)
    assert done.returncode != 0
    assert says in done.stderr


def test_another_server_is_told_apart_from_what_is_not_there(server: str) -> None:
    done = run("status", "--server", f"{server}/elsewhere")
    assert done.returncode == 1
    assert "is this a Bellwether server?" in done.stderr


def test_a_stop_of_what_nobody_knows_says_so_before_it_is_made(server: str) -> None:
    command = "stop --reason x --scope product --value nothing --dry-run"
    done = run(*command.split(), BELLWETHER_SERVER=server)
    assert "0 active rollouts may be concerned; NOTHING that we know is in it" in done.stdout


def test_a_database_that_is_away_is_no_traceback(tmp_path: Path) -> None:
    url = "postgresql+psycopg://x@127.0.0.1:1/x"
    away = run("serve", "--state-dir", str(tmp_path), "--database", url, "--repo", str(tmp_path))
    assert away.returncode == 1
    assert "does not answer" in away.stderr
    assert "Traceback" not in away.stderr


def test_help_loads_nothing_heavy() -> None:
    probe = "import sys, controller.cli; print(sorted(set(sys.modules) & {'rich.console', "
    probe += "'sqlalchemy', 'fastapi', 'numpy', 'pydantic', 'httpx2', 'yaml'}))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


# -- settings -------------------------------------------------------------------------------------


def test_flags_beat_the_environment_that_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bellwether.toml"
    file.write_text('branch = "file"\npath = "file"\nrepo = "file"\n')
    monkeypatch.setenv("BELLWETHER_PATH", "environment")
    monkeypatch.setenv("BELLWETHER_REPO", "environment")
    found = load({"repo": "flag", "branch": None}, file)
    assert (found.repo, found.path, found.branch) == ("flag", "environment", "file")


def test_every_setting_is_a_flag() -> None:
    import inspect

    from controller.cli.serve import serve

    assert set(Settings.model_fields) <= set(inspect.signature(serve).parameters)


def test_beyond_loopback_needs_authentication() -> None:
    with pytest.raises(SettingsError, match="--auth required"):
        load({"listen": "0.0.0.0:8420"})
    assert load({"listen": "0.0.0.0:8420", "auth": "required"}).address == ("0.0.0.0", 8420)
    assert load({"listen": "[::1]:1"}).address == ("::1", 1)


@pytest.mark.parametrize(
    "flags",
    [
        {"listen": "8420"},
        {"listen": "127.0.0.1:99999"},
        {"broker": "http://x"},
        {"role": "king"},
        {"poll_interval": 0},
        {"cowboy": 1},
    ],
)
def test_bad_settings_are_named(flags: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(flags))):
        load(flags)


def test_a_child_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load({"listen": "127.0.0.1:9", "broker": "mqtt://127.0.0.1:7", "poll_interval": 0.5})
    for name, value in before.environment().items():
        monkeypatch.setenv(name, value)
    assert load({}) == before


def test_shown_settings_cover_passwords() -> None:
    shown = load({"database": "postgresql+psycopg://u:geheim@h/d"}).shown()
    assert "geheim" not in json.dumps(shown)


def _holds(state: Path) -> list[tuple[str, str | None]]:
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        found = [(r.reason, r.incident) for r in conn.execute(select(holds))]
    engine.dispose()
    return found
