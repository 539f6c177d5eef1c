"""Says what a commit would do before it does it: the decisions themselves, run on a copy.

Pure: two readings of the repository and one snapshot of the world in, a `Plan` out. Nothing here
decides; `opening` says which rollouts the head opens, `drawing` draws every step of them one after
the other, `schedule` says when each could end. Who would be drawn follows from the commit's own
hash, so sizes are exact and names are not promised.

Rules, in order, for each Rollout manifest of base and head:

1. Broken in head: blocked, with the error; nothing else of it is planned.
2. Gone from head: its running rollout goes on as it was pinned.
3. It opens (`opening`): steps, who is left out and why, downloads, earliest end, the way back.
4. It is refused or waits (`opening`'s notice): a hold, a suspension, a running one.
5. Its documents differ and nothing opens: what is pinned stays until its next release.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from controller.manifests.kinds import Hold, Release
from controller.manifests.reader import Manifests, Problem
from controller.rollout import drawing, gate, holdout, opening, schedule
from controller.rollout.desired import Catalog, in_range, satisfied
from controller.rollout.model import ActiveHold, Arm, Device, Member, Rollout, RolloutState
from controller.rollout.power import GatePower, History, PlannedWave, power
from controller.rollout.standing import patience, reachable
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import Change, Decision, Head, Notice, Open, Put, World

_ID = "plan"  # of the rollout that is not opened
_MOST_NAMES = 5


class Effect(StrEnum):
    OPENS = "opens"
    REFUSED = "refused"  # a hold, a suspension, a running rollout
    BLOCKED = "blocked"  # an error in what it references
    EDITED = "edited"  # takes effect with its next release
    REMOVED = "removed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Devices of the fleet that no step reaches, by reason."""

    why: str
    devices: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    name: str
    size: int  # of its cohort
    devices: int  # that this step exposes
    control: int
    unheard: int  # of them out of reach now: they come when they are heard
    download: int  # bytes
    begins: float  # Unix seconds, at the earliest
    ends: float
    soak: float  # seconds
    waits_for: str = ""  # a person's word, after it
    gates: tuple[str, ...] = ()  # what a clean step must show
    power: tuple[GatePower, ...] = ()  # which rise is seen, how surely, by when
    warnings: tuple[str, ...] = ()
    conclusive: bool = True  # are there enough devices for a verdict at all?


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What becomes of one Rollout manifest."""

    rollout: str
    fleet: str
    effect: Effect
    sentence: str
    before: str = ""  # release
    after: str = ""
    steps: tuple[PlannedStep, ...] = ()
    returning: int = 0  # have run it in health: they go back to it at once
    left_out: tuple[LeftOut, ...] = ()
    fleet_size: int = 0
    download: int = 0  # bytes, all steps
    ends: float | None = None  # Unix seconds, at the earliest
    one_way: bool = False
    differs: tuple[str, ...] = ()  # fields, where it is edited
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A Hold or a Lift that the commit adds."""

    kind: str
    id: str
    sentence: str
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    base: str
    head: str
    at: float
    measured: bool  # with the fleet's own devices; else only the documents were read
    rollouts: tuple[Planned, ...]
    acts: tuple[Act, ...] = ()
    errors: tuple[str, ...] = ()  # path:line:col: …, of the head
    notices: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        return bool(self.acts) or any(r.effect is not Effect.UNCHANGED for r in self.rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One side of the comparison."""

    name: str  # revision, for people
    head: Head
    problems: tuple[Problem, ...] = ()


def plan(
    base: Commit,
    head: Commit,
    world: World,
    now: float,
    *,
    measured: bool,
    past: Mapping[str, History] | None = None,
) -> Plan:
    """What would happen if `head` were accepted now in this world; `past`: by fleet."""
    before, after = base.head.manifests, head.head.manifests
    world = replace(
        world,
        head=head.head,
        holds=_holds(world, before, after),
        catalog=Catalog(releases={**world.catalog.releases, **after.releases}),
    )
    opened, notices = _outcome(world, now)
    rollouts = []
    for name in sorted({*before.rollouts, *after.rollouts}):
        rollouts.append(
            _blocked(name, before, after, head.head)
            or _removed(name, before, after)
            or _opened(name, before, world, opened, now, measured, past or {})
            or _refused(name, before, after, notices)
            or _same(name, before, after)
        )
    return Plan(
        base=base.name,
        head=head.name,
        at=now,
        measured=measured,
        rollouts=tuple(rollouts),
        acts=tuple(_acts(world, before, after)),
        errors=tuple(str(p) for p in head.problems if p.severity == "error"),
        notices=tuple(
            str(p)
            for p in head.problems
            if p.severity != "error" and str(p) not in {str(q) for q in base.problems}
        ),
    )


def assumed(world: World, base: Commit, now: float) -> World:
    """Without a server: every rollout of base counts as completed, so that only edits open."""
    made = {}
    for name, wanted in base.head.manifests.rollouts.items():
        release = base.head.manifests.releases.get(wanted.release)
        if release is None:
            continue
        made[name] = Rollout(
            id=name, name=name, fleet=wanted.fleet, release=release.name, digest=release.digest,
            artifacts={c: a.digest for c, a in release.components.items()}, commit=base.head.commit,
            author="", state=RolloutState.COMPLETED, sentence="", revision=1, step=0,
            opened_at=now, step_at=now, seed="", pinned={},
        )  # fmt: skip
    return replace(world, rollouts=made)


# -- what becomes of each rollout -----------------------------------------------------------------


def _outcome(world: World, now: float) -> tuple[dict[str, Open], dict[str, str]]:
    opened: dict[str, Open] = {}
    notices: dict[str, str] = {}
    for action in opening.decide(world, now):
        if isinstance(action, Open):
            opened[action.rollout.name] = action
        elif isinstance(action, Notice):
            notices[action.name] = action.sentence
        elif isinstance(action, Change):
            notices.setdefault(f"~{action.rollout.name}", action.rollout.sentence)
    return opened, notices


def _blocked(name: str, before: Manifests, after: Manifests, head: Head) -> Planned | None:
    if name not in head.blocked or name not in after.rollouts:
        return None
    wanted = after.rollouts[name]
    return Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.BLOCKED,
        sentence=f"BLOCKED — {head.blocked[name]}; what is in force stays in force",
        before=_release(before, name),
        after=wanted.release,
    )


def _removed(name: str, before: Manifests, after: Manifests) -> Planned | None:
    if name in after.rollouts:
        return None
    wanted = before.rollouts[name]
    return Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.REMOVED,
        sentence="REMOVED — its manifest is gone: devices keep what they have, a running rollout "
        "goes on as it was opened",
        before=wanted.release,
    )


def _opened(
    name: str,
    before: Manifests,
    world: World,
    opened: Mapping[str, Open],
    now: float,
    measured: bool,
    past: Mapping[str, History],
) -> Planned | None:
    action = opened.get(name)
    if action is None:
        return None
    rollout = replace(action.rollout, id=_ID)
    running = opening.newest(world, name)
    was = running.release if running is not None else _release(before, name)
    base = Planned(
        rollout=name,
        fleet=rollout.fleet,
        effect=Effect.OPENS,
        sentence="",
        before=was,
        after=rollout.release,
        one_way=not action.pinned.release.rollback.possible,
        notes=tuple(_notes(action.pinned, running)),
    )
    if not measured:
        steps = tuple(_unmeasured(wave, now) for wave in action.pinned.waves)
        sentence = f"OPENS — {rollout.release} for {rollout.fleet}: {len(steps)} steps"
        return replace(base, steps=steps, sentence=sentence)
    drawn = list(_draw(world, rollout, action.pinned, now))
    steps = tuple(_steps(world, rollout, action.pinned, drawn, now, past.get(rollout.fleet)))
    devices = [d for d in world.devices.values() if d.fleet == rollout.fleet]
    reached = {m.device for wave in drawn for m in wave.exposed}
    returning = {m.device for wave in drawn for m in wave.returning}
    total = len(reached) + len(returning)
    return replace(
        base,
        steps=steps,
        returning=len(returning),
        fleet_size=len(devices),
        left_out=tuple(_left_out(world, rollout, action.pinned, devices, reached | returning)),
        download=sum(step.download for step in steps),
        ends=steps[-1].ends if steps else now,
        sentence=f"OPENS — {rollout.release} for {rollout.fleet}: {total} of {len(devices)} "
        f"devices in {len(steps)} steps",
    )


def _notes(pinned: Pinned, running: Rollout | None) -> Iterator[str]:
    if running is not None and running.active:
        yield f"{running.release} is {running.state} now and would be superseded"
    rule = pinned.release.rollback
    if not rule.possible:
        yield (
            "ONE-WAY: the release cannot be rolled back"
            + (f" ({rule.reason})" if rule.reason else "")
            + "; a bad verdict stops it and pages a person"
        )
    elif rule.data_loss:
        yield "rolling it back loses data" + (f": {rule.reason}" if rule.reason else "")
    fixes = next((wave.fixes for wave in pinned.waves if wave.fixes), None)
    if fixes:
        yield f"fixes {fixes}: first to devices that ran it, half of them as control"
    elif pinned.release.fixes:
        yield (
            f"fixes {pinned.release.fixes}, but fewer than {opening.FEWEST} devices ran it: "
            "the normal steps begin at once"
        )
    if pinned.rollout.urgency is not None and pinned.rollout.urgency.level == "recall":
        yield f"RECALL: {pinned.rollout.urgency.reason}"


def _refused(
    name: str, before: Manifests, after: Manifests, notices: Mapping[str, str]
) -> Planned | None:
    if name not in notices:
        return None
    wanted = after.rollouts[name]
    return Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.REFUSED,
        sentence=f"NOT OPENED — {notices[name]}",
        before=_release(before, name),
        after=wanted.release,
    )


def _same(name: str, before: Manifests, after: Manifests) -> Planned:
    wanted, known = after.rollouts[name], before.rollouts.get(name)
    differs = tuple(_differences(name, before, after)) if known is not None else ()
    now, later = [f for f in differs if f == "suspend"], [f for f in differs if f != "suspend"]
    words = []
    if now:
        words.append("SUSPENDED at once" if wanted.suspend else "goes on")
    if later:
        words.append(
            f"EDITED — {', '.join(later)}: a running rollout keeps what it was opened with, the "
            "next release takes it"
        )
    return Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.EDITED if differs or known is None else Effect.UNCHANGED,
        sentence="; ".join(words) or "UNCHANGED — the release it names has been rolled out",
        before=known.release if known else "",
        after=wanted.release,
        differs=differs,
    )


def _differences(name: str, before: Manifests, after: Manifests) -> Iterator[str]:
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


def _release(manifests: Manifests, name: str) -> str:
    return manifests.rollouts[name].release if name in manifests.rollouts else ""


# -- the steps of what opens ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    wave: Wave
    exposed: tuple[Member, ...]
    control: tuple[Member, ...]
    returning: tuple[Member, ...]
    size: int
    warnings: tuple[str, ...]
    empty: bool  # its cohort: the rollout would stop there


def _draw(world: World, rollout: Rollout, pinned: Pinned, now: float) -> Iterator[_Drawn]:
    """Every step as `drawing` would draw it now, each on top of the ones before."""
    members: dict[str, Member] = {}
    for wave in pinned.waves:
        here = replace(rollout, step=wave.index)
        copy = replace(
            world,
            rollouts={**world.rollouts, _ID: here},
            members={**world.members, _ID: members},
            pinned={**world.pinned, _ID: pinned},
        )
        actions = list(drawing.draw_step(copy, here, pinned, wave, now))
        new = [m for action in actions if isinstance(action, Put) for m in action.members]
        members = {**members, **{m.device: m for m in new}}
        exposed = tuple(m for m in new if m.arm is Arm.EXPOSED)
        decision = next((a for a in actions if isinstance(a, Decision)), None)
        inputs: Mapping[str, Any] = decision.inputs if decision else {}
        nobody = decision is not None and decision.verdict == "NoMembers"
        yield _Drawn(
            wave=wave,
            exposed=exposed,
            control=tuple(m for m in new if m.arm is Arm.CONTROL),
            returning=tuple(m for m in new if m.arm is Arm.RETURNING),
            size=len(exposed),
            warnings=tuple(_warnings(inputs, decision.sentence if decision and nobody else "")),
            empty=nobody,
        )


def _warnings(inputs: Mapping[str, Any], nobody: str) -> Iterator[str]:
    if nobody:
        yield nobody
    yield from inputs.get("warnings", ())
    if inputs.get("held_out"):
        yield f"{inputs['held_out']} held out until the benefit is measured"
    if inputs.get("valid_from") is not None:
        yield f"best first: what it shows is valid for scores ≥ {inputs['valid_from']:g}"


def _steps(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    drawn: Sequence[_Drawn],
    now: float,
    past: History | None,
) -> Iterator[PlannedStep]:
    begins, exposed = now, 0
    powers = _power(pinned, drawn, past)
    world = replace(world, pinned={**world.pinned, _ID: pinned})
    limit = patience(world, replace(rollout, id=_ID))
    for each in drawn:
        wave = each.wave
        devices = [world.devices[m.device] for m in each.exposed]
        exposed += len(devices)
        told_by = schedule.told_by(pinned.rollout.windows, wave.step, devices, begins)
        if each.empty:
            ends = math.inf
        else:
            ends = told_by + (wave.step.soak.total_seconds() if devices else 0.0)
        gates, conclusive = _gates(pinned, wave, exposed, len(devices))
        yield PlannedStep(
            name=wave.name,
            size=each.size,
            devices=len(devices),
            control=len(each.control),
            unheard=sum(not reachable(world, d.id, limit, now) for d in devices),
            download=sum(_bytes(world, pinned.release, d) for d in devices),
            begins=begins,
            ends=ends,
            soak=wave.step.soak.total_seconds(),
            waits_for="`promote`" if wave.step.pause is not None else "",
            gates=gates,
            power=powers.get(wave.index, ()),
            warnings=each.warnings,
            conclusive=conclusive,
        )
        begins = ends


def _gates(pinned: Pinned, wave: Wave, exposed: int, here: int) -> tuple[tuple[str, ...], bool]:
    """What a clean step of this size can prove; (sentences, is it enough for a verdict)."""
    last = wave.index == len(pinned.waves) - 1
    if not here or wave.fixes:
        return (), True
    need = gate.needed(pinned.policy.judged, _limits(wave))
    enough = exposed >= need["devices"]
    verb = "enough" if enough else "too few"
    words = [f"{exposed} devices so far, {need['devices']} needed without failure: {verb}"]
    for metric, wants in need["gates"].items():
        hours = wants["hours"]
        if hours is not None:
            each = hours / max(exposed, 1)
            words.append(
                f"{metric}: {hours:,.0f} {wants['unit']} without an event are needed, "
                f"{each:,.3g} a device; or {wants['events']} first events at ratio "
                f"{wants['ratio']:g}"
            )
        else:
            words.append(f"{metric}: {wants['events']} first events at ratio {wants['ratio']:g}")
    if not enough and not last:
        rule = pinned.rollout.strategy.on_inconclusive.action
        words.append(f"it would end inconclusive, onInconclusive is {rule}: enlarge the step")
    return tuple(words), enough or last


def _limits(wave: Wave) -> gate.StepLimits:
    longest = wave.step.max_soak
    return gate.StepLimits(
        wave=wave.index,
        name=wave.name,
        min_soak=wave.step.soak.total_seconds(),
        max_soak=longest.total_seconds() if longest is not None else None,
        margins=dict(wave.step.margins),
    )


def _power(
    pinned: Pinned, drawn: Sequence[_Drawn], past: History | None
) -> dict[int, tuple[GatePower, ...]]:
    """What each step with devices in it can see; nothing without a past."""
    if past is None:
        return {}
    waves = [
        PlannedWave(exposed=len(d.exposed), control=len(d.control), limits=_limits(d.wave))
        for d in drawn
        if d.exposed and not d.wave.fixes
    ]
    return {w.wave: w.gates for w in power(pinned.policy.judged, waves, past)}


def _unmeasured(wave: Wave, now: float) -> PlannedStep:
    soak = wave.step.soak.total_seconds()
    return PlannedStep(
        name=wave.name, size=0, devices=0, control=0, unheard=0, download=0, begins=now,
        ends=now + soak, soak=soak,
        waits_for="`promote`" if wave.step.pause is not None else "",
    )  # fmt: skip


def _bytes(world: World, release: Release, device: Device) -> int:
    row = world.seen.get(device.id)
    running = {c: report.digest for c, report in row.components.items()} if row else {}
    return sum(
        artifact.size
        for component, artifact in release.components.items()
        if running.get(component) != artifact.digest
    )


# -- who is left out, and what waits --------------------------------------------------------------


def _left_out(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    devices: Sequence[Device],
    reached: set[str],
) -> Iterator[LeftOut]:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for device in devices:
        why = _why_not(world, rollout, pinned, device, device.id in reached)
        if why:
            reasons[why].append(device.id)
    for why, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        yield LeftOut(why=why, devices=len(names), examples=tuple(sorted(names)[:_MOST_NAMES]))


def _why_not(world: World, rollout: Rollout, pinned: Pinned, device: Device, reached: bool) -> str:
    """Why no step reaches a device, or what it waits for although one does; empty: neither."""
    if not device.governed:
        return f"{device.status}: nothing is ordered"
    if not drawing.compatible(pinned, device):
        return f"not compatible: {_incompatible(pinned.release, device)}"
    if drawing.runs(world, rollout, device):
        return "runs it already"
    if not drawing.may_take(world, rollout, pinned, device):
        return _stepping_stone(world, pinned.release, device)
    if not reached and holdout.keeps_out(rollout, pinned, device.id, rollout.opened_at):
        return "held out until the benefit is measured"
    if not reached:
        return "in no step: the steps end below 100 % of its cohort"
    row = world.seen.get(device.id)
    if row is None or not pinned.release.requires:
        return ""
    versions = {c: world.catalog.version(c, r.digest) for c, r in row.components.items()}
    versions |= dict.fromkeys(rollout.artifacts, pinned.release.version)
    met, why = satisfied(pinned.release, versions)
    return "" if met else f"drawn, but waits: {why}"


def _incompatible(release: Release, device: Device) -> str:
    for artifact in release.artifacts:
        for label, allowed in artifact.compatible.items():
            value = device.labels.get(label)
            if value not in allowed:
                return f"{label} {value or 'is not set'}, needs {' or '.join(allowed)}"
    return ""


def _stepping_stone(world: World, release: Release, device: Device) -> str:
    """The version that it runs is no allowed source; name a release over which it could go."""
    row = world.seen[device.id]
    running = {
        c: world.catalog.version(c, row.components[c].digest)
        for c in release.components
        if c in row.components
    }
    shown = ", ".join(f"{c} {v or 'of an unknown release'}" for c, v in sorted(running.items()))
    why = f"runs {shown}; upgradesFrom {' or '.join(release.upgrades_from)}"
    for stone in world.catalog.releases.values():
        reaches = any(in_range(stone.version, spec) for spec in release.upgrades_from)
        takes = not stone.upgrades_from or all(
            version is not None and any(in_range(version, spec) for spec in stone.upgrades_from)
            for version in running.values()
        )
        if (
            stone.name != release.name
            and reaches
            and takes
            and set(running) <= set(stone.components)
        ):
            return f"{why}: over the stepping stone {stone.name}"
    return f"{why}: no known release is a stepping stone"


# -- holds and lifts ------------------------------------------------------------------------------


def _holds(world: World, before: Manifests, after: Manifests) -> list[ActiveHold]:
    """Holds in force once the head is accepted."""
    lifted = {lift.hold for lift in after.lifts.values()}
    known = {hold.id for hold in world.holds}
    found = [hold for hold in world.holds if hold.id not in lifted]
    for hold in after.holds.values():
        new = hold.id not in known and hold.id not in before.holds
        if new and hold.id not in lifted:
            found.append(_active(hold, world, after))
    return found


def _active(hold: Hold, world: World, manifests: Manifests) -> ActiveHold:
    rollout = manifests.rollouts.get(hold.rollout)
    release = manifests.releases.get(hold.rejects_release) or world.catalog.releases.get(
        hold.rejects_release
    )
    artifacts = {a.digest for a in release.components.values()} if release else set()
    fleet = rollout.fleet if rollout else ""
    proven = {p.digest for (f, _, _), p in world.proven.items() if f == fleet}
    return ActiveHold(
        id=hold.id, rollout=hold.rollout, fleet=fleet, release=hold.rejects_release,
        digest=hold.rejects_digest, artifacts=frozenset(artifacts - proven or artifacts),
        to=hold.to, reason=hold.reason, actor=hold.actor, created_at=world.hearing,
    )  # fmt: skip


def _acts(world: World, before: Manifests, after: Manifests) -> Iterator[Act]:
    for hold in sorted(after.holds.values(), key=lambda h: h.id):
        if hold.id in before.holds:
            continue
        active = _active(hold, world, after)
        n = sum(_touched(world, active))
        verb = "stay as they are" if hold.to == "stay" else f"go to {hold.to}"
        yield Act(
            kind="Hold",
            id=hold.id,
            devices=n,
            sentence=f"{hold.rejects_release} is rejected in {active.fleet or hold.rollout}: "
            f"{n} devices that have it {verb} — {hold.reason}",
        )
    for lift in sorted(after.lifts.values(), key=lambda item: item.id):
        if lift.id not in before.lifts:
            yield Act(
                kind="Lift",
                id=lift.id,
                devices=0,
                sentence=f"hold {lift.hold} ends: its digest may be tried again — {lift.reason}",
            )


def _touched(world: World, hold: ActiveHold) -> Iterator[bool]:
    for device in world.devices.values():
        row = world.seen.get(device.id)
        yield (
            device.fleet == hold.fleet
            and device.governed
            and row is not None
            and any(report.digest in hold.artifacts for report in row.components.values())
        )


def effects(rollouts: Iterable[Planned]) -> Mapping[Effect, int]:
    return Counter(rollout.effect for rollout in rollouts)
