"""Decides what a fleet has proven for one device: what it gets as a newcomer, or as its way back.

Pure. Rules, for each component:

1. What completed last for its hardware; else the fleet's baseline.
2. Never what does not fit the device, what a holdout keeps from it, or what a hold rejects: then
   what completed before that.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

from controller.rollout.desired import Catalog
from controller.rollout.model import Device, Proven, Rollout, RolloutState

NONE = frozenset[str]()


class Proofs:
    """Asked for many devices at one moment: devices that are alike are answered once."""

    def __init__(
        self,
        proven: Mapping[tuple[str, str, str], Proven],
        rollouts: Sequence[Rollout],
        catalog: Catalog,
        baselines: Mapping[str, Mapping[str, str]],
    ) -> None:
        """`proven`: by (fleet, component, hardware; "": any). `rollouts`: completed ones count.
        `baselines`: fleet → component → release."""
        self._proven, self._catalog, self._baselines = proven, catalog, baselines
        self._completed = [one for one in rollouts if one.state == RolloutState.COMPLETED]
        self._labels: dict[str, tuple[str, ...]] = {}  # by fleet: those that something asks for
        self._found: dict[Hashable, dict[str, Proven]] = {}

    def newest(
        self, device: Device, *, without: frozenset[str] = NONE, rejected: frozenset[str] = NONE
    ) -> Mapping[str, Proven]:
        """Component → what is proven. `without`: releases; `rejected`: artifact digests."""
        labels = tuple([device.labels.get(label) for label in self._asked(device.fleet)])
        key = (device.fleet, device.hardware, labels, without, rejected)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._newest(device, without, rejected)
        return found

    def _asked(self, fleet: str) -> tuple[str, ...]:
        known = self._labels.get(fleet)
        if known is None:
            names = {one.release for (of, _, _), one in self._proven.items() if of == fleet}
            names |= {one.release for one in self._completed if one.fleet == fleet}
            names |= set(self._baselines.get(fleet, {}).values())
            releases = (self._catalog.releases.get(name) for name in names)
            artifacts = (a for release in releases if release for a in release.artifacts)
            known = tuple(sorted({label for a in artifacts for label in a.compatible}))
            self._labels[fleet] = known
        return known

    def _newest(
        self, device: Device, without: Collection[str], rejected: Collection[str]
    ) -> dict[str, Proven]:
        found: dict[str, Proven] = {}
        passed_over: set[str] = set()

        def may_have(one: Proven) -> bool:
            release = self._catalog.releases.get(one.release)
            fits = release is None or release.fits(device.labels)
            return fits and one.release not in without and one.digest not in rejected

        for (fleet, component, kind), one in self._proven.items():
            if fleet != device.fleet or kind not in ("", device.hardware):
                continue
            if not may_have(one):
                passed_over.add(component)
                continue
            best = found.get(component)
            if best is None or one.at > best.at or kind:
                found[component] = one
        for component, one in self._before(device.fleet, passed_over):
            best = found.get(component)
            if may_have(one) and (best is None or one.at > best.at):
                found[component] = one
        return found

    def _before(self, fleet: str, components: Collection[str]) -> Iterator[tuple[str, Proven]]:
        """The baseline, and what completed once, of these components: `proven` knows the last of it
        only."""
        for component, name in self._baselines.get(fleet, {}).items() if components else ():
            release = self._catalog.releases.get(name)
            artifact = release.components.get(component) if release else None
            if artifact is not None and component in components:
                yield component, Proven(release=name, digest=artifact.digest, at=0.0)
        for rollout in self._completed if components else ():
            for component in components & rollout.artifacts.keys():
                if rollout.fleet == fleet:
                    digest, at = rollout.artifacts[component], rollout.finished_at or 0.0
                    yield component, Proven(release=rollout.release, digest=digest, at=at)
