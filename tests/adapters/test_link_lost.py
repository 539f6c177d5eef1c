"""A device that went back for want of a link: whose link was it? In doubt it is told once more."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from controller.store.tables import holds
from device_agent.protocol import Kind, State
from telemetry.store.database import reading

from .story import DIGESTS, MARGINS, Story, base, rollout

CANARIES = [f"car-{i:02}" for i in range(12)]
STEPS: list[dict[str, object]] = [
    {"cohort": "canary", "soak": "3s", "maxSoak": "200s", "margins": MARGINS},
    {"cohort": "general", "soak": "3s", "maxSoak": "200s", "margins": MARGINS},
]


def says(story: Story, name: str, state: State, **more: object) -> None:
    order = story.world.orders[name][-1]
    numbers = {"term": order.term, "generation": order.generation, "attempt": order.attempt}
    story.world.say(name, state=state, **numbers, **more)


def on_trial(story: Story, *names: str) -> None:
    for name in names:
        says(story, name, State.TRIAL, reason=None)


def lose_their_link(story: Story, *names: str) -> None:
    for name in names:
        says(story, name, State.ROLLED_BACK, reason="link_lost")


def outage(story: Story, seconds: int = 12) -> None:
    """Time goes by, and nothing is heard."""
    story.world.deaf_since = story.world.now
    for _ in range(seconds):
        story.world.now += 1
        story.loop.tick(story.world.now)
    story.world.deaf_since = None


def canary(story: Story, steps: Sequence[dict[str, object]] = STEPS, **strategy: object) -> None:
    """The canaries try app-2 when an outage of ours begins; the road is back, and so are they."""
    story.commit(*base(), rollout("cars", "app-2", [*steps], strategy=strategy))
    story.run(2, work=False)
    on_trial(story, *CANARIES)
    story.run(2, work=False)
    outage(story)
    lose_their_link(story, *CANARIES)


def generations(story: Story) -> list[int]:
    return [story.world.orders[name][-1].generation for name in CANARIES]


def state_of(story: Story, name: str) -> str:
    return str(story.loop._memory.members[story.rollout().id][name].state)


def test_after_an_outage_of_ours_it_is_told_once_more_and_the_rollout_goes_on(
    story: Story,
) -> None:
    canary(story)
    before = generations(story)
    story.run(3, work=False)
    assert [one - 1 for one in generations(story)] == before
    assert {story.world.orders[name][-1].kind for name in CANARIES} == {Kind.INSTALL}
    assert story.rollout().state in ("Progressing", "Soaking")
    story.run(40)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def test_a_release_that_silences_is_caught_at_the_second_try(story: Story) -> None:
    canary(story, abortFailed={"count": "2", "share": "10%"})
    story.run(3, work=False)
    on_trial(story, *CANARIES)
    story.run(2, work=False)
    lose_their_link(story, *CANARIES)  # and now we could hear all the while
    story.run(3, work=False)
    assert story.rollout().state in ("RollingBack", "RolledBack")
    with reading(story.engine) as conn:
        assert conn.execute(select(holds.c.digest)).scalar() == story.rollout().digest


def test_with_our_link_up_it_failed_and_an_outage_after_that_excuses_nobody(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2", STEPS))
    story.run(2, work=False)
    on_trial(story, *CANARIES)
    story.run(2, work=False)
    lose_their_link(story, "car-03")
    story.run(2, work=False)
    assert state_of(story, "car-03") == "failed"
    before = generations(story)
    outage(story)
    story.world.say("car-03")
    story.run(2, work=False)
    assert state_of(story, "car-03") == "failed"
    assert generations(story) == before


def test_nobody_is_told_once_more_in_a_pause_or_against_the_pace(story: Story) -> None:
    limited = [{**STEPS[0], "maxConcurrent": "4"}, STEPS[1]]
    story.commit(*base(), rollout("cars", "app-2", limited))
    told: list[str] = []
    story.run(2, work=False)
    while len(told) < 12:
        fresh = [n for n in CANARIES if story.world.orders[n] and n not in told]
        assert len(fresh) == 4
        told += fresh
        if len(told) < 12:
            story.world.work(*fresh)
            story.run(2, work=False)
    on_trial(story, *fresh)
    story.run(2, work=False)
    outage(story)
    story.command("pause")
    lose_their_link(story, *fresh)
    before = generations(story)
    story.run(5, work=False)
    assert generations(story) == before
    story.command("resume")
    story.run(2, work=False)
    assert sum(generations(story)) == sum(before) + 4


def test_a_new_controller_asks_no_third_time(story: Story) -> None:
    canary(story)
    story.run(3, work=False)
    again = generations(story)
    for _ in range(3):
        story.start()
        story.run(3, work=False)
    assert generations(story) == again
    story.world.work(*CANARIES)
    story.run(2, work=False)
    assert {state_of(story, name) for name in CANARIES} == {"updated"}
    assert {story.world.rows[n].components["app"].digest for n in CANARIES} == {DIGESTS["2"]}


def test_who_is_told_once_more_is_held_back_by_a_rollback_like_all_others(story: Story) -> None:
    canary(story)
    story.run(3, work=False)
    story.command("rollback")
    story.run(3, work=False)
    for name in CANARIES:
        assert story.world.orders[name][-1].components["app"].digest == DIGESTS["1"]
    story.run(20)
    assert story.versions() == {"1": 40}


def test_who_was_away_when_the_rollout_ended_is_told_once_more_at_its_return(story: Story) -> None:
    loose = {"failed": "50%", "lost": "50%"}
    canary(story, [{**step, "margins": loose} for step in STEPS])
    story.run(1, work=False)  # all are told once more
    others = [name for name in story.world.rows if name != "car-05"]
    story.world.work(*[name for name in CANARIES if name != "car-05"])
    on_trial(story, "car-05")
    outage(story)
    story.command("pause")
    lose_their_link(story, "car-05")
    for _ in range(60):  # it drives off before anybody may be told
        story.world.now, story.world.heard = story.world.now + 1, story.world.heard + 1
        story.loop.tick(story.world.now)
        story.world.work(*others)
    story.command("resume")
    for _ in range(60):
        story.world.now, story.world.heard = story.world.now + 1, story.world.heard + 1
        story.loop.tick(story.world.now)
        story.world.work(*others)
    assert story.rollout().state == "Completed"
    assert story.versions() == {"1": 1, "2": 39}
    story.run(3)
    assert story.versions() == {"2": 40}
    told = len(story.world.orders["car-05"])
    lose_their_link(story, "car-05")  # whatever it says now: the release is proven, and told it
    story.run(3, work=False)
    assert len(story.world.orders["car-05"]) == told
