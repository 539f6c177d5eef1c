"""Who may do what, from the OpenAPI document: every route × every role, every verb × every lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from controller.roles import RIGHTS, Right, Role
from telemetry.store.database import reading

if TYPE_CHECKING:
    from conftest import House

# Said here once more, so that a right that is given away by mistake is noticed.
DANGEROUS = {
    "/api/v1/rollouts/{rollout}:rollback": Right.STOP,
    "/api/v1/rollouts/{rollout}:hold": Right.STOP,
    "/api/v1/rollouts/{rollout}:pause": Right.STOP,
    "/api/v1/stop": Right.STOP,
    "/api/v1/rollouts/{rollout}:lift": Right.START,
    "/api/v1/rollouts/{rollout}:resume": Right.START,
    "/api/v1/rollouts/{rollout}:promote": Right.START,
    "/api/v1/devices": Right.DEVICES,
    "/api/v1/devices/{device}:move": Right.DEVICES,
    "/api/v1/devices/{device}:retire": Right.DEVICES,
    "/api/v1/devices/{device}:quarantine": Right.DEVICES,
    "/api/v1/devices/{device}:replace": Right.DEVICES,
    "/api/v1/releases:publish": Right.PUBLISH,
}
OPEN = {("get", "/livez"), ("get", "/readyz"), ("post", "/api/v1/devices:enrol"),
        ("post", "/webhooks/git")}  # fmt: skip
MAY = {
    Right.STOP: {Role.ON_CALL, Role.RELEASE_MANAGER, Role.ADMIN},
    Right.START: {Role.RELEASE_MANAGER, Role.ADMIN},
    Right.DEVICES: {Role.ADMIN},
    Right.PUBLISH: {Role.RELEASE_MANAGER, Role.ADMIN},
    Right.AUDIT: {Role.AUDITOR, Role.ADMIN},
    Right.VIEW: set(Role),
}


@pytest.fixture
def closed(house: House) -> TestClient:
    return house.with_settings(auth="required", rate_limit=0.0)


def routes(client: TestClient) -> list[tuple[str, str, Any]]:
    document = client.get("/api/v1/openapi.json").json()
    found = [(m, p, op) for p, item in document["paths"].items() for m, op in item.items()]
    assert len(found) > 25
    return found


def ask(client: TestClient, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    url = path
    for name in ("fleet", "device", "rollout", "decision", "digest", "approval"):
        url = url.replace(f"{{{name}}}", "x")
    assert "{" not in url, url
    if path.endswith(":publish"):
        url += "?component=a&version=1"
    kind: dict[str, Any] = {"json": {}} if method == "post" else {}
    if path == "/api/v1/events":
        kind["headers"] = {"Last-Event-ID": "x"}  # 400 once it is known who asks: no stream here
    kind["headers"] = {**kind.get("headers", {}), **(headers or {})}
    return client.request(method, url, **kind).status_code


def test_every_route_names_its_right_and_the_dangerous_ones_the_right_one(
    closed: TestClient,
) -> None:
    seen = {}
    for method, path, operation in routes(closed):
        if (method, path) in OPEN:
            assert "x-right" not in operation
            continue
        assert operation.get("x-right") in set(Right), (method, path)
        if method == "post":
            seen[path] = operation["x-right"]
    for path, right in DANGEROUS.items():
        assert seen[path] == right, path
    for right, roles in MAY.items():
        assert {role for role in Role if right in RIGHTS[role]} == roles, right


@pytest.mark.parametrize("role", list(Role))
def test_every_route_asks_every_role(house: House, closed: TestClient, role: Role) -> None:
    headers = {**house.token(role), "If-Match": "*"}
    for method, path, operation in routes(closed):
        if (method, path) in OPEN:
            continue
        code = ask(closed, method, path, headers)
        allowed = role in MAY[Right(operation["x-right"])]
        assert (code != 403) == allowed, (role, method, path, code)
        assert code < 500, (role, method, path)


def test_nobody_gets_nothing(closed: TestClient) -> None:
    for method, path, _ in routes(closed):
        if (method, path) not in OPEN:
            assert ask(closed, method, path) == 401, (method, path)


def test_a_grant_elsewhere_reaches_nothing_here(house: House, closed: TestClient) -> None:
    """Wrong fleet: what is not seen is 404, what needs every fleet is 403; nothing changes."""
    rollout = house.add_rollout()
    house.enrol("x")
    elsewhere = {**house.token(Role.ADMIN, ("us",)), "If-Match": "*"}
    with reading(house.deps.engine) as conn:
        before = conn.exec_driver_sql("SELECT count(*) FROM audit").scalar_one()
    bodies = {"/api/v1/stop": {"reason": "smoke"}, "/api/v1/devices": {"id": "y", "fleet": "eu"}}
    for path in DANGEROUS:
        if path == "/api/v1/releases:publish":
            continue  # bytes belong to no fleet: only a commit brings them to one
        url = path.format(rollout=rollout, device="x")
        body = bodies.get(path, {"reason": "smoke", "fleet": "us"} if ":move" in path else
                          {"reason": "smoke"})  # fmt: skip
        code = closed.post(url, json=body, headers=elsewhere).status_code
        assert code in (403, 404), (path, code)
    with reading(house.deps.engine) as conn:
        assert conn.exec_driver_sql("SELECT count(*) FROM audit").scalar_one() == before
