"""Decides what may enter: references between documents, cohorts that cover, disjoint fleets.

Pure. Each rule answers problems with the rollouts that they block, so that an error in one fleet
never blocks another. A field whose behaviour is not built yet is reported as a notice, never
silently ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from controller.manifests.kinds import (
    Expression,
    Fleet,
    Mode,
    Operator,
    Release,
    Rollout,
    Selector,
    Step,
)
from controller.manifests.reader import Manifests, Problem, Reading
from controller.manifests.text import dotted

NOT_YET = "accepted and checked, not in force yet"
Path = tuple[str | int, ...]


def admit(
    reading: Reading, registry: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[Problem, ...]:
    """Every problem between the documents; `registry` (device → labels) finds real overlaps."""
    rules = _Rules(reading)
    found: list[Problem] = []
    for fleet in reading.manifests.fleets.values():
        found += rules.fleet(fleet)
    found += rules.disjoint(registry or {})
    for release in reading.manifests.releases.values():
        found += rules.release(release)
    for rollout in reading.manifests.rollouts.values():
        found += rules.rollout(rollout)
    found += rules.one_rollout_a_component()
    found += rules.holds()
    found += rules.not_yet()
    return tuple(found)


class _Rules:
    def __init__(self, reading: Reading) -> None:
        self._all: Manifests = reading.manifests
        self._broken = reading.broken

    # -- fleets -----------------------------------------------------------------------------------

    def fleet(self, fleet: Fleet) -> Iterator[Problem]:
        blocks = self._of_fleet(fleet.name)
        if fleet.health_policy not in self._all.policies:
            yield self._missing(
                "Fleet", fleet.name, ("spec", "healthPolicy"), "HealthPolicy", fleet.health_policy,
                self._all.policies, blocks,
            )  # fmt: skip
        for component, name in fleet.baseline.items():
            path = ("spec", "baseline", component)
            release = self._all.releases.get(name)
            if release is None:
                yield self._missing(
                    "Fleet", fleet.name, path, "Release", name, self._all.releases, blocks
                )
            elif component not in release.components:
                message = f"release {name} brings no {component}"
                yield self._error("Fleet", fleet.name, path, message, blocks)
        names = [cohort.name for cohort in fleet.cohorts]
        for i, cohort in enumerate(fleet.cohorts):
            last = i == len(names) - 1
            if cohort.name in names[:i]:
                message = f"cohort {cohort.name} stands here twice"
                yield self._error("Fleet", fleet.name, ("spec", "cohorts", i), message, blocks)
            if cohort.rest != last:
                message = (
                    "the last cohort must be `rest: true`: else a device could belong to none"
                    if last
                    else "`rest: true` takes everybody: cohorts after it could never have a member"
                )
                yield self._error("Fleet", fleet.name, ("spec", "cohorts", i), message, blocks)

    def disjoint(self, registry: Mapping[str, Mapping[str, str]]) -> Iterator[Problem]:
        fleets = sorted(self._all.fleets.values(), key=lambda fleet: fleet.name)
        for i, one in enumerate(fleets):
            for other in fleets[i + 1 :]:
                if not can_overlap(one.selector, other.selector):
                    continue
                both = [
                    device
                    for device, labels in registry.items()
                    if one.selector.matches(labels) and other.selector.matches(labels)
                ]
                example = f" (device {min(both)} is in both)" if both else ""
                message = (
                    f"fleets {one.name} and {other.name} overlap{example}: give one a label "
                    "that the other excludes"
                )
                blocks = self._of_fleet(one.name) | self._of_fleet(other.name)
                yield self._error("Fleet", other.name, ("spec", "selector"), message, blocks)

    # -- releases ---------------------------------------------------------------------------------

    def release(self, release: Release) -> Iterator[Problem]:
        blocks = self._of_release(release.name)
        if release.fixes and release.fixes not in self._all.releases:
            yield self._missing(
                "Release", release.name, ("spec", "fixes"), "Release", release.fixes,
                self._all.releases, blocks,
            )  # fmt: skip
        specs: list[tuple[Path, str]] = [
            (("spec", "requires", i, "version"), need.version)
            for i, need in enumerate(release.requires)
        ]
        specs += [(("spec", "upgradesFrom", i), s) for i, s in enumerate(release.upgrades_from)]
        specs += [(("spec", "rollback", "to", i), s) for i, s in enumerate(release.rollback.to)]
        for path, spec in specs:
            try:
                SpecifierSet(spec)
            except InvalidSpecifier:
                message = f'{spec!r} is no version range: write ">=2.1" or ">=2.1,<3"'
                yield self._error("Release", release.name, path, message, blocks)

    # -- rollouts ---------------------------------------------------------------------------------

    def rollout(self, rollout: Rollout) -> Iterator[Problem]:
        blocks = frozenset({rollout.name})
        fleet = self._all.fleets.get(rollout.fleet)
        if fleet is None:
            yield self._missing(
                "Rollout", rollout.name, ("spec", "fleet"), "Fleet", rollout.fleet,
                self._all.fleets, blocks,
            )  # fmt: skip
        if rollout.release not in self._all.releases:
            yield self._missing(
                "Rollout", rollout.name, ("spec", "release"), "Release", rollout.release,
                self._all.releases, blocks,
            )  # fmt: skip
        to = rollout.rollback.to
        if to not in ("previous", "stay") and to not in self._all.releases:
            message = f"{to!r}: write previous, stay, or a release"
            yield self._error("Rollout", rollout.name, ("spec", "rollback", "to"), message, blocks)
        for i, window in enumerate(rollout.windows):
            yield from self._window(rollout, i, window.schedule, window.timezone)
        if fleet is not None:
            yield from self._steps(rollout, fleet)

    def _window(self, rollout: Rollout, i: int, schedule: str, zone: str) -> Iterator[Problem]:
        blocks = frozenset({rollout.name})
        path: Path = ("spec", "windows", i)
        try:
            CronSim(schedule, datetime(2026, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            message = f'{schedule!r} is no cron schedule ({error}): write "0 17 * * 5"'
            yield self._error("Rollout", rollout.name, (*path, "schedule"), message, blocks)
        try:
            if zone != "device":
                ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            message = f"{zone!r} is no time zone: write Europe/Berlin, UTC, or device"
            yield self._error("Rollout", rollout.name, (*path, "timezone"), message, blocks)

    def _steps(self, rollout: Rollout, fleet: Fleet) -> Iterator[Problem]:
        blocks = frozenset({rollout.name})
        names = [cohort.name for cohort in fleet.cohorts]
        best = {c.name for c in fleet.cohorts if c.select and c.select.mode is Mode.BEST_FIRST}
        reached: dict[str, float] = {}
        for i, step in enumerate(rollout.strategy.steps):
            path: Path = ("spec", "strategy", "steps", i)
            if step.cohort in best and i > 0:
                message = (
                    f"best_first is for the first wave alone: this step draws {step.cohort} "
                    "stratified"
                )
                yield self._error(
                    "Rollout", rollout.name, (*path, "cohort"), message, frozenset(), "notice"
                )
            if step.cohort not in names:
                message = (
                    f"fleet {fleet.name} has no cohort {step.cohort}; it has {', '.join(names)}"
                )
                yield self._error("Rollout", rollout.name, (*path, "cohort"), message, blocks)
            elif step.percent - _kept_back(step) <= reached.get(step.cohort, 0.0):
                message = (
                    f"percent is cumulative: {step.cohort} has reached "
                    f"{reached[step.cohort]:.0%} before"
                    + (", and keepBack leaves nobody above it" if _kept_back(step) else "")
                )
                yield self._error("Rollout", rollout.name, path, message, blocks)
            reached[step.cohort] = max(step.percent, reached.get(step.cohort, 0.0))
        short = [name for name in names if reached.get(name, 0.0) < 1]
        if short and not rollout.strategy.partial:
            message = (
                f"the steps end below 100 % of {', '.join(short)}: add steps, or say "
                "`partial: true`"
            )
            yield self._error(
                "Rollout", rollout.name, ("spec", "strategy", "steps"), message, blocks
            )

    def one_rollout_a_component(self) -> Iterator[Problem]:
        owners: dict[tuple[str, str], str] = {}
        for rollout in sorted(self._all.rollouts.values(), key=lambda r: r.name):
            release = self._all.releases.get(rollout.release)
            for component in release.components if release else ():
                first = owners.setdefault((rollout.fleet, component), rollout.name)
                if first != rollout.name:
                    message = (
                        f"{first} rolls out {component} in fleet {rollout.fleet} already: "
                        "one rollout for one component of a fleet"
                    )
                    yield self._error(
                        "Rollout", rollout.name, ("spec", "release"), message,
                        frozenset({first, rollout.name}),
                    )  # fmt: skip

    def holds(self) -> Iterator[Problem]:
        for hold in self._all.holds.values():
            rollout = self._all.rollouts.get(hold.rollout)
            fleet = self._all.fleets.get(rollout.fleet) if rollout else None
            name, known = hold.scope.get("cohort"), [c.name for c in fleet.cohorts] if fleet else []
            if known and name is not None and name not in known:
                message = (
                    f"fleet {rollout.fleet if rollout else ''} has no cohort {name}: the hold "
                    f"covers nobody; it has {', '.join(known)}"
                )
                path: Path = ("spec", "scope", "cohort")
                yield self._error("Hold", hold.id, path, message, frozenset(), "notice")
        for lift in self._all.lifts.values():
            if lift.hold not in self._all.holds:
                yield self._missing(
                    "Lift", lift.id, ("spec", "hold"), "Hold", lift.hold, self._all.holds,
                    frozenset(), severity="notice",
                )  # fmt: skip

    # -- not in force yet -------------------------------------------------------------------------

    def not_yet(self) -> Iterator[Problem]:
        for release in self._all.releases.values():
            fields: list[tuple[str, bool]] = [
                ("installer", release.installer != "slots"),
                ("sbom", release.sbom is not None),
            ]
            yield from self._notices("Release", release.name, fields)
        for policy in self._all.policies.values():
            fields = [("compare", bool(policy.compare))]
            yield from self._notices("HealthPolicy", policy.name, fields)

    def _notices(
        self, kind: str, name: str, fields: Iterable[tuple[str, bool]]
    ) -> Iterator[Problem]:
        for field, used in fields:
            if used:
                yield self._notice(kind, name, ("spec", *field.split(".")))

    # -- problems ---------------------------------------------------------------------------------

    def _of_fleet(self, fleet: str) -> frozenset[str]:
        return frozenset(r.name for r in self._all.rollouts.values() if r.fleet == fleet)

    def _of_release(self, release: str) -> frozenset[str]:
        return frozenset(r.name for r in self._all.rollouts.values() if r.release == release)

    def _missing(
        self,
        kind: str,
        name: str,
        path: Path,
        wanted: str,
        value: str,
        known: Mapping[str, object],
        blocks: frozenset[str],
        severity: str = "error",
    ) -> Problem:
        if (wanted, value) in self._broken:
            message = f"{wanted} {value} has errors of its own (see there)"
        else:
            close = difflib.get_close_matches(value, list(known), n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            message = f"there is no {wanted} {value!r} under this path{hint}"
        return self._error(kind, name, path, message, blocks, severity)

    def _error(
        self,
        kind: str,
        name: str,
        path: Path,
        message: str,
        blocks: frozenset[str],
        severity: str = "error",
    ) -> Problem:
        file, line, col = self._all.where(kind, name, path)
        shown = dotted(path)
        return Problem(
            path=file,
            line=line,
            col=col,
            field=shown,
            message=message,
            severity="error" if severity == "error" else "notice",
            blocks=blocks,
        )

    def _notice(self, kind: str, name: str, path: Path) -> Problem:
        return self._error(kind, name, path, NOT_YET, frozenset(), "notice")


def _kept_back(step: Step) -> float:
    return step.keep_back.percent if step.keep_back is not None else 0.0


def can_overlap(one: Selector, other: Selector) -> bool:
    """Is there any set of labels that both selectors match? Decided key by key."""
    needs: dict[str, list[Expression]] = {}
    for selector in (one, other):
        for key, value in selector.match_labels.items():
            only = Expression(key=key, operator=Operator.IN, values=(value,))
            needs.setdefault(key, []).append(only)
        for expression in selector.match_expressions:
            needs.setdefault(expression.key, []).append(expression)
    return all(_satisfiable(expressions) for expressions in needs.values())


def _satisfiable(expressions: list[Expression]) -> bool:
    """Can one value of a label (or its absence) meet all of these?"""
    absent = all(e.matches({}) for e in expressions)
    named = {value for e in expressions for value in e.values}
    # A value that nobody names stands for all the others.
    other = "\0other"
    key = expressions[0].key
    return absent or any(
        all(e.matches({key: value}) for e in expressions) for value in (*named, other)
    )
