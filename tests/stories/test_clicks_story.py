"""The on-call's night by clicks alone, on a system that runs: Git, Mosquitto, devices with the real
agent, `bellwether serve`, Chromium on a phone.

The alert is a webhook's; its link asks for a login; two clicks and a reason roll back. Then nobody
touches the page: it follows by its stream until the devices are back, and says that Git knows.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from controller.cli import stage
from controller.cli.story import Story, Wish
from controller.roles import Role
from tests.browser.served import SHOTS, Site, attach, end, log_in, watch

pytestmark = [pytest.mark.story, pytest.mark.timeout(500), pytest.mark.xdist_group("story")]
PATIENCE = 150_000  # ms: a busy machine is no fault of the page
REASON = "brakes late, seen on three cars"


class Alerts:
    """The on-call's pager: a webhook's receiver."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        alerts = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                alerts.events.append(json.loads(body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def link(self) -> str:
        """The link of the first event of a rollout, as a person would open it."""
        deadline = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < deadline:
            for event in self.events:
                data = event["data"]
                if data.get("url"):
                    return str(data["url"])
            time.sleep(0.2)
        raise AssertionError(f"no alert with a link: {self.events}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Night(Story):
    """The demo's fleet; its canary soaks for so long that it ends by the person's hand alone."""

    def slow_release(self, version: str) -> None:
        text = stage.rollout_text(self.size, version)
        slow = text.replace("cohort: canary, soak: 4s", "cohort: canary, soak: 1h")
        assert slow != text
        files = {
            f"releases/{version}.yaml": self._publish(version, self._bundle(version)),
            "rollout.yaml": slow,
        }
        self.repository.commit(files, f"Roll out {version}")


@pytest.fixture
def alerts() -> Iterator[Alerts]:
    made = Alerts()
    yield made
    made.close()


@pytest.fixture
def night(tmp_path: Path, alerts: Alerts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Night]:
    told = tmp_path / "notify.toml"
    told.write_text(
        f'[[target]]\nname = "pager"\nurl = "{alerts.url}"\nevents = ["state:*", "verdict:*"]\n'
    )
    monkeypatch.setenv("BELLWETHER_NOTIFY", str(told))
    made = Night(wish=Wish(devices=40, seed=5, fault="none"), root=tmp_path, tell=lambda _: None)
    try:
        made.set_up()
        made.baseline()
        yield made
    finally:
        made.children.stop()


def test_the_night_by_clicks_alone(night: Night, alerts: Alerts) -> None:
    night.slow_release("10.2.0")
    link = urlsplit(alerts.link()).path
    _soaks(night)
    site = attach(night.root / "state")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox"]
            )
            context = browser.new_context(
                viewport={"width": 360, "height": 740}, color_scheme="dark"
            )
            seen = watch(context, site.url)
            _rolled_back(seen.page, site, link)
            _followed(seen.page, night)
            assert seen.wrong == []
            browser.close()
    finally:
        end(site)


def _soaks(night: Night) -> None:
    """The canary runs the release: the step soaks, and stays so."""
    deadline = time.monotonic() + PATIENCE / 1000
    while True:
        found = night.api.get(f"/rollouts/{stage.ROLLOUT}") or {}
        updated = found.get("members", {}).get("devices", {}).get("updated", 0)
        if found.get("state") == "Soaking" and updated >= 5:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.3)


def _rolled_back(page: Page, site: Site, link: str) -> None:
    clicks = 0
    log_in(page, site, Role.ON_CALL, link)  # the alert's link, by somebody who is not logged in
    expect(page).to_have_url(site.url + link)
    expect(page.locator(".title .badge")).to_have_text("Soaking")
    page.get_by_role("link", name="Roll back").click()
    clicks += 1
    expect(page.get_by_text("change now")).to_be_visible()
    page.get_by_role("textbox", name="Reason").fill(REASON)
    page.get_by_label("Incident").fill("INC-4711")
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / "night-preview-dark-360.png", full_page=True)
    page.get_by_role("button", name=re.compile(r"^Roll back \d+ devices$")).click()
    clicks += 1
    if page.get_by_role("alert").count():  # a device more was told meanwhile: the numbers are new
        page.get_by_role("button", name=re.compile(r"^Roll back \d+ devices$")).click()
        clicks += 1
    expect(page.get_by_label("Hold in force")).to_contain_text(REASON)
    assert clicks <= 3


def _followed(page: Page, night: Night) -> None:
    """From here nobody touches the page, nor loads it again."""
    loads: list[str] = []
    page.on("framenavigated", lambda frame: loads.append(frame.url))
    expect(page.locator("[data-live]")).to_have_text("Live", timeout=PATIENCE)
    expect(page.locator(".title .badge")).to_have_text("Rolled back", timeout=PATIENCE)
    expect(page.locator(".verdict")).to_contain_text(REASON)
    expect(page.get_by_label("Hold in force")).to_contain_text("In Git at", timeout=PATIENCE)
    assert loads == []
    page.screenshot(path=SHOTS / "night-rolled-back-dark-360.png", full_page=True)
    deadline = time.monotonic() + PATIENCE / 1000
    while (runs := _runs(night)) != {"fsd-10.1.0": 40}:  # as the devices themselves say
        assert time.monotonic() < deadline, runs
        time.sleep(0.3)
    holds = night.repository.holds()
    assert any(REASON in text and "INC-4711" in text for text in holds.values())
    page.get_by_role("link", name="Decisions").click()
    expect(page.get_by_role("main")).to_contain_text(REASON)


def _runs(night: Night) -> dict[str, int]:
    found: dict[str, int] = {}
    for device in night.api.every("/devices"):
        for part in (device["components"] or {}).values():
            found[part["release"]] = found.get(part["release"], 0) + 1
    return found
