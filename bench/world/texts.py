"""The documents of a simulated fleet repository, as people write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from controller.manifests.reader import read

COMPONENT = "app"
ROLLOUT = "cars"
EVERYBODY: Mapping[str, Any] = {"all": True}


def artifact(version: str) -> str:
    return "sha256:" + sha256(version.encode()).hexdigest()


def fleet(*, name: str = "cars", baseline: str = "app-1") -> str:
    return _document(
        "Fleet",
        name,
        {
            "selector": {"matchLabels": {"model": "m3"}},
            "healthPolicy": "driving",
            "baseline": {COMPONENT: baseline},
            "cohorts": [
                {"name": "canary", "select": {"matchLabels": {"ring": "canary"}}},
                {"name": "general", "rest": True},
            ],
        },
    )


def policy(*, tripwire: bool = False) -> str:
    gates: list[dict[str, Any]] = [{"metric": "update_ok", "type": "proportion"}]
    if tripwire:
        gates.append({"metric": "incident", "type": "event", "tripwire": {"devices": 2}})
    return _document("HealthPolicy", "driving", {"gates": gates})


def release(version: str, *, fixes: str | None = None, requires: Sequence[str] = ()) -> str:
    spec: dict[str, Any] = {
        "version": version,
        "artifacts": [{"component": COMPONENT, "digest": artifact(version), "size": 10}],
    }
    if fixes:
        spec["fixes"] = fixes
    if requires:
        spec["install"] = {"requires": list(requires)}
    return _document("Release", f"app-{version}", spec)


def digest_of(version: str, requires: Sequence[str] = ()) -> str:
    """The release digest that the reader gives this release."""
    found = read({"x.yaml": release(version, requires=requires).encode()})
    return found.manifests.releases[f"app-{version}"].digest


def rollout(
    to: str, steps: Sequence[Mapping[str, Any]], strategy: Mapping[str, Any], **more: Any
) -> str:
    return _document(
        "Rollout",
        ROLLOUT,
        {
            "fleet": "cars",
            "release": f"app-{to}",
            "strategy": {"steps": [dict(step) for step in steps], **strategy},
            **more,
        },
    )


def hold(
    name: str,
    version: str,
    digest: str,
    *,
    to: str,
    at: str,
    scope: Mapping[str, Any] = EVERYBODY,
) -> str:
    """A hold that a person wrote into Git by hand."""
    return _document(
        "Hold",
        name,
        {
            "rollout": ROLLOUT,
            "rejects": {"release": f"app-{version}", "digest": digest},
            "to": to,
            "scope": scope,
            "reason": "seen on the road",
            "actor": "ann",
            "createdAt": at,
        },
    )


def _document(kind: str, name: str, spec: Mapping[str, Any]) -> str:
    head = {"apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": name}}
    return json.dumps({**head, "spec": spec}) + "\n"  # JSON is YAML
