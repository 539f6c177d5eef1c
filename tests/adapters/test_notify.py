"""Receivers are told of what was recorded: over real HTTP, through outages, and nothing is lost."""

from __future__ import annotations

import hmac
import json
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from sqlalchemy import Engine, select

from controller import audit, notify
from controller.notify import Notifier, Target
from controller.store.database import open_control
from controller.store.tables import deliveries
from telemetry.store.database import reading, writing

NOW = 1_800_000_000.0
HOSTILE = "\u202e<script>alert(1)</script>\x00\r\nX-Evil: 1" + "x" * 10_000


class Receiver:
    """A real HTTP receiver that can be told how to behave."""

    def __init__(self, port: int = 0) -> None:
        self.behave: Any = 200  # a status, or seconds to sleep before 200
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                how = (
                    receiver.behave(len(receiver.got))
                    if callable(receiver.behave)
                    else (receiver.behave)
                )
                if isinstance(how, float):
                    time.sleep(how)
                    how = 200
                try:
                    self.send_response(how)
                    self.end_headers()
                except OSError:
                    return
                if how < 300:
                    receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def ids(self) -> list[str]:
        return [json.loads(body)["id"] for _, body in self.got]

    def actions(self) -> list[str]:
        return [json.loads(body)["data"]["action"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_control(f"sqlite:///{tmp_path}/control.db")
    record(made, "device.register")  # before any receiver was known
    yield made
    made.dispose()


def record(engine: Engine, *named: str, subject: str = "cars", **detail: Any) -> None:
    for action in named:
        with writing(engine) as conn:
            audit.append(
                conn, at=NOW, actor="controller", action=action, subject=subject[:128],
                detail=detail or {"sentence": f"SAID — {action}", "rollout": "01R"},
            )  # fmt: skip


class Clocked:
    """A notifier whose clock the test moves."""

    def __init__(self, engine: Engine, target: Target, **more: Any) -> None:
        self.now = NOW
        self.notifier = Notifier(
            engine, target, source="https://bw.example", clock=lambda: self.now,
            patience=more.pop("patience", 2.0),
        )  # fmt: skip
        self.notifier.run_once()  # it is known from here on

    def turns(self, n: int = 20, step: float = 400.0) -> None:
        for _ in range(n):
            self.notifier.run_once()
            self.now += step


def test_what_is_wanted_is_told_in_order_and_once(engine: Engine, receiver: Receiver) -> None:
    told = Clocked(engine, Target(name="bot", url=receiver.url, events=("state:*", "rollback")))
    record(engine, "state:Soaking", "device.claim", "rollback", "verdict:wait", "state:RolledBack")
    told.turns()
    assert receiver.actions() == ["state:Soaking", "rollback", "state:RolledBack"]
    assert len(set(receiver.ids())) == 3
    again = Clocked(engine, Target(name="bot", url=receiver.url, events=("state:*", "rollback")))
    again.turns()
    assert len(receiver.got) == 3


def test_an_event_is_a_cloudevent(engine: Engine, receiver: Receiver) -> None:
    told = Clocked(engine, Target(name="bot", url=receiver.url))
    record(engine, "verdict:roll_back")
    told.turns(2)
    headers, body = receiver.got[0]
    assert headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    event = json.loads(body)
    assert event["specversion"] == "1.0"
    assert event["type"] == "dev.bellwether.verdict.roll_back"
    assert event["source"] == "https://bw.example"
    assert event["subject"] == "cars"
    assert event["time"].endswith("Z")
    assert event["data"]["sentence"] == "SAID — verdict:roll_back"
    assert event["data"]["url"] == "https://bw.example/rollouts/01R"
    assert event["id"].startswith("2-")


def test_in_binary_mode_the_attributes_are_headers(engine: Engine, receiver: Receiver) -> None:
    told = Clocked(engine, Target(name="bot", url=receiver.url, binary=True))
    record(engine, "state:RolledBack", subject='ü"%\u202e cars')
    told.turns(2)
    headers, body = receiver.got[0]
    assert headers["content-type"] == "application/json"
    assert headers["ce-type"] == "dev.bellwether.state.RolledBack"
    assert headers["ce-specversion"] == "1.0"
    assert unquote(headers["ce-subject"]) == 'ü"%\u202e cars'
    assert json.loads(body)["action"] == "state:RolledBack"


def test_a_signed_event_is_known_by_its_receiver(
    engine: Engine, receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("hush\n")
    target = Target(name="bot", url=receiver.url, secret_file=tmp_path / "secret")
    told = Clocked(engine, target)
    record(engine, "stop")
    told.turns(2)
    headers, body = receiver.got[0]
    version, _, signature = headers["webhook-signature"].partition(",")
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    right = hmac.new(b"hush", text, sha256).digest()
    assert version == "v1"
    assert hmac.compare_digest(b64decode(signature), right), b64encode(right)
    assert headers["webhook-id"] == json.loads(body)["id"]


def test_down_slow_and_broken_then_up_nothing_is_lost(engine: Engine) -> None:
    first = Receiver()
    port, url = first.port, first.url
    first.close()
    told = Clocked(engine, Target(name="bot", url=url), patience=0.3)
    record(engine, "state:Soaking")  # down
    told.turns(3)
    with reading(engine) as conn:
        place = conn.execute(select(deliveries)).one()
    assert place.failures == 3
    assert "ConnectError" in place.error
    receiver = Receiver(port)
    try:
        for how in (1.0, 500, 503, 429, 302):  # slow, broken, too busy, sent elsewhere
            receiver.behave = how
            record(engine, "rollback", "device.claim", "hold")
            told.turns(2)
        receiver.behave = 200
        told.turns(20)
        assert _once(receiver) == ["state:Soaking", *["rollback", "hold"] * 5]
    finally:
        receiver.close()


def _once(receiver: Receiver) -> list[str]:
    """Actions without repeated ids: at least once means that some come twice."""
    known: dict[str, str] = {}
    for name, action in zip(receiver.ids(), receiver.actions(), strict=True):
        known.setdefault(name, action)
    return list(known.values())


def test_a_kill_between_sending_and_noting_sends_the_same_event_again(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Clocked(engine, Target(name="bot", url=receiver.url))
    record(engine, "rollback", "hold")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Notifier, "_go_on", killed)
        with pytest.raises(KeyboardInterrupt):
            told.notifier.run_once()
    told.turns(3)
    assert receiver.actions() == ["rollback", "rollback", "hold"]
    assert receiver.ids()[0] == receiver.ids()[1]
    assert _once(receiver) == ["rollback", "hold"]


def test_an_event_that_is_refused_as_such_stops_the_others_only_so_long(
    engine: Engine, receiver: Receiver
) -> None:
    refused = [0]

    def behave(_: int) -> int:
        refused[0] += 1
        return 422 if refused[0] <= notify.MOST_REFUSALS else 200

    receiver.behave = behave
    told = Clocked(engine, Target(name="bot", url=receiver.url))
    record(engine, "rollback", "hold")
    told.turns(notify.MOST_REFUSALS + 5)
    assert receiver.actions() == ["hold"]


def test_one_that_is_away_does_not_hold_up_another(engine: Engine, receiver: Receiver) -> None:
    stopping = threading.Event()
    away = Target(name="away", url="http://127.0.0.1:9/x")
    there = Target(name="there", url=receiver.url)
    Clocked(engine, away)
    Clocked(engine, there)
    record(engine, "rollback")
    threads = notify.start(engine, (away, there), "https://bw.example", stopping)
    until = time.monotonic() + 20
    while not receiver.got and time.monotonic() < until:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join(15)
    assert receiver.actions() == ["rollback"]


def test_hostile_words_break_no_request(engine: Engine, receiver: Receiver) -> None:
    for binary in (False, True):
        target = Target(name=f"bot-{binary}", url=receiver.url, binary=binary)
        told = Clocked(engine, target)
        record(engine, "rollback", subject=HOSTILE, reason=HOSTILE, sentence=HOSTILE)
        told.turns(2)
    assert len(receiver.got) == 2
    for headers, body in receiver.got:
        assert "x-evil" not in headers
        data = json.loads(body)
        assert HOSTILE in json.dumps(data, ensure_ascii=False) or (
            data.get("data", data)["detail"]["reason"] == HOSTILE
        )


# Apprise loads a hundred adapters, some of which import what Python will drop.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_chat_and_pagers_come_by_apprise(engine: Engine, receiver: Receiver) -> None:
    pytest.importorskip("apprise")
    url = f"json://127.0.0.1:{receiver.port}/hook"
    told = Clocked(engine, Target(name="pager", url=url, kind="apprise"))
    record(engine, "state:RolledBack")
    told.turns(2)
    said = json.loads(receiver.got[0][1])
    assert said["title"] == "Bellwether: cars"
    assert "SAID — state:RolledBack" in said["message"]
    receiver.behave = 500
    record(engine, "state:RolledBack")
    told.turns(2)
    receiver.behave = 200
    told.turns(3)
    assert len(receiver.got) == 2


def test_a_new_receiver_begins_now(engine: Engine, receiver: Receiver) -> None:
    record(engine, "rollback")
    told = Clocked(engine, Target(name="late", url=receiver.url))
    told.turns(2)
    assert receiver.got == []
    record(engine, "hold")
    told.turns(2)
    assert receiver.actions() == ["hold"]


@pytest.mark.parametrize(
    "text",
    ["", "target = 1", "[[target]]", '[[target]]\nname = "a"', '[[target]]\nname = ""\nurl = "x"',
     '[[target]]\nname = "a"\nurl = "ftp://x"', '[[target]]\nname = "a"\nurl = "https://x"\nx = 1',
     '[[target]]\nname = "a"\nurl = "https://x"\nmode = "loud"',
     '[[target]]\nname = "a"\nurl = "https://x"\nevents = "all"',
     '[[target]]\nname = "a"\nurl = "https://x"\n' * 2, "\0", "=", '[[target]]\nname = 7'],
)  # fmt: skip
def test_a_file_with_a_mistake_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "notify.toml").write_text(text)
    with pytest.raises(notify.BadTargets, match=r"notify\.toml"):
        notify.load(tmp_path / "notify.toml")


def test_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "notify.toml").write_text(
        '[[target]]\nname = "bot"\nurl = "https://x/hook"\nmode = "binary"\nsecret_file = "s"\n'
        '[[target]]\nname = "pager"\nkind = "apprise"\nurl = "slack://a"\nevents = ["stop"]\n'
    )
    bot, pager = notify.load(tmp_path / "notify.toml")
    assert bot == replace(
        Target(name="bot", url="https://x/hook"), binary=True, secret_file=tmp_path / "s"
    )
    assert pager.wants("stop")
    assert not pager.wants("rollback")
    assert bot.wants("state:RolledBack")
    assert not bot.wants("device.claim")
