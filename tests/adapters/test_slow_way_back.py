"""A rollback that goes by steps, and one that fails on its way: `rollback: {pace, abortFailed}`."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from controller import commands
from controller.store.tables import decisions
from device_agent.protocol import Kind, State
from telemetry.store.database import reading

from .story import DIGESTS, Story, base, release, rollout

SLOW = {"soak": "1h", "maxSoak": "2h"}
STEPS = [
    {"cohort": "canary", **SLOW},
    {"cohort": "general", "percent": "50%", **SLOW},
    {"cohort": "general", **SLOW},
]


def widened(cars: Story, steps: int = 3, **way: object) -> Story:
    """2 is on the devices of so many steps: 12, 26, 40."""
    more = {"rollback": {key: str(value) for key, value in way.items()}} if way else {}
    cars.commit(*base(), rollout("cars", "app-2", STEPS, **more))
    cars.run(4)
    for _ in range(steps - 1):
        cars.command("promote")
        cars.run(4)
    assert cars.versions().get("2") == (12, 26, 40)[steps - 1]
    return cars


def on_it(cars: Story) -> list[str]:
    """Devices that run 2."""
    return sorted(
        name
        for name, row in cars.world.rows.items()
        if row.components["app"].digest == DIGESTS["2"]
    )


def of_step(cars: Story, step: int) -> list[str]:
    members = cars.loop._memory.members[cars.rollout().id].values()
    return sorted(m.device for m in members if m.step == step and m.arm == "exposed")


def tick(cars: Story, seconds: int, *workers: str) -> None:
    """Time passes; only these devices work, the others stay in touch."""
    for _ in range(seconds):
        cars.world.now += 1
        cars.world.heard += 1
        for name in cars.world.rows:
            if name not in workers:
                cars.world.say(name)
        if workers:
            cars.world.work(*workers)
        cars.loop.tick(cars.world.now)


def fails(cars: Story, name: str, **said: object) -> None:
    """The device tries to go back, and cannot."""
    order = cars.world.orders[name][-1]
    assert order.kind is Kind.ROLLBACK
    values = {"state": State.STUCK, "reason": "activation_failed", **said}
    cars.world.say(
        name, term=order.term, generation=order.generation, attempt=order.attempt, **values
    )


# -- pace: steps ----------------------------------------------------------------------------------


def test_the_way_back_goes_by_steps(story: Story) -> None:
    cars = widened(story, pace="steps")
    steps = [of_step(cars, step) for step in range(3)]
    told = {name: len(cars.world.orders[name]) for name in cars.world.rows}
    cars.command("rollback")
    for step in range(3):
        tick(cars, 5)
        waiting = [name for later in steps[step + 1 :] for name in later]
        assert [n for n in waiting if len(cars.world.orders[n]) > told[n]] == []
        assert cars.rollout().state == "RollingBack"
        tick(cars, 1, *steps[step][:-1])
        tick(cars, 3)
        assert [n for n in waiting if len(cars.world.orders[n]) > told[n]] == []  # one is away
        tick(cars, 2, *steps[step])
        assert sorted(on_it(cars)) == sorted(waiting)
    tick(cars, 2)
    assert cars.rollout().state == "RolledBack"
    assert cars.versions() == {"1": 40}


def test_who_does_not_run_it_yet_never_waits(story: Story) -> None:
    """It was told the release, and must not start it, whatever step it belongs to."""
    cars = widened(story, 2, pace="steps")
    cars.command("promote")
    cars.loop.tick(cars.world.now)  # step 3 is told, and nobody of it works
    late = of_step(cars, 2)
    assert [cars.world.orders[n][-1].components["app"].digest for n in late[:1]] == [DIGESTS["2"]]
    cars.command("rollback")
    tick(cars, 1)
    for name in late:
        assert cars.world.orders[name][-1].components["app"].digest == DIGESTS["1"]


def test_a_step_does_not_wait_for_who_is_out_of_reach(story: Story) -> None:
    cars = widened(story, pace="steps")
    first, last = of_step(cars, 0), of_step(cars, 2)
    away = first[0]
    cars.command("rollback")
    for _ in range(60):
        cars.world.now += 1
        cars.world.heard += 1
        cars.loop.tick(cars.world.now)
        cars.world.work(*(n for n in cars.world.rows if n != away))
    assert cars.rollout().state == "RolledBack"
    assert on_it(cars) == [away]
    assert last[0] not in on_it(cars)
    cars.run(3)
    assert cars.versions() == {"1": 40}


def test_a_restart_keeps_the_pace(story: Story) -> None:
    cars = widened(story, pace="steps")
    second = of_step(cars, 1)
    told = {name: len(cars.world.orders[name]) for name in second}
    cars.command("rollback")
    tick(cars, 2)
    cars.start()
    tick(cars, 3)
    assert {name: len(cars.world.orders[name]) for name in second} == told
    cars.run(10)
    assert cars.versions() == {"1": 40}


# -- abortFailed ----------------------------------------------------------------------------------


def test_two_that_fail_to_come_back_freeze_the_others(story: Story) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    fails(cars, names[0])
    tick(cars, 1, *names[2:10])
    assert len(on_it(cars)) == 32
    fails(cars, names[1])
    tick(cars, 2)
    seen = cars.rollout()
    assert seen.state == "RollingBack"
    assert "FROZEN — 2 devices failed to come back" in seen.sentence
    assert "30 others stay as they are until `resume`" in seen.sentence
    assert {cars.world.orders[n][-1].kind for n in names[10:]} == {Kind.NONE}
    assert {cars.world.orders[n][-1].kind for n in names[:10]} == {Kind.ROLLBACK}
    with reading(cars.engine) as conn:
        verdicts = [row.verdict for row in conn.execute(select(decisions))]
    assert verdicts.count("Frozen") == 1  # and so somebody is paged
    sent = sum(len(orders) for orders in cars.world.orders.values())
    tick(cars, 20)
    assert sum(len(orders) for orders in cars.world.orders.values()) == sent
    cars.start()
    tick(cars, 3)
    assert sum(len(orders) for orders in cars.world.orders.values()) == sent

    cars.command("resume")
    tick(cars, 1)
    assert {cars.world.orders[n][-1].kind for n in names[10:]} == {Kind.ROLLBACK}
    assert cars.world.orders[names[20]][-1].not_after is None
    tick(cars, 3, *names[10:])
    assert on_it(cars) == names[:2]
    assert "FROZEN" not in cars.rollout().sentence


def test_a_third_one_after_resume_freezes_again_only_with_as_many_more(
    story: Story,
) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:2]:
        fails(cars, name)
    tick(cars, 2)
    cars.command("resume")
    tick(cars, 1)
    fails(cars, names[2])
    tick(cars, 2)
    assert "FROZEN" not in cars.rollout().sentence
    fails(cars, names[3])
    tick(cars, 2)
    assert "FROZEN — 4 devices" in cars.rollout().sentence


@pytest.mark.parametrize("reason", ["download_failed", "link_lost", "lower_generation"])
def test_what_says_nothing_about_the_way_back_freezes_nothing(
    story: Story,
    reason: str,
) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:5]:
        fails(cars, name, state=State.FAILED, reason=reason)
    tick(cars, 3, *names[5:])
    assert "FROZEN" not in cars.rollout().sentence
    assert on_it(cars) == names[:5]


def test_devices_that_went_silent_on_their_way_back_count(story: Story) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:2]:
        fails(cars, name, state=State.ACTIVATING, reason=None)
    for _ in range(40):  # longer than silentAfter
        cars.world.now += 1
        cars.world.heard += 1
        for name in names[2:]:
            cars.world.say(name)
        cars.loop.tick(cars.world.now)
    assert "FROZEN — 2 devices failed to come back" in cars.rollout().sentence
    assert {cars.world.orders[n][-1].kind for n in names[2:]} == {Kind.NONE}
    tick(cars, 2, *names[:2])  # they were only slow
    assert "FROZEN" not in cars.rollout().sentence
    assert {cars.world.orders[n][-1].kind for n in names[2:]} == {Kind.ROLLBACK}
    for name in names[:2]:
        cars.world.say(name, generation=0)  # so that they carry out the order after all
    tick(cars, 3, *names)
    assert cars.rollout().state == "RolledBack"
    assert on_it(cars) == []


def test_an_order_back_that_is_issued_again_thaws_nothing(story: Story) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:2]:
        fails(cars, name, state=State.FAILED, reason="activation_failed")
    tick(cars, 2)
    assert "FROZEN" in cars.rollout().sentence
    before = len(cars.world.orders[names[0]])
    cars.world.now += 310
    tick(cars, 3)
    assert len(cars.world.orders[names[0]]) == before + 1
    assert "FROZEN" in cars.rollout().sentence
    assert {cars.world.orders[n][-1].kind for n in names[2:]} == {Kind.NONE}


def test_a_fix_leads_on_who_stays_frozen(story: Story) -> None:
    cars = widened(story)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:2]:
        fails(cars, name)
    tick(cars, 2)
    assert "FROZEN" in cars.rollout().sentence
    fixing = [*base()[:-1], release("3.1", fixes="app-2")]
    loose = {"failed": "80%", "lost": "80%"}
    quick = [{**step, "soak": "1s", "maxSoak": "1h", "margins": loose} for step in STEPS]
    cars.commit(*fixing, rollout("cars", "app-3.1", quick))
    for _ in range(60):
        tick(cars, 1, *names[2:])
    assert cars.rollout().release == "app-3.1"
    assert cars.versions().get("3.1", 0) > 30
    assert cars.world.orders[names[-1]][-1].kind is Kind.INSTALL


def test_zero_watches_nothing(story: Story) -> None:
    cars = widened(story, abortFailed=0)
    names = on_it(cars)
    cars.command("rollback")
    tick(cars, 1)
    for name in names[:9]:
        fails(cars, name)
    tick(cars, 3, *names[9:])
    assert on_it(cars) == names[:9]


def test_only_a_frozen_way_back_is_resumed(story: Story) -> None:
    cars = widened(story)
    cars.command("rollback")
    tick(cars, 1)
    with pytest.raises(commands.Refused, match="not possible while it is RollingBack"):
        cars.command("resume")
