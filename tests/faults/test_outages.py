"""Parts are away in the middle of a rollout: nobody counts as silent, nothing widens or goes back.

Afterwards everything goes on by itself. Outages last several times `silentAfter`: what ten minutes
are to a policy of minutes. Random moments; the seed is printed with a failure and plays again by
BELLWETHER_FAULT_SEED.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import eventually
from .estate import CARS, PATIENCE, SILENT_AFTER, Estate, lost
from .proxy import Proxy, moments, seed

pytestmark = [
    pytest.mark.story,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("story"),
]

OUTAGE = 2.5 * SILENT_AFTER
LONG = 24 * SILENT_AFTER


@pytest.fixture(scope="module")
def estate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    made = Estate(tmp_path_factory.mktemp("estate"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def dice() -> random.Random:
    return random.Random(seed())


@pytest.fixture(params=[OUTAGE, pytest.param(LONG, marks=pytest.mark.long)])
def outage(request: pytest.FixtureRequest) -> float:
    return float(request.param)


def test_the_broker_away(estate: Estate, dice: random.Random, outage: float) -> None:
    """It hangs, then it is killed, and everything that it kept is gone."""
    version = estate.roll_out()
    time.sleep(dice.uniform(0.0, 1.5))
    with estate.frozen("serve.mosquitto"):
        estate.nothing_moves(version, outage, settle=3.0)
    estate.forget_the_broker()
    estate.completes(version)


def test_ingest_away(estate: Estate, dice: random.Random, outage: float) -> None:
    version = estate.roll_out()
    time.sleep(dice.uniform(0.0, 1.5))
    with estate.frozen("serve.ingest"):
        estate.nothing_moves(version, outage, settle=3.0)
    estate.completes(version)


def test_all_cars_then_controller_and_api_stand_still_and_wake(
    estate: Estate, dice: random.Random, outage: float
) -> None:
    """The road to the cars is cut: it is not the release. Who leads the rollout stands still."""
    version = estate.roll_out()
    time.sleep(dice.uniform(0.0, 1.5))
    with estate.frozen("simulate.0"):
        time.sleep(outage)
        assert not estate.harmed(estate.rollout(f"fsd-{version}")["id"])
    for names in (("serve.controller",), ("serve.controller", "serve.api")):
        time.sleep(dice.uniform(0.0, 1.0))
        with estate.frozen(*names):
            time.sleep(dice.uniform(0.5, SILENT_AFTER))
    estate.completes(version)


@pytest.mark.long
def test_cars_behind_a_broken_network(estate: Estate, outage: float) -> None:
    """Cut, stalled, crawling, half open: they update once, and all that they say counts."""
    number = seed()
    proxy = Proxy("127.0.0.1", estate.broker_port())
    try:
        far = estate.enrol("far", 4)
        before = {name: estate.ran(name) for name in far}
        estate.reroute("far", proxy.port)
        eventually(lambda: proxy.passed > 2_000, PATIENCE, "they are in touch")
        version = estate.publish()
        estate.push(version)
        for fault, lasts, well in moments(number, int(outage / SILENT_AFTER) * 4):
            proxy.become(fault)
            time.sleep(lasts)
            proxy.become("pass")
            time.sleep(well)
        estate.completes(version)
        eventually(
            lambda: all(estate.ran(name)[-1] == version for name in far), PATIENCE, "they have it"
        )
    finally:
        estate.end("far")
        proxy.close()
    for name in far:
        assert estate.ran(name) == [*before[name], version]
    assert lost(estate.root / "state", estate.root / "far") == {}


def test_who_slept_through_rollback_and_fix_never_starts_the_fault(estate: Estate) -> None:
    """Told the faulty release, and away before it could begin: frozen, or its power was cut."""
    # Ten of the estate's cars have a perfect score, as these have: whichever ten are drawn first,
    # enough of them are awake to prove the fix, and one of these is as good as surely among them.
    sleepers = [*estate.enrol("doze", 3), *estate.enrol("nap", 2)]
    before = {name: estate.ran(name) for name in sleepers}
    bad = estate.publish(boots=False)
    with estate.frozen("doze", "doze.0", "nap", "nap.0"):
        os.kill(estate.pid("nap.0"), signal.SIGKILL)
        estate.push(bad, silent_after=60.0)  # whoever is away for so long may be told yet
        told = estate.told(bad, sleepers)
        estate.goes_back(bad)
        fix = estate.publish(fixes=bad)
        estate.push(fix)
        estate.completes(fix)
    eventually(
        lambda: all(estate.ran(name)[-1] == fix for name in sleepers), PATIENCE, "they have the fix"
    )
    assert told
    for name in sleepers:
        assert estate.ran(name) == [*before[name], fix]


def test_doctor_finds_nothing(estate: Estate) -> None:
    """After all of that."""
    assert sum(estate.story._counts().values()) >= CARS
    state = str(Path(estate.root) / "state")
    doctor = subprocess.run(
        [sys.executable, "-m", "controller.cli", "doctor", "--state-dir", state],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
