"""What a fleet has proven for one device."""

from __future__ import annotations

from controller.manifests.kinds import Release
from controller.rollout.desired import Catalog
from controller.rollout.model import Device, Proven, Rollout, RolloutState
from controller.rollout.proven import Proofs

VERSIONS = ("10.1", "10.2", "10.3")
DIGESTS = {v: "sha256:" + f"{n:064x}" for n, v in enumerate(VERSIONS)}


def release(version: str, **compatible: list[str]) -> Release:
    artifact = {"component": "app", "digest": DIGESTS[version], "size": "1"}
    return Release.model_validate(
        {
            "name": f"fsd-{version}",
            "version": version,
            "artifacts": [{**artifact, "compatible": compatible}],
        }
    )


def proven(version: str, at: float) -> Proven:
    return Proven(release=f"fsd-{version}", digest=DIGESTS[version], at=at)


def completed(version: str, at: float, state: RolloutState = RolloutState.COMPLETED) -> Rollout:
    return Rollout(
        id=version, name="cars", fleet="eu", release=f"fsd-{version}", digest="d",
        artifacts={"app": DIGESTS[version]}, commit="c", author="", state=state, sentence="",
        revision=1, step=0, opened_at=at, step_at=at, finished_at=at, seed="s", pinned={},
    )  # fmt: skip


def proofs(*rollouts: Rollout, **compatible: list[str]) -> Proofs:
    """10.1 is the baseline, 10.2 completed, then 10.3 (for some devices only, if they say so)."""
    known = [release("10.1"), release("10.2"), release("10.3", **compatible)]
    last = proven("10.3", 30.0)
    return Proofs(
        {("eu", "app", ""): proven("10.1", 0.0), ("eu", "app", "hw3"): last,
         ("eu", "app", "hw2"): last, ("us", "app", ""): last},
        rollouts or (completed("10.2", 20.0), completed("10.3", 30.0)),
        Catalog(releases={one.name: one for one in known}),
        {},
    )  # fmt: skip


def car(hardware: str = "hw3", fleet: str = "eu", **labels: str) -> Device:
    labels = {"hardware": hardware, **labels}
    return Device(id="car-1", fleet=fleet, labels=labels, status="active")


def test_the_newest_that_completed_for_its_hardware() -> None:
    assert proofs().newest(car())["app"].release == "fsd-10.3"
    assert proofs().newest(car("hw9"))["app"].release == "fsd-10.1"
    assert proofs().newest(car(fleet="asia")) == {}


def test_never_what_does_not_fit_the_device() -> None:
    """A rollout completes for a fleet; a device that it left out is not told it afterwards."""
    some = proofs(hardware=["hw3"])
    assert some.newest(car("hw3"))["app"].release == "fsd-10.3"
    assert some.newest(car("hw2"))["app"].release == "fsd-10.2"
    by_label = proofs(region=["eu"])
    assert by_label.newest(car(region="eu"))["app"].release == "fsd-10.3"
    assert by_label.newest(car(region="us"))["app"].release == "fsd-10.2"


def test_what_a_hold_rejects_gives_way_to_what_completed_before() -> None:
    all_of_it = frozenset(DIGESTS.values())
    found = proofs()
    assert found.newest(car(), rejected=frozenset({DIGESTS["10.3"]}))["app"].release == "fsd-10.2"
    both = frozenset({DIGESTS["10.3"], DIGESTS["10.2"]})
    assert found.newest(car(), rejected=both)["app"].release == "fsd-10.1"
    assert found.newest(car(), rejected=all_of_it) == {}


def test_only_a_completed_rollout_has_proven_anything() -> None:
    some = proofs(completed("10.2", 20.0, RolloutState.SUPERSEDED))
    assert some.newest(car(), rejected=frozenset({DIGESTS["10.3"]}))["app"].release == "fsd-10.1"


def test_a_holdout_keeps_a_release_from_its_devices() -> None:
    assert proofs().newest(car(), without=frozenset({"fsd-10.3"}))["app"].release == "fsd-10.2"


def test_a_baseline_stays_a_way_back_after_something_completed_in_its_place() -> None:
    """A fleet whose devices have no hardware label has one entry, which every completion takes."""
    found = Proofs(
        {("eu", "app", ""): proven("10.2", 20.0)},
        [completed("10.2", 20.0)],
        Catalog(releases={one.name: one for one in (release("10.1"), release("10.2"))}),
        {"eu": {"app": "fsd-10.1"}, "us": {"app": "fsd-10.2"}},
    )
    assert found.newest(car())["app"].release == "fsd-10.2"
    rejected = frozenset({DIGESTS["10.2"]})
    assert found.newest(car(), rejected=rejected)["app"].release == "fsd-10.1"
