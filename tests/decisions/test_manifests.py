"""Manifest text: strict, located, and never a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.manifests.admission import admit, can_overlap
from controller.manifests.kinds import Release, Rollout, Selector
from controller.manifests.reader import Problem, Reading, read

DIGEST = "sha256:" + "a" * 64

FLEET = """\
apiVersion: bellwether.dev/v1
kind: Fleet
metadata: {name: cars}
spec:
  selector: {matchLabels: {model: m3}}
  healthPolicy: driving
  cohorts:
  - {name: canary, select: {score: {min: 100}}, limit: 10}
  - {name: general, rest: true}
"""
POLICY = """\
apiVersion: bellwether.dev/v1
kind: HealthPolicy
metadata: {name: driving}
spec:
  gates:
  - {metric: update_ok, type: proportion}
"""
RELEASE = f"""\
apiVersion: bellwether.dev/v1
kind: Release
metadata: {{name: app-10.10}}
spec:
  version: 10.10
  artifacts: [{{component: app, digest: "{DIGEST}", size: 10}}]
"""
ROLLOUT = """\
apiVersion: bellwether.dev/v1
kind: Rollout
metadata: {name: cars-app}
spec:
  fleet: cars
  release: app-10.10
  strategy:
    steps:
    - {cohort: canary, soak: 24h}
    - {cohort: general, percent: 10%}
    - {cohort: general, percent: 100%}
"""
GOOD = {
    "fleet.yaml": FLEET,
    "policy.yaml": POLICY,
    "release.yaml": RELEASE,
    "rollout.yaml": ROLLOUT,
}


def errors(**changed: str) -> list[str]:
    files = {**GOOD, **{f"{name}.yaml": text for name, text in changed.items()}}
    reading = read(files)
    return [str(p) for p in _all(reading) if p.severity == "error"]


def _all(reading: Reading) -> list[Problem]:
    return [*reading.problems, *admit(reading)]


def test_a_good_fleet_has_no_problem() -> None:
    assert errors() == []


def test_a_version_stays_as_it_is_written() -> None:
    assert read(GOOD).manifests.releases["app-10.10"].version == "10.10"


def test_an_unknown_field_names_the_nearest_one_at_its_place() -> None:
    (error,) = errors(rollout=ROLLOUT.replace("soak:", "soack:"))
    assert error == (
        "rollout.yaml:9:24: spec.strategy.steps[0].soack: unknown field; did you mean 'soak'?"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("release: app-10.10", "release: app-10.1", "there is no Release 'app-10.1'"),
        ("fleet: cars", "fleet: carz", "did you mean 'cars'"),
        ("cohort: canary", "cohort: canari", "fleet cars has no cohort canari"),
        ("percent: 10%", "percent: ten", "'ten' is no number"),
        ("percent: 10%", "percent: 110%", "out of range"),
        ("percent: 10%", "percent: 100%", "percent is cumulative"),
        ("soak: 24h", "soak: 24", "write 30s, 15m, 24h or 14d"),
        ("soak: 24h", "soak: nan", "is no duration"),
        ("soak: 24h", "soak: -1h", "is no duration"),
        ("soak: 24h", "soak: 99999999999999d", "out of range"),
        ("name: cars-app", "name: Cars App", "does not fit"),
        ("name: cars-app", "name: ''", "does not fit"),
        ("bellwether.dev/v1", "bellwether.dev/v2", "write apiVersion: bellwether.dev/v1"),
        ("kind: Rollout", "kind: Rolout", "did you mean 'Rollout'"),
        ("steps:", "steps: &a", "cohort"),
        ("- {cohort: general, percent: 100%}", "", "the steps end below 100 % of general"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, expected: str) -> None:
    found = errors(rollout=ROLLOUT.replace(old, new))
    if new == "steps: &a":  # an anchor alone means nothing; an alias is refused
        assert found == []
        return
    assert any(expected in error for error in found), found
    assert all(error.startswith("rollout.yaml:") for error in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !!python/object:os.system x\n", "tags"),
        ("a: !foo x\n", "tags"),
        ("a: 1\na: 2\n", "written twice"),
        ("<<: {a: 1}\n", "merge keys"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
        ("- " * 500 + "a\n", "nested too deep"),
        ("a: \x00\n", "not YAML"),
        ('a: "x\\0y"\n', "control character '\\x00'"),
        ('a: "\\e]0;x\\a"\n', "control character '\\x1b'"),
        ('"\\x7f": 1\n', "control character '\\x7f'"),
        ("a: [1\n", "not YAML"),
        ("x" * (1 << 20) + "y", "larger than 1 MiB"),
        ("just text\n", "a document is a map"),
        ("kind: Fleet\n", "apiVersion"),
    ],
)
def test_hostile_text_is_refused_with_its_place(text: str, expected: str) -> None:
    found = [str(p) for p in read({"bad.yaml": text}).problems]
    assert any(expected in error for error in found), found
    assert all(error.startswith("bad.yaml:") for error in found)


def test_a_bomb_costs_nothing() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert any("aliases" in str(p) for p in read({"bomb.yaml": bomb}).problems)


def test_what_is_not_utf8_is_said() -> None:
    (problem,) = read({"bad.yaml": b"a: \xff\n"}).problems
    assert "not UTF-8" in problem.message


def test_an_error_in_one_fleet_never_blocks_another() -> None:
    other = {
        "trucks.yaml": FLEET.replace("cars", "trucks").replace("m3", "t1").replace("rest", "rset"),
        "trucks-app.yaml": ROLLOUT.replace("cars", "trucks"),
    }
    reading = read({**GOOD, **other})
    problems = [p for p in _all(reading) if p.severity == "error"]
    blocked = frozenset().union(*(p.blocks for p in problems))
    assert problems
    assert blocked == {"trucks-app"}


def test_a_broken_rollout_blocks_itself() -> None:
    reading = read({**GOOD, "rollout.yaml": ROLLOUT.replace("soak", "soack")})
    assert frozenset().union(*(p.blocks for p in reading.problems)) == {"cars-app"}


def test_two_documents_of_one_name_are_an_error() -> None:
    assert any("stands in" in error for error in errors(second=RELEASE))


def test_the_last_cohort_takes_the_rest() -> None:
    found = errors(fleet=FLEET.replace(", rest: true", ", select: {}"))
    assert any("the last cohort must be `rest: true`" in error for error in found)


def test_overlapping_fleets_are_named_both() -> None:
    found = errors(other=FLEET.replace("name: cars", "name: vans"))
    assert any("fleets cars and vans overlap" in error for error in found)


def test_two_rollouts_for_one_component_are_an_error() -> None:
    found = errors(other=ROLLOUT.replace("name: cars-app", "name: cars-app-2"))
    assert any("rolls out app in fleet cars already" in error for error in found)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ({"matchLabels": {"a": "1"}}, {"matchLabels": {"a": "2"}}, False),
        ({"matchLabels": {"a": "1"}}, {"matchLabels": {"b": "2"}}, True),
        ({}, {"matchLabels": {"b": "2"}}, True),
        (
            {"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]},
            {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1", "2"]}]},
            False,
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]},
            {"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["2"]}]},
            True,
        ),
        (
            {"matchExpressions": [{"key": "a", "operator": "Exists"}]},
            {"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]},
            False,
        ),
    ],
)
def test_overlap_is_decided_key_by_key(one: Any, other: Any, overlap: bool) -> None:
    assert can_overlap(Selector.model_validate(one), Selector.model_validate(other)) is overlap


def test_models_survive_their_json() -> None:
    manifests = read(GOOD).manifests
    for table in (manifests.fleets, manifests.releases, manifests.rollouts, manifests.policies):
        for model in table.values():
            again = type(model).model_validate(
                json.loads(json.dumps(model.model_dump(mode="json")))
            )
            assert again == model


def test_a_digest_is_what_a_release_is_not_what_it_is_called() -> None:
    first = read(GOOD).manifests.releases["app-10.10"]
    renamed = first.model_copy(update={"name": "other", "notes": "https://x", "labels": {"a": "b"}})
    other = Release.model_validate({**first.model_dump(mode="json"), "installer": "module:apt"})
    assert Release.model_validate(renamed.model_dump(mode="json")).digest == first.digest
    assert other.digest != first.digest


def test_fields_of_later_issues_are_noticed_not_ignored() -> None:
    reading = read({**GOOD, "release.yaml": RELEASE + "  installer: rauc\n"})
    notices = [p for p in _all(reading) if p.severity == "notice"]
    assert [(p.field, p.message) for p in notices] == [
        ("spec.installer", "accepted and checked, not in force yet")
    ]


def test_proceed_is_written_as_a_map() -> None:
    rule = {"proceed": {"minHealthy": "3", "afterSoak": "1h", "maxDevices": "9"}}
    made = Rollout.model_validate(
        {
            "name": "r", "fleet": "f", "release": "a",
            "strategy": {"steps": [{"cohort": "c"}], "onInconclusive": rule},
        }
    ).strategy.on_inconclusive  # fmt: skip
    assert made.allows(healthy=3, soaked=3600, devices=9)
    assert not made.allows(healthy=3, soaked=3600, devices=10)


_YAML = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["kind", "metadata", "spec", "name", "strategy", "steps", "cohorts", "select", "x"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=25,
)


@given(_YAML)
@settings(max_examples=150, deadline=None)
def test_reading_never_raises(value: Any) -> None:
    reading = read({"a.yaml": json.dumps(value, ensure_ascii=True)})
    admit(reading)


@given(st.sampled_from(["Fleet", "Release", "Rollout", "HealthPolicy", "Hold", "Lift"]), _YAML)
@settings(max_examples=200, deadline=None)
def test_any_spec_is_answered_by_problems(kind: str, spec: Any) -> None:
    document = {
        "apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": "n"}, "spec": spec,
    }  # fmt: skip
    admit(read({"a.yaml": json.dumps(document, ensure_ascii=True)}))


@pytest.mark.parametrize(("cohort", "told"), [("canary", False), ("canaries", True)])
def test_a_hold_that_covers_nobody_says_so(cohort: str, told: bool) -> None:
    hold = (
        "apiVersion: bellwether.dev/v1\nkind: Hold\nmetadata: {name: 01hold}\nspec:\n"
        f'  rollout: cars-app\n  rejects: {{release: app-10.10, digest: "{DIGEST}"}}\n'
        f"  scope: {{cohort: {cohort}}}\n  reason: it hurts\n  actor: eve\n"
    )
    found = _all(read({**GOOD, "hold.yaml": hold}))
    notices = [p for p in found if "has no cohort" in p.message]
    assert len(notices) == told
    assert all(p.severity == "notice" and "canary, general" in p.message for p in notices)
    assert not [p for p in found if p.severity == "error"], found
