"""What happens in one history, from its seed: the fleet, its releases, people, and every fault.

`Script` sets the stage and puts deeds on the heap; it decides by chance alone and looks at nothing
that the service says. The order of the `_DEEDS` is part of what a seed means.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from bench.world import texts
from bench.world.device import Device, Nature
from bench.world.world import World
from controller import ulid

DAY = 86_400.0
BUSY = 31.0  # seconds in which things happen
VERSIONS = tuple(str(n) for n in range(1, 12))


class Script:
    def __init__(self, world: World) -> None:
        self.world = world
        self.chance: Random = world.chance("script")
        self.version = 1  # the newest one that was committed
        self.wanted = "1"
        self.restorable = False
        self._steps: list[dict[str, Any]] = []
        self._strategy: dict[str, Any] = {}
        self._requires: tuple[str, ...] = ()

    def stage(self) -> None:
        """The fleet, its repository, and when what happens."""
        chance, world = self.chance, self.world
        self._natures()
        self._fleet()
        self._shape()
        self._weather()
        world.commit(
            {
                "fleet.yaml": texts.fleet(),
                "policy.yaml": texts.policy(tripwire=chance.random() < 0.3),
                "1.yaml": texts.release("1"),
            }
        )
        world.start()
        world.heap.after(5.0, self.new_release)
        for _ in range(chance.choice((1, 2, 2, 3, 3, 4, 5))):
            deed = chance.choices(_DEEDS, _WEIGHTS)[0]
            world.heap.after(6.0 + chance.random() * (BUSY - 8.0), self._bound(deed))

    def _bound(self, deed: Deed) -> Callable[[], None]:
        return lambda: deed(self)

    # -- the stage --------------------------------------------------------------------------------

    def _natures(self) -> None:
        for version in VERSIONS[1:]:
            kind = self.chance.random()
            nature = Nature()
            if kind < 0.15:
                nature = Nature(boots=self.chance.choice((0.0, 0.0, 0.5)))
            elif kind < 0.22:
                nature = Nature(silent=self.chance.choice((0.3, 1.0)))
            elif kind < 0.3:
                nature = Nature(events=0.7)
            self.world.natures[texts.artifact(version)] = nature

    def _fleet(self) -> None:
        chance = self.chance
        size = chance.choice((5, 5, 5, 6, 6, 7, 8, 9, 12)) if chance.random() < 0.97 else 25
        canaries = chance.choice((3, 3, 4))
        for n in range(size):
            labels = {"hardware": chance.choice(("a", "a", "b"))}
            if n < canaries:
                labels["ring"] = "canary"
            device = self.world.enrol(f"car-{n:02}", **labels)
            if chance.random() < 0.1:
                device.flaky = 0.5
            if chance.random() < 0.1:
                device.skew = chance.choice((-3_000.0, -5.0, 7.0, 3_000.0, -20 * 365 * DAY))
        if chance.random() < 0.15:
            self._one().liar = chance.choice(("garbage", "replay", "future", "harm", "failed"))

    def _shape(self) -> None:
        chance = self.chance
        step = {
            "soak": chance.choice(("2s", "3s", "5s")),
            "maxSoak": "20s",
            "margins": {"failed": "80%", "lost": "80%"},
        }
        self._steps = [{"cohort": "canary", **step}, {"cohort": "general", **step}]
        if chance.random() < 0.3:
            self._steps.insert(1, {"cohort": "general", "percent": "50%", **step})
        if chance.random() < 0.2:
            self._steps[0]["maxConcurrent"] = chance.choice((1, 2))
        if chance.random() < 0.15:
            self._steps[-1]["maxPerMinute"] = 6
        self._strategy = {
            "silentAfter": "14s",
            "maxFailed": "1%",
            "onFailure": chance.choice(("rollback", "rollback", "rollback", "hold")),
            "onInconclusive": chance.choice(("pause", "pause", "extend", "rollback")),
        }
        if chance.random() < 0.25:
            self._requires = ("parked",)

    def _weather(self) -> None:
        weather, chance = self.world.wire.weather, self.chance
        if chance.random() < 0.4:
            return
        weather.cut = chance.choice((0.0, 0.02, 0.08))
        weather.double = chance.choice((0.0, 0.05, 0.3))
        weather.slow = chance.choice((0.05, 0.5, 3.0))
        weather.lose_puback = chance.choice((0.0, 0.0, 0.2))

    # -- people -----------------------------------------------------------------------------------

    def new_release(self) -> None:
        if self.version >= len(VERSIONS):
            return
        self.version += 1
        self._publish(str(self.version))

    def fix_forward(self) -> None:
        if self.version >= len(VERSIONS):
            return
        broken, self.version = self.wanted, self.version + 1
        self._publish(str(self.version), fixes=f"app-{broken}")

    def revert(self) -> None:
        earlier = str(max(1, int(self.wanted) - 1))
        self.wanted = earlier
        self.world.commit({"cars.yaml": self._rollout()})

    def widen(self) -> None:
        """Somebody edits the steps of a rollout that is under way."""
        self._steps = [{**self._steps[0], "percent": "100%"}, self._steps[-1]]
        self.world.commit({"cars.yaml": self._rollout()})

    def suspend(self) -> None:
        self.world.commit({"cars.yaml": self._rollout(suspend=True)})
        self._later(8.0, lambda: self.world.commit({"cars.yaml": self._rollout()}))

    def hold_file(self) -> None:
        name = ulid.new(self.world.now, self.chance.randbytes(10))
        text = texts.hold(
            name, self.wanted, texts.digest_of(self.wanted, self._requires),
            to=self.chance.choice(("previous", "stay")), at="2027-01-15T08:00:00Z",
        )  # fmt: skip
        self.world.commit({f"holds/{name}.yaml": text})

    def break_manifest(self) -> None:
        self.world.commit({"cars.yaml": "kind: [unfinished\n"})
        self._later(7.0, lambda: self.world.commit({"cars.yaml": self._rollout()}))

    def roll_back(self) -> None:
        self.world.ask("rollback")

    def break_in(self) -> None:
        """A person acts while the controller is in the middle of its turn."""
        kind = self.chance.choice(("rollback", "rollback", "hold", "pause"))
        if self.chance.random() < 0.6:  # the turn that follows a commit tells many devices
            self.new_release()
        self.world.interrupt(lambda: self.world.ask(kind))

    def hold(self) -> None:
        self.world.ask("hold")

    def part(self) -> None:
        """Only some devices are rolled back, or held."""
        names = [device.name for device in self._some()] or [self._one().name]
        self.world.ask(self.chance.choice(("rollback", "hold")), scope={"devices": names})

    def lose_hold_file(self) -> None:
        """Somebody tidies the repository up."""
        files = [path for path in sorted(self.world.repository.tree()) if "holds/" in path]
        if files:
            self.world.commit({self.chance.choice(files): None})

    def rewrite(self) -> None:
        """Somebody forces another history, and takes that back a little later."""
        before = self.world.repository.head
        self.world.force(self.world.repository.parent(), {"cars.yaml": self._rollout()})
        self._later(9.0, lambda: self.world.force(before))

    def lift(self) -> None:
        self.world.ask("rollback")
        self._later(9.0, lambda: self.world.ask("lift"))

    def pause(self) -> None:
        self.world.ask("pause")
        self._later(8.0, lambda: self.world.ask("resume"))

    def promote(self) -> None:
        self.world.ask("promote")

    def stop(self) -> None:
        self.world.ask("stop", None, scope="all")
        self._later(10.0, lambda: self.world.ask("stop", None, scope="all", lift=True))

    # -- devices ----------------------------------------------------------------------------------

    def nap(self) -> None:
        for device in self._some():
            device.sleep(5.0 + self.chance.random() * 25.0)

    def weeks(self) -> None:
        """One sleeps while the world goes on, and returns weeks later."""
        device = self._one()
        device.sleep(21 * DAY)

    def die(self) -> None:
        self._one().die()

    def tunnel(self) -> None:
        for device in self._some():
            device.lose_network(4.0 + self.chance.random() * 25.0)

    def power_cut(self) -> None:
        for device in self._some():
            device.crash()

    def ask_by_http(self) -> None:
        """Who has no session for long asks the API for its order."""
        for device in self._some():
            self.world.hand_out(device)

    def clock_jump(self) -> None:
        self._one().skew += self.chance.choice((-7_200.0, -30.0, 30.0, 7_200.0))

    def drive(self) -> None:
        for device in self._some():
            device.park(False)
            self._later(10.0, partial(device.park, True))

    def retire(self) -> None:
        device = self._one()
        status = self.chance.choice(("retired", "quarantined"))
        self.world.register(device.name, status=status)
        self.world.trace(f"{device.name} is {status}")

    # -- the service ------------------------------------------------------------------------------

    def broker_away(self) -> None:
        self.world.broker_away(self._while(), forgot=self.chance.random() < 0.5)

    def ingest_away(self) -> None:
        self.world.ingest_away(self._while())

    def controller_away(self) -> None:
        self.world.controller_away(self._while())

    def git_away(self) -> None:
        self.world.git_away(self._while())

    def another_controller(self) -> None:
        self.world.second_controller()

    def restore(self) -> None:
        """A backup is made, and a little later it takes the database's place."""
        self.world.databases.backup()
        self.restorable = True
        self._later(8.0, lambda: self.world.lose_control_database(backup=True))

    def wipe(self) -> None:
        self.world.lose_control_database(backup=False)

    # -- small things -----------------------------------------------------------------------------

    def _publish(self, version: str, *, fixes: str | None = None) -> None:
        self.wanted = version
        release = texts.release(version, fixes=fixes, requires=self._requires)
        self.world.commit({f"{version}.yaml": release, "cars.yaml": self._rollout()})

    def _rollout(self, **more: Any) -> str:
        return texts.rollout(self.wanted, self._steps, self._strategy, **more)

    def _one(self) -> Device:
        return self.world.devices[self.chance.choice(sorted(self.world.devices))]

    def _some(self) -> list[Device]:
        names = sorted(self.world.devices)
        share = self.chance.choice((0.2, 0.5, 1.0))
        return [self.world.devices[n] for n in names if self.chance.random() < share]

    def _while(self) -> float:
        return self.chance.choice((3.0, 8.0, 15.0, 30.0))

    def _later(self, seconds: float, deed: Callable[[], Any]) -> None:
        self.world.heap.after(seconds, deed)


Deed = Callable[[Script], None]

_CAST: tuple[tuple[Deed, float], ...] = (
    (Script.new_release, 3.0),
    (Script.fix_forward, 2.0),
    (Script.revert, 2.0),
    (Script.widen, 1.0),
    (Script.suspend, 0.5),
    (Script.hold_file, 1.5),
    (Script.break_manifest, 1.0),
    (Script.roll_back, 4.0),
    (Script.break_in, 3.0),
    (Script.hold, 1.5),
    (Script.lift, 1.5),
    (Script.pause, 1.0),
    (Script.promote, 1.5),
    (Script.stop, 1.5),
    (Script.nap, 2.0),
    (Script.weeks, 2.0),
    (Script.die, 1.0),
    (Script.tunnel, 2.0),
    (Script.power_cut, 2.0),
    (Script.clock_jump, 1.0),
    (Script.drive, 1.0),
    (Script.retire, 1.0),
    (Script.broker_away, 2.5),
    (Script.ingest_away, 1.5),
    (Script.controller_away, 1.5),
    (Script.git_away, 1.0),
    (Script.another_controller, 1.0),
    (Script.restore, 1.5),
    (Script.wipe, 0.7),
    (Script.part, 1.0),
    (Script.lose_hold_file, 0.7),
    (Script.rewrite, 0.7),
    (Script.ask_by_http, 1.0),
)
_DEEDS = tuple(deed for deed, _ in _CAST)
_WEIGHTS = tuple(weight for _, weight in _CAST)
