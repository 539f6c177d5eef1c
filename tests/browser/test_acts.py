"""What a person does: from the alert's link to the rollback, and what may go wrong on the way."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import Browser, BrowserContext, expect
from sqlalchemy import select, update

from controller.roles import Role
from controller.store.tables import audit, commands, holds, rollouts
from telemetry.store.database import reading, writing
from tests.browser.served import SHOTS, Site, end, log_in, serve, watch

pytestmark = pytest.mark.xdist_group("browser")


def test_from_the_alert_to_the_rollback_in_three_clicks(chromium: Browser, site: Site) -> None:
    """Log in, preview, reason, roll back: on a phone, at night."""
    rollout = site.rollout("vans-nordic")
    context = chromium.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    seen, clicks = watch(context, site.url), 0
    log_in(seen.page, site, Role.ON_CALL, f"/rollouts/{rollout}")  # the alert's link
    expect(seen.page).to_have_url(f"{site.url}/rollouts/{rollout}")

    seen.page.get_by_role("link", name="Roll back").click()
    clicks += 1
    expect(seen.page.get_by_text("change now")).to_be_visible()
    seen.page.get_by_role("textbox", name="Reason").fill("brakes late, seen on three vans")
    seen.page.get_by_label("Incident").fill("INC-4711")
    seen.page.screenshot(path=SHOTS / "story-preview-dark-360.png", full_page=True)
    seen.page.get_by_role("button", name=re.compile(r"^Roll back \d+ devices$")).click()
    clicks += 1

    expect(seen.page.get_by_label("Hold in force")).to_contain_text("brakes late")
    expect(seen.page.get_by_label("Recorded")).to_contain_text("on-call-person")
    assert clicks <= 3
    assert seen.wrong == []
    with reading(site.engine) as conn:
        command = conn.execute(select(commands).where(commands.c.rollout == rollout)).one()
        hold = conn.execute(select(holds).where(holds.c.incident == "INC-4711")).one()
        row = conn.execute(select(audit).order_by(audit.c.seq.desc()).limit(1)).one()
    assert (command.kind, command.state, command.incident) == ("rollback", "recorded", "INC-4711")
    assert (hold.fleet, hold.to, hold.actor) == ("vans-nordic", "previous", "on-call-person")
    assert (row.action, row.actor) == ("rollback", "on-call-person")
    assert row.detail["reason"] == "brakes late, seen on three vans"
    context.close()


def test_a_preview_that_is_stale_is_shown_again(admin: BrowserContext, site: Site) -> None:
    rollout = site.rollout("drones-alps")
    seen = watch(admin, site.url)
    seen.page.goto(f"{site.url}/rollouts/{rollout}/rollback")
    with writing(site.engine) as conn:
        conn.execute(
            update(rollouts)
            .where(rollouts.c.id == rollout)
            .values(revision=rollouts.c.revision + 1, updated_at=time.time())
        )
    seen.page.get_by_role("textbox", name="Reason").fill("gusts")
    seen.page.get_by_role("button", name=re.compile("^Roll back")).click()
    expect(seen.page.get_by_role("alert")).to_contain_text("The preview was stale")
    expect(seen.page.get_by_role("textbox", name="Reason")).to_have_value("gusts")
    with reading(site.engine) as conn:
        assert conn.execute(select(commands).where(commands.c.rollout == rollout)).first() is None
    seen.page.get_by_role("button", name=re.compile("^Roll back")).click()
    expect(seen.page.get_by_label("Hold in force")).to_contain_text("gusts")


def test_without_javascript_links_and_forms_do_everything(chromium: Browser, site: Site) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    log_in(page, site, Role.RELEASE_MANAGER, "/")
    page.get_by_role("link", name="Rollouts").click()
    page.get_by_label("State", exact=True).select_option("Paused")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("link", name=re.compile("^trams-zurich-signals")).first.click()
    assert "Without JavaScript this page does not follow" in page.content()
    page.get_by_role("link", name="Promote").click()
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_label("Recorded")).to_contain_text("promote")
    page.goto(f"{site.url}/devices")
    first = page.locator("tbody th a").first.inner_text()
    page.get_by_role("link", name="Next page").click()
    expect(page.locator("tbody th a").first).not_to_have_text(first)
    page.get_by_label("Id begins with").fill("lab-")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody th a").first).to_contain_text("lab-")
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{site.url}/login")
    context.close()


def test_who_may_not_act_sees_no_verb_and_is_refused(
    chromium: Browser, site: Site, cookies: dict[Role, list[dict[str, object]]]
) -> None:
    context = chromium.new_context()
    context.add_cookies(cookies[Role.VIEWER])  # type: ignore[arg-type]
    page = context.new_page()
    rollout = site.rollout("model-3-eu")
    page.goto(f"{site.url}/rollouts/{rollout}")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_role("link", name="Roll back")).to_have_count(0)
    assert page.goto(f"{site.url}/rollouts/{rollout}/rollback").status == 403  # type: ignore[union-attr]
    assert page.goto(f"{site.url}/audit").status == 403  # type: ignore[union-attr]
    context.close()


def test_a_stop_stands_on_every_page_and_is_ended(admin: BrowserContext, site: Site) -> None:
    seen = watch(admin, site.url)
    seen.page.goto(f"{site.url}/oncall")
    seen.page.get_by_role("link", name="Stop everything").click()
    seen.page.get_by_label("one product").check()
    seen.page.get_by_label("Which one").fill("autopilot")
    seen.page.get_by_role("textbox", name="Reason").fill("storm")
    seen.page.get_by_role("button", name="Stop", exact=True).click()
    for path in ("/", "/board", "/devices"):
        seen.page.goto(site.url + path)
        expect(seen.page.get_by_label("Stop in force")).to_contain_text("storm")
    seen.page.get_by_role("link", name="End it").click()
    seen.page.get_by_label("Reason to end it").fill("over")
    seen.page.get_by_role("button", name="End this stop").click()
    expect(seen.page.get_by_label("Stop in force")).to_have_count(0)
    assert seen.wrong == []


def test_by_keyboard_alone(admin: BrowserContext, site: Site) -> None:
    page = admin.new_page()
    page.goto(f"{site.url}/rollouts/{site.rollout('model-3-eu')}")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    expect(focused).to_be_in_viewport()
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    assert focused.evaluate("e => document.getElementById('main').contains(e)")


def test_a_page_follows_by_itself_and_says_when_it_does_not(
    chromium: Browser, tmp_path: object
) -> None:
    site = serve(tmp_path, devices=60, rollouts=6)  # type: ignore[arg-type]
    context = chromium.new_context()
    try:
        seen = watch(context, site.url)
        rollout = site.rollout("model-3-eu")
        log_in(seen.page, site, Role.VIEWER, f"/rollouts/{rollout}")
        page = seen.page
        expect(page.locator("[data-live]")).to_have_text("Live", timeout=20_000)
        page.get_by_text("The chart as a table").click()
        with writing(site.engine) as conn:
            conn.execute(
                update(rollouts)
                .where(rollouts.c.id == rollout)
                .values(sentence="PAUSED — by hand", state="Paused", updated_at=time.time() + 1)
            )
        expect(page.locator(".verdict")).to_have_text("PAUSED — by hand")
        expect(page.locator(".title .badge")).to_have_text("Paused")
        # What a person opened stays open, and the chart stays drawn.
        expect(page.locator("details.twin")).to_have_attribute("open", "")
        expect(page.locator("#chart canvas")).to_be_visible()
        assert seen.wrong == []
        site.child.kill()
        site.child.wait()
        expect(page.locator("#stale")).to_contain_text("Stale since", timeout=20_000)
        expect(page.locator("[data-live]")).to_have_text("Not live")
    finally:
        context.close()
        end(site)
