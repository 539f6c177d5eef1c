"""The update's state machine: what waits, what is cancelled, what goes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from device_agent.protocol import ComponentOrder, ComponentReport, Desired, Kind, Reason, State
from device_agent.record import Record, Update
from device_agent.update import Step, World, learn, obey, restart
from device_agent.work import (
    Activate,
    Cancel,
    Done,
    Echoed,
    Failed,
    Fetch,
    Install,
    Passed,
    RunSelfTests,
    SelfTestsDone,
    SwitchBack,
)

OLD, NEW = "sha256:" + "0" * 64, "sha256:" + "1" * 64
NOW = 1_800_000_000.0
WORLD = World(now=NOW)
RUNNING = Record(
    running={"app": ComponentReport(release="old", digest=OLD, committed=True)}, generation=1
)


def order(digest: str = NEW, **changes: Any) -> Desired:
    told = ComponentOrder(release="r", digest=digest, size=1, urls=("http://x/a",))
    base = Desired(
        device="car-1",
        term=1,
        generation=2,
        attempt="try",
        kind=Kind.INSTALL,
        components={"app": told},
        issued_at="2027-01-15T08:00:00Z",
        not_after="2027-01-15T09:00:00Z",
    )
    return replace(base, **changes)


def none(generation: int = 3) -> Desired:
    return order(kind=Kind.NONE, components={}, generation=generation, attempt="none")


def state(record: Record) -> Update:
    assert record.update is not None
    return record.update


def done(record: Record, work: State, world: World = WORLD) -> Step:
    return learn(record, Done(attempt="try", work=work), world)


def to_trial(**changes: Any) -> Record:
    record, _ = obey(RUNNING, order(**changes), "h", WORLD)
    for work in (State.DOWNLOADING, State.INSTALLING, State.ACTIVATING):
        record, _ = done(record, work)
    assert state(record).state is State.TRIAL
    return record


def test_an_unknown_precondition_defers_the_install_but_not_the_download() -> None:
    record, effects = obey(RUNNING, order(preconditions=("parked",)), "h", WORLD)
    assert isinstance(effects[0], Fetch)
    record, effects = done(record, State.DOWNLOADING)
    assert (state(record).state, state(record).blocked_by) == (State.DEFERRED, ("parked",))
    assert effects == ()
    record, effects = learn(record, Passed(seconds=1), replace(WORLD, facts={"parked": True}))
    assert isinstance(effects[0], Install)


def test_a_precondition_that_flaps_is_no_loop() -> None:
    record, _ = obey(RUNNING, order(preconditions=("a", "b")), "h", WORLD)
    record, _ = done(record, State.DOWNLOADING)
    for n in range(200):
        world = replace(WORLD, facts={"a": n % 2 == 0})
        record, _ = learn(record, Passed(seconds=1), world)
    record, effects = learn(record, Passed(seconds=1), replace(WORLD, facts={"a": True, "b": True}))
    assert isinstance(effects[0], Install)
    assert state(done(record, State.INSTALLING)[0]).state is not State.FAILED


def test_none_cancels_what_has_not_been_activated() -> None:
    record, _ = obey(RUNNING, order(), "h", WORLD)
    record, effects = obey(record, none(), "n", WORLD)
    assert state(record).state is State.CANCELLED
    assert effects == (Cancel(attempt="try"),)


def test_none_lets_a_trial_go_on() -> None:
    record, effects = obey(to_trial(), none(), "n", WORLD)
    assert (state(record).state, effects, record.generation) == (State.TRIAL, (), 3)


def test_the_latest_order_wins_over_a_download() -> None:
    record, _ = obey(RUNNING, order(), "h", WORLD)
    record, effects = obey(record, order(generation=3, attempt="next"), "i", WORLD)
    assert [type(effect) for effect in effects] == [Cancel, Fetch]
    assert state(record).order.attempt == "next"


def test_an_answer_of_another_attempt_changes_nothing() -> None:
    record, _ = obey(RUNNING, order(), "h", WORLD)
    assert learn(record, Done(attempt="before", work=State.DOWNLOADING), WORLD) == (record, ())


def test_a_commit_needs_tests_echo_and_soak() -> None:
    record = to_trial()
    for fact in (SelfTestsDone(attempt="try", ok=True), Echoed(attempt="try")):
        record, _ = learn(record, fact, WORLD)
        assert state(record).state is State.TRIAL
    record, _ = learn(record, Passed(seconds=5), WORLD)
    assert state(record).state is State.COMMITTED
    assert record.running["app"].committed


def test_a_rollback_ends_a_trial_at_once_and_marks_the_digest() -> None:
    back = order(OLD, kind=Kind.ROLLBACK, generation=3, attempt="back", not_after=None)
    record, effects = obey(to_trial(), back, "b", WORLD)
    assert isinstance(effects[0], Fetch)
    assert record.known_bad == {NEW: 3}


def test_a_forward_order_in_a_trial_waits_for_its_end() -> None:
    other = order("sha256:" + "2" * 64, generation=3, attempt="next")
    record, effects = obey(to_trial(), other, "b", WORLD)
    assert (state(record).state, effects) == (State.TRIAL, ())
    record, effects = learn(record, SelfTestsDone(attempt="try", ok=False), WORLD)
    record, effects = done(record, State.ROLLING_BACK)
    assert state(record).order.attempt == "next"


def test_too_many_starts_in_a_trial_go_back() -> None:
    record = to_trial()
    for _ in range(3):
        record, effects = restart(record, WORLD)
    assert (state(record).state, state(record).reason) == (State.ROLLING_BACK, Reason.BOOT_FAILED)
    assert effects == (SwitchBack(attempt="try", to={"app": OLD}),)


def test_an_agent_killed_on_a_machine_that_goes_on_does_it_again_uncounted() -> None:
    record, _ = restart(RUNNING, WORLD, "boot-1")
    record, _ = obey(record, order(), "h", WORLD)
    for work, counts in (
        (State.DOWNLOADING, None),
        (State.INSTALLING, "installs"),
        (State.ACTIVATING, "activations"),
        (State.TRIAL, "boots"),
    ):
        assert state(record).state is work
        for _ in range(8):
            record, effects = restart(record, WORLD, "boot-1")
            assert state(record).state is work
            assert len(effects) == 1  # it is done again
        assert counts is None or getattr(state(record), counts) == 1
        if work is not State.TRIAL:
            record, _ = done(record, work)
    assert state(record).state is State.TRIAL


def test_a_machine_that_boots_and_one_that_cannot_tell_are_counted() -> None:
    for machines in (("a", "b", "c"), ("", "", "")):
        record = to_trial()
        for machine in machines:
            record, _ = restart(record, WORLD, machine)
        assert state(record).reason == Reason.BOOT_FAILED


def test_an_agent_that_dies_for_ever_in_a_trial_goes_back() -> None:
    record = replace(to_trial(), machine="boot-1")
    while state(record).state is State.TRIAL:
        assert state(record).transitions <= WORLD.limits.transitions + 1
        record, _ = restart(record, WORLD, "boot-1")
    assert state(record).state is State.ROLLING_BACK
    assert state(record).reason == Reason.TOO_MANY_TRANSITIONS
    record, _ = done(restart(record, WORLD, "boot-1")[0], State.ROLLING_BACK)
    assert state(record).state is State.ROLLED_BACK
    assert record.running == RUNNING.running


def test_what_an_earlier_term_ended_does_not_bind_an_order_of_the_next() -> None:
    record, _ = learn(to_trial(), SelfTestsDone(attempt="try", ok=False), WORLD)
    record, _ = done(record, State.ROLLING_BACK)
    assert record.known_bad == {NEW: 2}
    newer = order(term=2, generation=1, attempt="again")
    record, _ = obey(record, newer, "i", WORLD)
    assert (state(record).state, record.known_bad) == (State.DOWNLOADING, {})

    # It came while the other was still under way.
    record, _ = obey(switching(), newer, "i", PARKED)
    failed = Failed(attempt="try", work=State.ACTIVATING, reason=Reason.ACTIVATION_FAILED)
    record, _ = learn(record, failed, PARKED)
    record, _ = done(record, State.ROLLING_BACK, PARKED)
    assert (state(record).order.attempt, state(record).state) == ("again", State.DOWNLOADING)


def test_going_back_that_fails_three_times_is_stuck() -> None:
    record, _ = learn(to_trial(), SelfTestsDone(attempt="try", ok=False), WORLD)
    failed = Failed(attempt="try", work=State.ROLLING_BACK, reason=Reason.ACTIVATION_FAILED)
    for _ in range(3):
        record, effects = learn(record, failed, WORLD)
    assert (state(record).state, effects) == (State.STUCK, ())
    assert state(record).reason == Reason.SELF_TEST_FAILED


PARKED, DRIVING = (World(now=NOW, facts={"parked": fact}) for fact in (True, False))


def switching(**changes: Any) -> Record:
    """The power is cut while the slots are switched."""
    record, _ = obey(RUNNING, order(preconditions=("parked",), **changes), "h", PARKED)
    record, _ = done(record, State.DOWNLOADING, PARKED)
    record, effects = done(record, State.INSTALLING, PARKED)
    assert isinstance(effects[0], Activate)
    return record


def test_a_switch_that_was_not_done_waits_again_for_a_car_that_drives_now() -> None:
    record, effects = restart(switching(), DRIVING, active={"app": OLD})
    assert (state(record).state, effects) == (State.DEFERRED, ())
    assert state(record).blocked_by == ("parked",)
    record, effects = obey(record, order(OLD, generation=3, attempt="next"), "i", DRIVING)
    assert state(record).order.attempt == "next"  # nothing was switched: nothing is in its way


def test_a_switch_that_was_done_goes_on_to_its_trial_wherever_the_car_is() -> None:
    record, effects = restart(switching(), DRIVING, active={"app": NEW})
    assert state(record).state is State.TRIAL
    assert isinstance(effects[0], RunSelfTests)
    assert record.running["app"].digest == NEW


def test_half_a_switch_is_finished_first_and_not_while_the_car_drives() -> None:
    two = {
        name: ComponentOrder(release="r", digest=NEW, size=1, urls=("http://x/a",))
        for name in ("app", "maps")
    }
    half = switching(components=two)
    for active in ({"app": NEW}, None):
        record, effects = restart(half, DRIVING, active=active)
        assert (state(record).state, effects) == (State.ACTIVATING, ())
        assert state(record).blocked_by == ("parked",)
        record, effects = obey(record, order(OLD, generation=3, attempt="next"), "i", DRIVING)
        assert (state(record).order.attempt, effects) == ("try", ())
        record, effects = learn(record, Passed(seconds=1), PARKED)
        assert isinstance(effects[0], Activate)
        assert not state(record).blocked_by


def test_the_way_back_waits_for_safety_and_not_for_wishes() -> None:
    facts = {"parked": True, "battery>=30": True}
    world = replace(WORLD, facts=facts)
    record, _ = obey(RUNNING, order(preconditions=tuple(facts)), "h", world)
    for work in (State.DOWNLOADING, State.INSTALLING, State.ACTIVATING):
        record, _ = done(record, work, world)
    record, effects = learn(record, SelfTestsDone(attempt="try", ok=False), WORLD)
    assert (state(record).blocked_by, effects) == (("parked",), ())
    _, effects = learn(record, Passed(seconds=1), replace(WORLD, facts={"parked": True}))
    assert isinstance(effects[0], SwitchBack)
