"""Decides what every component of one device must be: one map, from all rollouts and holds.

Pure. Rules, in order, for each component (the first that speaks wins):

1. A device that is not active in the registry gets nothing.
2. Base: what it was last told. What the fleet has proven since then is newer and wins; so it does
   for a newcomer, that was never told anything. A digest nobody knows is kept (`onUnknown: keep`)
   or, from the moment when it is heard of, what the device was told (`adopt`).
   Where the memory of what it was told is lost, what it runs is its base: a baseline moves nobody.
   So it is where the order is over without success, and a hold rejects what it fell back to.
3. A rollout whose member it is (told, not left) replaces the base for the components it changes.
4. A digest that a hold rejects is replaced by the hold's destination: `stay` keeps what runs,
   `previous` is what this device itself committed before, else the proven release; never a version
   that the rejected release does not let its devices go back to (`rollback.to`).
5. Rolling back X rolls back what requires X; where that cannot be, the device stays and says why.
6. A stop lets nothing new start: components that are not running yet fall back to what runs.
7. Who runs what a hold rejects, and whose turn to go back has not come (`rollback.pace`), or whose
   way back is frozen, is left alone; an order back that it has not begun yet is taken away again.

An order is `rollback` when any component goes back; it carries no lease and waits for nothing but
the device's own safety.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from controller.manifests.kinds import Release
from controller.rollout.model import (
    ActiveHold,
    ActiveStop,
    Arm,
    Device,
    Member,
    MemberState,
    Order,
    Proven,
    Rollout,
    Told,
)
from device_agent.protocol import ComponentReport, Kind

_NOT_TOLD = frozenset({MemberState.DRAWN, MemberState.LEFT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Every release ever seen, by name, and who owns an artifact digest."""

    releases: Mapping[str, Release]
    _owners: dict[str, Release] = field(default_factory=dict, repr=False, compare=False)
    _by_artifact: dict[tuple[str, str], Release] = field(
        default_factory=dict, repr=False, compare=False
    )

    def owner(self, component: str, digest: str, hint: str | None = None) -> Release | None:
        """The release that brings this artifact; `hint` (a name) wins where several do."""
        named = self.releases.get(hint) if hint else None
        artifact = named.components.get(component) if named else None
        if artifact is not None and artifact.digest == digest:
            return named
        if len(self._owners) < len(self.releases):  # counted once, when first asked
            for name, release in self.releases.items():
                self._owners[name] = release
                for brings, each in release.components.items():
                    self._by_artifact.setdefault((brings, each.digest), release)
        return self._by_artifact.get((component, digest))

    def version(self, component: str, digest: str) -> str | None:
        release = self.owner(component, digest)
        return release.version if release else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Everything that bears on one device."""

    device: Device
    running: Mapping[str, ComponentReport]  # by its last report; empty: never heard
    last: Order | None
    memberships: Sequence[tuple[Rollout, Member]]  # rollouts that may still speak, oldest first
    # Rollout name → its newest membership whose `previous` no hold rejects (else its newest).
    past: Mapping[str, Member]
    holds: Sequence[ActiveHold]
    stops: Sequence[ActiveStop]
    proven: Mapping[str, Proven]  # component → for this hardware
    on_unknown: str = "keep"
    stays: frozenset[str] = frozenset()  # holds whose way back is not open to this device now
    begun: bool = False  # it has begun to carry out its last order
    failed: bool = False  # its last order is over without success: it runs what it fell back to
    foreign: bool = False  # it obeys an order that we do not remember: see rollout.recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    kind: Kind
    components: Mapping[str, Told]
    attempt: str
    security_epoch: int = 0
    preconditions: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()  # sentences: "cannot roll back: …"
    adopts: bool = False  # it names what no release document does: noted as told, not ordered


def compose(place: Place, catalog: Catalog, now: float) -> Target | None:
    """What this device must be; None when there is nothing to say."""
    if not place.device.governed:
        return None
    if _left_alone(place):
        return _nothing(place.last)
    chosen: dict[str, Told] = {}
    attempts: list[str] = []
    back = False
    blocked: list[str] = []
    for component in _components(place):
        base = _base(place, component, catalog, now)
        base, attempt, returning = _by_rollout(place, component, base, now)
        after, went_back, hold = _by_holds(place, component, base, catalog, now)
        if after is None and (running := _not_started(place, component, base)) is not None:
            # There is no other set: what it was told and has not started must not start.
            after = Told(release=running.release, digest=running.digest, at=now, rollout=None)
            went_back = True
        kept = _by_stops(place, component, after, now)
        if kept != after:  # what runs may be rejected itself: a stop keeps nobody on it
            after, more, spoke = _by_holds(place, component, kept, catalog, now)
            went_back, hold = went_back or more, spoke or hold
        if after is None:
            continue
        if hold is not None:
            attempts.append(f"{hold.id}.back")
        elif attempt:
            attempts.append(attempt)
        back = back or went_back or returning
        chosen[component] = after
    if not chosen:
        return None
    chosen, more, sentences = _by_requirements(place, chosen, catalog, now)
    back, blocked = back or more, blocked + sentences
    return Target(
        kind=Kind.ROLLBACK if back else Kind.INSTALL,
        components=chosen,
        attempt=attempts[-1] if attempts else _proven_attempt(chosen),
        security_epoch=_epoch(chosen, catalog),
        preconditions=_preconditions(chosen, catalog),
        blocked=tuple(blocked),
        adopts=place.on_unknown == "adopt" and _adopts(chosen, catalog),
    )


def _adopts(chosen: Mapping[str, Told], catalog: Catalog) -> bool:
    return any(catalog.owner(c, told.digest, told.release) is None for c, told in chosen.items())


def _left_alone(place: Place) -> bool:
    """Does it wait for its turn to go back? Not from where a later rollout leads it on."""
    if place.begun or not place.stays:
        return False
    led = {
        component
        for rollout, member in place.memberships
        if member.arm is not Arm.CONTROL and member.state not in _NOT_TOLD
        for component in rollout.artifacts
    }
    waiting = frozenset().union(*(h.artifacts for h in place.holds if h.id in place.stays))
    return any(r.digest in waiting and c not in led for c, r in place.running.items())


def _nothing(last: Order | None) -> Target | None:
    """Takes back an order back that came too early. It still counts as what the device was told."""
    if last is None or last.kind != Kind.ROLLBACK:
        return None
    return Target(kind=Kind.NONE, components=last.components, attempt=last.attempt)


def differs(target: Target, last: Order | None, running: Mapping[str, ComponentReport]) -> bool:
    """Must an order go out? Not to a device that was never told and runs the target already."""
    if target.kind is Kind.NONE:
        return last is not None and last.kind != Kind.NONE
    wanted = {c: told.digest for c, told in target.components.items()}
    if last is not None:
        ordered = {c: told.digest for c, told in last.components.items()}
        return wanted != ordered or last.kind == Kind.NONE
    if target.adopts:
        return True
    return any(c not in running or running[c].digest != d for c, d in wanted.items())


def moves(target: Target, running: Mapping[str, ComponentReport]) -> bool:
    """Does the target name anything that the device does not run?"""
    return any(
        component not in running or running[component].digest != told.digest
        for component, told in target.components.items()
    )


def satisfied(release: Release, installed: Mapping[str, str | None]) -> tuple[bool, str]:
    """Do these versions (component → version) meet what the release requires? With the sentence."""
    for need in release.requires:
        version = installed.get(need.component)
        if version is None:
            return False, f"{release.name} requires {need.component}{need.version}: not installed"
        if not in_range(version, need.version):
            return False, f"{release.name} requires {need.component}{need.version}, has {version}"
    return True, ""


@lru_cache(maxsize=4096)
def in_range(version: str, spec: str) -> bool:
    """Is the version in the range (">=2.1")? What is no version compares as text for equality."""
    try:
        return SpecifierSet(spec).contains(Version(version), prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return version == spec.lstrip("=")


def _components(place: Place) -> list[str]:
    names = set(place.proven)
    if place.last:
        names |= set(place.last.components)
    for rollout, member in place.memberships:
        if member.state not in _NOT_TOLD:
            names |= set(rollout.artifacts)
    for hold in place.holds:
        names |= {c for c, report in place.running.items() if report.digest in hold.artifacts}
    return sorted(names)


def _base(place: Place, component: str, catalog: Catalog, now: float) -> Told | None:
    told = place.last.components.get(component) if place.last else None
    proven = place.proven.get(component)
    running = place.running.get(component)
    if place.foreign:
        # A baseline is for newcomers. This device was governed before: what it runs was ordered.
        return _as_it_runs(place, component, now) or told
    if told is not None and _fell_back_to_rejected(place, told, running):
        return _as_it_runs(place, component, now)
    known = running is None or catalog.owner(component, running.digest) is not None
    if running is not None and not known and place.on_unknown == "adopt":
        if told is None or told.digest != running.digest:  # from now on: what comes later wins
            return Told(release=running.release, digest=running.digest, at=now, rollout=None)
        known = True
    if told is not None and (proven is None or proven.at <= told.at):
        return told
    if not known and place.on_unknown != "converge":
        return told
    if proven is not None:
        return Told(release=proven.release, digest=proven.digest, at=proven.at, rollout=None)
    if told is not None or running is None:
        return told
    return Told(release=running.release, digest=running.digest, at=0.0, rollout=None)


def _failed_at(place: Place, component: str, digest: str) -> bool:
    """Did it fail at just this, under another rollout's name, and must leave what it fell to?"""
    told = place.last.components.get(component) if place.last else None
    if told is None or told.digest != digest:
        return False
    return _fell_back_to_rejected(place, told, place.running.get(component))


def _fell_back_to_rejected(place: Place, told: Told, running: ComponentReport | None) -> bool:
    if not place.failed or running is None or running.digest == told.digest:
        return False
    return any(running.digest in hold.artifacts for hold in place.holds)


def _by_rollout(
    place: Place, component: str, base: Told | None, now: float
) -> tuple[Told | None, str | None, bool]:
    for rollout, member in reversed(place.memberships):
        if member.arm is Arm.CONTROL or member.state in _NOT_TOLD:
            continue
        digest = rollout.artifacts.get(component)
        at = member.told_at or now
        if digest is None or (base is not None and base.at > at and base.rollout is not None):
            continue
        proven = place.proven.get(component)
        if proven is not None and proven.at > at:
            continue
        if _failed_at(place, component, digest):
            continue
        if member.state is MemberState.FAILED and _gave_up(place, component, rollout):
            if base is not None and base.rollout == rollout.id:
                base = _as_it_runs(place, component, now)
            continue
        told = Told(release=rollout.release, digest=digest, at=at, rollout=rollout.id)
        return told, member.attempt, member.arm is Arm.RETURNING
    return base, None, False


def _gave_up(place: Place, component: str, rollout: Rollout) -> bool:
    """Does a failed member no longer wait for this release? It keeps the order that it failed at,
    unless what it fell back to is rejected: then it goes on back, and is not told again after it.
    """
    running = place.running.get(component)
    if running is not None and any(running.digest in hold.artifacts for hold in place.holds):
        return running.digest != rollout.artifacts[component]
    last = place.last.components.get(component) if place.last else None
    return last is not None and last.rollout != rollout.id


def _as_it_runs(place: Place, component: str, now: float) -> Told | None:
    running = place.running.get(component)
    if running is None:
        return None
    return Told(release=running.release, digest=running.digest, at=now, rollout=None)


def _by_holds(
    place: Place, component: str, base: Told | None, catalog: Catalog, now: float
) -> tuple[Told | None, bool, ActiveHold | None]:
    """(what to run, does it go back, the hold that says so)."""
    running = place.running.get(component)
    back, spoke = False, None
    tried: set[str] = set()
    for _ in range(len(place.holds) + 1):
        hold = _rejecting(place.holds, component, base, running)
        if hold is None:
            break
        spoke = hold
        digest = base.digest if base else (running.digest if running else "")
        tried.add(digest)
        base = _destination(place, component, hold, digest, tried, catalog, now)
        if hold.to == "stay" and base is not None and base.digest == digest:
            break
        back = True
        if base is None:
            return None, False, spoke
    if spoke is None and (leaving := _still_leaving(place, component, base)):
        return base, True, leaving
    if running is None or base is None or spoke is None:
        return base, back, spoke
    return base, back or running.digest in spoke.artifacts, spoke


def _still_leaving(place: Place, component: str, base: Told | None) -> ActiveHold | None:
    """The hold that a device obeys which was ordered back before, and has not gone yet."""
    last, running = place.last, place.running.get(component)
    if last is None or last.kind == Kind.INSTALL or last.components.get(component) != base:
        return None
    if running is None or base is None or running.digest == base.digest:
        return None
    return next((h for h in reversed(place.holds) if running.digest in h.artifacts), None)


def _not_started(place: Place, component: str, base: Told | None) -> ComponentReport | None:
    """What runs instead of `base`; None when base runs already, or nothing does."""
    running = place.running.get(component)
    if running is None or base is None or running.digest == base.digest:
        return None
    return running


def _rejecting(
    holds: Sequence[ActiveHold],
    component: str,
    base: Told | None,
    running: ComponentReport | None,
) -> ActiveHold | None:
    """The newest that rejects it; one that sends devices back before one that lets them stay."""
    digest = base.digest if base else (running.digest if running else None)
    found = [h for h in reversed(holds) if digest in h.artifacts]
    return next((h for h in found if h.to != "stay"), found[0] if found else None)


def _destination(
    place: Place,
    component: str,
    hold: ActiveHold,
    digest: str,
    tried: set[str],
    catalog: Catalog,
    now: float,
) -> Told | None:
    running = place.running.get(component)
    if hold.to == "stay" and running is not None and running.digest == digest:
        return Told(release=running.release, digest=digest, at=now, rollout=None)
    left = catalog.owner(component, digest, hold.release)
    for told in _ways_back(place, component, hold, catalog, now):
        nameless = catalog.owner(component, told.digest, told.release) is None
        if nameless and (running is None or running.digest != told.digest):
            continue  # what no release document names can be left alone, and not be ordered
        if told.digest not in tried and _takes_back(left, component, told, catalog):
            return told
    return None


def _ways_back(
    place: Place, component: str, hold: ActiveHold, catalog: Catalog, now: float
) -> Iterator[Told]:
    """Where this device could go, the best first."""
    release = catalog.releases.get(hold.to)
    artifact = release.components.get(component) if release else None
    if release is not None and artifact is not None:
        yield Told(release=release.name, digest=artifact.digest, at=now, rollout=None)
    member = place.past.get(hold.rollout)
    own = (member.previous or {}).get(component) if member else None
    if own:
        yield Told(release=own["release"], digest=own["digest"], at=now, rollout=None)
    running = place.running.get(component)
    if running is not None and running.committed:
        yield Told(release=running.release, digest=running.digest, at=now, rollout=None)
    proven = place.proven.get(component)
    if proven is not None:
        yield Told(release=proven.release, digest=proven.digest, at=now, rollout=None)


def _takes_back(left: Release | None, component: str, told: Told, catalog: Catalog) -> bool:
    """Does the release that is left allow its devices to go to that version? (`rollback.to`)"""
    if left is None or not left.rollback.to:
        return True
    version = catalog.version(component, told.digest)
    return version is not None and any(in_range(version, spec) for spec in left.rollback.to)


def _by_stops(place: Place, component: str, wanted: Told | None, now: float) -> Told | None:
    running = place.running.get(component)
    if wanted is None or running is None or running.digest == wanted.digest:
        return wanted
    if wanted.rollout is None or not stopped(place.device, [wanted.digest], place.stops):
        return wanted  # going back, or to the proven set, is never stopped
    return Told(release=running.release, digest=running.digest, at=now, rollout=None)


def stopped(
    device: Device,
    digests: Collection[str],
    stops: Sequence[ActiveStop],
    product: str | None = None,
) -> bool:
    """Is a new activation of these digests on this device within a stop? `product`: its fleet's."""
    return any(stop.covers(device, digests, product) for stop in stops)


def _by_requirements(
    place: Place, chosen: dict[str, Told], catalog: Catalog, now: float
) -> tuple[dict[str, Told], bool, list[str]]:
    """Roll back what requires the set that is going back; say so where that cannot be."""
    back = False
    sentences: list[str] = []
    for component, told in sorted(chosen.items()):  # a copy: `chosen` changes below
        release = catalog.owner(component, told.digest, told.release)
        if release is None or not release.requires:
            continue
        versions = {c: catalog.version(c, t.digest) for c, t in chosen.items()}
        for other, report in place.running.items():
            versions.setdefault(other, catalog.version(other, report.digest))
        ok, why = satisfied(release, versions)
        if ok:
            continue
        running = place.running.get(component)
        if running is None or running.digest != told.digest:
            _leave(chosen, component, running, now)  # it does not run yet: it waits for its needs
            continue
        own = _own_previous(place, component)
        older = catalog.owner(component, own.digest, own.release) if own else None
        if own and older and satisfied(older, versions)[0]:
            chosen[component] = replace(own, at=now)
            back = True
            continue
        sentences.append(f"cannot roll back: {why}")
        for need in release.requires:  # leave the pair as it runs, until the fix-forward
            _leave(chosen, need.component, place.running.get(need.component), now)
    return chosen, back, sentences


def _leave(
    chosen: dict[str, Told], component: str, running: ComponentReport | None, now: float
) -> None:
    """This component stays what it is."""
    if running is None:
        chosen.pop(component, None)
        return
    chosen[component] = Told(release=running.release, digest=running.digest, at=now, rollout=None)


def _own_previous(place: Place, component: str) -> Told | None:
    for member in place.past.values():
        own = (member.previous or {}).get(component)
        running = place.running.get(component)
        if own and (running is None or own["digest"] != running.digest):
            return Told(release=own["release"], digest=own["digest"], at=0.0, rollout=None)
    return None


def _proven_attempt(chosen: Mapping[str, Told]) -> str:
    newest = max(chosen.values(), key=lambda told: (told.at, told.release))
    return f"proven.{newest.release}"


def _epoch(chosen: Mapping[str, Told], catalog: Catalog) -> int:
    owners = (catalog.owner(c, t.digest, t.release) for c, t in chosen.items())
    return max((owner.security_epoch for owner in owners if owner), default=0)


def _preconditions(chosen: Mapping[str, Told], catalog: Catalog) -> tuple[str, ...]:
    owners = (catalog.owner(c, t.digest, t.release) for c, t in chosen.items())
    names = {name for o in owners if o and o.install for name in o.install.requires}
    return tuple(sorted(names))
