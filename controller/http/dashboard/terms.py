"""What a yes is to, in words: a start's plan, or the rollout that a verb was asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from controller.rollout.plan_text import span
from controller.rollout.waves import Pinned, Wave

Plain = Mapping[str, Any]
_OF_A_VERB = ("name", "fleet", "release", "step", "state", "revision", "from", "to")


def terms(kind: str, seen: Plain) -> list[tuple[str, str]]:
    """(what, in words), in the order of reading."""
    if kind in ("start", "recall"):
        try:
            return list(_plan(Pinned.from_json(seen), seen.get("devices")))
        except (KeyError, ValidationError):
            pass  # pinned by an older version: what is known of it is told below
    found = dict(seen)
    if isinstance(step := found.get("step"), int):
        found["step"] = step + 1  # people count from one
    return [(key, str(found[key])) for key in _OF_A_VERB if key in found]


def _plan(pinned: Pinned, devices: int | None) -> Iterator[tuple[str, str]]:
    release, fleet = pinned.release, pinned.fleet
    brings = ", ".join(f"{c} {a.digest[:19]}" for c, a in sorted(release.components.items()))
    yield "what", f"{release.name}, version {release.version}: {brings}"
    count = "" if devices is None else f", {devices:,} devices when it was asked for"
    yield "to whom", f"{fleet.name}{count}"
    for wave in pinned.waves:
        yield f"step {wave.index + 1}", _step(wave)
    gates = ", ".join(f"{gate.metric} ({gate.type})" for gate in pinned.policy.judged.gates)
    yield "gates", f"policy {pinned.policy.name}: {gates or 'whether the update succeeds'}"
    for window in pinned.rollout.windows:
        zone = f"{window.timezone} time"
        yield "window", f"{window.kind} {window.schedule} for {_time(window.duration)}, {zone}"
    if (holdout := pinned.rollout.holdout) is not None:
        yield "held out", f"{float(holdout.percent):.3g} of the fleet for {_time(holdout.for_)}"
    if not release.rollback.possible:
        yield "way back", "none: the release is ONE-WAY"


def _step(wave: Wave) -> str:
    step = wave.step
    then = ", then waits for `promote`" if step.pause is not None else ""
    return f"{wave.name}, soak {_time(step.soak)}{then}"


def _time(length: timedelta) -> str:
    return span(length.total_seconds())
