"""I12 a stop stops: no member is told while one in its scope is in force."""

from __future__ import annotations

import math
from collections.abc import Iterator

from controller.facts import Finding, Look, Row


def stops(look: Look) -> Iterator[Finding]:
    rollouts = {row["id"]: row for row in look.tables.rollouts}
    for stop in look.tables.stops:
        until = stop["lifted_at"] if stop["lifted_at"] is not None else math.inf
        for member in look.tables.members:
            told = member["told_at"]
            if told is None or not stop["at"] + look.grace < told < until:
                continue
            device, rollout = look.devices.get(member["device"]), rollouts.get(member["rollout"])
            if device is None or rollout is None or member["arm"] != "exposed":
                continue
            if _stopped(stop, device, rollout):
                yield Finding(
                    invariant="I12",
                    what=f"{member['device']} was told {rollout['release']} during the stop of "
                    f"{stop['scope']} {stop['value']}".rstrip(),
                    do="Keep the databases and report it",
                )


def _stopped(stop: Row, device: Row, rollout: Row) -> bool:
    labels = device["labels"] or {}
    match stop["scope"]:
        case "all":
            return True
        case "hardware":
            return bool(labels.get("hardware", "") == stop["value"])
        case "digest":
            return stop["value"] in {rollout["digest"], *rollout["artifacts"].values()}
        case _:
            label = rollout["pinned"].get("fleet", {}).get("labels", {}).get("product")
            return stop["value"] in (labels.get("product"), device["fleet"], label)
