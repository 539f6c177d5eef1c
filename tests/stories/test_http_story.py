"""The on-call's night by HTTP alone: look, preview, roll back, see it in Git, lift, fix forward.

The commits are the release managers'; everything else is a request to the public API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from controller.cli.story import Story, Wish

pytestmark = [pytest.mark.story, pytest.mark.timeout(500), pytest.mark.xdist_group("story")]
ROLLOUT = "model-3-autopilot"


class OnCall:
    def __init__(self, server: str) -> None:
        self.client = httpx2.Client(base_url=f"{server}/api/v1", timeout=60)

    def rollout(self) -> dict[str, Any]:
        found = self.client.get(f"/rollouts/{ROLLOUT}")
        return found.json() if found.status_code == 200 else {"state": "none", "release": ""}

    def wait(self, met: Callable[[dict[str, Any]], bool], seconds: float = 150) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not met(found := self.rollout()):
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found

    def runs(self, version: str) -> int:
        devices = self.client.get("/devices", params={"limit": 500}).json()["items"]
        return sum(
            report["release"] == f"fsd-{version}"
            for device in devices
            for report in (device["components"] or {}).values()
        )


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    made = Story(wish=Wish(devices=60, seed=11, fault="none"), root=tmp_path, tell=lambda _: None)
    try:
        made.set_up()
        made.baseline()
        yield made
    finally:
        made.children.stop()


def test_the_night_by_http_alone(story: Story, request: pytest.FixtureRequest) -> None:
    on_call = OnCall(story.server)
    request.addfinalizer(on_call.client.close)
    story.release("10.2.0", "reworked")
    on_call.wait(lambda r: r["state"] == "Completed" and r["release"] == "fsd-10.2.0")

    story.release("10.3.0", "smoother")
    seen = on_call.wait(
        lambda r: r["release"] == "fsd-10.3.0" and r["members"]["devices"].get("updated", 0) > 0
    )

    preview = on_call.client.post(
        f"/rollouts/{ROLLOUT}:rollback", params={"dryRun": "true"}, json={"reason": "looks odd"}
    )
    assert preview.status_code == 200, preview.text
    assert preview.json()["revision"] >= seen["revision"]

    blind = on_call.client.post(f"/rollouts/{ROLLOUT}:rollback", json={"reason": "looks odd"})
    assert blind.status_code == 428, blind.text
    stale = on_call.client.post(
        f"/rollouts/{ROLLOUT}:rollback", json={"reason": "looks odd"}, headers={"If-Match": '"0"'}
    )
    assert stale.status_code == 412, stale.text
    assert stale.headers["content-type"].startswith("application/problem+json")
    nameless = on_call.client.post(
        f"/rollouts/{ROLLOUT}:rollback", json={"reason": ""}, headers={"If-Match": "*"}
    )
    assert nameless.status_code == 422, nameless.text

    done = on_call.client.post(
        f"/rollouts/{ROLLOUT}:rollback",
        json={"reason": "looks odd at night", "incident": "INC-7"},
        headers={"If-Match": "*"},
    )
    assert done.status_code == 202, done.text
    back = on_call.wait(lambda r: r["state"] == "RolledBack")
    assert "looks odd at night" in back["sentence"]
    deadline = time.monotonic() + 60
    while on_call.runs("10.2.0") < 60 or on_call.runs("10.3.0"):
        assert time.monotonic() < deadline
        time.sleep(0.3)

    deadline = time.monotonic() + 30
    while not (holds := story.repository.holds()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert "looks odd at night" in next(iter(holds.values()))
    audit = on_call.client.get("/audit").json()["items"]
    assert any(row["action"] == "rollback" for row in audit)

    # The same digest again opens nothing; a fix does, without a lift.
    story.release("10.3.1", "mended", fixes="10.3.0")
    fixed = on_call.wait(lambda r: r["release"] == "fsd-10.3.1" and r["state"] == "Completed", 240)
    assert "10.3.1" in fixed["sentence"]
    assert on_call.runs("10.3.1") == 60
