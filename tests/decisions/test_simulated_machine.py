"""What a simulated car does follows from what is installed, and from the seed alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from device_agent.simulator.machine import (
    Behaviour,
    BehaviourError,
    Driver,
    Vehicle,
    load,
    parse,
    poisson,
    share,
    together,
)

DIGESTS = {"autopilot": "sha256:" + "a" * 64}
OTHER = {"autopilot": "sha256:" + "b" * 64}


def slot(tmp_path: Path, name: str, content: object) -> Path:
    path = tmp_path / name
    path.mkdir()
    (path / "behaviour.json").write_text(json.dumps(content))
    return path


def vehicle(tmp_path: Path, content: object, *, device: str = "car-1", pace: float = 10) -> Vehicle:
    car = Vehicle(device, seed="7", pace=pace)
    car.switched({"autopilot": slot(tmp_path, f"{device}-slot", content)}, DIGESTS)
    return car


def test_what_is_in_the_active_slot_decides(tmp_path: Path) -> None:
    calm = slot(tmp_path, "a", {"events": {"intervention": {"per_device_hour": 0}}})
    wild = slot(tmp_path, "b", {"events": {"intervention": {"per_device_hour": 50}}})
    car = Vehicle("car-1", seed="7", pace=10)
    car.switched({"autopilot": calm}, DIGESTS)
    assert car.drive(DIGESTS, 0.0, 1.0).counters == {"intervention": 0}
    car.switched({"autopilot": wild}, OTHER)
    assert car.drive(OTHER, 1.0, 1.0).counters["intervention"] > 100


def test_exposure_is_driving_not_wall_time(tmp_path: Path) -> None:
    car = vehicle(tmp_path, {"exposure": {"device_hour": 1, "km": 60}}, pace=8)
    sampled = car.drive(DIGESTS, 100.0, 2.0)
    assert sampled.exposure == {"device_hour": 16.0, "km": 960.0}
    assert (sampled.t0, sampled.dt) == (100.0, 2.0)


def test_a_fault_begins_after_hours_of_driving_and_a_switch_ends_them(tmp_path: Path) -> None:
    content = {
        "events": {"intervention": {"per_device_hour": 10}},
        "fault": {"after_hours": 15, "events": {"intervention": {"ratio": 20}}},
    }
    car = vehicle(tmp_path, content, pace=10)
    before = car.drive(DIGESTS, 0.0, 1.0).counters["intervention"]
    after = car.drive(DIGESTS, 1.0, 1.0).counters["intervention"]
    assert after > 5 * before
    again = tmp_path / "car-1-slot"
    car.switched({"autopilot": again}, OTHER)
    assert car.drive(OTHER, 2.0, 1.0).counters["intervention"] < after / 5


@pytest.mark.parametrize("of", [0.0, 0.25, 1.0])
def test_boot_failures_hit_their_share_of_devices(tmp_path: Path, of: float) -> None:
    path = slot(tmp_path, "s", {"boot": {"fail": of}})
    failed = 0
    for number in range(400):
        car = Vehicle(f"car-{number}", seed="7", pace=1)
        car.switched({"autopilot": path}, DIGESTS)
        failed += not car.boots()[0]
    assert abs(failed / 400 - of) < 0.08


def test_silence_follows_the_slot(tmp_path: Path) -> None:
    car = vehicle(tmp_path, {"silent": True})
    assert car.silent
    car.switched({"autopilot": slot(tmp_path, "good", {})}, OTHER)
    assert not car.silent


def test_an_unreadable_behaviour_does_not_boot(tmp_path: Path) -> None:
    car = vehicle(tmp_path, {"boot": "perhaps"})
    ok, said = car.boots()
    assert not ok
    assert "boot" in said


def test_a_slot_without_behaviour_drives_plainly(tmp_path: Path) -> None:
    assert load(tmp_path) == Behaviour()


def test_of_two_components_the_worst_boot_and_all_events_count() -> None:
    both = together([parse({"boot": "fail"}), parse({"events": {"x": {"per_device_hour": 2}}})])
    assert both.boot_fails == 1.0
    assert both.events == {"x": 2.0}
    assert together([]) == Behaviour()


@pytest.mark.parametrize(
    "content",
    [
        [],
        "ok",
        {"boots": "ok"},
        {"boot": {"fail": 2}},
        {"boot": {"fail": math.nan}},
        {"silent": "yes"},
        {"silent": {"share": -1}},
        {"events": {"Bad Name": {"per_device_hour": 1}}},
        {"events": {"x": 1}},
        {"events": {"x": {"per_device_hour": True}}},
        {"events": {"x": {"per_device_hour": math.inf}}},
        {"levels": {"x": {"sd": 1}}},
        {"exposure": {"km": "60"}},
        {"fault": {"after_hours": -1}},
        {"fault": {"events": {"x": {"ratio": None}}}},
    ],
)
def test_a_behaviour_that_does_not_fit_is_refused(content: object) -> None:
    with pytest.raises(BehaviourError):
        parse(content)


def test_a_file_that_is_no_behaviour_is_refused(tmp_path: Path) -> None:
    (tmp_path / "behaviour.json").write_text("[" * 5000)
    with pytest.raises(BehaviourError):
        load(tmp_path)
    (tmp_path / "behaviour.json").write_bytes(b" " * 70_000)
    with pytest.raises(BehaviourError):
        load(tmp_path)


def test_the_same_seed_gives_the_same_past(tmp_path: Path) -> None:
    content = {"events": {"intervention": {"per_device_hour": 0.1}}}
    one = vehicle(tmp_path, content).past(DIGESTS, 30, 1e9, "factory")
    (tmp_path / "more").mkdir()
    two = vehicle(tmp_path / "more", content).past(DIGESTS, 30, 1e9, "factory")
    assert one == two
    assert [message.seq for message in one] == list(range(1, 31))
    assert all(message.t0 + message.dt <= 1e9 for message in one)


def test_a_known_share_of_drivers_is_careful() -> None:
    factors = [Driver(careful=0.4).factor("7", f"car-{n}") for n in range(1000)]
    careful = sum(factor == 1.0 for factor in factors) / 1000
    assert abs(careful - 0.4) < 0.05
    assert all(3.5 <= factor <= 9.0 for factor in factors if factor != 1.0)


@pytest.mark.parametrize("mean", [0.0, 0.3, 5.0, 200.0])
def test_poisson_has_its_mean(mean: float) -> None:
    chance = random.Random(1)
    numbers = [poisson(chance, mean) for _ in range(2000)]
    assert abs(sum(numbers) / 2000 - mean) <= 5 * math.sqrt(mean / 2000) + 1e-9


def test_shares_are_stable_and_uniform() -> None:
    assert share("a", 1) == share("a", 1)
    assert abs(sum(share("u", n) for n in range(2000)) / 2000 - 0.5) < 0.03
