"""Login by token on the pages: cookies, CSRF, expiry, logout; nothing moves by a forged form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from controller import sessions, tokens
from controller.http import session
from controller.roles import Role

if TYPE_CHECKING:
    from conftest import House

NOW = 1_800_000_000.0


def csrf_of(page: Any) -> str:
    return str(re.search(r'name="csrf" value="([^"]+)"', page.text)[1])  # type: ignore[index]


def log_in(house: House, client: TestClient, role: Role = Role.ON_CALL, path: str = "/") -> Any:
    token = house.token(role)["Authorization"].removeprefix("Bearer ")
    form = client.get("/login")
    return client.post(
        "/login",
        data={"token": token, "csrf": csrf_of(form), "next": path},
        follow_redirects=False,
    )


@pytest.fixture
def client(house: House) -> TestClient:
    """A browser of nobody: the service asks everybody who they are."""
    return house.with_settings(auth="required")


def csrf_in_force(house: House, client: TestClient) -> str:
    who = sessions.find(house.deps.engine, client.cookies["bellwether"], NOW)
    assert who is not None
    return who.csrf


def test_a_page_sends_nobody_to_the_login_and_back(house: House, client: TestClient) -> None:
    sent = client.get("/?fleet=eu", follow_redirects=False)
    assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=%2F%3Ffleet%3Deu")
    done = log_in(house, client, path="/?fleet=eu")
    assert (done.status_code, done.headers["location"]) == (303, "/?fleet=eu")
    assert client.get("/").status_code == 200
    assert client.get("/api/v1/rollouts").status_code == 200


def test_the_cookie_is_kept_from_scripts_and_other_sites(house: House, client: TestClient) -> None:
    set_cookie = log_in(house, client).headers["set-cookie"]
    assert "HttpOnly" in set_cookie
    assert "SameSite=lax" in set_cookie
    assert "Secure" not in set_cookie
    secure = house.with_settings(auth="required", public_url="https://bw.example")
    secure.base_url = "https://bw.example"
    set_cookie = log_in(house, secure).headers["set-cookie"]
    assert set_cookie.startswith("__Host-bellwether=")
    assert "Secure" in set_cookie
    assert "Path=/" in set_cookie
    assert "Domain" not in set_cookie


def test_a_session_may_do_what_its_token_may(house: House, client: TestClient) -> None:
    house.add_rollout()
    log_in(house, client, Role.VIEWER)
    headers = {"If-Match": "*", "X-CSRF-Token": csrf_in_force(house, client)}
    body = {"reason": "look"}
    denied = client.post("/api/v1/rollouts/cars:pause", json=body, headers=headers)
    assert denied.status_code == 403
    assert "viewer" in denied.json()["detail"]


def test_a_cookie_alone_changes_nothing(house: House, client: TestClient) -> None:
    house.add_rollout()
    log_in(house, client)
    url, body, headers = "/api/v1/rollouts/cars:pause", {"reason": "look"}, {"If-Match": "*"}
    assert client.post(url, json=body, headers=headers).status_code == 403
    wrong = {**headers, "X-CSRF-Token": "x" * 43}
    assert client.post(url, json=body, headers=wrong).status_code == 403
    assert house.client.get("/api/v1/rollouts/cars").json()["revision"] == 4
    right = {**headers, "X-CSRF-Token": csrf_in_force(house, client)}
    assert client.post(url, json=body, headers=right).status_code == 202


def test_logout_ends_the_session_not_only_the_cookie(house: House, client: TestClient) -> None:
    log_in(house, client)
    cookie = client.cookies["bellwether"]
    csrf = csrf_in_force(house, client)
    assert client.post("/logout", data={"x": ""}, follow_redirects=False).status_code == 403
    assert client.post("/logout", data={"csrf": csrf}, follow_redirects=False).status_code == 303
    assert "bellwether" not in client.cookies
    assert sessions.find(house.deps.engine, cookie, NOW) is None


def test_a_session_ends_with_its_time_and_with_its_token(house: House, client: TestClient) -> None:
    log_in(house, client)
    cookie, engine = client.cookies["bellwether"], house.deps.engine
    assert sessions.find(engine, cookie, NOW + sessions.LASTS - 1) is not None
    assert sessions.find(engine, cookie, NOW + sessions.LASTS) is None
    token = tokens.every(engine)[-1]
    tokens.revoke(engine, token.id, actor="test", now=NOW)
    assert sessions.find(engine, cookie, NOW) is None


def test_a_login_form_of_another_site_is_refused(house: House, client: TestClient) -> None:
    token = house.token(Role.ADMIN)["Authorization"].removeprefix("Bearer ")
    bare = client.post("/login", data={"token": token})
    assert bare.status_code == 403
    client.get("/login")
    forged = client.post("/login", data={"token": token, "csrf": "x" * 32})
    assert forged.status_code == 403
    assert "bellwether" not in client.cookies


@pytest.mark.parametrize("token", ["", "bwt_nope", "x" * 5000, "bwt_\u202e", "' OR 1=1 --"])
def test_a_wrong_token_opens_nothing(house: House, client: TestClient, token: str) -> None:
    csrf = csrf_of(client.get("/login"))
    answer = client.post("/login", data={"token": token, "csrf": csrf})
    assert answer.status_code == 403
    assert "unknown, expired or revoked" in answer.text


def test_a_login_makes_a_new_session_whatever_the_browser_brought(
    house: House, client: TestClient
) -> None:
    client.cookies.set("bellwether", "chosen-by-somebody-else")
    log_in(house, client)
    assert sessions.find(house.deps.engine, "chosen-by-somebody-else", NOW) is None


@pytest.mark.parametrize(
    "path",
    ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "", "/a\nb", "/" * 600,
     "javascript:alert(1)", "/a\\b", "/\u202ex\x00"],
)  # fmt: skip
def test_next_never_leads_away(path: str) -> None:
    assert session.safe_next(path) == "/"


def test_a_token_beside_the_cookie_is_checked(house: House, client: TestClient) -> None:
    log_in(house, client)
    bad = client.get("/api/v1/rollouts", headers={"Authorization": "Bearer bwt_nope"})
    assert bad.status_code == 401


def test_forms_are_for_pages_and_json_for_the_api(house: House, client: TestClient) -> None:
    assert client.post("/login", json={"token": "x"}).status_code == 415
    files = {"token": ("t", b"x")}
    assert client.post("/login", files=files).status_code == 415
