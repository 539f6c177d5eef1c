"""Whom a hold excludes: everybody, or a part of the fleet.

Pure. A scope is one of `{all: true}`, `{step: n}` (counted from 0, as in the API), `{cohort:
name}`, `{selector: {matchLabels: …, matchExpressions: …}}`, `{devices: [id, …]}`. A whole hold ends
its rollout; a partial one takes its devices out of the rollout, which goes on without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from controller.manifests.kinds import Selector
from controller.manifests.text import CONTROL
from controller.rollout.model import ActiveHold, Arm, Device, Member, MemberState, Rollout
from controller.rollout.waves import Pinned, plain_steps
from controller.rollout.world import World
from device_agent.protocol import ID

KINDS = ("all", "step", "cohort", "selector", "devices")
MOST_DEVICES = 1000
EVERYBODY: Mapping[str, Any] = {"all": True}
_OUT = frozenset({MemberState.LEFT, MemberState.BACK})


def checked(plain: Mapping[str, Any] | None) -> dict[str, Any]:
    """The scope as it is kept; raises ValueError that says what to write."""
    given = {
        key: value
        for key, value in (EVERYBODY if plain is None else plain).items()
        if value is not None
    }
    if len(given) != 1 or next(iter(given)) not in KINDS:
        raise ValueError(f"scope: one of {', '.join(KINDS)}")
    kind, value = next(iter(given.items()))
    match kind:
        case "all" if value is True or value == "true":
            return {"all": True}
        case "step" if str(value).isascii() and str(value).isdigit() and int(value) < 100:
            return {"step": int(value)}
        case "cohort" if isinstance(value, str) and ID.fullmatch(value):
            return {"cohort": value}
        case "selector" if isinstance(value, Mapping) and value:
            try:
                selector = Selector.model_validate(value)
            except ValidationError as error:
                raise ValueError(f"scope: selector: {error.errors()[0]['msg']}") from None
            if found := CONTROL.search("".join(_texts(selector))):
                raise ValueError(f"scope: selector: without {found.group()!a}: it is a control")
            return {"selector": selector.model_dump(mode="json", by_alias=True)}
        case "devices" if isinstance(value, list | tuple) and 1 <= len(value) <= MOST_DEVICES:
            if all(isinstance(name, str) and ID.fullmatch(name) for name in value):
                return {"devices": sorted(set(value))}
    raise ValueError(
        f"scope: {kind}: write all: true, step: 0, cohort: canary, selector: {{matchLabels: "
        f"{{hardware: hw3}}}}, or devices: [up to {MOST_DEVICES} ids]"
    )


def in_git(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What Git says; a scope that means nothing holds for everybody, the safer reading."""
    try:
        return checked(plain)
    except ValueError:
        return dict(EVERYBODY)


def _texts(selector: Selector) -> Iterator[str]:
    """What a hold's file in Git has to carry."""
    for key, value in selector.match_labels.items():
        yield from (key, value)
    for expression in selector.match_expressions:
        yield from (expression.key, *expression.values)


def words(scope: Mapping[str, Any]) -> str:
    """For sentences; empty for everybody."""
    match next(iter(scope.items()), ("all", True)):
        case ("step", number):
            return f"step {int(number) + 1}"
        case ("cohort", name):
            return f"cohort {name}"
        case ("selector", selector):
            labels = selector.get("matchLabels") or {}
            return "devices with " + ", ".join(f"{k}={v}" for k, v in sorted(labels.items()))
        case ("devices", names):
            return names[0] if len(names) == 1 else f"{len(names)} named devices"
    return ""


def covers(
    scope: Mapping[str, Any], device: Device, member: Member | None, pinned: Pinned | None
) -> bool:
    """Is this device in the scope? `member`: in the rollout that the hold names."""
    match next(iter(scope.items()), ("all", True)):
        case ("step", number):
            return _exposed(member) and member is not None and member.step == int(number)
        case ("cohort", name):
            if member is None or pinned is None or not _exposed(member) or member.step < 0:
                return False
            wave = pinned.waves[member.step]
            return not wave.fixes and not wave.recall and wave.step.cohort == name
        case ("selector", selector):
            return Selector.model_validate(selector).matches(device.labels)
        case ("devices", names):
            return device.id in names
    return True


def empty(scope: Mapping[str, Any], pinned: Mapping[str, Any]) -> str:
    """Why nobody can ever be in this scope, by what the rollout pinned; empty: somebody may be.

    A selector is not asked: it may be meant for devices that are still to come.
    """
    cohorts = [str(cohort["name"]) for cohort in pinned.get("fleet", {}).get("cohorts", ())]
    waves = len(plain_steps(pinned)) + bool(pinned.get("fixes"))
    match next(iter(scope.items()), ("all", True)):
        case ("cohort", name) if cohorts and name not in cohorts:
            return f"the fleet has no cohort {name}: {', '.join(cohorts)}"
        case ("cohort", _) if pinned.get("recall"):
            return "a recall goes to the whole fleet, not by cohorts: name its steps or devices"
        case ("cohort", name) if waves and name not in reached(pinned):
            return f"no step of it is of cohort {name}: {', '.join(reached(pinned))}"
        case ("step", number) if waves and int(number) >= waves:
            return f"it has no step {int(number) + 1}: its last one is step {waves}"
    return ""


def reached(pinned: Mapping[str, Any]) -> list[str]:
    """The cohorts that a rollout goes by; a recall goes by none."""
    steps = () if pinned.get("recall") else plain_steps(pinned)
    return list(dict.fromkeys(str(step["cohort"]) for step in steps))


def named(scope: Mapping[str, Any]) -> bool:
    """Does the scope say who by itself, whatever rollout they are in?"""
    return next(iter(scope), "all") in ("all", "selector", "devices")


def excluding(world: World, rollout: Rollout, member: Member) -> ActiveHold | None:
    """The partial hold that takes this member out of its rollout."""
    device = world.devices.get(member.device)
    if device is None or member.arm is Arm.CONTROL or member.state in _OUT:
        return None
    for hold in partial(world, rollout):
        if covers(hold.scope, device, member, world.pinned.get(rollout.id)):
            return hold
    return None


def partial(world: World, rollout: Rollout) -> list[ActiveHold]:
    """Holds in force against a part of this rollout's devices."""
    return [
        hold
        for hold in world.holds
        if not hold.whole and hold.fleet == rollout.fleet and hold.digest == rollout.digest
    ]


def leave(member: Member, hold: ActiveHold, now: float) -> Member:
    """Out of the rollout and of every denominator; what it runs is the hold's business now."""
    return replace(
        member,
        state=MemberState.LEFT,
        reason=f"excluded by hold {hold.id}",
        left_at=now,
        updated_at=now,
    )


def _exposed(member: Member | None) -> bool:
    return member is not None and member.arm is not Arm.CONTROL
