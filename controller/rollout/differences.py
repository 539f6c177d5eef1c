"""The fields in which a rollout, its fleet, policy and release differ between two commits.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from controller.manifests.reader import Manifests


def differences(name: str, before: Manifests, after: Manifests) -> Iterator[str]:
    """Fields of the rollout, its fleet, policy and release that differ, as dotted names."""
    old, new = before.rollouts[name], after.rollouts[name]
    yield from _fields("", old, new)
    fleets = before.fleets.get(old.fleet), after.fleets.get(new.fleet)
    yield from _fields("fleet.", *fleets)
    policies = tuple(
        manifests.policies.get(fleet.health_policy) if fleet else None
        for manifests, fleet in zip((before, after), fleets, strict=True)
    )
    yield from _fields("policy.", *policies)
    releases = before.releases.get(old.release), after.releases.get(new.release)
    if releases[0] is not None and releases[1] is not None:
        same = releases[0].digest == releases[1].digest
        yield from _fields("release.", *releases) if same else ()


def _fields(prefix: str, old: BaseModel | None, new: BaseModel | None) -> Iterator[str]:
    one = old.model_dump(mode="json", by_alias=True) if old else {}
    two = new.model_dump(mode="json", by_alias=True) if new else {}
    yield from _paths(prefix, one, two, depth=4)


def _paths(prefix: str, one: Any, two: Any, depth: int) -> Iterator[str]:
    if one == two:
        return
    if depth and isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in sorted({*one, *two}, key=str):
            yield from _paths(f"{prefix}{key}.", one.get(key), two.get(key), depth - 1)
        return
    if depth and isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            label = a.get("metric") or a.get("name") if isinstance(a, Mapping) else None
            yield from _paths(f"{prefix.rstrip('.')}[{label or i}].", a, b, depth - 1)
        return
    yield prefix.rstrip(".")
