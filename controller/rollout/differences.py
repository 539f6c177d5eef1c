"""The fields in which a rollout, its fleet, policy and release differ between two commits.

Pure. Two documents that mean the same differ in nothing, however they are written; where the
meaning differs, each field is told in the words of the manifest: its path under `spec`, what was
written there and what is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from controller.manifests.reader import Manifests

_DEPTH = 6
_LONGEST = 100  # characters of a value; a longer one is cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field as it was and as it would be, as written; empty: not written."""

    document: str  # `Rollout model-3-eu-autopilot`
    field: str  # `strategy.steps[1].percent`
    before: str
    after: str

    def __str__(self) -> str:
        before, after = self.before or "(not written)", self.after or "(not written)"
        return f"{self.document}: {self.field}: {before} → {after}"


def differences(name: str, before: Manifests, after: Manifests) -> Iterator[Difference]:
    """Of the rollout, its fleet, policy and release, in this order."""
    old, new = before.rollouts[name], after.rollouts[name]
    yield from _written("Rollout", name, before, after)
    if old.fleet != new.fleet:
        return  # another fleet is not an edited one
    yield from _written("Fleet", new.fleet, before, after)
    fleets = before.fleets.get(old.fleet), after.fleets.get(new.fleet)
    if fleets[0] and fleets[1] and fleets[0].health_policy == fleets[1].health_policy:
        yield from _written("HealthPolicy", fleets[1].health_policy, before, after)
    releases = before.releases.get(old.release), after.releases.get(new.release)
    if releases[0] and releases[1] and releases[0].digest == releases[1].digest:
        yield from _written("Release", new.release, before, after)


def _written(kind: str, name: str, before: Manifests, after: Manifests) -> Iterator[Difference]:
    if _read(kind, name, before) == _read(kind, name, after):
        return
    one, two = _document(kind, name, before), _document(kind, name, after)
    for path, was, now in _paths("", one, two, _DEPTH):
        yield Difference(document=f"{kind} {name}", field=path, before=_says(was), after=_says(now))


def _read(kind: str, name: str, manifests: Manifests) -> Any:
    table: Mapping[str, Any] = {
        "Rollout": manifests.rollouts,
        "Fleet": manifests.fleets,
        "HealthPolicy": manifests.policies,
        "Release": manifests.releases,
    }[kind]
    found = table.get(name)
    return found.model_dump(mode="json") if found is not None else None


def _document(kind: str, name: str, manifests: Manifests) -> Mapping[str, Any]:
    """Its spec as written, with its labels and annotations beside it."""
    place = manifests.places.get((kind, name))
    if place is None or not isinstance(place.data, Mapping):
        return {}
    metadata = {key: value for key, value in place.data["metadata"].items() if key != "name"}
    return {**metadata, **place.data["spec"]}


def _paths(path: str, one: Any, two: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
    if one == two:
        return
    if depth and isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in dict.fromkeys((*one, *two)):
            inner = f"{path}.{key}" if path else str(key)
            yield from _paths(inner, one.get(key), two.get(key), depth - 1)
    elif depth and isinstance(one, list) and isinstance(two, list):
        for label, a, b in _items(one, two):
            yield from _paths(f"{path}[{label}]", a, b, depth - 1)
    else:
        yield path, one, two


def _items(one: list[Any], two: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Items beside each other: by metric or name where all of them have one, else by place."""
    named = [{_label(item): item for item in side} for side in (one, two)]
    if None not in {*named[0], *named[1]} and [len(n) for n in named] == [len(one), len(two)]:
        for label in dict.fromkeys((*named[0], *named[1])):
            yield label, named[0].get(label), named[1].get(label)
        return
    for i in range(max(len(one), len(two))):
        yield i, one[i] if i < len(one) else None, two[i] if i < len(two) else None


def _label(item: Any) -> str | None:
    if not isinstance(item, Mapping):
        return None
    label = item.get("metric") or item.get("name")
    return label if isinstance(label, str) else None


def _says(value: Any) -> str:
    text = "" if value is None else _flow(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _flow(value: Any) -> str:
    """As a manifest has it in one line: {cohort: early, percent: 10%}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value)
