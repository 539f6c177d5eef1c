"""The loop on a real control database: commits, decisions, orders, with devices as plain data.

Devices here are rows of a reader: they obey the last order that was published to them when they are
told to `work`. Time is a number that the test moves.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, insert, select

from controller import commands
from controller.hindsight import messages, past
from controller.keys import DirectorKey
from controller.loop import Loop, Ports
from controller.manifests.admission import admit
from controller.manifests.reader import read
from controller.orders import Issuer
from controller.outcomes import board
from controller.rollout import holdout as holdouts
from controller.rollout import reconcile
from controller.rollout.hindsight import retry, told
from controller.rollout.model import Arm
from controller.rollout.muster import Muster
from controller.rollout.world import Head, Notice
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import decisions, devices, holds, rollouts
from device_agent.protocol import ComponentReport, HistoryEntry, State, open_envelope, parse_topic
from telemetry.evidence.observations import Observations
from telemetry.report import DeviceRow, HealthRow, Level, Totals
from telemetry.store.database import reading, writing
from telemetry.sums import Block, Layout, Sums

VERSIONS = ("1", "2", "3", "3.1", "b1", "b2")
DIGESTS = {v: "sha256:" + format(i, "064x") for i, v in enumerate(VERSIONS)}


class World:
    """Git head, broker and telemetry as the loop sees them."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.rows: dict[str, DeviceRow] = {}
        self.health: list[HealthRow] = []
        self.batch = 0
        self.heard = 0.0
        self.now = 1_000_000.0
        self.orders: dict[str, list] = defaultdict(list)
        self.broker_up = True
        self.broken: set[str] = set()  # versions that fail to boot

    # Heads
    def current(self) -> Head | None:
        return self.head

    # TelemetryReader
    def watermark(self) -> int:
        return self.batch

    def hearing(self) -> tuple[float, float]:
        return self.heard, self.now

    def devices_changed(self, since: int, *, limit: int | None = None) -> Sequence[DeviceRow]:
        return sorted((r for r in self.rows.values() if r.change > since), key=lambda r: r.change)

    def device(self, device: str) -> DeviceRow | None:
        return self.rows.get(device)

    def health_since(self, batch: int, *, limit: int = 20_000) -> Sequence[HealthRow]:
        return [row for row in self.health if row.batch > batch]

    def totals(self, *, since: float, until: float, names=None) -> Totals:
        return self.sums().since(Sums())

    def sums(self) -> Sums:
        names = sorted(self.rows)
        hours = Layout.of((), ("device_hour",), ())
        return Sums([Block(hours, names, np.full((1, len(names)), 100.0))])

    def checkpoints(self, since: float) -> Sequence[int]:
        return []

    def checkpoint(self, day: int) -> Sums:
        raise AssertionError("there is none")

    # Broker
    def publish(self, messages, *, qos=1, retain=True, timeout=10.0) -> list[bool]:
        if not self.broker_up:
            return [False] * len(messages)
        for topic, payload in messages:
            self.orders[parse_topic(topic)[0]].append(open_envelope(payload)[0])
        return [True] * len(messages)

    # devices
    def say(self, device: str, **changes) -> None:
        self.batch += 1
        self.rows[device] = replace(
            self.rows[device],
            change=self.batch,
            last_contact=self.now,
            heard_clock=self.heard,
            reported_at=self.now,
            **changes,
        )

    def join(self, device: str, components: dict[str, tuple[str, str]]) -> None:
        self.rows[device] = DeviceRow(
            device=device, change=0, last_contact=self.now, heard_clock=self.heard, online=True,
            sleeping_until=None, boot="b", boot_count=1, reported_at=self.now, state=State.IDLE,
        )  # fmt: skip
        self.say(device, components=_reports(components))

    def work(self, *names: str) -> None:
        """Each device (or those named) obeys its newest order at once."""
        for device in names or list(self.rows):
            if not self.orders[device]:
                self.say(device)
                continue
            order, row = self.orders[device][-1], self.rows[device]
            if row.generation == order.generation:
                self.say(device)
                continue
            wanted = {c: (o.release, o.digest) for c, o in order.components.items()}
            numbers = {
                "term": order.term, "generation": order.generation, "attempt": order.attempt,
            }  # fmt: skip
            changed = [c for c, (_, d) in wanted.items() if _runs(row, c) != d]
            if any(wanted[c][1] in self.broken for c in changed):
                self.say(device, state=State.ROLLED_BACK, reason="boot_failed", **numbers)
                continue
            history = row.history + tuple(
                HistoryEntry(component=c, release=r, digest=d, at=self.now, event="activated")
                for c, (r, d) in wanted.items()
                if c in changed
            )
            components = {**row.components, **_reports(wanted)}
            self.say(
                device, state=State.COMMITTED, reason=None, components=components,
                history=history, **numbers,
            )  # fmt: skip


def _reports(components: dict[str, tuple[str, str]]) -> dict[str, ComponentReport]:
    return {
        c: ComponentReport(release=release, digest=digest, committed=True)
        for c, (release, digest) in components.items()
    }


def _runs(row: DeviceRow, component: str) -> str | None:
    report = row.components.get(component)
    return report.digest if report else None


class Story:
    def __init__(self, directory: Path) -> None:
        self.world = World()
        self.engine: Engine = open_control(f"sqlite:///{directory / 'control.db'}")
        self.key = DirectorKey.load_or_create(directory / "key.pem")
        self.commits = 0
        self.registry = 0
        self.start()

    def start(self) -> None:
        with writing(self.engine) as conn:
            term = store.take_over(conn, 1)
        issuer = Issuer(
            key=self.key, term=term, base_url="http://localhost:1", lease=timedelta(hours=1)
        )
        ports = Ports(engine=self.engine, reader=self.world, heads=self.world, broker=self.world)
        self.loop = Loop(ports, issuer)

    def enrol(
        self, *names: str, fleet: str = "cars", status: str = "active", **labels: str
    ) -> None:
        with writing(self.engine) as conn:
            for name in names:
                self.registry += 1
                conn.execute(devices.delete().where(devices.c.id == name))
                conn.execute(
                    insert(devices).values(
                        id=name, fleet=fleet, labels=labels, status=status, created_at=0.0,
                        change=self.registry,
                    )
                )  # fmt: skip

    def commit(self, *documents: str) -> None:
        self.commits += 1
        reading_ = read({"fleet.yaml": "---\n".join(documents)})
        problems = [*reading_.problems, *admit(reading_)]
        errors = [str(p) for p in problems if p.severity == "error"]
        assert not errors, errors
        self.world.head = Head(
            commit=f"{self.commits:040x}", author="ann", manifests=reading_.manifests
        )

    def run(self, seconds: float = 1.0, step: float = 1.0, work: bool = True) -> None:
        end = self.world.now + seconds
        while self.world.now < end:
            self.world.now += step
            self.world.heard += step
            self.loop.tick(self.world.now)
            if work:
                self.world.work()
            self.loop.tick(self.world.now)

    def rollout(self, name: str = "cars"):
        with reading(self.engine) as conn:
            return conn.execute(
                select(rollouts).where(rollouts.c.name == name).order_by(rollouts.c.id.desc())
            ).first()

    def versions(self, component: str = "app") -> dict[str, int]:
        counted: dict[str, int] = defaultdict(int)
        names = {digest: version for version, digest in DIGESTS.items()}
        for row in self.world.rows.values():
            counted[names[row.components[component].digest]] += 1
        return dict(counted)

    def command(self, kind: str, name: str = "cars", **more) -> None:
        commands.record(
            self.engine, kind=kind, rollout=name, body=more.pop("body", {}), actor="eve",
            reason="because", incident=None, if_revision=more.get("if_revision"),
            now=self.world.now,
        )  # fmt: skip


def fleet(component: str = "app", baseline: str = "app-1") -> str:
    return _document(
        "Fleet",
        "cars",
        {
            "selector": {"matchLabels": {"model": "m3"}},
            "healthPolicy": "driving",
            "baseline": {component: baseline},
            "cohorts": [
                {"name": "canary", "select": {"matchLabels": {"ring": "canary"}}},
                {"name": "general", "rest": "true"},
            ],
        },
    )


def policy() -> str:
    return _document(
        "HealthPolicy", "driving", {"gates": [{"metric": "update_ok", "type": "proportion"}]}
    )


def release(version: str, component: str = "app", artifact: str | None = None, **more) -> str:
    digest = DIGESTS[artifact or version]
    return _document(
        "Release",
        more.pop("name", f"{component}-{version}"),
        {
            "version": version.removeprefix("b"),
            "artifacts": [{"component": component, "digest": digest, "size": "10"}],
            **more,
        },
    )


def rollout(name: str, to: str, steps: list | None = None, **more) -> str:
    strategy = {
        "steps": steps
        or [
            {"cohort": "canary", "soak": "3s", "maxSoak": "20s", "margins": MARGINS},
            {"cohort": "general", "soak": "3s", "maxSoak": "20s", "margins": MARGINS},
        ],
        "silentAfter": "30s",
        "maxFailed": "1%",
        **more.pop("strategy", {}),
    }
    return _document(
        "Rollout", name, {"fleet": "cars", "release": to, "strategy": strategy, **more}
    )


MARGINS = {"failed": "30%", "lost": "30%"}


def _document(kind: str, name: str, spec: dict) -> str:
    head = {"apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": name}}
    # JSON is YAML: flow maps and quoted strings.
    return json.dumps({**head, "spec": spec}) + "\n"


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    canaries = [f"car-{i:02}" for i in range(12)]
    others = [f"car-{i:02}" for i in range(12, 40)]
    made.enrol(*canaries, model="m3", ring="canary")
    made.enrol(*others, model="m3")
    for name in canaries + others:
        made.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    return made


def base() -> list[str]:
    return [fleet(), policy(), *(release(v) for v in ("1", "2", "3", "3.1"))]


def test_a_commit_moves_the_canary_then_the_fleet(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state in ("Soaking", "Progressing")
    story.run(20)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"
    assert "COMPLETED — app-2 on 40 of 40 devices" in story.rollout().sentence


def test_a_release_that_does_not_boot_is_rolled_back_in_the_canary(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    assert story.versions() == {"1": 40}
    last = story.rollout()
    assert last.state == "RolledBack"
    assert last.sentence.startswith("ROLLED BACK — ")
    with reading(story.engine) as conn:
        hold = conn.execute(select(holds)).one()
    assert (hold.digest, hold.to, hold.actor) == (last.digest, "previous", "policy driving")


def test_rollback_by_a_person_sends_each_device_to_its_own_previous(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(3)
    assert story.versions() == {"2": 28, "3": 12}
    story.command("rollback")
    story.run(3)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "RolledBack"
    assert {o[-1].kind for d, o in story.world.orders.items() if d < "car-12"} == {"rollback"}


def test_a_held_digest_moves_nothing_whatever_its_name(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(5)
    renamed = release("9", artifact="2", name="app-9")
    story.commit(*base(), renamed, rollout("cars", "app-9"))
    story.run(5)
    assert story.versions() == {"1": 40}
    with reading(story.engine) as conn:
        notice = store.get_meta(conn, "notices")["cars"]
    assert "app-9 is rejected by hold" in notice
    story.commit(*base(), release("3", name="app-fix", fixes="app-2"), rollout("cars", "app-fix"))
    story.run(40)
    assert story.versions() == {"3": 40}


def test_a_lifted_digest_starts_again_at_step_one(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.command("lift")
    story.run(3)
    assert story.versions() == {"1": 28, "2": 12}
    story.run(30)
    assert story.versions() == {"2": 40}


def test_a_lift_sets_free_the_release_of_its_rollout_and_no_other(story: Story) -> None:
    """2 is bad; 3 was held by mistake. Who lifts 3 has not looked at 2, which Git names again."""
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(40)
    assert story.versions() == {"3": 40}
    story.command("hold")
    story.run(2)
    story.commit(*base(), rollout("cars", "app-2"))
    story.command("lift")
    story.run(30)
    assert story.versions() == {"3": 40}
    with reading(story.engine) as conn:
        left = conn.execute(select(holds.c.id, holds.c.release).where(holds.c.lifted_at.is_(None)))
        (still,) = left.all()
    assert still.release == "app-2"
    with pytest.raises(commands.Refused, match=f"in force are {still.id} on app-2"):
        story.command("lift")
    story.command("lift", body={"hold": still.id})
    story.run(60)
    assert story.versions() == {"2": 40}


def test_hold_leaves_devices_as_they_are(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.command("hold")
    story.run(30)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state == "Held"


def test_a_reason_of_several_lines_is_quoted_in_one(story: Story) -> None:
    """Its second line would read as a sentence of ours, on a terminal and in a commit's status."""
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(4)
    with writing(story.engine) as conn:
        row = conn.execute(select(rollouts).where(rollouts.c.name == "cars")).one()
        reason = "brakes\u202e\n\nCOMPLETED — app-2 on 40 of 40 devices"
        commands.add_hold(
            conn, dict(row._mapping), to="previous", actor="eve", reason=reason, incident=None,
            now=story.world.now,
        )  # fmt: skip
    story.run(4)
    sentence = story.rollout().sentence
    assert "brakes COMPLETED — app-2 on 40" in sentence
    assert "\n" not in sentence


def test_pause_tells_nobody_else_and_resume_goes_on(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.command("pause")
    story.run(30)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state == "Paused"
    story.command("resume")
    story.run(30)
    assert story.versions() == {"2": 40}


def test_an_offline_device_blocks_nobody_and_gets_it_at_its_next_contact(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    gone = [d for d in story.world.rows if d != "car-05"]
    for _ in range(200):
        story.world.now += 1
        story.world.heard += 1
        story.loop.tick(story.world.now)
        story.world.work(*gone)
    assert story.rollout().state == "Completed"
    assert "1 not reached yet" in story.rollout().sentence
    assert story.versions() == {"1": 1, "2": 39}
    story.run(3)
    assert story.versions() == {"2": 40}


def test_a_stale_revision_is_refused(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    with pytest.raises(commands.Refused) as refused:
        story.command("rollback", if_revision=0)
    assert refused.value.code == 412
    assert story.rollout().state != "RollingBack"


def test_git_revert_goes_at_rollback_pace(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(30)
    assert story.versions() == {"3": 40}
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    assert story.versions() == {"2": 40}


def test_a_new_release_supersedes_and_leaves_devices_what_they_have(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.commit(*base(), rollout("cars", "app-3", steps=[
        {"cohort": "canary", "percent": "50%", "soak": "60s", "margins": MARGINS},
        {"cohort": "canary", "soak": "60s", "margins": MARGINS},
        {"cohort": "general", "margins": MARGINS},
    ]))  # fmt: skip
    story.run(5)
    assert story.versions() == {"1": 28, "2": 6, "3": 6}


def test_a_newcomer_gets_the_proven_set_and_no_running_step(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(2)
    for name, version in (("car-90", "1"), ("car-91", "3")):
        story.enrol(name, model="m3")
        story.world.join(name, {"app": (f"app-{version}", DIGESTS[version])})
    story.enrol("car-92", model="m3")
    story.world.join("car-92", {"app": ("mystery", "sha256:" + "f" * 64)})
    story.loop.tick(story.world.now)
    story.world.work()
    assert story.world.rows["car-90"].components["app"].digest == DIGESTS["2"]
    assert story.world.rows["car-91"].components["app"].digest == DIGESTS["2"]
    assert story.world.rows["car-92"].components["app"].digest == "sha256:" + "f" * 64


def test_a_device_that_is_moved_or_retired_leaves_the_step(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(1, work=False)
    story.enrol("car-00", model="m3", ring="canary", status="retired")
    story.enrol("car-01", model="m3", ring="canary", fleet="elsewhere")
    story.run(2)
    assert story.world.rows["car-00"].components["app"].digest == DIGESTS["2"]  # had its order
    story.run(30)
    assert story.rollout().state == "Completed"
    assert "38 of 38" in story.rollout().sentence


def test_a_restart_between_any_two_ticks_changes_nothing(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    for _ in range(30):
        story.run(1)
        story.start()
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def drive(story: Story, seconds: int) -> None:
    """Time passes; each device tells every second how it drove."""
    for second in range(seconds):
        story.run(1)
        for i, (name, row) in enumerate(sorted(story.world.rows.items())):
            story.world.batch += 1
            story.world.health.append(
                HealthRow(
                    batch=story.world.batch, device=name, received_at=story.world.now, boot="b",
                    seq=story.world.batch, attempt=row.attempt,
                    components={c: r.digest for c, r in row.components.items()},
                    t0=story.world.now - 1, seconds=1.0, counters={"hard": (i + second) % 3 // 2},
                    exposure={"device_hour": 1.0}, levels={},
                )
            )  # fmt: skip


def test_who_was_a_control_before_counts_as_one_after_a_restart(story: Story) -> None:
    """The last steps take the controls of the first ones: a restart must not forget their word."""
    slow = {"soak": "1h", "maxSoak": "2h"}
    steps = [
        {"cohort": "canary", **slow},
        {"cohort": "general", "percent": "50%", **slow},
        {"cohort": "general", **slow},
    ]
    hard = {"metric": "hard", "type": "rate", "per": "device_hour", "direction": "increase",
            "margin": {"ratio": "2"}}  # fmt: skip
    update_ok = {"metric": "update_ok", "type": "proportion"}
    judged = _document("HealthPolicy", "driving", {"gates": [update_ok, hard]})
    releases = [release(v) for v in ("1", "2")]
    story.commit(fleet(), judged, *releases, rollout("cars", "app-2", steps))
    drive(story, 8)
    counted = []
    for step in (0, 1, 2):
        assert story.rollout().step == step
        if step == 1:  # one of those who count leaves in the middle of it
            story.enrol("car-03", model="m3", status="retired")
            drive(story, 2)
        story.loop.tick(story.world.now)
        before = story.loop._listening.evidence.observations()[story.rollout().id]
        counted += [arms.devices for arms in before.metric("hard").totals if arms.arm == "control"]
        story.start()
        story.loop.tick(story.world.now)
        after = story.loop._listening.evidence.observations()[story.rollout().id]
        assert (after.arms, _counts(after)) == (before.arms, _counts(before))
        story.command("promote")
        drive(story, 8)
    assert story.rollout().state == "Completed"
    assert counted[-1] > 0  # in the last step nobody is a control any more


def _counts(seen: Observations) -> list[object]:
    """What is counted; sums of sums differ in their last digit by the order of adding."""
    hard = seen.metric("hard")
    firsts = [(f.wave, f.band, f.d1, f.d0, f.y1, f.y0) for f in hard.firsts]
    return [firsts, [(t.wave, t.arm, t.devices, t.events, t.exposure) for t in hard.totals]]


def test_cars_that_come_back_before_the_controller_make_nobody_silent(story: Story) -> None:
    """All fell quiet together, which a controller saw that is gone; half of them are back."""
    slow = [{"cohort": "canary", "soak": "1h"}, {"cohort": "general", "soak": "1h"}]
    story.commit(*base(), rollout("cars", "app-2", slow))
    story.run(6)
    story.run(25, work=False)
    story.world.now, story.world.heard = story.world.now + 20, story.world.heard + 20
    back = [name for i, name in enumerate(sorted(story.world.rows)) if i % 2]
    story.world.work(*back)
    story.start()
    for _ in range(5):
        story.run(1, work=False)
        story.world.work(*back)
    members = story.loop._memory.members[story.rollout().id].values()
    assert {m.state for m in members if m.arm is Arm.EXPOSED} == {"updated"}
    for _ in range(120):  # who does not come back is silent all the same
        story.run(1, work=False)
        story.world.work(*back)
    members = story.loop._memory.members[story.rollout().id].values()
    states = {m.device: m.state for m in members if m.arm is Arm.EXPOSED}
    assert {name for name, state in states.items() if state == "silent"} == states.keys() - {*back}


def test_an_older_controller_is_fenced(story: Story) -> None:
    old = story.loop
    story.commit(*base(), rollout("cars", "app-2"))
    story.start()
    with pytest.raises(store.Fenced):
        old.tick(story.world.now)
    story.run(30)
    assert story.versions() == {"2": 40}


def test_orders_wait_for_the_broker(story: Story) -> None:
    story.world.broker_up = False
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(5)
    assert not any(story.world.orders.values())
    story.world.broker_up = True
    story.run(30)
    assert story.versions() == {"2": 40}


def test_an_empty_cohort_stops_the_rollout(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.enrol("car-1", model="m3")
    story.world.join("car-1", {"app": ("app-1", DIGESTS["1"])})
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(10)
    assert story.rollout().state == "NoMembers"
    assert "cohort canary is empty" in story.rollout().sentence


def test_every_decision_is_a_row_with_its_sentence(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    with reading(story.engine) as conn:
        rows = conn.execute(select(decisions).order_by(decisions.c.id)).all()
    kinds = [(row.kind, row.verdict) for row in rows]
    assert kinds[0] == ("open", "opened")
    assert ("draw", "drawn") in kinds
    assert ("verdict", "widen") in kinds
    assert kinds[-1] == ("state", "Completed")
    assert all(row.sentence for row in rows)
    assert len(rows) < 30


def test_rolling_back_a_component_rolls_back_what_requires_it(tmp_path: Path) -> None:
    story = Story(tmp_path)
    names = [f"drone-{i:02}" for i in range(20)]
    story.enrol(*names[:8], model="m3", ring="canary")
    story.enrol(*names[8:], model="m3")
    for name in names:
        story.world.join(
            name, {"app": ("app-1", DIGESTS["1"]), "battery": ("battery-b1", DIGESTS["b1"])}
        )
    steps = [{"cohort": "canary", "margins": {"failed": "45%", "lost": "45%"}},
             {"cohort": "general", "margins": {"failed": "45%", "lost": "45%"}}]  # fmt: skip
    documents = [
        fleet(), policy(), release("1"), release("b1", component="battery"),
        release("b2", component="battery"),
        release("2", requires=[{"component": "battery", "version": ">=2"}]),
    ]  # fmt: skip
    needs = rollout("cars", "app-2", steps=steps)
    story.commit(*documents, rollout("power", "battery-b2", steps=steps), needs)
    story.run(60)
    assert story.versions("battery") == {"b2": 20}
    assert story.versions("app") == {"2": 20}
    story.command("rollback", "power")
    story.run(5)
    assert story.versions("battery") == {"b1": 20}
    assert story.versions("app") == {"1": 20}


def test_a_passed_deadline_asks_a_person_and_resume_gives_another(story: Story) -> None:
    slow = [{"cohort": "canary", "soak": "1h", "margins": MARGINS}, {"cohort": "general"}]
    deadline = {"progressDeadline": "20s"}
    story.commit(*base(), rollout("cars", "app-2", steps=slow, strategy=deadline))
    story.run(25)
    assert story.rollout().state == "Inconclusive"
    assert "the progress deadline of 0:00:20 has passed" in story.rollout().sentence
    story.command("resume")
    story.run(5)
    assert story.rollout().state == "Soaking"


def test_a_fix_goes_first_to_the_devices_that_ran_the_fault(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    assert story.rollout().state == "RolledBack"
    story.commit(*base(), release("3", name="app-fix", fixes="app-2"), rollout("cars", "app-fix"))
    story.run(1)
    with reading(story.engine) as conn:
        drawn = conn.execute(
            select(decisions.c.sentence).where(decisions.c.kind == "draw").order_by(decisions.c.id)
        ).all()[-1]
    assert "app-2's devices" in drawn.sentence
    story.run(60)
    assert story.versions() == {"3": 40}


@pytest.mark.parametrize("rule", ["grow", "pause"])
def test_a_wave_too_small_to_prove_anything_is_doubled_once(story: Story, rule: str) -> None:
    # 6 of the 12 canaries cannot refute 30 %; all 12 can. More time would not help.
    half = {"cohort": "canary", "percent": "50%", "soak": "3s", "maxSoak": "20s"}
    steps = [{**half, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout("cars", "app-2", steps=steps, strategy={"onInconclusive": rule, "partial": "true"}),
    )
    story.run(60)
    with reading(story.engine) as conn:
        rows = conn.execute(select(decisions.c.kind, decisions.c.sentence)).all()
    growing = [row.sentence for row in rows if row.sentence.startswith("GROWING")]
    draws = [row for row in rows if row.kind == "draw"]
    if rule == "pause":
        assert growing == []
        assert story.rollout().state == "Inconclusive"
        assert story.versions()["2"] == 6
        return
    assert len(growing) == 1
    assert "more devices can tell what more time cannot" in growing[0]
    assert len(draws) == 3
    assert story.versions() == {"2": 40}


def test_a_step_that_waits_for_a_person_waits_when_the_policy_proceeds_too(story: Story) -> None:
    """`proceed` gives up the proof; with `pause: {}` somebody wants to look before it widens."""
    few = {"cohort": "canary", "percent": "25%", "soak": "3s", "maxSoak": "6s", "margins": MARGINS}
    steps = [{**few, "pause": {}}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    proceed = {"proceed": {"minHealthy": "1", "afterSoak": "3s", "maxDevices": "1000"}}
    strategy = {"onInconclusive": proceed, "partial": "true"}
    story.commit(*base(), rollout("cars", "app-2", steps=steps, strategy=strategy))
    story.run(30)
    assert story.versions()["2"] == 3
    assert story.rollout().state == "Paused"
    assert "UNPROVEN, the step waits for `promote`" in story.rollout().sentence
    story.command("resume")  # who did not want to look longer has not said that it may widen
    story.run(5)
    assert story.rollout().state == "Paused"
    story.command("promote")
    story.run(30)
    assert story.versions() == {"2": 40}


@pytest.mark.parametrize(("percent", "canaries"), [("25%", 40), ("10%", 5)])
def test_a_wave_is_doubled_at_most_twice(story: Story, percent: str, canaries: int) -> None:
    """3 canaries become 6, then the 12 that refute 30 %; 10 % become 5: a person."""
    few = {"cohort": "canary", "percent": percent, "soak": "3s", "maxSoak": "20s"}
    steps = [{**few, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout(
            "cars", "app-2", steps=steps, strategy={"onInconclusive": "grow", "partial": "true"}
        ),
    )
    story.run(120)
    with reading(story.engine) as conn:
        said = conn.execute(select(decisions.c.sentence)).scalars().all()
    growing = [sentence for sentence in said if sentence.startswith("GROWING")]
    assert len(growing) == 2
    assert "is doubled:" in growing[0]
    assert "is doubled again:" in growing[1]
    assert story.versions()["2"] == canaries
    assert story.rollout().state == ("Completed" if canaries == 40 else "Inconclusive")


def test_a_wave_that_grows_has_soaked_already(story: Story) -> None:
    """It asked for devices, not for time; but it gets what is left until the maximum once more."""
    half = {"cohort": "canary", "percent": "50%", "soak": "30s", "maxSoak": "90s"}
    steps = [{**half, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout(
            "cars", "app-2", steps=steps, strategy={"onInconclusive": "grow", "partial": "true"}
        ),
    )
    for _ in range(60):
        story.run(1)
        if story.rollout().flags.get("grown") == 0:
            break
    assert story.rollout().flags["grown"] == 0
    story.run(11)  # far less than to soak anew
    assert story.rollout().step == 1


# -- what the loop remembers is what counting from the beginning says ------------------------------


class Doubting(Loop):
    """Before each answer it counts everything from the beginning, and compares."""

    asked = 0
    answers = 0

    def _ask(self, now: float):
        world = self._world()
        awake = self._rollcall.awake(world, now)
        for name, muster in self._rollcall.musters.items():
            fresh = Muster(world, world.rollouts[name], now)
            for what in ("groups", "moving", "unsaid"):
                assert getattr(muster, what) == getattr(fresh, what), (name, what)
            assert list(muster.ready) == list(fresh.ready)
        anew = reconcile.decide(replace(world, musters={}, ended={}), now)
        known = reconcile.decide(world, now, awake)
        said = [action for action in anew if not isinstance(action, Notice)]
        assert [action for action in known if not isinstance(action, Notice)] == said
        if awake.opening:
            assert known == anew
        Doubting.asked += len(world.rollouts)
        Doubting.answers += len(awake.rollouts)
        return super()._ask(now)


class Trouble:
    """A seeded history: devices, people, Git and time do whatever they may do."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.story = Story(directory)
        self.restart()
        self.names = [f"car-{i:02}" for i in range(24)]
        for i, name in enumerate(self.names):
            zone = {"timezone": self.dice.choice(["Asia/Tokyo", "America/New_York", "UTC"])}
            ring = {"ring": "canary"} if i < 8 else {}
            self.story.enrol(name, model="m3", hardware=f"hw{i % 2}", **zone, **ring)
            self.story.world.join(
                name, {"app": ("app-1", DIGESTS["1"]), "battery": ("battery-b1", DIGESTS["b1"])}
            )
        self.story.world.broken.add(DIGESTS["3"])

    def restart(self) -> None:
        self.story.start()
        self.story.loop = Doubting(self.story.loop._ports, self.story.loop._issuer)

    def commit(self) -> None:
        dice = self.dice
        pace = {}
        if dice.random() < 0.4:
            pace["maxConcurrent"] = dice.choice(["1", "3"])
        if dice.random() < 0.4:
            pace["maxPerMinute"] = dice.choice(["2", "5"])
        limits = {"margins": {"failed": "60%", "lost": "60%"}, "soak": "3s", "maxSoak": "15s"}
        steps = [
            {"cohort": "canary", "percent": "50%", **limits, **pace},
            {"cohort": "canary", **limits},
            {"cohort": "general", **limits, **pace},
        ]
        if dice.random() < 0.2:
            steps[1]["pause"] = {}
        more = {}
        if dice.random() < 0.3:
            more["windows"] = [
                {
                    "kind": dice.choice(["Allow", "Deny"]),
                    "schedule": "*/3 * * * *",
                    "duration": dice.choice(["1m", "90s", "2m"]),
                    "timezone": "device",
                }
            ]
        if dice.random() < 0.15:
            more["suspend"] = "true"
        deadline: dict = {"progressDeadline": dice.choice(["40s", "1h"])}
        if dice.random() < 0.4:
            action = dice.choice(["wait", "fail"])
            deadline["offline"] = {"action": action, "countAfter": dice.choice(["20s", "60s"])}
        needs = {}
        if dice.random() < 0.3:
            needs = {"requires": [{"component": "battery", "version": ">=2"}]}
        to = dice.choice(["2", "3", "3.1"])
        self.story.commit(
            fleet(), policy(), release("1"), release(to, **needs),
            release("b1", component="battery"), release("b2", component="battery"),
            rollout("cars", f"app-{to}", steps=steps, strategy=deadline, **more),
            rollout("power", dice.choice(["battery-b1", "battery-b2"]), steps=steps),
        )  # fmt: skip

    def device(self) -> None:
        dice, world, name = self.dice, self.story.world, self.dice.choice(self.names)
        match dice.randrange(7):
            case 0:
                world.say(name, state=State.FAILED, reason="link_lost")
            case 1:
                world.say(name, sleeping_until=world.now + dice.choice([5, 50, 500]))
            case 2:
                world.say(name, state=State.DEFERRED, blocked_by=("driving",))
            case 3:
                status = dice.choice(["retired", "quarantined", "active"])
                self.story.enrol(name, model="m3", status=status)
            case 4:
                fleet_ = dice.choice(["cars", "elsewhere"])
                self.story.enrol(name, model="m3", ring="canary", fleet=fleet_)
            case 5:
                world.say(name, generation=world.rows[name].generation + 5)
            case 6:
                if orders := world.orders[name]:
                    order = orders[-1]
                    world.say(name, state=State.ACTIVATING, attempt=order.attempt)

    def person(self) -> None:
        kind = self.dice.choice(["rollback", "hold", "lift", "pause", "resume", "promote", "stop"])
        body = {"scope": "all", "value": ""} if kind == "stop" else {}
        if kind == "stop" and self.dice.random() < 0.6:
            body["lift"] = True
        name = None if kind == "stop" else self.dice.choice(["cars", "power"])
        with contextlib.suppress(commands.Refused):
            self.story.command(kind, name, body=body)

    def happen(self) -> None:
        story, world, dice = self.story, self.story.world, self.dice
        lot = dice.random()
        if lot < 0.04:
            self.commit()
        elif lot < 0.12:
            self.person()
        elif lot < 0.32:
            self.device()
        elif lot < 0.34:
            self.restart()
        elif lot < 0.35:
            world.now -= dice.choice([1, 30])
        elif lot < 0.37:
            world.now += dice.choice([8, 20])  # our ears were shut: the hearing clock stood still
        elif lot < 0.40:
            world.broker_up = not world.broker_up
        elif lot < 0.43 and world.head is not None:
            world.head = replace(world.head, stale=not world.head.stale)
        elif lot < 0.8:
            world.work(*dice.sample(self.names, dice.randrange(1, len(self.names))))
        step = dice.choice([0.3, 1.0, 1.0, 5.0, 31.0])
        world.now, world.heard = world.now + step, world.heard + step
        story.loop.tick(world.now)


@pytest.mark.parametrize("seed", range(8))
def test_counting_from_the_beginning_gives_the_same_answer(tmp_path: Path, seed: int) -> None:
    Doubting.asked = Doubting.answers = 0
    trouble = Trouble(tmp_path, seed)
    trouble.commit()
    for _ in range(160):
        trouble.happen()
    assert Doubting.asked > 2 * Doubting.answers > 0  # not all were asked every time
    with reading(trouble.story.engine) as conn:
        assert len(conn.execute(select(decisions)).all()) > 10


LOOSE = [  # few devices are left beside a holdout: they prove little
    {"cohort": name, "soak": "3s", "maxSoak": "20s", "margins": {"failed": "70%", "lost": "70%"}}
    for name in ("canary", "general")
]


def test_a_holdout_is_kept_out_until_its_time_has_passed(story: Story) -> None:
    holdout = {"percent": "25%", "for": "60s", "unit": "device"}
    story.commit(*base(), rollout("cars", "app-2", LOOSE, holdout=holdout))
    story.run(30)
    done = story.rollout()
    assert done.state == "Completed"
    kept = story.versions()["1"]
    held = [name for name in story.world.rows if holdouts.chosen(done.seed, name, 0.25)]
    assert kept == len(held) > 0
    assert {n for n, r in story.world.rows.items() if _runs(r, "app") == DIGESTS["1"]} == set(held)
    story.start()  # a new controller keeps the same ones out
    story.run(20)
    assert story.versions()["1"] == kept
    story.run(20)
    assert story.versions() == {"2": 40}


def test_the_board_measures_a_goal_against_the_holdout(story: Story) -> None:
    goals = {"goals": [{"metric": "km", "type": "mean", "direction": "increase"}]}
    gates = [{"metric": "update_ok", "type": "proportion"}]
    judged = _document("HealthPolicy", "driving", {"gates": gates, **goals})
    documents = [fleet(), judged, *(release(v) for v in ("1", "2", "3", "3.1"))]
    holdout = {"percent": "25%", "for": "1h", "unit": "device"}
    story.commit(*documents, rollout("cars", "app-2", LOOSE, holdout=holdout))
    story.run(30)
    now = story.world.now
    for i, (name, row) in enumerate(sorted(story.world.rows.items())):
        story.world.batch += 1
        value = (12.0 if _runs(row, "app") == DIGESTS["2"] else 10.0) + (i % 5) / 10
        story.world.health.append(
            HealthRow(
                batch=story.world.batch, device=name, received_at=now, boot="b", seq=1,
                attempt=None, components={}, t0=now - 1, seconds=1.0, counters={}, exposure={},
                levels={"km": Level(n=1, total=value, squares=value**2)},
            )
        )  # fmt: skip
    with reading(story.engine) as conn:
        found = board(conn, story.world, now=now, days=30, fleets=frozenset())
    one = found["items"][0]["outcomes"][0]
    assert one["verdict"] == "better"
    assert one["against"] == "the holdout"
    assert one["treated"] + one["control"] == 40
    assert one["estimate"] == pytest.approx(2.0, abs=0.3)
    assert found["delivery"][0]["measures"][0]["name"] == "deployment_frequency"


def test_without_a_holdout_a_finished_goal_is_not_measurable(story: Story) -> None:
    goals = {"goals": [{"metric": "km", "type": "mean", "direction": "increase"}]}
    judged = _document(
        "HealthPolicy",
        "driving",
        {"gates": [{"metric": "update_ok", "type": "proportion"}], **goals},
    )
    documents = [fleet(), judged, *(release(v) for v in ("1", "2", "3", "3.1"))]
    story.commit(*documents, rollout("cars", "app-2"))
    story.run(30)
    with reading(story.engine) as conn:
        found = board(conn, story.world, now=story.world.now, days=30, fleets=frozenset())
    one = found["items"][0]["outcomes"][0]
    assert one["verdict"] == "not measurable"
    assert one["sentence"].startswith("km: not measurable — ")


def test_the_past_of_a_rollout_is_judged_again_from_database_and_messages(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    with reading(story.engine) as conn:
        found = past(conn, story.rollout())
    assert found.release == "app-2"
    assert {e.device for e in found.enrolled if e.arm == "control"} <= set(story.world.rows)
    looks = retry(found, messages(story.world))
    assert "so did the policy in force then, at the same time" in told(found, looks)
