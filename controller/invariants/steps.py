"""I2 no step beyond its size: members drawn once, as recorded, and told at the pace of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from controller.facts import Finding, Look, Row
from controller.rollout.cohort import AFTER_BEST, TOP_BAND
from controller.rollout.waves import plain_steps


def steps(look: Look) -> Iterator[Finding]:
    exposed: dict[tuple[str, int], set[str]] = defaultdict(set)
    told: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in look.tables.members:
        if row["arm"] == "exposed":
            key = (row["rollout"], row["step"])
            exposed[key].add(row["device"])
            if row["told_at"] is not None:
                told[key].append(row["told_at"])
    draws: dict[str, list[Row]] = defaultdict(list)
    for row in look.tables.decisions:
        if row["kind"] == "draw":
            draws[row["rollout"]].append(row)
    for rollout in look.tables.rollouts:
        drawn: set[str] = set()
        best_first = False
        mine = sorted(draws[rollout["id"]], key=lambda row: row["id"])
        for draw in mine:
            step = int(str(draw["inputs"]["seed"]).rpartition("/")[2])
            members = exposed[rollout["id"], step]
            yield from _step(look, rollout, draw, members, drawn, after_best=best_first)
            drawn |= set(draw["inputs"]["exposed"])
            best_first = draw["inputs"].get("valid_from") is not None
            yield from _pace(rollout, step, told[rollout["id"], step])
        known = {int(str(row["inputs"]["seed"]).rpartition("/")[2]) for row in mine}
        extra = {step for (name, step) in exposed if name == rollout["id"]} - known
        if len(known) < len(mine) or extra:
            yield _step_finding(rollout, f"a step was drawn twice, or without a decision: {extra}")


def _step(
    look: Look,
    rollout: Row,
    draw: Row,
    members: set[str],
    before: set[str],
    *,
    after_best: bool,
) -> Iterator[Finding]:
    inputs = draw["inputs"]
    recorded = set(inputs["exposed"])
    if members - recorded:
        extra = ", ".join(sorted(members - recorded)[:5])
        yield _step_finding(rollout, f"{extra} are members of a step that did not draw them")
    if recorded & before:
        yield _step_finding(rollout, "a step drew devices that an earlier one had drawn")
    size = inputs.get("size")
    # The wave after a best_first one holds some of every band, whatever its percent.
    more = AFTER_BEST * (TOP_BAND + 2) if after_best else 0
    if size is not None and len(recorded) > _admits(rollout, inputs, size) + more:
        share = f"{float(inputs['percent']):.0%}"
        yield _step_finding(rollout, f"a step of {share} of {size} devices drew {len(recorded)}")
    if size is not None and size > len(look.tables.devices):
        yield _step_finding(rollout, f"a cohort of {size} in {len(look.tables.devices)} devices")


def _admits(rollout: Row, inputs: Row, size: int) -> int:
    """How many devices a draw from `size` may expose; a fix's first wave takes half."""
    first = str(inputs["seed"]).endswith("/0")
    if rollout["pinned"].get("fixes") and first:
        return (size + 1) // 2
    return math.ceil(float(inputs["percent"]) * size - 1e-9)


def _pace(rollout: Row, step: int, told: list[float]) -> Iterator[Finding]:
    steps = plain_steps(rollout["pinned"])
    first = 1 if rollout["pinned"].get("fixes") else 0
    limit = steps[max(0, step - first)].get("max_per_minute")
    if limit is None:
        return
    told = sorted(told)
    if any(told[i + limit] < told[i] + 60 for i in range(len(told) - limit)):
        yield _step_finding(rollout, f"more than {limit} devices were told within a minute")


def _step_finding(rollout: Row, what: str) -> Finding:
    return Finding(
        invariant="I2",
        what=f"{rollout['name']} ({rollout['release']}): {what}",
        do="`bellwether pause` it, and compare the draw's decision with the members",
    )
