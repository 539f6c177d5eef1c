"""`plan` on five pull requests: a new release, a widened step, a changed gate, a broken reference,
a revert; on a real repository, a real control database, and through the API and the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, insert, update

from controller.cli.plan import _tree
from controller.manifests.reader import read as read_manifests
from controller.planner import Tree, against_fleet, documents_only
from controller.rollout import plan_text
from controller.rollout.plan import Effect, Plan, Planned
from controller.rollout.planned_steps import NOBODY_NEW
from controller.store.database import open_control
from controller.store.tables import devices, members, releases, rollouts
from device_agent.protocol import ComponentReport, HistoryEntry, State
from telemetry.report import DeviceRow, HealthRow, Totals
from telemetry.store.database import writing
from telemetry.sums import Block, Layout, Sums

FLEETS = Path(__file__).parents[2] / "fleets"
NOW = 1_790_000_000.0  # Monday 2026-09-21, 13:33 UTC
RELEASES = ("fsd-10.1.0", "fsd-10.2.0", "fsd-10.3.0", "fsd-10.3.1")


class Words:
    """What 400 cars said: all run 10.2.0, one in ten never reported a score's worth of hours."""

    def __init__(self) -> None:
        self.rows: dict[str, DeviceRow] = {}

    def watermark(self) -> int:
        return 1

    def hearing(self) -> tuple[float, float]:
        return 1_300_000.0, NOW

    def devices_changed(self, since: int, *, limit: int | None = None) -> Sequence[DeviceRow]:
        return list(self.rows.values())

    def device(self, device: str) -> DeviceRow | None:
        return self.rows.get(device)

    def health_since(self, batch: int, *, limit: int = 20_000) -> Sequence[HealthRow]:
        return []

    def totals(self, *, since: float, until: float, names: Collection[str] | None = None) -> Totals:
        return self.sums().since(Sums(), names)

    def sums(self) -> Sums:
        names = sorted(self.rows)
        hours = np.where(np.arange(len(names)) % 10 == 0, 1.0, 200.0)
        braking = np.array([60.0, 0.0, 16.0, 60.0])[np.arange(len(names)) % 4]
        rows = {
            "forward_collision_warning": np.zeros(len(names)),
            "hard_braking": braking,
            "intervention": np.where(braking > 0, 4.0, 0.0),
            "device_hour": hours,
            "km": hours * 40,
        }
        layout = Layout.of(list(rows)[:3], list(rows)[3:], ())
        return Sums([Block(layout, names, np.array(list(rows.values())))])

    def checkpoints(self, since: float) -> Sequence[int]:
        return []

    def checkpoint(self, day: int) -> Sums:
        raise AssertionError("there is none")


def digest_of(repo: Path, release: str) -> str:
    text = (repo / "releases" / f"{release}.yaml").read_text()
    return next(w.strip('",}') for w in text.split() if "sha256:" in w)


def car(name: str, number: int) -> dict[str, object]:
    hardware = "hw3" if number % 5 else "hw2"
    labels = {"model": "m3", "region": "eu", "hardware": hardware}
    return {
        "id": name, "fleet": "model-3-eu", "status": "active", "labels": labels,
        "created_at": NOW, "change": 1,
    }  # fmt: skip


class Fleet:
    """A repository with a branch for each pull request, and the fleet behind it."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.repo = folder / "repo"
        self.engine, self.words = engine, Words()
        shutil.copytree(FLEETS / "cars", self.repo)
        self._git("init", "-q", "-b", "main")
        self.edit("rollout.yaml", "release: fsd-10.3.0", "release: fsd-10.2.0")
        self.commit("main")
        self.digests = {r: digest_of(self.repo, r) for r in RELEASES}
        with writing(engine) as conn:
            conn.execute(insert(devices), [car(f"car-{i:03d}", i) for i in range(400)])
        for i in range(400):
            self.says(f"car-{i:03d}", "fsd-10.2.0")
        self.completed("fsd-10.2.0")

    def _git(self, *arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments],
            cwd=self.repo,
            check=True,
            capture_output=True,
        )

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.repo / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def commit(self, branch: str) -> None:
        if branch != "main":
            self._git("checkout", "-q", "-b", branch)
        self._git("add", "-A")
        self._git("commit", "-q", "-m", branch)

    def pull_request(self, branch: str, file: str, old: str, new: str) -> None:
        self._git("checkout", "-q", "main")
        self.edit(file, old, new)
        self.commit(branch)

    def says(self, name: str, release: str, history: Sequence[str] = ()) -> None:
        report = ComponentReport(release=release, digest=self.digests[release], committed=True)
        self.words.rows[name] = DeviceRow(
            device=name, change=1, last_contact=NOW, heard_clock=1_300_000.0, online=True,
            sleeping_until=None, boot="b", boot_count=1, reported_at=NOW, state=State.COMMITTED,
            components={"autopilot": report},
            history=tuple(
                HistoryEntry(
                    component="autopilot", release=r, digest=self.digests[r], event="trial", at=NOW
                )
                for r in history
            ),
        )  # fmt: skip

    def completed(self, release: str) -> None:
        from controller.manifests.reader import read

        found = read({str(p): p.read_bytes() for p in self.repo.rglob("*.yaml")}).manifests
        with writing(self.engine) as conn:
            for name, each in found.releases.items():
                conn.execute(
                    insert(releases).values(
                        name=name, digest=each.digest, commit="c" * 40, seen_at=NOW,
                        document=each.model_dump(mode="json"),
                    )
                )  # fmt: skip
            conn.execute(
                insert(rollouts).values(
                    id="r" * 26, name="model-3-eu-autopilot", fleet="model-3-eu", release=release,
                    digest=found.releases[release].digest, artifacts={"autopilot": "x"},
                    commit="c" * 40, author="a", state="Completed", sentence="COMPLETED",
                    revision=1, step=3, opened_at=NOW - 9e5, step_at=NOW, updated_at=NOW,
                    seed="s", pinned={}, flags={},
                )
            )  # fmt: skip

    def tree(self, revision: str) -> Tree:
        return _tree(self.repo, "", revision)

    def plan(self, branch: str) -> Plan:
        return against_fleet(self.tree("main"), self.tree(branch), self.engine, self.words, NOW)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, open_control(f"sqlite:///{tmp_path}/control.db"))


def only(plan: Plan) -> Planned:
    (one,) = plan.rollouts
    return one


def test_a_new_release_is_planned_step_by_step(fleet: Fleet) -> None:
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    plan = fleet.plan("new")
    one = only(plan)
    assert one.effect is Effect.OPENS
    assert (one.before, one.after) == ("fsd-10.2.0", "fsd-10.3.0")
    left = sum(out.devices for out in one.left_out)
    assert sum(step.devices for step in one.steps) + left == 400
    assert [step.soak for step in one.steps] == [86_400.0] * 4
    assert one.steps[1].waits_for == "`promote`"
    assert all(a.ends <= b.begins for a, b in zip(one.steps, one.steps[1:], strict=False))
    assert one.steps[1].control > 0
    assert "is left" in one.steps[0].warnings[0]  # every perfect score is exposed
    seen = {gate.metric: gate for gate in one.steps[1].power}
    assert "intervention" in seen["intervention"].sentence
    assert seen["intervention"].sentence in plan_text.plain(plan)
    assert one.download == sum(step.devices for step in one.steps) * 734_003_200
    assert plan.changes
    assert not plan.errors


def test_a_start_that_takes_two_people_names_the_plan_that_they_approve(fleet: Fleet) -> None:
    policy = "healthPolicy: driving\n"
    fleet.edit("rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    fleet.pull_request("two", "fleet.yaml", policy, policy + "  approvals: {start: 2}\n")

    def planned(branch: str) -> Planned:
        return only(documents_only(fleet.tree("main"), fleet.tree(branch), NOW))

    one = planned("two")
    assert one.approves.startswith("sha256:")
    assert any(one.approves[7:19] in note and "one more person" in note for note in one.notes)
    fleet.edit("rollout.yaml", "soak: 24h", "soak: 12h")
    fleet.commit("shorter")
    assert planned("shorter").approves != one.approves


def test_a_gate_that_will_have_no_data_is_foretold(fleet: Fleet) -> None:
    declared = "spec:\n  metrics: {intervention: 2, unheard_of: 3}\n"
    fleet.edit("releases/fsd-10.3.0.yaml", "spec:\n", declared)
    fleet.commit("main")
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    notes = [note for note in only(fleet.plan("new")).notes if "no data" in note]
    assert len(notes) == 1
    assert "fsd-10.3.0 reports revision 2 of it" in notes[0]
    assert "`promote`" in notes[0]


def test_a_weekend_window_postpones_the_step_that_meets_it(fleet: Fleet) -> None:
    # Opened on Monday: three soaks of 36 h end on Saturday; from Friday 17:00 on nobody is told.
    fleet.edit("rollout.yaml", "soak: 24h", "soak: 36h")
    fleet.commit("main")
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    one = only(fleet.plan("new"))
    friday_evening, monday_morning = 1_790_355_600.0, 1_790_586_000.0
    begins = one.steps[3].begins
    assert friday_evening < begins < monday_morning
    assert one.steps[3].ends >= monday_morning + 36 * 3600


def test_hardware_that_the_release_does_not_fit_is_left_out_with_the_reason(fleet: Fleet) -> None:
    fleet.edit("releases/fsd-10.3.1.yaml", "hw3", "hw4")
    fleet.commit("main")
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.1")
    out = only(fleet.plan("new")).left_out
    assert sum(o.devices for o in out) == 400
    assert "hardware hw3, needs hw4" in out[0].why
    assert len(out[0].examples) == 5


def test_a_source_that_is_not_allowed_names_its_stepping_stone(fleet: Fleet) -> None:
    fleet.says("car-001", "fsd-10.1.0")
    text = (fleet.repo / "releases/fsd-10.3.0.yaml").read_text()
    spec = next(line for line in text.splitlines() if "upgradesFrom" in line)
    fleet.edit("releases/fsd-10.3.0.yaml", spec, '  upgradesFrom: [">=10.2"]')
    fleet.commit("main")
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    why = [out for out in only(fleet.plan("new")).left_out if "car-001" in out.examples]
    assert "stepping stone fsd-10.2.0" in why[0].why


def test_a_widened_step_changes_nothing_before_the_next_release(fleet: Fleet) -> None:
    fleet.pull_request("wide", "rollout.yaml", "percent: 10%", "percent: 50%")
    one = only(fleet.plan("wide"))
    assert one.effect is Effect.EDITED
    (edit,) = one.differs
    assert str(edit) == "Rollout model-3-eu-autopilot: strategy.steps[1].percent: 10% → 50%"
    assert "next release" in one.sentence


def test_a_widened_step_is_rehearsed_beside_what_it_was(fleet: Fleet) -> None:
    fleet.pull_request("wide", "rollout.yaml", "percent: 10%", "percent: 50%")
    plan = fleet.plan("wide")
    one = only(plan)
    assert [step.devices for step in one.steps] == [80, 40, 40, 160]
    assert [step.was for step in one.steps] == [80, 20, 60, 160]
    assert "20 → 40 devices" in plan_text.plain(plan)
    assert "| 2 | early 50% | 20 → 40 |" in plan_text.markdown(plan)


def test_another_way_to_write_the_same_changes_nothing(fleet: Fleet) -> None:
    fleet.pull_request("same", "rollout.yaml", "soak: 24h, maxSoak: 72h}", "soak: 1d, maxSoak: 3d}")
    assert only(fleet.plan("same")).effect is Effect.UNCHANGED


def test_a_changed_gate_is_named(fleet: Fleet) -> None:
    fleet.pull_request("gate", "policy.yaml", "per_1000h: 40", "per_1000h: 80")
    one = only(fleet.plan("gate"))
    assert one.effect is Effect.EDITED
    assert [str(each) for each in one.differs] == [
        "HealthPolicy driving: gates[intervention].budget.per_1000h: 40 → 80"
    ]
    assert any("47 device hours" in line for step in one.steps for line in step.gates)


def test_a_broken_reference_blocks_and_is_an_error(fleet: Fleet) -> None:
    fleet.pull_request("broken", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.4.0")
    plan = fleet.plan("broken")
    assert only(plan).effect is Effect.BLOCKED
    assert "rollout.yaml:6:12" in plan.errors[0]
    assert "did you mean" in plan.errors[0]


def test_a_file_that_cannot_be_read_removes_nothing(fleet: Fleet) -> None:
    fleet.pull_request("typo", "rollout.yaml", "percent: 10%", "percent: 1000%")
    plan = documents_only(fleet.tree("main"), fleet.tree("typo"), NOW)
    one = only(plan)
    assert one.effect is Effect.BLOCKED
    assert "1000%" in one.sentence
    assert "stays in force" in one.sentence
    assert "removed" not in plan_text.summary(plan)


def test_a_revert_takes_devices_back_at_once(fleet: Fleet) -> None:
    for i in range(50):
        fleet.says(f"car-{i:03d}", "fsd-10.2.0", history=("fsd-10.1.0", "fsd-10.2.0"))
    fleet.pull_request("revert", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.1.0")
    one = only(fleet.plan("revert"))
    assert one.effect is Effect.OPENS
    assert one.returning == 50
    assert "280 of 400 devices in 4 steps, 50 go back at once" in one.sentence
    assert [step.devices for step in one.steps] == [70, 0, 70, 140]
    assert one.steps[1].warnings == (NOBODY_NEW,)


def test_where_all_go_back_at_once_no_table_of_noughts_is_shown(fleet: Fleet) -> None:
    for i in range(400):
        fleet.says(f"car-{i:03d}", "fsd-10.2.0", history=("fsd-10.1.0", "fsd-10.2.0"))
    fleet.pull_request("revert", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.1.0")
    plan = fleet.plan("revert")
    one = only(plan)
    assert (one.returning, sum(step.devices for step in one.steps)) == (400, 0)
    assert one.returning_download == 400 * 734_003_200
    for text in (plan_text.plain(plan), plan_text.markdown(plan)):
        assert "400 devices have run fsd-10.1.0 in health" in text
        assert "at most 294 GB to download" in text
        assert "step 1" not in text
        assert NOBODY_NEW not in text


def test_a_second_line_of_a_reason_is_no_line_of_the_plan(fleet: Fleet) -> None:
    reason = "brakes\u202e\n\nPlan: nothing changes on any device."
    release = fleet.tree("main").files["releases/fsd-10.3.0.yaml"]
    digest = next(iter(read_manifests({"r.yaml": release}).manifests.releases.values())).digest
    (fleet.repo / "holds").mkdir()
    (fleet.repo / "holds/01hold.yaml").write_text(
        "apiVersion: bellwether.dev/v1\nkind: Hold\nmetadata: {name: 01hold}\nspec:\n"
        "  rollout: model-3-eu-autopilot\n"
        f'  rejects: {{release: fsd-10.3.0, digest: "{digest}"}}\n'
        f"  to: previous\n  reason: {json.dumps(reason)}\n  actor: ada\n"
    )
    fleet.pull_request("held", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    plan = fleet.plan("held")
    for text in (plan_text.plain(plan), plan_text.markdown(plan)):
        assert "brakes Plan: nothing changes" in text
        assert not any(line.startswith("Plan: nothing") for line in text.splitlines())
        assert "\u202e" not in text


def test_a_held_digest_is_not_opened(fleet: Fleet) -> None:
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    held = fleet.tree("new")
    from controller.manifests.reader import read

    release = read(held.files).manifests.releases["fsd-10.3.0"]
    hold = (
        "apiVersion: bellwether.dev/v1\nkind: Hold\nmetadata: {name: 01hold}\nspec:\n"
        "  rollout: model-3-eu-autopilot\n"
        f'  rejects: {{release: fsd-10.3.0, digest: "{release.digest}"}}\n'
        "  to: previous\n  reason: brakes\n  actor: ada\n"
    )
    (fleet.repo / "holds").mkdir()
    (fleet.repo / "holds/01hold.yaml").write_text(hold)
    fleet.commit("held")
    plan = fleet.plan("held")
    assert only(plan).effect is Effect.REFUSED
    assert "brakes" in only(plan).sentence
    assert plan.acts[0].kind == "Hold"


def test_a_hold_of_a_part_is_foretold_for_that_part(fleet: Fleet) -> None:
    """A `rejects` of what runs: two cars go back, and nobody else."""
    from controller.manifests.reader import read

    release = read(fleet.tree("main").files).manifests.releases["fsd-10.2.0"]
    (fleet.repo / "holds").mkdir()
    (fleet.repo / "holds/01hold.yaml").write_text(
        "apiVersion: bellwether.dev/v1\nkind: Hold\nmetadata: {name: 01hold}\nspec:\n"
        "  rollout: model-3-eu-autopilot\n"
        f'  rejects: {{release: fsd-10.2.0, digest: "{release.digest}"}}\n'
        "  scope: {devices: [car-001, car-002]}\n"
        "  to: previous\n  reason: brakes\n  actor: ada\n"
    )
    fleet.commit("part")
    (act,) = fleet.plan("part").acts
    assert act.devices == 2
    assert (
        "in model-3-eu for 2 named devices: 2 devices that have it go to previous" in act.sentence
    )


def test_twelve_devices_are_foretold_to_be_too_few(fleet: Fleet) -> None:
    with writing(fleet.engine) as conn:
        conn.execute(update(devices).where(devices.c.id >= "car-012").values(status="retired"))
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    steps = [step for step in only(fleet.plan("new")).steps if step.devices]
    assert not steps[0].conclusive
    assert "too few" in " ".join(steps[0].gates)


def test_without_a_fleet_only_documents_are_compared(fleet: Fleet) -> None:
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    plan = documents_only(fleet.tree("main"), fleet.tree("new"), NOW)
    assert only(plan).effect is Effect.OPENS
    assert not plan.measured
    assert "no server was asked" in plan_text.plain(plan)
    same = documents_only(fleet.tree("main"), fleet.tree("main"), NOW)
    assert not same.changes


def test_the_texts_carry_the_numbers_and_the_digest_is_stable(fleet: Fleet) -> None:
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    one, two = fleet.plan("new"), fleet.plan("new")
    assert plan_text.digest(one) == plan_text.digest(two)
    page = plan_text.markdown(one)
    assert page.startswith(plan_text.STICKY)
    assert f"{only(one).steps[0].devices:,}" in page
    document = json.loads(json.dumps(plan_text.document(one)))
    assert document["rollouts"][0]["steps"][0]["waitsFor"] == ""
    assert document["digest"] == plan_text.digest(one)


def test_hostile_text_stays_text_in_markdown(fleet: Fleet) -> None:
    fleet.pull_request(
        "evil", "policy.yaml", "metadata: {name: driving}",
        'metadata: {name: driving, annotations: {note: "</details><script>x</script> @all |"}}',
    )  # fmt: skip
    fleet.edit("rollout.yaml", "release: fsd-10.2.0", 'release: "<img src=x onerror=alert(1)>|"')
    fleet.commit("worse")
    page = plan_text.markdown(fleet.plan("worse"))
    assert "<script>" not in page
    assert "<img" not in page.split("```")[0]


def test_a_member_table_of_the_fault_gives_the_fix_its_own_first_step(fleet: Fleet) -> None:
    with writing(fleet.engine) as conn:
        conn.execute(
            insert(rollouts).values(
                id="f" * 26, name="model-3-eu-autopilot", fleet="model-3-eu", release="fsd-10.3.0",
                digest="sha256:x", artifacts={"autopilot": fleet.digests["fsd-10.3.0"]},
                commit="c" * 40, author="a", state="RolledBack", sentence="ROLLED BACK", revision=1,
                step=0, opened_at=NOW - 1e5, step_at=NOW, updated_at=NOW, seed="s", pinned={},
                flags={},
            )
        )  # fmt: skip
        for i in range(20):
            conn.execute(
                insert(members).values(
                    rollout="f" * 26, device=f"car-{i:03d}", step=0, arm="exposed", state="back",
                    drawn_at=NOW, exposed_at=NOW, hardware="hw3", band=0, reason="", updated_at=NOW,
                )
            )  # fmt: skip
    fleet.pull_request("fix", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.1")
    one = only(fleet.plan("fix"))
    assert one.steps[0].name == "fsd-10.3.0's devices"
    assert 0 < one.steps[0].devices <= 10
    assert any("fixes fsd-10.3.0" in note for note in one.notes)


def test_a_step_with_an_empty_cohort_is_foretold(fleet: Fleet) -> None:
    fleet.edit("fleet.yaml", "score: {min: 90}", "score: {min: 99.9}")
    fleet.commit("main")
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    plan = fleet.plan("new")
    assert "NO MEMBERS" in only(plan).steps[1].warnings[0]
    assert "step 2 stops there: its cohort is empty" in plan_text.plain(plan)


def bellwether(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BELLWETHER_")}
    return subprocess.run(
        [sys.executable, "-m", "controller.cli", *arguments],
        capture_output=True, text=True, env=clean, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_line_tells_changes_by_its_exit_code(fleet: Fleet, tmp_path: Path) -> None:
    fleet.pull_request("new", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    fleet.pull_request("bad", "rollout.yaml", "release: fsd-10.2.0", "release: fsd-9")
    here = ("--repo", str(fleet.repo))
    same = bellwether("plan", "--base", "main", "--head", "main", "--detailed-exitcode", *here)
    assert same.returncode == 0, same.stderr
    assert "nothing changes" in same.stdout
    new = bellwether("plan", "--base", "main", "--head", "new", "--detailed-exitcode", *here)
    assert new.returncode == 3, new.stderr
    assert "OPENS" in new.stdout
    bad = bellwether("plan", "--base", "main", "--head", "bad", *here)
    assert bad.returncode == 1
    assert "there is no Release 'fsd-9'" in bad.stdout
    with_fleet = bellwether(
        "plan", "--base", "main", "--head", "new", "-o", "json", "--state-dir", str(tmp_path), *here
    )
    found = json.loads(with_fleet.stdout)
    assert found["measured"], with_fleet.stderr
    assert found["rollouts"][0]["fleetSize"] == 400
    gone = bellwether("plan", "--base", "nowhere", *here)
    assert gone.returncode == 1
    assert "was the revision fetched" in gone.stderr
    option = bellwether("plan", "--base=--upload-pack=x", *here)
    assert option.returncode == 1


def test_the_work_tree_is_planned_where_no_head_is_named(fleet: Fleet) -> None:
    fleet.edit("rollout.yaml", "release: fsd-10.2.0", "release: fsd-10.3.0")
    (fleet.repo / ".github").mkdir()
    (fleet.repo / ".github/ci.yaml").write_text("on: push\n")
    done = bellwether("plan", "--base", "main", "--repo", str(fleet.repo))
    assert done.returncode == 0, done.stdout
    assert "main → work tree" in done.stdout
    assert "+ model-3-eu-autopilot" in done.stdout
