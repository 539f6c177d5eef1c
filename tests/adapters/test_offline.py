"""`offline: {action: wait}`: a step does not pass without those that are out of reach."""

from __future__ import annotations

from .test_loop import Story, base, rollout, story  # noqa: F401 - a fixture


def without(cars: Story, name: str, seconds: int) -> None:
    """Everybody works but this one, who is not heard."""
    others = [device for device in cars.world.rows if device != name]
    for _ in range(seconds):
        cars.world.now += 1
        cars.world.heard += 1
        cars.loop.tick(cars.world.now)
        cars.world.work(*others)


def test_a_step_waits_for_the_device_that_is_offline(story: Story) -> None:  # noqa: F811
    strategy = {"offline": {"action": "wait"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 120)
    assert story.versions() == {"1": 29, "2": 11}
    assert story.rollout().state == "Soaking"
    assert "11 updated, 1 offline; all of them are waited for" in story.rollout().sentence
    story.run(60)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def test_a_person_may_pass_it_all_the_same(story: Story) -> None:  # noqa: F811
    strategy = {"offline": {"action": "wait"}}
    story.commit(*base(), rollout("cars", "app-2", strategy=strategy))
    without(story, "car-05", 60)
    story.command("promote")
    without(story, "car-05", 20)
    assert story.versions() == {"1": 1, "2": 39}
