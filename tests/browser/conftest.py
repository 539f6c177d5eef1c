"""One server for all browser tests of a session, one Chromium a file.

Playwright's loop runs in the thread of the tests as long as a Chromium is open: no longer than a
file's tests, so that whatever comes next can run a loop of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from controller.roles import Role
from tests.browser.served import Site, end, log_in, serve


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    served = serve(tmp_path_factory.mktemp("site"))
    yield served
    end(served)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def cookies(chromium: Browser, site: Site) -> dict[Role, list[dict[str, object]]]:
    """Session cookies of a person of each role that the tests use."""
    found = {}
    for role in (Role.ADMIN, Role.VIEWER):
        context = chromium.new_context()
        log_in(context.new_page(), site, role, "/")
        found[role] = [dict(cookie) for cookie in context.cookies()]
        context.close()
    return found


@pytest.fixture
def admin(
    chromium: Browser, site: Site, cookies: dict[Role, list[dict[str, object]]]
) -> Iterator[BrowserContext]:
    context = chromium.new_context()
    context.add_cookies(cookies[Role.ADMIN])  # type: ignore[arg-type]
    yield context
    context.close()
