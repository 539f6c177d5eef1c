"""When the service could not hear, nobody was silent: its own outages, and a road that is cut."""

from __future__ import annotations

import pytest

from controller.rollout.ears import COMES_BACK, Ears

START = 1_000.0


class Look:
    """Ears that are asked once a second, of a service whose parts may be away."""

    def __init__(self, *, crowd: bool = True) -> None:
        self.ears = Ears(0.0, START)
        self.now, self.raw, self.at, self.word = START, 0.0, START, 0.0
        self.crowd, self.asked = crowd, 0

    def pass_(self, seconds: int, *, probe: bool = True, devices: bool = True) -> None:
        for _ in range(seconds):
            self.now += 1
            if probe:
                self.raw, self.at = self.raw + 1, self.now
            if probe and devices:
                self.word = self.raw
            self.ears.hear((self.raw, self.at), self.word, self.now, quiet=4.0, crowd=self._ask)

    def _ask(self) -> bool:
        self.asked += 1
        return self.crowd


def test_the_clock_runs_while_devices_are_heard() -> None:
    look = Look()
    look.pass_(60)
    assert (look.ears.clock, look.ears.heard_at, look.ears.deaf) == (60.0, look.now, [])


@pytest.mark.parametrize(("away", "back"), [(600, COMES_BACK), (10, 25.0)])
def test_after_an_outage_of_ours_devices_have_time_to_come_back(away: int, back: float) -> None:
    look = Look()
    look.pass_(60)
    look.pass_(away, probe=False)
    assert look.ears.clock == 60.0
    assert look.ears.heard_at == START + 60
    assert look.ears.deaf == [(START + 60, look.now)]
    look.pass_(int(back) - 1)
    assert look.ears.clock == 60.0
    assert look.ears.heard_at == look.now
    look.pass_(3)
    assert look.ears.clock == look.raw


def test_a_late_probe_is_no_outage() -> None:
    look = Look()
    look.pass_(60)
    look.pass_(4, probe=False)
    look.pass_(1)
    assert (look.ears.clock, look.ears.deaf) == (61.0, [])


def test_a_fleet_that_falls_quiet_together_is_not_silent() -> None:
    look = Look()
    look.pass_(60)
    look.pass_(300, devices=False)
    assert look.ears.clock <= 65.0
    assert look.ears.heard_at == START + 60  # deaf: nothing soaks
    assert look.ears.deaf == [(START + 60, look.now)]
    look.pass_(60)
    assert look.ears.clock <= 65.0
    look.pass_(60)
    assert look.ears.clock == look.raw
    assert look.asked == 1  # whom a step has touched is looked up once, not at each look


def test_devices_that_were_all_updated_at_once_may_be_bricked() -> None:
    """Nobody else was there to tell by: their silence counts."""
    look = Look(crowd=False)
    look.pass_(60)
    look.pass_(30, devices=False)
    assert (look.ears.clock, look.ears.deaf) == (90.0, [])


def test_at_our_own_start_the_silence_before_it_counts_for_nobody() -> None:
    look = Look()
    look.ears = Ears(500.0, START)
    look.raw, look.word = 500.0, 100.0
    look.pass_(5, devices=False)
    assert look.ears.clock == 104.0
