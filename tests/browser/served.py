"""A real server over an estate of some months, and pages that are watched.

The server is `bellwether serve --role api` in a process of its own. Nobody is let in without a
login. Every page that a test opens is watched: console, errors, requests to elsewhere.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from playwright.sync_api import BrowserContext, Page
from sqlalchemy import Engine

from bench import estate
from controller import tokens
from controller.roles import Role
from controller.store.database import open_control
from telemetry.store.database import open_engine
from telemetry.store.tables import create_schema

SHOTS = Path(__file__).parent / "shots"  # git-ignored; what the last run saw
START_SECONDS = 60.0


@dataclass
class Site:
    """A served estate."""

    url: str
    engine: Engine
    telemetry: Engine
    estate: estate.Estate
    child: subprocess.Popen[bytes]
    tokens: dict[Role, str] = field(default_factory=dict)

    def token(self, role: Role) -> str:
        if role not in self.tokens:
            made = tokens.create(
                self.engine, name=f"{role}-person", role=role, fleets=(), actor="test",
                now=time.time(),
            )  # fmt: skip
            self.tokens[role] = made.token
        return self.tokens[role]

    def rollout(self, fleet: str) -> str:
        """The id of the newest rollout of a fleet."""
        return self.estate.rollouts[fleet][-1]


def serve(root: Path, *, devices: int = 240, rollouts: int = 30) -> Site:
    """Fill a directory (with nothing, for no devices) and serve it; the caller ends the child."""
    engine = open_control(f"sqlite:///{root / 'control.db'}")
    telemetry = open_engine(f"sqlite:///{root / 'telemetry.db'}")
    create_schema(telemetry)
    filled = (
        estate.fill(engine, telemetry, devices=devices, rollouts=rollouts, now=time.time())
        if devices
        else estate.Estate(devices={}, rollouts={})
    )
    return _attach(root, root / "none.git", engine, telemetry, filled)


def attach(state_dir: Path) -> Site:
    """Pages that ask for a login, of a service that runs already: an API process of their own."""
    engine = open_control(f"sqlite:///{state_dir / 'control.db'}")
    telemetry = open_engine(f"sqlite:///{state_dir / 'telemetry.db'}")
    nothing = estate.Estate(devices={}, rollouts={})
    return _attach(state_dir, state_dir / "none.git", engine, telemetry, nothing)


def _attach(
    state_dir: Path, repo: Path, engine: Engine, telemetry: Engine, filled: estate.Estate
) -> Site:
    port = _free_port()
    child = subprocess.Popen(
        [
            sys.executable, "-m", "controller.cli", "serve", "--role", "api", "--auth", "required",
            "--repo", str(repo), "--state-dir", str(state_dir),
            "--listen", f"127.0.0.1:{port}", "--broker", f"mqtt://127.0.0.1:{_free_port()}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    site = Site(f"http://127.0.0.1:{port}", engine, telemetry, filled, child)
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and child.poll() is None:
        try:
            if httpx2.get(f"{site.url}/readyz", timeout=5).status_code == 200:
                return site
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    end(site)
    raise RuntimeError("the server did not start")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def end(site: Site) -> None:
    site.child.terminate()
    try:
        site.child.wait(15)
    except subprocess.TimeoutExpired:
        site.child.kill()
        site.child.wait()
    site.engine.dispose()
    site.telemetry.dispose()


@dataclass
class Watched:
    """A page and what went wrong on it."""

    page: Page
    wrong: list[str]


def watch(context: BrowserContext, url: str) -> Watched:
    """A new page that notes console errors, script errors and requests to elsewhere."""
    page, wrong = context.new_page(), []
    page.on(
        "console",
        lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request",
        lambda r: None if r.url.startswith((url, "data:")) else wrong.append(f"elsewhere: {r.url}"),
    )
    return Watched(page, wrong)


def log_in(page: Page, site: Site, role: Role, path: str) -> None:
    """Go to a page as a person does who is not logged in yet."""
    page.goto(site.url + path)
    page.get_by_label("API token").fill(site.token(role))
    page.get_by_role("button", name="Log in").click()
