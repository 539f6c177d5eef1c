"""Every route × every role, every changing route × every lie; both from the application itself.

No list of routes stands here: what the application serves is asked, pages and API alike, so that a
new route is in the matrix when it is in the application.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import APIRoute
from joserfc import jwt
from joserfc.jwk import KeySet, OKPKey
from sqlalchemy import select
from starlette.testclient import TestClient

from controller import tokens
from controller.http.dashboard import pages
from controller.roles import Role
from controller.store.tables import audit
from telemetry.store.database import reading

if TYPE_CHECKING:
    from conftest import House

pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")

NOW = 1_800_000_000.0
ISSUER, AUDIENCE = "https://id.example", "bellwether"
# What changes nothing, or is asked by nobody's own right: a claim token, a signed webhook, a login.
HARMLESS = {"/api/v1/plan"}
OPEN = {"/api/v1/devices:enrol", "/webhooks/git", "/login", "/logout"}
OF_EVERYBODY = {"/login", "/login/oidc", "/login/oidc/callback", "/static/{digest}/{name:path}"}


def served(house: House, method: str) -> list[str]:
    """The paths that the application takes for this method."""
    found = [
        route.path
        for route in _routes(house.app.routes)
        if method in (route.methods or ()) and route.path != "/api/v1/openapi.json"
    ]
    return sorted(set(found))


def _routes(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (inner := getattr(route, "original_router", None)) is not None:
            yield from _routes(inner.routes)


def filled(path: str) -> str:
    """The path with names of things that are there as far as the house has them."""
    names = {"rollout": "cars", "device": "car-1", "fleet": "eu", "verb": "rollback",
             "word": "approve", "name": "rollout", "what": "cars"}  # fmt: skip
    return re.sub(r"{(\w+)(?::path)?}", lambda found: names.get(found[1], "x"), path)


@pytest.fixture
def closed(house: House, tmp_path: Any) -> TestClient:
    house.add_rollout()
    house.enrol("car-1")
    (tmp_path / "roles.toml").write_text(
        '[[grant]]\nclaim = "groups"\nvalue = "admins"\nrole = "admin"\n'
    )
    return house.with_settings(
        auth="required", oidc_issuer=ISSUER, oidc_audience=AUDIENCE,
        oidc_jwks=str(tmp_path / "jwks.json"), oidc_roles=tmp_path / "roles.toml", rate_limit=0.0,
    )  # fmt: skip


def test_the_matrix_is_not_empty(house: House) -> None:
    assert len(served(house, "GET")) > 35
    assert len(served(house, "POST")) > 20
    known = {route.path for router in pages.routers for route in router.routes}
    assert {p for p in served(house, "GET") if not p.startswith(("/api", "/live"))} & known


# -- what changes something × who may not ---------------------------------------------------------


def test_every_changing_route_refuses_every_lie(
    house: House, closed: TestClient, tmp_path: Any
) -> None:
    before = _audited(house)
    for name, headers in _lies(house, tmp_path).items():
        made = _audited(house)  # a revoked token has rows of its own
        for path in served(house, "POST"):
            if path in OPEN:
                continue
            answer = _post(closed, path, {"reason": "x"}, {**headers, "If-Match": "*"})
            if path.startswith("/api/"):
                assert answer.status_code == 401, (name, path)
            elif answer.status_code == 303:  # a form of nobody: to the login
                assert answer.headers["location"].startswith("/login"), (name, path)
            else:
                assert answer.status_code in (401, 403), (name, path, answer.status_code)
        assert _audited(house) == made, name
    assert before > 0


def _logged_in(closed: TestClient, token: str) -> tuple[TestClient, str]:
    """A browser with the session of whom the token is, and the token of its forms."""
    person = TestClient(
        closed.app, base_url="http://127.0.0.1:8420", client=("127.0.0.1", 50_000),
        headers={"Accept": "text/html"}, follow_redirects=False,
    )  # fmt: skip
    form = {"csrf": _csrf(person.get("/login").text), "next": "/", "token": token}
    assert person.post("/login", data=form).status_code == 303
    return person, _csrf(person.get("/").text)


def _csrf(page: str) -> str:
    return page.partition('name="csrf" value="')[2].partition('"')[0]


def _post(client: TestClient, path: str, body: dict[str, str], headers: dict[str, str]) -> Any:
    """As a program asks the API, as a form asks a page."""
    kind: dict[str, Any] = {"json": body} if path.startswith("/api/") else {"data": body}
    return client.post(filled(path), headers=headers, follow_redirects=False, **kind)


def _lies(house: House, tmp_path: Any) -> dict[str, dict[str, str]]:
    key = OKPKey.generate_key("Ed25519", {"kid": "ed"})
    (tmp_path / "jwks.json").write_text(json.dumps(KeySet([key]).as_dict()))

    def signed(**more: Any) -> str:
        said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "u", "iat": int(NOW) - 5,
                "exp": int(NOW) + 300, "groups": ["admins"], **more}  # fmt: skip
        return jwt.encode({"alg": "EdDSA", "kid": "ed"}, said, key, algorithms=["EdDSA"])

    good = signed()
    payload = good.split(".")[1]
    none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"ed"}').decode().rstrip("=")
    engine = house.deps.engine
    gone = tokens.create(engine, name="gone", role=Role.ADMIN, fleets=(), actor="t", now=NOW)
    assert tokens.revoke(engine, gone.row.id, actor="t", now=NOW)
    found = {
        "unknown token": "bw_" + "A" * 43,
        "revoked token": gone.token,
        "expired": signed(exp=int(NOW) - 60),
        "alg none": f"{none}.{payload}.",
        "wrong audience": signed(aud="another-service"),
        "wrong issuer": signed(iss="https://evil.example"),
    }
    lies = {name: {"Authorization": f"Bearer {token}"} for name, token in found.items()}
    return {"no token": {}, **lies}


def test_every_changing_route_knows_a_grant_of_another_fleet(
    house: House, closed: TestClient
) -> None:
    elsewhere = {**house.token(Role.ADMIN, ("us",)), "If-Match": "*"}
    bodies = {"/api/v1/stop": {"scope": "all", "reason": "x"},
              "/api/v1/devices": {"id": "new", "fleet": "eu"},
              "/api/v1/devices/{device}:move": {"fleet": "us", "reason": "x"}}  # fmt: skip
    person, csrf = _logged_in(closed, elsewhere["Authorization"].removeprefix("Bearer "))
    before = _audited(house)
    for path in served(house, "POST"):
        # Bytes of an artifact belong to no fleet: only a commit brings them to one.
        if path in OPEN | HARMLESS or path == "/api/v1/releases:publish":
            continue
        votes = path.startswith("/api/v1/approvals")
        body = bodies.get(path, {"reason": "x", **({"digest": f"sha256:{0:064}"} if votes else {})})
        if path.startswith("/api/"):
            code = _post(closed, path, body, elsewhere).status_code
        else:
            code = _post(person, path, {**body, "csrf": csrf}, {}).status_code
        assert code in (403, 404), (path, code)
    assert _audited(house) == before


# -- what shows something × everybody -------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
def test_every_page_and_list_answers_every_role(
    house: House, closed: TestClient, role: Role
) -> None:
    """Found, not found, or refused: never an error of ours; and never what the role may not see."""
    headers = house.token(role)
    for path in served(house, "GET"):
        if path.startswith("/live/") or path == "/api/v1/events":
            continue  # streams do not end here; their first answer is asked below
        code = closed.get(filled(path), headers=headers, follow_redirects=False).status_code
        assert code < 500, (role, path, code)
        assert code != 401, (role, path)
        if "audit" in path or path.endswith("evidence:file"):
            assert (code == 403) == (role not in (Role.AUDITOR, Role.ADMIN)), (role, path, code)


def test_every_page_and_list_asks_who_is_looking(house: House, closed: TestClient) -> None:
    for path in served(house, "GET"):
        if path in OF_EVERYBODY or path in ("/livez", "/readyz"):
            continue
        answer = closed.get(filled(path), follow_redirects=False)
        if path.startswith("/api/") or path in ("/metrics", "/artifacts/{digest}"):
            assert answer.status_code == 401, path
        else:
            assert answer.status_code == 303, (path, answer.status_code)
            assert answer.headers["location"].startswith("/login?next="), path


def test_every_list_keeps_other_fleets_to_itself(house: House, closed: TestClient) -> None:
    """A grant of another fleet sees nothing of this one, wherever it looks."""
    elsewhere = house.token(Role.ADMIN, ("us",))
    for path in served(house, "GET"):
        if path.startswith("/live/") or path in ("/api/v1/events", "/metrics"):
            continue
        answer = closed.get(filled(path), headers=elsewhere)
        if answer.status_code == 200:
            assert "car-1" not in answer.text.replace(filled(path), ""), path
            assert "SOAKING — 3 of 10" not in answer.text, path


def _audited(house: House) -> int:
    with reading(house.deps.engine) as conn:
        return len(conn.execute(select(audit.c.seq)).all())
