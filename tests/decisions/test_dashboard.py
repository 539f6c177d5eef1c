"""What the pages show, from plain rows: each rule one test."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bench.estate_evidence import story
from controller.http.dashboard import (
    blast,
    board,
    device,
    evidence,
    figures,
    overview,
    rollout,
    shares,
    sights,
    tally,
)
from controller.http.dashboard.census import Counts
from controller.http.dashboard.signs import Tone, of_device, of_rollout, of_verdict
from controller.roles import Grant, Principal, Role
from controller.rollout.model import MemberState, RolloutState
from device_agent.protocol import ComponentReport, HistoryEntry, State
from telemetry.outcomes import Shipped, delivery
from telemetry.report import DeviceRow

ONE: dict[str, Any] = {
    "id": "01r", "name": "cars", "fleet": "eu", "release": "app-2", "state": "Soaking", "step": 1,
    "digest": "sha256:r", "artifacts": {"app": "sha256:new"}, "sentence": "WAITING — soaked 1 h",
    "soakSeconds": 3600.0, "holds": [],
    "steps": [
        {"cohort": "canary", "percent": 1.0, "soak": "PT24H"},
        {"cohort": "early", "percent": 0.1, "soak": "PT24H", "pause": {"duration": None}},
        {"cohort": "general", "percent": 1.0, "max_per_minute": 500},
    ],
    "members": {
        "devices": {}, "control": 4,
        "steps": {"0": {"updated": 9}, "1": {"told": 3, "drawn": 2}},
    },
}  # fmt: skip
CAR: dict[str, Any] = {
    "id": "car-1", "fleet": "eu", "status": "active", "cohort": "general", "online": True,
    "lastContact": "2026-11-24T02:14:05Z", "state": "IDLE", "reason": None, "blockedBy": [],
    "components": {"app": {"release": "app-1", "digest": "sha256:old", "committed": True}},
    "desired": None, "membership": None, "history": [], "enrolledAt": None,
}  # fmt: skip


def member(**changes: Any) -> dict[str, Any]:
    return {"rollout": "01r", "arm": "exposed", "step": 1, "state": "told", "reason": "", **changes}


def blocking(car: dict[str, Any], one: dict[str, Any] | None = None, **more: Any) -> list[str]:
    """The questions that are not met."""
    holds, stops = more.get("holds", ()), more.get("stops", ())
    checks = device.why_not(car, one or ONE, None, holds, stops)
    return [
        f"{check.question} {check.answer}" for check in checks if check.sign.tone is not Tone.GOOD
    ]


def test_every_state_has_a_word_and_a_shape() -> None:
    for state in RolloutState:
        assert of_rollout(str(state)).icon
        assert of_verdict(str(state)).word == of_rollout(str(state)).word
    assert {of_rollout(s).tone for s in ("RolledBack", "RollingBack", "Held")} == {Tone.BAD}
    assert of_rollout("SomethingNew").word == "SomethingNew"


def test_a_device_shows_what_is_most_urgent() -> None:
    assert of_device("quarantined", True, "COMMITTED").word == "Quarantined"
    assert of_device("active", False, "FAILED").word == "Failed"
    assert of_device("active", False, "IDLE").word == "Offline"
    assert of_device("active", True, "DOWNLOADING").tone is Tone.MOVING
    assert of_device("active", True, None).word == "Never heard"


def test_a_bar_holds_everybody_and_ends_at_its_end() -> None:
    bar = tally.members({str(state): n for n, state in enumerate(MemberState, 1)} | {"odd": 2})
    assert bar.total == sum(range(1, 8)) + 2
    assert sum(part.width for part in bar.segments) == pytest.approx(100, abs=0.01)
    assert bar.segments[-1].word == "odd"
    assert tally.members({}).segments == ()


def test_offline_and_deferred_stand_apart_while_the_counters_agree() -> None:
    now = {"updated": 5, "waiting": 1, "deferred": 2, "offline": 3, "untold": 1, "failed": 1}
    counts = {"updated": 5, "told": 5, "drawn": 2, "failed": 1, "left": 2}
    words = {part.word: part.n for part in tally.standing(now, counts).segments}
    assert words["Offline"] == 3
    assert words["Deferred by the device"] == 2
    assert words["Left"] == 2
    stale = tally.standing(now, {**counts, "updated": 50})
    assert {part.word for part in stale.segments} >= {"Updated", "In progress", "Not told yet"}
    assert stale.total == 60


def test_steps_stand_against_the_plan() -> None:
    first, second, third = rollout.steps(ONE, None, {"early": 5000, "general": 6004}, {})
    assert (first.sign.word, second.sign.word, third.sign.word) == (
        "Passed",
        "Soaks",
        "Not started",
    )
    assert second.current
    assert second.tally.total == 5
    assert second.planned == "about 500 of 5,000 in the cohort now"
    assert "soaked 60 min of 24 h" in second.soak
    assert third.limits == ("at most 500 a minute",)


def test_a_fix_has_a_step_before_the_first() -> None:
    names = [step.name for step in rollout.steps(ONE, "app-1", {}, {})]
    assert names[0] == "devices that ran app-1"
    assert len(names) == 4
    told = {**ONE, "fixes": "app-1"}
    assert [row["steps"] for row in sights.rows_of([told, {**ONE, "fixes": None}])] == [4, 3]


def test_margins_of_a_step_are_told_in_words() -> None:
    step = {"cohort": "canary", "margins": {"failed": 0.08, "ratio": 2.0, "cabin_cpu": 3.0}}
    (shown,) = rollout.steps({**ONE, "steps": [step]}, None, {}, {})
    assert shown.limits == ("must refute cabin cpu 3, 8 % failed, 2 × control",)


def test_verbs_are_those_of_the_state_and_of_the_person() -> None:
    def labels(role: Role, fleets: tuple[str, ...] = (), **changes: Any) -> list[str]:
        who = Principal(name="p", grants=(Grant(role=role, fleets=frozenset(fleets)),))
        return [verb.name for verb in rollout.verbs({**ONE, **changes}, who, held=False)]

    assert labels(Role.VIEWER) == []
    assert labels(Role.ON_CALL) == ["rollback", "hold", "pause"]
    assert labels(Role.RELEASE_MANAGER, ("us",)) == []
    assert labels(Role.RELEASE_MANAGER, ("eu",)) == ["rollback", "hold", "pause", "promote"]
    assert labels(Role.ADMIN, state="Paused") == ["rollback", "hold", "resume", "promote"]
    assert labels(Role.ADMIN, state="RolledBack") == []


def test_why_not_names_what_is_in_the_way() -> None:
    assert blocking(CAR) == [
        "Is its turn come? Cohort general: its first step is number 3 (general all), the rollout "
        "is at 2."
    ]
    control = {**CAR, "membership": member(arm="control")}
    assert "control group of step 2" in blocking(control)[0]
    window = {**CAR, "membership": member(state="drawn", reason="window closed until 01:00")}
    assert "not told yet: window closed until 01:00" in blocking(window)[0]
    deferred = {**CAR, "membership": member(reason="parked"), "blockedBy": ["parked"]}
    assert any("It waits for parked" in line for line in blocking(deferred))
    assert "Offline since" in blocking({**CAR, "online": False})[-1]
    assert "never heard" in blocking({**CAR, "online": False, "lastContact": None})[-1]
    assert "quarantined" in blocking({**CAR, "status": "quarantined"})[0]
    assert "Soaking" not in blocking(CAR, {**ONE, "state": "Paused", "sentence": "PAUSED — ann"})[0]


def test_holds_and_stops_are_in_the_way() -> None:
    hold = {"liftedAt": None, "digest": "sha256:r", "actor": "ann", "reason": "brakes"}
    assert any("Held by ann: brakes" in line for line in blocking(CAR, holds=[hold]))
    lifted = {**hold, "liftedAt": "2026-11-24T02:14:05Z"}
    assert not any("Held by" in line for line in blocking(CAR, holds=[lifted]))
    stop = {"scope": "product", "value": "app", "actor": "bo", "reason": "storm"}
    assert any("Stop of product app by bo: storm" in line for line in blocking(CAR, stops=[stop]))


def test_who_runs_the_release_needs_no_reason() -> None:
    runs = {"app": {"release": "app-2", "digest": "sha256:new", "committed": True}}
    checks = device.why_not({**CAR, "components": runs}, ONE, None, (), ())
    assert [check.sign.tone for check in checks] == [Tone.GOOD]
    trial = {"app": {**runs["app"], "committed": False}}
    assert len(device.why_not({**CAR, "components": trial}, ONE, None, (), ())) > 1


@pytest.mark.parametrize(("name", "tone"), [("harmful", Tone.BAD), ("clean", Tone.GOOD)])
def test_guardrails_of_a_real_judgement(name: str, tone: Tone) -> None:
    last = story(name, 1)[-1]
    rails = evidence.guardrails(last.numbers)
    found = next(rail for rail in rails if rail.name == "disengagement")
    assert found.sign.tone is tone
    assert found.says
    assert found.drawn is not None
    assert 0 <= found.drawn.low < found.drawn.high <= 100
    assert found.drawn.limit is not None
    assert found.n.count("+") == 1
    assert [rail.name for rail in rails if rail.dry_run] == ["cabin cpu"]
    if name == "harmful":
        assert rails[0] is found
        assert found.binding


def test_what_the_policy_measures_stands_before_what_is_always_watched() -> None:
    names = [rail.name for rail in evidence.guardrails(story("clean", 1)[-1].numbers)]
    assert names == ["disengagement", "update ok", "lost", "silence", "cabin cpu"]


def test_numbers_that_are_none_are_shown_as_unknown() -> None:
    odd = {
        "guardrails": {"x": {"kind": "events", "band": [None, 3], "harm": None}, "y": "nonsense"}
    }
    (rail,) = evidence.guardrails(odd)
    assert rail.drawn is None
    assert rail.band == "—"
    assert evidence.guardrails({}) == ()
    assert evidence.traces([("t", odd)])[0].points[0].low is None


def test_the_chart_has_a_point_for_each_judgement() -> None:
    told = story("harmful", 1)
    traces = evidence.traces(
        [(f"2026-11-24T{n:02}:00:00Z", one.numbers) for n, one in enumerate(told)]
    )
    trace = next(one for one in traces if one.name == "disengagement")
    assert len(trace.points) == len(told)
    assert trace.points[-1].low is not None


def test_a_dialog_says_the_verb_and_the_number() -> None:
    plan = {
        "members": {"told": 3, "updated": 1200, "drawn": 7},
        "devices": 1203,
        "release": "app-2",
    }
    shown = blast.dialog("rollback", plan, "eu", away=40)
    assert shown.button == "Roll back 1,203 devices"
    assert shown.type_name == "eu"
    assert not shown.exact
    assert [line.n for line in shown.lines] == [1203, 40, 3, 7]
    assert blast.dialog("rollback", {**plan, "devices": 1}, "eu", 0).button == "Roll back 1 device"
    assert blast.dialog("hold", plan, "eu", 0).needs_reason
    assert not blast.dialog("resume", plan, "eu", 0).danger
    one = {**plan, "members": {"told": 1, "drawn": 1}, "devices": 1}
    assert [
        f"{line.what}: {line.detail}" for line in blast.dialog("rollback", one, "eu", 1).lines
    ] == [
        "was told this release: it returns to what it ran before",
        "of them is offline now: it goes back at its next contact",
        "of them is still installing: it stops, or goes back once it is safe (parked, landed)",
        "more would have been told: it never is",
    ]


def test_an_exact_dialog_says_who_cannot_go_back_and_why() -> None:
    def group(n: int, **reasons: int) -> dict[str, Any]:
        return {"count": n, "reasons": reasons, "devices": []}

    plan = {
        "members": {}, "devices": 12, "release": "app-2", "changes": group(8), "offline": group(1),
        "waiting": group(3, parked=3), "cannot": group(2, one_way=2), "untold": 0,
        "also": {"maps": 1},
    }  # fmt: skip
    shown = blast.dialog("rollback", plan, "eu", away=0)
    assert shown.exact
    assert [(line.n, line.detail) for line in shown.lines[2:]] == [
        (3, "3 parked"), (2, "2 one_way"), (1, "maps"),
    ]  # fmt: skip


def test_a_card_counts_who_was_never_heard() -> None:
    counts = Counts(online=6, heard=8)
    counts.status.update({"active": 10, "retired": 2})
    counts.runs = {"app": {("app-2", "b"): 3, ("app-1", "a"): 5}}  # type: ignore[dict-item]
    card = overview.fleet_card("eu", counts, ONE, {}, {"product": "p", "team": "t"})
    ((component, bar),) = card.components
    assert component == "app"
    assert [(part.word, part.n) for part in bar.segments] == [
        ("app-2", 3), ("app-1", 5), ("not heard yet", 2),
    ]  # fmt: skip
    assert card.others == (("retired", 2),)


def test_a_release_has_one_colour_in_the_bar_and_in_the_chart() -> None:
    days = (("2026-11-23", (9, 0, 0)), ("2026-11-24", (2, 3, 5)))
    share = shares.Share(
        fleet="eu", component="app", releases=("app-1", "app-2", "app-0"), days=days
    )
    places = dict(zip(share.releases, overview.tones(share, ONE), strict=True))
    runs = {("app-1", "a"): 2, ("app-2", "b"): 3, ("app-0", "c"): 5}
    bar = overview.shares(runs, 10, ONE)
    assert [part.key for part in bar.segments] == sorted(places, key=lambda name: places[name])
    assert overview.tones(share, {**ONE, "release": "app-3"}) == (3, 2, 1)  # nobody runs it yet


def test_the_timeline_stands_newest_first_also_within_a_second() -> None:
    at = "2026-11-24T02:14:05Z"
    drawn = {**member(), "name": "cars", "release": "app-2", "score": None, "drawnAt": at,
             "toldAt": at, "updatedAt": at}  # fmt: skip
    claim = {"at": "2026-11-23T02:14:05Z", "action": "device.claim", "actor": "device:car-1",
             "detail": {}}  # fmt: skip
    words = [entry.sign.word for entry in device.timeline(CAR, [drawn], [claim])]
    assert words == ["Told", "Drawn", "By itself"]


def test_the_most_urgent_stands_first() -> None:
    rollouts = [
        {**ONE, "id": "a", "state": "Paused"},
        {**ONE, "id": "b"},
        {**ONE, "id": "c", "state": "RollingBack"},
        {**ONE, "id": "d"},
    ]
    git = {"refused": "history was rewritten", "problems": []}
    asks = overview.asks(rollouts, frozenset({"d"}), git)
    assert [ask.href[-1] for ask in asks] == ["c", "d", "t", "a"]


def test_the_board_counts_with_n_and_definition() -> None:
    def shipped(rollout: str, state: str, took: float | None = 7200.0) -> Shipped:
        return Shipped(
            rollout=rollout, product="p", team="t", state=state, committed_at=0.0,
            finished_at=took, rejected_at=None, fixes=False,
        )  # fmt: skip

    rows = [shipped("1", "Completed"), shipped("2", "Completed"), shipped("3", "RolledBack")]
    plain = [
        (one, {"id": one.rollout, "state": one.state, "release": "r", "fleet": "f"}) for one in rows
    ]
    (card,) = board.scorecards(delivery(rows, 14), plain)
    figures_of = {figure.name: figure for figure in card.figures}
    assert figures_of["Deployment frequency"].value == "1 per week"
    assert figures_of["Lead time"].value == "2 h"
    assert figures_of["Change failure rate"].n == "1 of 3"
    assert all(figure.meaning for figure in card.figures)
    assert card.states.total == 3


def test_an_outcome_that_cannot_be_measured_says_so() -> None:
    outcome = {"verdict": "not measurable", "metric": "m", "sentence": "nobody was held out"}
    item = {"initiative": None, "product": "p", "outcomes": [outcome]}
    (found,) = board.initiatives([item, {**item, "outcomes": []}])
    assert found.name == "No initiative named"
    assert found.rows == ()
    assert found.unmeasured == (("nobody was held out", (item,)),)


def test_figures_read_as_people_write_them() -> None:
    assert figures.number(1840) == "1,840"
    assert figures.number(0.00041) == "0.00041"
    assert figures.number(float("nan")) == figures.number(None) == "—"
    assert figures.percent(0.0123) == "1.23 %"
    assert figures.weight(8.01e10) == "> 1,000,000"
    assert figures.weight(4e-12) == "< 0.001"
    assert figures.weight(None) == "—"
    assert figures.span(5400) == "1.5 h"
    assert figures.size(1.9e12) == "1.9 TB"
    assert figures.moment("2026-11-24T02:14:05Z") == "24 Nov 02:14:05"
    assert figures.moment("nonsense") == "nonsense"


def test_a_sentence_of_the_engine_is_escaped_and_its_names_are_code() -> None:
    assert figures.said("by policy `driving`") == "by policy <code>driving</code>"
    assert figures.said("soaked 22 h of 24 h, 4 % failed") == (
        "soaked 22\u00a0h of 24\u00a0h, 4\u00a0% failed"
    )
    assert figures.said("`<b>`") == "<code>&lt;b&gt;</code>"
    assert figures.said("a ` b <i>") == "a ` b &lt;i&gt;"
    assert len(figures.said("x" * 50_000)) < figures.MOST + 100
    assert "\0" not in figures.said("a\0b")
    assert figures.said("\u202egnals`\u2066x`; 31 are back") == "�gnals<code>�x</code>; 31 are back"
    assert figures.said("שלום") == "שלום"


def test_who_ran_what_follows_each_devices_own_history() -> None:
    day = 86_400
    now = 20_000 * day + 5_000.0

    def car(*steps: tuple[float, str], runs: str, at: float = now) -> DeviceRow:
        return DeviceRow(
            device="car", change=1, last_contact=at, heard_clock=0.0, online=True,
            sleeping_until=None, boot="b", boot_count=1, reported_at=at, state=State.COMMITTED,
            components={"app": ComponentReport(release=runs, digest="d", committed=True)},
            history=tuple(
                HistoryEntry(component="app", release=r, digest="d", at=when, event="activated")
                for when, r in steps
            ),
        )  # fmt: skip

    cars = [
        car((now - 30 * day, "1"), (now - 3 * day, "2"), (now - 2 * day, "1"), runs="1"),
        car((now - 30 * day, "1"), (now - 3 * day, "2"), runs="2"),
        car((now + 900 * day, "2"), runs="2"),  # a clock of the future: today at the latest
        car((-9e9, "1"), runs="1"),  # and one of long ago
        car(runs="3"),  # it never said since when: today
        car((now - 5 * day, "1"), runs="2"),  # its history ends before what it runs
    ]
    counted: Counter[tuple[int, str]] = Counter()
    for one in cars:
        for _, when, release, n in shares.moves(one):
            counted[when, release] += n
    share = shares.over_time("eu", "app", counted, now)
    assert share.days[-1][0] == "2024-10-04"
    assert len(share.days) == shares.DAYS
    named = [dict(zip(share.releases, counts, strict=True)) for _, counts in share.days]
    assert named[0] == {"1": 3, "2": 0, "3": 0}
    assert named[-4] == {"1": 2, "2": 2, "3": 0}
    assert named[-3] == {"1": 3, "2": 1, "3": 0}
    assert named[-1] == {"1": 2, "2": 3, "3": 1}
    assert sum(named[-1].values()) == len(cars)


def test_many_releases_are_added_up_and_nobody_is_lost() -> None:
    counted = {(20_000 - n, f"r{n}"): 10 - n for n in range(9)}
    share = shares.over_time("eu", "app", counted, 20_000 * 86_400.0)
    assert share.releases == ("r0", "r1", "r2", "r3", "r4", shares.OTHERS)
    assert sum(share.days[-1][1]) == sum(counted.values())
