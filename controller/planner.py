"""Plans a commit against the fleet as it is: loads the snapshot, then `rollout.plan` says the rest.

Reads only: the control database, the telemetry store, trees of files. Used by the API and, with a
state directory, by the command line; without either, documents are compared with documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, Engine

from controller.gitwatch import assess
from controller.manifests.kinds import Release
from controller.manifests.reader import read
from controller.release_signing import Signers
from controller.rollout.desired import Catalog
from controller.rollout.model import Device
from controller.rollout.plan import Commit, Plan, assumed, plan
from controller.rollout.power import History, history
from controller.rollout.waves import Pinned
from controller.rollout.world import Head, Scored, World
from controller.store import approvals
from controller.store import rollouts as store
from controller.store import stops as stop_rows
from telemetry.policy import GateType
from telemetry.report import TelemetryReader
from telemetry.score import placed, score
from telemetry.score_days import DAY, ScoreDays
from telemetry.store.database import reading

HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A revision and its manifests: path → text."""

    revision: str
    commit: str
    author: str
    files: Mapping[str, str | bytes]


def against_fleet(
    base: Tree,
    head: Tree,
    engine: Engine,
    reader: TelemetryReader,
    now: float,
    signers: Signers | None = None,
) -> Plan:
    """The plan with the fleet's own devices, scores, holds and running rollouts; `signers`: whose
    signatures a release needs."""
    with reading(engine) as conn:
        devices = {d.id: d for d in store.load_devices(conn, 0)[0]}
        known = {
            name: Release.model_validate(document)
            for name, document in store.load_releases(conn).items()
        }
        before, after = (_commit(tree, known, devices, signers) for tree in (base, head))
        readings = ScoreDays(reader)
        world = _world(conn, reader, readings, after.head, devices, known, now)
    past = _past(after.head, devices, reader, readings, now)
    return plan(before, after, world, now, measured=True, past=past)


def documents_only(base: Tree, head: Tree, now: float) -> Plan:
    """The plan without a fleet: what opens and what is edited, no devices."""
    before, after = (_commit(tree, {}, {}) for tree in (base, head))
    world = assumed(_nobody(after.head), before, now)
    return plan(before, after, world, now, measured=False)


def _commit(
    tree: Tree,
    known: Mapping[str, Release],
    devices: Mapping[str, Device],
    signers: Signers | None = None,
) -> Commit:
    head, problems = assess(
        read(tree.files),
        tree.commit,
        tree.author,
        known={name: release.digest for name, release in known.items()},
        registry={d.id: d.labels for d in devices.values()},
        signers=signers,
    )
    return Commit(name=tree.revision, head=head, problems=tuple(problems))


def _world(
    conn: Connection,
    reader: TelemetryReader,
    readings: ScoreDays,
    head: Head,
    devices: Mapping[str, Device],
    known: Mapping[str, Release],
    now: float,
) -> World:
    holds, rejected = store.load_holds(conn)
    rollouts = store.load_rollouts(conn)
    return World(
        head=head,
        devices=devices,
        seen={row.device: row for row in reader.devices_changed(0)},
        hearing=reader.hearing()[0],
        deaf=(),
        rollouts=rollouts,
        members=store.load_members(conn),
        pinned={r.id: Pinned.from_json(r.pinned) for r in rollouts.values() if r.active},
        orders={},
        holds=holds,
        rejected=rejected,
        stops=stop_rows.load(conn),
        commands=(),
        rules=approvals.load_rules(conn),
        proven=store.load_proven(conn),
        catalog=Catalog(releases=known),
        scores=_scores(head, devices, readings, now),
        observations={},
        watermark=reader.watermark(),
    )


def _scores(
    head: Head, devices: Mapping[str, Device], readings: ScoreDays, now: float
) -> dict[str, Scored]:
    scores = {}
    for fleet in head.manifests.fleets.values():
        policy = head.manifests.policies.get(fleet.health_policy)
        if policy is None:
            continue
        spec = policy.score
        # As the loop does it: quintiles of this fleet alone, day by day where the preset wants it.
        ours = {name for name, device in devices.items() if device.fleet == fleet.name}
        result = score([day.of(ours) for day in readings.read(spec, now)], spec)
        values = placed(result)
        size = sum(d.fleet == fleet.name and d.governed for d in devices.values())
        scored = sum(value is not None for value, _ in values.values())
        scores[fleet.name] = Scored(
            at=now, values=values, unscored=size - scored, min_exposure=float(spec.min_exposure)
        )
    return scores


def _past(
    head: Head,
    devices: Mapping[str, Device],
    reader: TelemetryReader,
    readings: ScoreDays,
    now: float,
) -> dict[str, History]:
    """What each fleet's own baselines are; no longer ago than we have listened."""
    listened = max(reader.hearing()[0] / DAY, 1 / 24)
    found = {}
    for fleet in head.manifests.fleets.values():
        policy = head.manifests.policies.get(fleet.health_policy)
        if policy is None:
            continue
        days = min(policy.judged.engine.baseline_days, listened)
        rates = policy.judged.of(GateType.RATE)
        names = {"device_hour"}.union(*({gate.metric, gate.unit} for gate in rates))
        begun, totals = readings.counted(now - days * DAY, now, names)
        # In whole hours: a second plan within one has the same past.
        days = listened if begun is None else max(round((now - begun) / HOUR), 1) / 24
        ours = {d.id: d for d in devices.values() if d.fleet == fleet.name and d.governed}
        kinds = Counter(d.hardware for d in ours.values())
        shares = {name: n / len(ours) for name, n in sorted(kinds.items())}
        found[fleet.name] = history(totals.of(ours), policy.judged, days, shares)
    return found


def _nobody(head: Head) -> World:
    return World(
        head=head, devices={}, seen={}, hearing=0.0, deaf=(), rollouts={}, members={}, pinned={},
        orders={}, holds=(), rejected=frozenset(), stops=(), commands=(), proven={},
        catalog=Catalog(releases={}), scores={}, observations={}, watermark=0,
    )  # fmt: skip
