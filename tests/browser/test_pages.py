"""Every page as it is seen: light and dark, 360 and 1280 pixels wide, by rules and by pictures."""

from __future__ import annotations

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, expect

from controller.roles import Role
from controller.store import lookups
from telemetry.store.database import reading
from tests.browser.served import SHOTS, Site, end, log_in, serve, watch

pytestmark = pytest.mark.xdist_group("browser")

WIDTHS = {360: 740, 1280: 900}
LIVE_MS = 20_000  # a busy machine is no fault of the page
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
OPTIONS = {"runOnly": RULES, "resultTypes": ["violations"]}


def _waiting(site: Site) -> str:
    with reading(site.engine) as conn:
        return str(lookups.waiting_approvals(conn, frozenset(), 1)[0]["id"])


def paths(site: Site) -> dict[str, str]:
    fleet, moving = "model-3-eu", site.rollout("model-3-eu")
    return {
        "overview": "/",
        "rollouts": "/rollouts",
        "rollout-soaking": f"/rollouts/{moving}",
        "rollout-back": f"/rollouts/{site.rollout('model-y-us')}",
        "dialog-rollback": f"/rollouts/{moving}/rollback",
        "dialog-promote": f"/rollouts/{site.rollout('trams-zurich')}/promote",
        "stop": "/stop",
        "oncall": "/oncall",
        "devices": f"/devices?fleet={fleet}",
        "device": f"/devices/{site.estate.devices[fleet][3]}",
        "releases": "/releases",
        "release": f"/releases/autopilot-{fleet}-10.2.0",
        "decisions": "/decisions",
        "audit": "/audit",
        "board": "/board",
        "approval": f"/approvals/{_waiting(site)}",
    }


PAGES = (
    "overview", "rollouts", "rollout-soaking", "rollout-back", "dialog-rollback", "dialog-promote",
    "stop", "oncall", "devices", "device", "releases", "release", "decisions", "audit", "board",
    "approval",
)  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound_in_every_light_and_width(
    admin: BrowserContext, site: Site, name: str
) -> None:
    seen = watch(admin, site.url)
    answer = seen.page.goto(site.url + paths(site)[name])
    assert answer is not None
    assert answer.status == 200
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    _looked_at(seen.page, name)
    assert seen.wrong == []


def test_the_numbers_of_a_decision_and_its_replay(admin: BrowserContext, site: Site) -> None:
    seen = watch(admin, site.url)
    seen.page.goto(f"{site.url}/rollouts/{site.rollout('model-y-us')}")
    seen.page.get_by_role("link", name=re.compile("^numbers and replay")).first.click()
    expect(seen.page.get_by_text("Same", exact=True)).to_be_visible()
    _looked_at(seen.page, "decision")
    assert seen.wrong == []


def test_the_login_and_a_page_that_is_not_there(
    chromium: Browser, admin: BrowserContext, site: Site
) -> None:
    context = chromium.new_context()
    seen = watch(context, site.url)
    seen.page.goto(f"{site.url}/board?days=30")
    expect(seen.page).to_have_url(re.compile(r"/login\?next="))
    _looked_at(seen.page, "login")
    assert seen.wrong == []
    context.close()
    lost = watch(admin, site.url)
    answer = lost.page.goto(f"{site.url}/rollouts/none-of-that-name")
    assert answer is not None
    assert answer.status == 404
    expect(lost.page.get_by_text("unknown")).to_be_visible()
    _looked_at(lost.page, "not-found")


def test_an_empty_service_says_what_to_do_first(chromium: Browser, tmp_path: Any) -> None:
    site = serve(tmp_path, devices=0)
    try:
        context = chromium.new_context()
        seen = watch(context, site.url)
        log_in(seen.page, site, Role.ADMIN, "/")
        expect(seen.page.get_by_text("bellwether device enrol ID --fleet F")).to_be_visible()
        for path in ("/rollouts", "/devices", "/releases", "/decisions", "/board", "/oncall"):
            assert seen.page.goto(site.url + path).status == 200  # type: ignore[union-attr]
        assert seen.wrong == []
        context.close()
    finally:
        end(site)


def _looked_at(page: Any, name: str) -> None:
    """Pictures of the page in all four ways; nothing sticks out, axe finds nothing."""
    SHOTS.mkdir(exist_ok=True)
    page.wait_for_load_state("load")
    if page.locator("[data-live]").count():
        expect(page.locator("[data-live]")).to_have_text("Live", timeout=LIVE_MS)
    for width, height in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            wide = page.evaluate("document.scrollingElement.scrollWidth")
            assert wide <= width, f"{name}: {wide} pixels wide in a window of {width}"
            page.screenshot(path=SHOTS / f"{name}-{scheme}-{width}.png", full_page=True)
            found = Axe().run(page, options=OPTIONS).response["violations"]
            assert found == [], [(rule["id"], rule["nodes"][0]["html"]) for rule in found]
