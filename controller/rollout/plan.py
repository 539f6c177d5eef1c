"""Says what a commit would do before it does it: the decisions themselves, run on a copy.

Pure: two readings of the repository and one snapshot of the world in, a `Plan` out. Nothing here
decides; `opening` says which rollouts the head opens, `drawing` draws every step of them one after
the other, `schedule` says when each could end. Who would be drawn follows from the commit's own
hash, so sizes are exact and names are not promised.

Rules, in order, for each Rollout manifest of base and head:

1. Broken in head, or in a file that cannot be read there: blocked, with the error.
2. Gone from head: its running rollout goes on as it was pinned.
3. It opens (`opening`): steps, who is left out and why, downloads, earliest end, the way back.
4. It is refused or waits (`opening`'s notice): a hold, a suspension, a running one.
5. Its documents differ and nothing opens: what is pinned stays until its next release; how that
   one would go is rehearsed with a stand-in, a release like the present one that nobody runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from controller.manifests.reader import Manifests, Problem
from controller.rollout import acts, approval, opening, revisions
from controller.rollout.acts import Act
from controller.rollout.desired import Catalog
from controller.rollout.differences import Difference, differences
from controller.rollout.left_out import LeftOut, left_out
from controller.rollout.model import Rollout, RolloutState, quoted
from controller.rollout.planned_steps import (
    PLANNED,
    PlannedStep,
    download,
    drawn_by_step,
    planned,
    unmeasured,
)
from controller.rollout.power import History
from controller.rollout.waves import Pinned, pin
from controller.rollout.world import Change, Head, Notice, Open, World


class Effect(StrEnum):
    OPENS = "opens"
    REFUSED = "refused"  # a hold, a suspension, a running rollout
    BLOCKED = "blocked"  # an error in what it references
    EDITED = "edited"  # takes effect with its next release
    REMOVED = "removed"
    UNCHANGED = "unchanged"


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
    returning_download: int = 0  # bytes, at most: less where the other slot still holds it
    left_out: tuple[LeftOut, ...] = ()
    fleet_size: int = 0
    download: int = 0  # bytes, all steps
    ends: float | None = None  # Unix seconds, at the earliest
    one_way: bool = False
    differs: tuple[Difference, ...] = ()  # where it is edited; `steps` are its next release's
    approves: str = ""  # digest of the plan that its people approve, where the rule asks for them
    notes: tuple[str, ...] = ()


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
        rules={
            name: approval.in_force(world.rules.get(name), approval.rule_of(fleet))
            for name, fleet in after.fleets.items()
        },
        holds=acts.in_force(world, before, after),
        catalog=Catalog(releases={**world.catalog.releases, **after.releases}),
    )
    opened, notices = _outcome(world, now)
    rollouts = []
    for name in sorted({*before.rollouts, *after.rollouts}):
        rollouts.append(
            _blocked(name, before, after, head.head)
            or _unread(name, base.head.manifests, head)
            or _removed(name, before, after)
            or _opened(name, before, world, opened, now, measured, past or {})
            or _refused(name, before, after, notices)
            or _same(name, before, after, world, now, past if measured else None)
        )
    return Plan(
        base=base.name,
        head=head.name,
        at=now,
        measured=measured,
        rollouts=tuple(rollouts),
        acts=tuple(acts.added(world, before, after)),
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


def _unread(name: str, before: Manifests, head: Commit) -> Planned | None:
    """Not in head because its file cannot be read there: nothing is removed."""
    if name in head.head.manifests.rollouts or name not in before.rollouts:
        return None
    path = before.origin.get(("Rollout", name), "").rpartition(":")[0]
    broken = next((p for p in head.problems if p.severity == "error" and p.path == path), None)
    if broken is None:
        return None
    wanted = before.rollouts[name]
    return Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.BLOCKED,
        sentence=f"BLOCKED — {broken}; what is in force stays in force",
        before=wanted.release,
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
    rollout = replace(action.rollout, id=PLANNED)
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
        approves=rollout.flags.get("awaits", {}).get("digest", ""),
        notes=(
            *_people(rollout),
            *_notes(action.pinned, running),
            *_incomparable(world, rollout, action.pinned),
        ),
    )
    if not measured:
        steps = tuple(unmeasured(wave, now) for wave in action.pinned.waves)
        sentence = f"OPENS — {rollout.release} for {rollout.fleet}: {len(steps)} steps"
        return replace(base, steps=steps, sentence=sentence)
    base = _drawn(base, world, rollout, action.pinned, now, past)
    reached, back = sum(step.devices for step in base.steps), base.returning
    return replace(
        base,
        sentence=f"OPENS — {rollout.release} for {rollout.fleet}: {reached} of {base.fleet_size} "
        f"devices in {len(base.steps)} steps" + (f", {back} go back at once" if back else ""),
    )


def _drawn(
    base: Planned, world: World, rollout: Rollout, pinned: Pinned, now: float,
    past: Mapping[str, History],
) -> Planned:  # fmt: skip
    """With its steps, as they would be drawn now."""
    drawn = list(drawn_by_step(world, rollout, pinned, now))
    steps = tuple(planned(world, rollout, pinned, drawn, now, past.get(rollout.fleet)))
    devices = [d for d in world.devices.values() if d.fleet == rollout.fleet]
    reached = {m.device for wave in drawn for m in wave.exposed}
    returning = {m.device for wave in drawn for m in wave.returning}
    back = (download(world, pinned.release, world.devices[name]) for name in returning)
    return replace(
        base,
        steps=steps,
        returning=len(returning),
        returning_download=sum(back),
        fleet_size=len(devices),
        left_out=tuple(left_out(world, rollout, pinned, devices, reached | returning)),
        download=sum(step.download for step in steps),
        ends=steps[-1].ends if steps else now,
    )


def _people(rollout: Rollout) -> Iterator[str]:
    if (awaits := rollout.flags.get("awaits")) is not None:
        yield f"waits for {approval.words(awaits)} before the first device is told"


def _notes(pinned: Pinned, running: Rollout | None) -> Iterator[str]:
    if running is not None and running.active:
        yield f"{running.release} is {running.state} now and would be superseded"
    rule = pinned.release.rollback
    if not rule.possible:
        yield (
            "ONE-WAY: the release cannot be rolled back"
            + (f" ({quoted(rule.reason)})" if rule.reason else "")
            + "; a bad verdict stops it and pages a person"
        )
    elif rule.data_loss:
        yield "rolling it back loses data" + (f": {quoted(rule.reason)}" if rule.reason else "")
    fixes = next((wave.fixes for wave in pinned.waves if wave.fixes), None)
    if fixes:
        yield f"fixes {fixes}: first to devices that ran it, half of them as control"
    elif pinned.release.fixes:
        yield (
            f"fixes {pinned.release.fixes}, but fewer than {opening.FEWEST} devices ran it: "
            "the normal steps begin at once"
        )
    if pinned.rollout.urgency is not None and pinned.rollout.urgency.level == "recall":
        yield f"RECALL: {quoted(pinned.rollout.urgency.reason)}"


def _incomparable(world: World, rollout: Rollout, pinned: Pinned) -> Iterator[str]:
    action = pinned.rollout.strategy.on_inconclusive.action
    for metric, why in revisions.of_plan(world, rollout, pinned).items():
        yield f"gate {metric} has no data: {why}; `promote`, or `onInconclusive: {action}`, goes on"


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


def _same(
    name: str,
    before: Manifests,
    after: Manifests,
    world: World,
    now: float,
    past: Mapping[str, History] | None,
) -> Planned:
    """`past`: None where the fleet is not known."""
    wanted, known = after.rollouts[name], before.rollouts.get(name)
    differs = tuple(differences(name, before, after)) if known is not None else ()
    suspends = wanted.suspend != known.suspend if known is not None else False
    later = [d for d in differs if d.field != "suspend"]
    words = []
    if suspends:
        words.append("SUSPENDED at once" if wanted.suspend else "GOES ON at once")
    if later:
        running = opening.newest(world, name)
        keeps = (
            f"{running.release}, which is under way,"
            if running and running.active
            else "what is under way"
        )
        words.append(f"EDITED — {keeps} keeps what it was opened with; the next release takes it")
    same = Planned(
        rollout=name,
        fleet=wanted.fleet,
        effect=Effect.EDITED if differs or known is None else Effect.UNCHANGED,
        sentence="; ".join(words) or "UNCHANGED — the release it names has been rolled out",
        before=known.release if known else "",
        after=wanted.release,
        differs=differs,
    )
    if not later or past is None:
        return same
    return _rehearsed(same, before, after, world, now, past)


def _rehearsed(
    base: Planned, before: Manifests, after: Manifests, world: World, now: float,
    past: Mapping[str, History],
) -> Planned:  # fmt: skip
    """With the steps of the next release, each beside its devices as the rules are in base."""
    next_one = _stand_in(base.rollout, after)
    if next_one is None:
        return base
    rollout, pinned = next_one
    found = _drawn(base, world, rollout, pinned, now, past)
    old = _stand_in(base.rollout, before)
    were = [len(d.exposed) for d in drawn_by_step(world, *old, now)] if old is not None else []
    if len(were) != len(found.steps):
        return found
    steps = (replace(step, was=was) for step, was in zip(found.steps, were, strict=True))
    return replace(found, steps=tuple(steps))


def _stand_in(name: str, manifests: Manifests) -> tuple[Rollout, Pinned] | None:
    """A release like the present one, whose artifacts no device has; None: something is missing."""
    wanted = manifests.rollouts[name]
    release, fleet = manifests.releases.get(wanted.release), manifests.fleets.get(wanted.fleet)
    policy = manifests.policies.get(fleet.health_policy) if fleet else None
    if release is None or fleet is None or policy is None:
        return None
    components = {
        component: artifact.model_copy(update={"digest": f"sha256:{n:064x}"})
        for n, (component, artifact) in enumerate(release.components.items())
    }
    new = release.model_copy(
        update={"name": f"after {release.name}"[:63], "components": components, "fixes": None}
    )
    rollout = Rollout(
        id=PLANNED, name=name, fleet=fleet.name, release=new.name, digest=new.digest,
        artifacts={c: a.digest for c, a in components.items()}, commit="", author="",
        state=RolloutState.PROGRESSING, sentence="", revision=1, step=0, opened_at=0.0,
        step_at=0.0, seed=name, pinned={},
    )  # fmt: skip
    return rollout, pin(wanted, fleet, policy, new)


def _release(manifests: Manifests, name: str) -> str:
    return manifests.rollouts[name].release if name in manifests.rollouts else ""


def effects(rollouts: Iterable[Planned]) -> Mapping[Effect, int]:
    return Counter(rollout.effect for rollout in rollouts)
