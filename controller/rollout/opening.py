"""Decides which rollouts a commit opens, and what becomes of the one before.

Pure. Rules, in order, for each Rollout manifest of the accepted head:

1. A broken or suspended one opens nothing; the last good state stays in force.
2. A digest that a hold in force rejects (release or artifact) opens nothing, and says so.
3. The digest that its newest rollout already has changes nothing, whatever its name or notes say;
   after a hold of that digest was lifted it opens again, at step 0.
4. A running rollout is superseded, waited for, or wins, by `onNewRelease`. One that still waits
   for its people and whose plan a commit has changed is superseded: nobody has agreed to the new.
5. `fixes: X` gets a first wave among the devices that ran X.
6. A digest that a device itself has run in health, and that no hold ever named, goes back to it at
   rollback pace (`git revert`); every other device goes through the steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from hashlib import sha256

from controller.manifests import kinds
from controller.rollout import approval, recall, recovery
from controller.rollout.model import (
    ActiveHold,
    Arm,
    Member,
    MemberState,
    Rollout,
    RolloutState,
    quoted,
)
from controller.rollout.waves import Pinned, pin
from controller.rollout.world import Action, Change, Decision, Head, Notice, Open, Put, World
from telemetry.report import DeviceRow

FEWEST = 8  # devices that ran the faulty release: fewer, halved, prove nothing by themselves


def decide(world: World, now: float, moved: Collection[str] = ()) -> Iterator[Action]:
    """`moved`: rollouts (ids) that this round has changed; their names wait for the next one."""
    if world.head is None or not world.head.asked:
        return
    for name in sorted(world.head.manifests.rollouts):
        last = newest(world, name) if moved else None
        if last is not None and last.id in moved:
            continue
        yield from _one(world, world.head, world.head.manifests.rollouts[name], now)


def next_look(world: World, now: float) -> float:
    """When time alone may change the answer: a recall's urgency runs out."""
    wanted = world.head.manifests.rollouts.values() if world.head is not None else ()
    ends = (rollout.urgency.until for rollout in wanted if rollout.urgency is not None)
    return min((at for at in ends if at > now), default=math.inf)


def _one(world: World, head: Head, wanted: kinds.Rollout, now: float) -> Iterator[Action]:
    if wanted.name in head.blocked:
        return
    manifests = head.manifests
    release = manifests.releases.get(wanted.release)
    fleet = manifests.fleets.get(wanted.fleet)
    policy = manifests.policies.get(fleet.health_policy) if fleet else None
    if release is None or fleet is None or policy is None:
        return  # admission has shown why
    last = newest(world, wanted.name)
    artifacts = {c: artifact.digest for c, artifact in release.components.items()}
    hold = rejecting(world, fleet.name, release.digest, artifacts)
    if hold is not None:
        yield Notice(
            name=wanted.name,
            sentence=f"{wanted.release} is rejected by hold {hold.id} ({hold.reason}): "
            "name another release, or lift the hold",
        )
        return
    urgent = recall.declared(wanted, now)
    faster = urgent and last is not None and last.active and not world.pinned[last.id].recall
    plan = functools.partial(_plan, world, fleet, policy, wanted, release, now)
    again = last is not None and approval.outdated(last, head) and last.pinned != plan().to_json()
    if last is not None and not (faster or again or _may_open(world, last, release)):
        return
    if wanted.suspend:
        yield Notice(name=wanted.name, sentence=f"{wanted.release} waits: the rollout is suspended")
        return
    if last is not None and last.active:
        # Nobody was told of a start that waits for its people: there is nothing to queue behind.
        mode = "supersede" if urgent or again else str(wanted.strategy.on_new_release)
        if mode != "supersede":
            verb = "waits for" if mode == "queue" else "is rejected while there is"
            yield Notice(name=wanted.name, sentence=f"{wanted.release} {verb} {last.release}")
            return
        yield from _supersede(
            last, f"another plan for {wanted.release}" if again else wanted.release, now
        )
    if recall.expired(wanted, now):
        sentence = f"the urgency of {wanted.release} has expired: it goes through its normal steps"
        yield Notice(name=wanted.name, sentence=sentence)
    yield from _open(world, head, wanted, plan(), artifacts, now)


def _plan(
    world: World, fleet: kinds.Fleet, policy: kinds.HealthPolicy, wanted: kinds.Rollout,
    release: kinds.Release, now: float,
) -> Pinned:  # fmt: skip
    """What the rollout would be judged by if it opened now."""
    urgent = recall.declared(wanted, now)
    ran = who_ran(world, fleet.name, release.fixes) if release.fixes and not urgent else []
    fixes = release.fixes if len(ran) >= FEWEST else None
    return pin(wanted, fleet, policy, release, fixes=fixes, urgent=urgent)


def newest(world: World, name: str) -> Rollout | None:
    named = [r for r in world.rollouts.values() if r.name == name]
    return max(named, key=lambda r: (r.opened_at, r.id), default=None)


def rejecting(
    world: World, fleet: str, digest: str, artifacts: dict[str, str]
) -> ActiveHold | None:
    found = (h for h in world.holds if h.whole and h.fleet == fleet)
    return next((h for h in found if h.rejects(digest, artifacts)), None)


def _may_open(world: World, last: Rollout, release: kinds.Release) -> bool:
    if last.digest != release.digest:
        return True
    ended = (RolloutState.ROLLED_BACK, RolloutState.HELD, RolloutState.ROLLING_BACK)
    in_force = any(
        h.whole and h.fleet == last.fleet and h.rejects(last.digest, last.artifacts)
        for h in world.holds
    )
    return last.state in ended and not in_force


def _supersede(last: Rollout, by: str, now: float) -> Iterator[Action]:
    sentence = f"SUPERSEDED — {by} was committed in its place; its devices keep what they have"
    yield Change(
        rollout=replace(
            last,
            state=RolloutState.SUPERSEDED,
            sentence=sentence,
            revision=last.revision + 1,
            finished_at=now,
            updated_at=now,
        )
    )
    yield Decision(rollout=last.id, kind="state", verdict="Superseded", sentence=sentence)


def _open(
    world: World,
    head: Head,
    wanted: kinds.Rollout,
    pinned: Pinned,
    artifacts: dict[str, str],
    now: float,
) -> Iterator[Action]:
    urgent, release, fleet = recall.declared(wanted, now), pinned.release, pinned.fleet
    times = sum(1 for r in world.rollouts.values() if r.name == wanted.name)
    # One commit opens one rollout of a name: its id follows from them, so that a controller that
    # died after the opening finds the same one again.
    seed = sha256(f"{head.commit}/{wanted.name}/{release.digest}/{times}".encode()).hexdigest()
    state = RolloutState.PAUSED if world.recovered else RolloutState.PROGRESSING
    sentence = f"OPENED — {release.name} for {fleet.name}: {len(pinned.waves)} steps"
    if urgent and wanted.urgency is not None:
        people = " and ".join(wanted.urgency.approved_by)
        why = quoted(wanted.urgency.reason)
        sentence = f"RECALL — {release.name} for {fleet.name}: {why}; by {people}"
    awaits = approval.needed(world, head, fleet, pinned.to_json(), wanted.name, urgent=urgent)
    if awaits is not None:
        state = RolloutState.PENDING
        sentence = f"PENDING — {release.name} for {fleet.name} waits for {approval.words(awaits)}"
    if world.recovered:
        sentence = (
            f"PAUSED — {release.name}: the control database is new but the devices were told "
            "things before; `resume` when that is right"
        )
    opened = Rollout(
        id="",  # the loop gives it
        name=wanted.name,
        fleet=fleet.name,
        release=release.name,
        digest=release.digest,
        artifacts=artifacts,
        commit=head.commit,
        author=head.author,
        state=state,
        sentence=sentence,
        revision=1,
        step=0,
        opened_at=now,
        step_at=now,
        updated_at=now,
        seed=seed,
        pinned=pinned.to_json(),
        flags={
            "before": _before(world, fleet.name, artifacts),
            **({"awaits": awaits} if awaits is not None else {}),
        },
    )
    if world.recovered and (n := recovery.already_everywhere(world, opened)):
        yield from recovery.completed(world, opened, pinned, n, now)
        return
    yield Open(rollout=opened, pinned=pinned)


def returning(world: World, rollout: Rollout, now: float) -> Put | None:
    """The members of a `git revert`: who has run this digest in health goes back at once."""
    if rollout.digest in world.rejected:
        return None
    members = []
    for device in world.devices.values():
        row = world.seen.get(device.id)
        if device.fleet != rollout.fleet or not device.governed or row is None:
            continue
        if has_run(row, rollout) and not _runs(row, rollout):
            members.append(
                Member(
                    device=device.id,
                    step=-1,
                    arm=Arm.RETURNING,
                    drawn_at=now,
                    hardware=device.hardware,
                    band=-1,
                    score=None,
                    previous=previous(row, rollout),
                    state=MemberState.TOLD,
                    attempt=f"{rollout.id}.revert",
                    told_at=now,
                    updated_at=now,
                )
            )
    return Put(rollout=rollout.id, members=tuple(members)) if members else None


def previous(row: DeviceRow, rollout: Rollout) -> dict[str, dict[str, str]]:
    """What this device last committed in health, for exactly the components that change."""
    return {
        component: {"release": report.release, "digest": report.digest}
        for component, report in row.components.items()
        if component in rollout.artifacts
        and report.committed
        and report.digest != rollout.artifacts[component]
    }


def has_run(row: DeviceRow, rollout: Rollout) -> bool:
    """Did this device run every artifact of the rollout before, and not go back from it at once?"""
    return all(_ran(row, component, digest) for component, digest in rollout.artifacts.items())


def _ran(row: DeviceRow, component: str, digest: str) -> bool:
    events = [entry for entry in row.history if entry.component == component]
    later = [*(entry.event for entry in events[1:]), ""]
    return any(
        entry.digest == digest and after != "rolled_back"
        for entry, after in zip(events, later, strict=False)
    )


def who_ran(world: World, fleet: str, release: str) -> list[str]:
    """Devices of this fleet that were exposed to that release."""
    ran = set()
    for rollout in world.rollouts.values():
        if rollout.release != release or rollout.fleet != fleet:
            continue
        for member in world.members.get(rollout.id, {}).values():
            device = world.devices.get(member.device)
            # One that failed or fell silent before its first word ran it too.
            ran_it = member.exposed_at is not None or member.harmed
            exposed = ran_it and member.arm is not Arm.CONTROL
            if exposed and device is not None and device.governed and device.fleet == fleet:
                ran.add(member.device)
    return sorted(ran)


def _runs(row: DeviceRow, rollout: Rollout) -> bool:
    return all(
        component in row.components and row.components[component].digest == digest
        for component, digest in rollout.artifacts.items()
    )


def _before(world: World, fleet: str, artifacts: dict[str, str]) -> dict[str, str]:
    """The proven artifact of each component that changes: what a hold need not reject."""
    return {
        component: proven.digest
        for (name, component, _), proven in sorted(world.proven.items())
        if name == fleet and component in artifacts
    }
