"""The compose file: every service is healthy by a check, pinned, without a default password."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if "bellwether/" in service["image"]]


def test_it_holds_broker_database_controller_and_a_fleet() -> None:
    assert {"postgres", "mosquitto", "controller", "ingest", "api", "fleet"} <= set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_every_lasting_service_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "no" or service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_ports_stay_on_this_machine(name: str) -> None:
    assert re.search(r":[0-9]+\.[0-9]+", SERVICES[name]["image"])
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_depends_on_is_there(name: str) -> None:
    assert set(SERVICES[name].get("depends_on", {})) <= set(SERVICES)
    for volume in SERVICES[name].get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"]


def test_no_password_is_written_down() -> None:
    assert not re.search(r"PASSWORD\s*[:=]", (ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize("name", ["api", "ingest", "controller"])
def test_the_command_of_each_role_is_one_of_ours(name: str, tmp_path: Path) -> None:
    service = SERVICES[name]
    environment = {**service["environment"], "BELLWETHER_STATE_DIR": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-m", "controller.cli", *service["command"], "--show-settings"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'"role": "{name}"' in shown.stdout


def test_the_fleet_is_simulated_with_options_that_exist() -> None:
    words = SERVICES["fleet"]["command"][0].split()
    options = {word for word in words if word.startswith("--")}
    shown = subprocess.run(
        [sys.executable, "-m", "controller.cli", "simulate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(option in shown.stdout for option in options)


def test_our_services_do_not_run_as_root() -> None:
    for file in ("controller.Dockerfile", "agent.Dockerfile"):
        assert "\nUSER " in (ROOT / "deploy" / file).read_text()
    assert all("user" not in SERVICES[name] for name in OURS)
