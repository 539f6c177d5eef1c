"""`offline: {action: wait}`: a step does not pass without those that are out of reach."""

from __future__ import annotations

from .story import Story, base, rollout


def without(cars: Story, name: str, seconds: int) -> None:
    """Everybody works but this one, who is not heard."""
    others = [device for device in cars.world.rows if device != name]
    for _ in range(seconds):
        cars.world.now += 1
        cars.world.heard += 1
        cars.loop.tick(cars.world.now)
        cars.world.work(*others)


def test_a_step_waits_for_the_device_that_is_offline(story: Story) -> None:
    strategy = {"offline": {"action": "wait"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 120)
    assert story.versions() == {"1": 29, "2": 11}
    assert story.rollout().state == "Soaking"
    assert "11 updated, 1 offline; all of them are waited for" in story.rollout().sentence
    story.run(60)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def test_a_person_may_pass_it_all_the_same(story: Story) -> None:
    strategy = {"offline": {"action": "wait"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 60)
    story.command("promote")
    without(story, "car-05", 20)
    assert story.versions() == {"1": 1, "2": 39}


def test_a_step_waits_no_longer_than_the_policy_says(story: Story) -> None:
    strategy = {"offline": {"action": "wait", "countAfter": "90s"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 80)
    assert story.rollout().state == "Soaking"
    assert story.versions() == {"1": 29, "2": 11}
    without(story, "car-05", 40)
    assert story.versions() == {"1": 1, "2": 39}


def test_who_is_away_for_too_long_counts_as_failed(story: Story) -> None:
    strategy = {
        "offline": {"action": "fail", "countAfter": "60s"},
        "abortFailed": {"count": "1", "share": "5%"},
    }
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 50)
    assert story.versions() == {"1": 29, "2": 11}  # it is waited for
    assert "1 offline; all of them are waited for" in story.rollout().sentence
    without(story, "car-05", 40)
    assert story.rollout().state in ("RollingBack", "RolledBack")
    assert "1 of 12 devices of canary all failed or fell silent" in story.rollout().sentence
    without(story, "car-05", 20)
    assert story.versions() == {"1": 40}
    story.run(10)  # it is back, and was never told
    assert story.versions() == {"1": 40}


def test_who_comes_back_in_time_or_later_is_no_failure(story: Story) -> None:
    strategy = {"offline": {"action": "fail", "countAfter": "60s"}, "maxFailed": "20%"}
    loose = {"failed": "70%", "lost": "70%"}
    steps = [
        {"cohort": "canary", "soak": "100s", "maxSoak": "1h", "margins": loose},
        {"cohort": "general", "soak": "3s", "maxSoak": "1h", "margins": loose},
    ]
    story.commit(*base(), rollout("cars", "app-2", steps, strategy=strategy))
    without(story, "car-05", 75)
    assert story.rollout().flags["standing"]["given_up"] == 1
    story.run(10)
    seen = story.rollout().flags["standing"]
    assert (seen["given_up"], seen["failed"], seen["updated"]) == (0, 0, 12)
    story.run(60)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def test_our_own_deafness_makes_nobody_late(story: Story) -> None:
    strategy = {"offline": {"action": "fail", "countAfter": "60s"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 5)
    for _ in range(200):  # the hearing clock stands still
        story.world.now += 1
        story.loop.tick(story.world.now)
    assert story.rollout().flags["standing"]["given_up"] == 0
    story.run(60)
    assert story.versions() == {"2": 40}
