"""Where a device goes when what it runs is rejected: its own previous, within `rollback.to`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.manifests.kinds import Release
from controller.rollout.desired import Catalog, Place, compose
from controller.rollout.model import (
    ActiveHold,
    Arm,
    Device,
    Member,
    MemberState,
    Order,
    Proven,
    Rollout,
    RolloutState,
    Told,
)
from device_agent.protocol import ComponentReport, Kind

NOW = 1_000.0
DIGESTS = {v: "sha256:" + f"{n:064x}" for n, v in enumerate(("10.0", "10.1", "10.2", "10.3"))}


def release(version: str, **rollback: object) -> Release:
    return Release.model_validate(
        {
            "name": f"fsd-{version}",
            "version": version,
            "artifacts": [{"component": "app", "digest": DIGESTS[version], "size": "1"}],
            **({"rollback": rollback} if rollback else {}),
        }
    )


def catalog(**rollback: object) -> Catalog:
    found = [release("10.0"), release("10.1"), release("10.2"), release("10.3", **rollback)]
    return Catalog(releases={r.name: r for r in found})


def told(version: str, at: float = 500.0) -> Told:
    return Told(release=f"fsd-{version}", digest=DIGESTS[version], at=at, rollout="r")


def place(
    previous: str | None = "10.2", proven: str | None = "10.1", to: str = "previous"
) -> Place:
    """A device that runs 10.3, which is rejected."""
    own = {"app": {"release": f"fsd-{previous}", "digest": DIGESTS[previous]}} if previous else None
    member = Member(
        device="car-1", step=0, arm=Arm.EXPOSED, drawn_at=0.0, hardware="", band=0, score=None,
        previous=own, state=MemberState.UPDATED,
    )  # fmt: skip
    hold = ActiveHold(
        id="h", rollout="cars", fleet="eu", release="fsd-10.3", digest="sha256:" + "f" * 64,
        artifacts=frozenset({DIGESTS["10.3"]}), to=to, reason="", actor="eve", created_at=900.0,
    )  # fmt: skip
    return Place(
        device=Device(id="car-1", fleet="eu", labels={}, status="active"),
        running={
            "app": ComponentReport(release="fsd-10.3", digest=DIGESTS["10.3"], committed=True)
        },
        last=Order(
            device="car-1", term=1, generation=1, attempt="a", kind="install",
            components={"app": told("10.3")}, at=500.0,
        ),
        memberships=(),
        past={"cars": member},
        holds=(hold,),
        stops=(),
        proven={"app": Proven(release=f"fsd-{proven}", digest=DIGESTS[proven], at=1.0)}
        if proven
        else {},
    )  # fmt: skip


def goes_to(place: Place, **rollback: object) -> str | None:
    target = compose(place, catalog(**rollback), NOW)
    if target is None:
        return None
    assert target.kind is Kind.ROLLBACK
    return target.components["app"].release


def test_its_own_previous_comes_first_then_what_is_proven() -> None:
    assert goes_to(place()) == "fsd-10.2"
    assert goes_to(place(previous=None)) == "fsd-10.1"


def test_a_named_release_comes_before_its_own_previous() -> None:
    assert goes_to(place(to="fsd-10.0")) == "fsd-10.0"


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [([">=10.2"], "fsd-10.2"), (["<10.2"], "fsd-10.1"), (["==10.0", ">=10.1"], "fsd-10.2")],
)
def test_a_release_limits_where_its_devices_may_go_back_to(
    allowed: list[str], expected: str
) -> None:
    assert goes_to(place(), to=allowed) == expected


def test_a_named_release_outside_of_the_limit_is_passed_over() -> None:
    assert goes_to(place(to="fsd-10.0"), to=[">=10.1"]) == "fsd-10.2"


def test_with_no_way_back_that_is_allowed_the_device_waits_for_the_fix() -> None:
    assert goes_to(place(), to=[">=11"]) is None
    assert goes_to(place(previous=None, proven=None)) is None


def test_a_lost_memory_keeps_what_runs_whatever_the_baseline_says() -> None:
    lost = replace(place(), last=None, holds=(), past={}, foreign=True)
    target = compose(lost, catalog(), NOW)
    assert target is not None
    assert target.components["app"].release == "fsd-10.3"
    assert target.kind is Kind.INSTALL


def failed_at_the_next(version: str = "10.0") -> Place:
    """10.3 was rejected, and before the device was back it failed at a later release."""
    at = place()
    later = Rollout(
        id="later", name="cars", fleet="eu", release=f"fsd-{version}", digest="sha256:" + "e" * 64,
        artifacts={"app": DIGESTS[version]}, commit="c", author="", state=RolloutState.SOAKING,
        sentence="", revision=1, step=0, opened_at=950.0, step_at=950.0, seed="s", pinned={},
    )  # fmt: skip
    member = replace(
        at.past["cars"], state=MemberState.FAILED, told_at=950.0, attempt="later.0", previous=None
    )
    return replace(
        at,
        memberships=((later, member),),
        last=Order(
            device="car-1", term=1, generation=3, attempt="later.0", kind="install",
            components={"app": replace(told(version, 950.0), rollout="later")}, at=950.0,
        ),
    )  # fmt: skip


def test_who_failed_at_the_next_release_and_runs_a_rejected_one_goes_back() -> None:
    assert goes_to(failed_at_the_next()) == "fsd-10.2"


def test_once_back_it_is_not_told_again_what_it_failed_at() -> None:
    at = failed_at_the_next()
    report = ComponentReport(release="fsd-10.2", digest=DIGESTS["10.2"], committed=True)
    back = Order(
        device="car-1", term=1, generation=4, attempt="h.back", kind="rollback",
        components={"app": replace(told("10.2", 990.0), rollout=None)}, at=990.0,
    )  # fmt: skip
    target = compose(replace(at, running={"app": report}, last=back), catalog(), NOW)
    assert target is not None
    assert target.components["app"].release == "fsd-10.2"


def test_who_failed_and_runs_nothing_rejected_keeps_the_order_that_it_failed_at() -> None:
    at = failed_at_the_next()
    report = ComponentReport(release="fsd-10.2", digest=DIGESTS["10.2"], committed=True)
    target = compose(replace(at, running={"app": report}), catalog(), NOW)
    assert target is not None
    assert target.components["app"].release == "fsd-10.0"
    assert target.attempt == "later.0"


def test_who_failed_at_a_superseded_order_and_runs_a_rejected_release_goes_back() -> None:
    """No rollout speaks any more for what it was told last, and that is over for it."""
    at = replace(failed_at_the_next(), memberships=())
    kept = compose(at, catalog(), NOW)
    assert kept is not None
    assert kept.components["app"].release == "fsd-10.0"  # it may be on its way there
    assert goes_to(replace(at, failed=True)) == "fsd-10.2"


def test_nor_does_another_rollout_of_the_same_artifact_keep_it_there() -> None:
    at = failed_at_the_next()
    ((later, member),) = at.memberships
    told_anew = replace(member, state=MemberState.TOLD, attempt="later.revert")
    assert goes_to(replace(at, memberships=((later, told_anew),), failed=True)) == "fsd-10.2"


def test_only_a_membership_that_leads_to_nothing_rejected_leads_back() -> None:
    member = place().past["cars"]
    assert member.leads_back({DIGESTS["10.3"]})
    assert not member.leads_back({DIGESTS["10.2"]})
    assert not replace(member, previous=None).leads_back(set())
