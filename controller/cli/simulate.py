"""`simulate`: a fleet of simulated devices that run the real agent, against a running service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.errors import Failed, Unreachable
from controller.cli.options import SERVER, Server, Token

if TYPE_CHECKING:
    from controller.cli.client import Api
    from device_agent.simulator.plan import Image, Script

_ENROLLING = "enrolling.json"


def register(app: typer.Typer) -> None:
    app.command("simulate")(simulate)


def simulate(
    directory: Annotated[Path, typer.Option("--dir", help="One directory a device, below this.")],
    devices: Annotated[int, typer.Option(min=1, max=20_000, help="How many to enrol.")] = 10,
    fleet: Annotated[str, typer.Option(help="The fleet that they belong to.")] = "demo",
    tokens: Annotated[
        Path | None, typer.Option(help="File with one one-time token a line: claim these instead.")
    ] = None,
    name: Annotated[str, typer.Option(help="What their ids begin with.")] = "car",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For all of them; may be repeated."),
    ] = None,
    pace: Annotated[float, typer.Option(min=0, help="Hours of driving a second.")] = 1.0,
    seed: Annotated[str, typer.Option(help="The same seed, the same drivers.")] = "1",
    history: Annotated[int, typer.Option(min=0, max=40, help="Days of recorded past.")] = 0,
    factory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COMPONENT=RELEASE=BUNDLE", help="In slot a from the start; may be repeated."
        ),
    ] = None,
    careful: Annotated[
        float, typer.Option(min=0, max=1, help="Share of drivers with the fewest events.")
    ] = 0.4,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes to run them in.")] = 1,
    faults: Annotated[
        Path | None, typer.Option(help="JSON list of scripted faults of networks and devices.")
    ] = None,
    health_interval: Annotated[float, typer.Option(min=0.2, help="Seconds a report.")] = 5.0,
    trial_soak: Annotated[float, typer.Option(min=0, help="Seconds of trial.")] = 1.0,
    trial_deadline: Annotated[
        float, typer.Option(min=1, help="Seconds without a link before a device goes back.")
    ] = 600.0,
    server: Server = SERVER,
    token: Token = None,
) -> None:
    """Enrol devices and run them until Ctrl-C. A directory that is enrolled already continues.

    Each device runs the real agent with its own session, journal and slots; what it does follows
    from `behaviour.json` of the bundle in its active slot. Prints one JSON line an event.
    """
    from device_agent.simulator.plan import Plan

    directory.mkdir(parents=True, exist_ok=True)
    if tokens is not None:
        names = _enrolled(directory) or _claim(directory, server, _tokens(tokens))
    elif _begun(directory) is None and (known := _enrolled(directory)):
        names = known
    else:
        wanted = _wanted(devices, name, fleet, seed, label or [])
        names = _enrol(directory, server, token, wanted)
    plan = Plan(
        root=str(directory.resolve()),
        devices=tuple(names),
        seed=seed,
        pace=pace,
        history_days=history,
        health_interval=health_interval,
        trial_soak=trial_soak,
        trial_deadline=trial_deadline,
        images=tuple(_image(text) for text in factory or []),
        faults=_faults(faults),
        careful=careful,
    )
    raise typer.Exit(_run(plan, directory, processes))


# -- enrolment ------------------------------------------------------------------------------------


def _enrolled(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob("*/identity.json"))


def _wanted(
    count: int, name: str, fleet: str, seed: str, labels: list[str]
) -> list[dict[str, Any]]:
    from device_agent.simulator.machine import share

    fixed = {}
    for text in labels:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise Failed(f"--label {text!r}: write key=value", 2)
        fixed[key] = value
    found = []
    for number in range(1, count + 1):
        device = f"{name}-{number:04d}"
        drawn = {
            "hardware": "hw4" if share(seed, "hardware", device) < 0.5 else "hw3",
            "region": "us" if share(seed, "region", device) < 0.4 else "eu",
            "model": "m3",
        }
        found.append({"id": device, "fleet": fleet, "labels": {**drawn, **fixed}})
    return found


def _begun(directory: Path) -> dict[str, Any] | None:
    """An enrolment that was cut off: {wanted, registered}."""
    import json

    file = directory / _ENROLLING
    return dict(json.loads(file.read_text())) if file.exists() else None


def _begin(directory: Path, wanted: list[dict[str, Any]], *, registered: bool) -> None:
    import json

    from device_agent.installers.slots import write_durably

    body = json.dumps({"wanted": wanted, "registered": registered})
    write_durably(directory / _ENROLLING, body.encode(), 0o600)


def _enrol(
    directory: Path, server: str, token: str | None, wanted: list[dict[str, Any]]
) -> list[str]:
    """Enrol a fleet, or what an interrupted enrolment of it left over; its names.

    Tokens live once: a claim whose answer never came is repeated with a new one. That is allowed
    for devices that this directory registers, never for somebody else's: before the first word
    about them nobody knew them, and that is noted.
    """
    import time

    begun = _begun(directory)
    if begun is None:
        _begin(directory, wanted, registered=False)
    else:
        wanted = begun["wanted"]
    ours = begun is not None and bool(begun["registered"])
    for pause in (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, None):
        there = set(_enrolled(directory))
        missing = [device for device in wanted if device["id"] not in there]
        try:
            if not ours and not _known(server, token, wanted):
                _begin(directory, wanted, registered=True)
                ours = True
            given = _register(server, token, missing, ours=ours)
            _claim(directory, server, given)
            (directory / _ENROLLING).unlink()
            return _enrolled(directory)
        except Unreachable as error:
            if pause is None:
                raise
            typer.echo(f"{error}; again in {pause:g} s", err=True)
            time.sleep(pause)
    raise AssertionError("the last round answers or raises")


def _known(server: str, token: str | None, wanted: list[dict[str, Any]]) -> bool:
    """Does the service know any of these already?"""
    from controller.cli.client import Api

    names = {device["id"] for device in wanted}
    return any(found["id"] in names for found in Api(server, token).every("/devices"))


def _register(
    server: str, token: str | None, wanted: list[dict[str, Any]], *, ours: bool
) -> list[str]:
    from controller.cli.client import Api

    api, found = Api(server, token, timeout=300), []
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        try:
            found += [str(item["token"]) for item in api.post("/devices", part)["items"]]
        except Unreachable:
            raise
        except Failed:
            if not ours:
                raise
            found += [_token_again(api, device) for device in part]
    return found


def _token_again(api: Api, device: dict[str, Any]) -> str:
    try:
        return str(api.post("/devices", [device])["items"][0]["token"])
    except Unreachable:
        raise
    except Failed:
        why = {"reason": "its enrolment was interrupted"}
        return str(api.post(f"/devices/{device['id']}:replace", why)["token"])


def _tokens(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"{file}: {error}: name a file with one token a line", 2) from None
    if not found:
        raise Failed(f"{file} holds no token: `bellwether device enrol` prints them", 2)
    return found


def _claim(directory: Path, server: str, tokens: list[str]) -> list[str]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=8) as workers:
        return sorted(workers.map(lambda token: _claim_one(directory, server, token), tokens))


def _claim_one(directory: Path, server: str, token: str) -> str:
    """The device's own road: only its token, no right of ours."""
    import http.client
    import json
    import urllib.error
    import urllib.request

    from device_agent.agent import Identity
    from device_agent.installers.slots import write_durably
    from device_agent.machine import private_directory

    if not server.startswith(("http://", "https://")):
        raise Failed(f"--server {server!r}: a URL with http:// or https:// is expected", 2)
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        f"{server.rstrip('/')}/api/v1/devices:enrol",
        data=json.dumps({"token": token}).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60.0) as answer:
            identity = Identity.from_enrolment(json.loads(answer.read(1 << 20)), server)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode(errors="replace")
        if error.code >= 500:  # it is being started again, or its broker or database is
            raise Unreachable(f"{server}: enrolment failed: HTTP {error.code}: {said}") from None
        raise Failed(f"a token was refused (HTTP {error.code}): {said}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"{server}: enrolment failed: {error}") from None
    home = directory / identity.device
    private_directory(home)
    write_durably(home / "identity.json", identity.to_json().encode(), 0o600)
    return identity.device


# -- running --------------------------------------------------------------------------------------


def _image(text: str) -> Image:
    from device_agent.simulator.plan import Image

    parts = text.split("=", 2)
    if len(parts) != 3 or not Path(parts[2]).is_file():
        raise Failed(f"--factory {text!r}: write COMPONENT=RELEASE=BUNDLE, an existing file", 2)
    return Image(component=parts[0], release=parts[1], bundle=str(Path(parts[2]).resolve()))


def _faults(file: Path | None) -> tuple[Script, ...]:
    import json

    from device_agent.simulator.plan import scripts

    if file is None:
        return ()
    try:
        return scripts(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise Failed(f"{file}: {error}", 2) from None


def _run(plan: Any, directory: Path, processes: int) -> int:
    """One child a process; one that was killed is started again, and continues from its disk."""
    import os
    import signal
    import subprocess
    import sys
    import time
    from dataclasses import replace

    from device_agent.simulator.plan import split

    commands = []
    for index, part in enumerate(split(plan.devices, processes)):
        file = directory / f"plan-{index}.json"
        text = replace(plan, devices=part).to_json()
        # Written once: one that we started before we were killed may be reading it now.
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        commands.append([sys.executable, "-m", "device_agent.simulator", str(file)])

    environment = os.environ | {"BELLWETHER_PARENT": str(os.getpid())}

    def begin(command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)

    ending: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.append(1))
    children = [begin(command) for command in commands]
    while not ending and not any((child.poll() or 0) > 0 for child in children):
        for index, child in enumerate(children):
            if child.poll() is not None and not ending:
                typer.echo(f"simulator {index} ended ({child.returncode}): again", err=True)
                children[index] = begin(commands[index])
        time.sleep(0.2)
    for child in children:
        if child.poll() is None:
            child.terminate()
    codes = [child.wait() for child in children]
    return 0 if ending else max((abs(code) for code in codes), default=0)
