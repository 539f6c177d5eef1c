"""When the service could not hear, nobody was silent: its own outages, and a road that is cut."""

from __future__ import annotations

import json

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


def restarted(look: Look, *, away: int = 0, devices: bool = True) -> None:
    """The controller is killed, and another one looks after `away` seconds."""
    noted = json.loads(json.dumps(look.ears.note(look.now)))
    for _ in range(away):
        look.now, look.raw = look.now + 1, look.raw + 1
        look.at, look.word = look.now, look.raw if devices else look.word
    look.ears = Ears.resumed(noted, (look.raw, look.at), look.now)


def test_our_own_absence_is_an_outage_like_another() -> None:
    """The devices fell quiet while we were away, and some of them are back before us."""
    look = Look()
    look.pass_(60)
    restarted(look, away=20, devices=False)
    look.word = look.raw
    look.pass_(40)
    assert look.ears.clock == 60.0  # who was heard at 60 has its time to come back
    look.pass_(6)
    assert look.ears.clock == look.raw


def test_a_road_that_was_cut_before_our_start_is_still_cut() -> None:
    look = Look()
    look.pass_(60)
    look.pass_(30, devices=False)
    restarted(look, away=3, devices=False)
    look.pass_(30, devices=False)
    assert look.ears.clock <= 65.0
    assert look.ears.deaf[0][0] == START + 60
    restarted(look)
    look.pass_(10)
    assert look.ears.clock <= 65.0


def test_who_was_silent_before_our_start_is_silent_after_it() -> None:
    look = Look()
    look.pass_(600)
    restarted(look, away=2)
    look.pass_(1)
    assert look.ears.clock == 600.0
    look.pass_(9)
    assert look.ears.clock == look.raw


def test_another_telemetry_begins_anew() -> None:
    look = Look()
    look.pass_(600)
    look.raw = look.word = 3.0
    restarted(look)
    look.pass_(1)
    assert look.ears.clock == 4.0
