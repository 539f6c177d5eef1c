"""What the loop remembers is what counting from the beginning says."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from controller import commands
from controller.loop import Loop
from controller.rollout import reconcile
from controller.rollout.muster import Muster
from controller.rollout.world import Notice
from controller.store.tables import decisions
from device_agent.protocol import State
from telemetry.store.database import reading

from .story import DIGESTS, Story, fleet, policy, release, rollout


class Doubting(Loop):
    """Before each answer it counts everything from the beginning, and compares."""

    asked = 0
    answers = 0

    def _ask(self, now: float):
        world = self._world()
        awake = self._rollcall.awake(world, now)
        for name, muster in self._rollcall.musters.items():
            fresh = Muster(world, world.rollouts[name], now)
            for what in ("groups", "moving", "unsaid"):
                assert getattr(muster, what) == getattr(fresh, what), (name, what)
            assert list(muster.ready) == list(fresh.ready)
        anew = reconcile.decide(replace(world, musters={}, ended={}), now)
        known = reconcile.decide(world, now, awake)
        said = [action for action in anew if not isinstance(action, Notice)]
        assert [action for action in known if not isinstance(action, Notice)] == said
        if awake.opening:
            assert known == anew
        Doubting.asked += len(world.rollouts)
        Doubting.answers += len(awake.rollouts)
        return super()._ask(now)


class Trouble:
    """A seeded history: devices, people, Git and time do whatever they may do."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.story = Story(directory)
        self.restart()
        self.names = [f"car-{i:02}" for i in range(24)]
        for i, name in enumerate(self.names):
            zone = {"timezone": self.dice.choice(["Asia/Tokyo", "America/New_York", "UTC"])}
            ring = {"ring": "canary"} if i < 8 else {}
            self.story.enrol(name, model="m3", hardware=f"hw{i % 2}", **zone, **ring)
            self.story.world.join(
                name, {"app": ("app-1", DIGESTS["1"]), "battery": ("battery-b1", DIGESTS["b1"])}
            )
        self.story.world.broken.add(DIGESTS["3"])

    def restart(self) -> None:
        self.story.start()
        self.story.loop = Doubting(self.story.loop._ports, self.story.loop._issuer)

    def commit(self) -> None:
        dice = self.dice
        pace = {}
        if dice.random() < 0.4:
            pace["maxConcurrent"] = dice.choice(["1", "3"])
        if dice.random() < 0.4:
            pace["maxPerMinute"] = dice.choice(["2", "5"])
        limits = {"margins": {"failed": "60%", "lost": "60%"}, "soak": "3s", "maxSoak": "15s"}
        steps = [
            {"cohort": "canary", "percent": "50%", **limits, **pace},
            {"cohort": "canary", **limits},
            {"cohort": "general", **limits, **pace},
        ]
        if dice.random() < 0.2:
            steps[1]["pause"] = {}
        more = {}
        if dice.random() < 0.3:
            more["windows"] = [
                {
                    "kind": dice.choice(["Allow", "Deny"]),
                    "schedule": "*/3 * * * *",
                    "duration": dice.choice(["1m", "90s", "2m"]),
                    "timezone": "device",
                }
            ]
        if dice.random() < 0.15:
            more["suspend"] = "true"
        deadline: dict = {"progressDeadline": dice.choice(["40s", "1h"])}
        if dice.random() < 0.4:
            action = dice.choice(["wait", "fail"])
            deadline["offline"] = {"action": action, "countAfter": dice.choice(["20s", "60s"])}
        needs = {}
        if dice.random() < 0.3:
            needs = {"requires": [{"component": "battery", "version": ">=2"}]}
        to = dice.choice(["2", "3", "3.1"])
        self.story.commit(
            fleet(), policy(), release("1"), release(to, **needs),
            release("b1", component="battery"), release("b2", component="battery"),
            rollout("cars", f"app-{to}", steps=steps, strategy=deadline, **more),
            rollout("power", dice.choice(["battery-b1", "battery-b2"]), steps=steps),
        )  # fmt: skip

    def device(self) -> None:
        dice, world, name = self.dice, self.story.world, self.dice.choice(self.names)
        match dice.randrange(7):
            case 0:
                world.say(name, state=State.FAILED, reason="link_lost")
            case 1:
                world.say(name, sleeping_until=world.now + dice.choice([5, 50, 500]))
            case 2:
                world.say(name, state=State.DEFERRED, blocked_by=("driving",))
            case 3:
                status = dice.choice(["retired", "quarantined", "active"])
                self.story.enrol(name, model="m3", status=status)
            case 4:
                fleet_ = dice.choice(["cars", "elsewhere"])
                self.story.enrol(name, model="m3", ring="canary", fleet=fleet_)
            case 5:
                world.say(name, generation=world.rows[name].generation + 5)
            case 6:
                if orders := world.orders[name]:
                    order = orders[-1]
                    world.say(name, state=State.ACTIVATING, attempt=order.attempt)

    def person(self) -> None:
        kind = self.dice.choice(["rollback", "hold", "lift", "pause", "resume", "promote", "stop"])
        body = {"scope": "all", "value": ""} if kind == "stop" else {}
        if kind == "stop" and self.dice.random() < 0.6:
            body["lift"] = True
        name = None if kind == "stop" else self.dice.choice(["cars", "power"])
        with contextlib.suppress(commands.Refused):
            self.story.command(kind, name, body=body)

    def happen(self) -> None:
        story, world, dice = self.story, self.story.world, self.dice
        lot = dice.random()
        if lot < 0.04:
            self.commit()
        elif lot < 0.12:
            self.person()
        elif lot < 0.32:
            self.device()
        elif lot < 0.34:
            self.restart()
        elif lot < 0.35:
            world.now -= dice.choice([1, 30])
        elif lot < 0.37:
            world.now += dice.choice([8, 20])  # our ears were shut: the hearing clock stood still
        elif lot < 0.40:
            world.broker_up = not world.broker_up
        elif lot < 0.43 and world.head is not None:
            world.head = replace(world.head, stale=not world.head.stale)
        elif lot < 0.8:
            world.work(*dice.sample(self.names, dice.randrange(1, len(self.names))))
        step = dice.choice([0.3, 1.0, 1.0, 5.0, 31.0])
        world.now, world.heard = world.now + step, world.heard + step
        story.loop.tick(world.now)


@pytest.mark.parametrize("seed", range(8))
def test_counting_from_the_beginning_gives_the_same_answer(tmp_path: Path, seed: int) -> None:
    Doubting.asked = Doubting.answers = 0
    trouble = Trouble(tmp_path, seed)
    trouble.commit()
    for _ in range(160):
        trouble.happen()
    assert Doubting.asked > 2 * Doubting.answers > 0  # not all were asked every time
    with reading(trouble.story.engine) as conn:
        assert len(conn.execute(select(decisions)).all()) > 10
