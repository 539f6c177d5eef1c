"""`bellwether-agent enrol | run | status`. Exit codes: 0 ok · 1 error · 2 usage."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from device_agent.agent import Identity, Settings
from device_agent.installers.slots import write_durably
from device_agent.journal import Journal, JournalBroken
from device_agent.machine import private_directory
from device_agent.record import Limits
from device_agent.runner import Cadence, Runner


class Failed(Exception):
    """Says what happened, to what, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        code: int = options.do(options)
    except (Failed, JournalBroken) as error:
        print(f"bellwether-agent: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    # A width that is said: argparse would load shutil, and with it the compressors, to ask for it.
    words = partial(argparse.HelpFormatter, width=100)
    parser = argparse.ArgumentParser(
        prog="bellwether-agent",
        description="Keeps this device at what its fleet's director signs.",
        formatter_class=words,
    )
    verbs = parser.add_subparsers(required=True, metavar="enrol|run|status")
    verb = partial(verbs.add_parser, formatter_class=words)
    enrol = verb("enrol", help="claim this device's identity with a one-time token")
    enrol.add_argument("--server", required=True, help="base URL, as http://127.0.0.1:8420")
    enrol.add_argument("--token", required=True, help="from `bellwether device enrol`")
    enrol.add_argument("--dir", required=True, type=Path, help="the device's directory")
    enrol.set_defaults(do=_enrol)
    run = verb("run", help="run the agent until SIGTERM")
    run.add_argument("--dir", required=True, type=Path, help="the device's directory")
    run.add_argument("--health-interval", type=_seconds, default=60.0, metavar="SECONDS")
    run.add_argument("--trial-soak", type=_seconds, default=5.0, metavar="SECONDS")
    run.add_argument("--trial-deadline", type=_seconds, default=600.0, metavar="SECONDS")
    run.set_defaults(do=_run)
    status = verb("status", help="what this device runs and does, as JSON")
    status.add_argument("--dir", required=True, type=Path, help="the device's directory")
    status.set_defaults(do=_status)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 86_400:
        raise argparse.ArgumentTypeError("0.05 to 86400 seconds are expected")
    return value


def _enrol(options: argparse.Namespace) -> int:
    path: Path = options.dir / "identity.json"
    if path.exists():
        raise Failed(f"{path} exists: this device is enrolled; remove it to enrol anew")
    server = options.server.rstrip("/")
    if urlsplit(server).scheme not in ("http", "https"):
        raise Failed(f"{server!r}: a URL with http:// or https:// is expected")
    try:
        identity = Identity.from_enrolment(_claim(server, options.token), server)
        private_directory(options.dir)
        write_durably(path, identity.to_json().encode(), 0o600)
    except (OSError, ValueError) as error:
        raise Failed(f"{server}: {error}") from error
    print(f"enrolled as {identity.device}")
    return 0


def _detail(body: bytes) -> str:
    """What a problem document says; of anything else its beginning."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace")


def _claim(server: str, token: str) -> dict[str, Any]:
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        f"{server}/api/v1/devices:enrol",
        data=json.dumps({"token": token}).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30.0) as answer:
            body = json.loads(answer.read(1 << 20))
    except urllib.error.HTTPError as error:
        with error:
            said = _detail(error.read(4096))
        raise Failed(f"the server refused the token (HTTP {error.code}): {said}") from error
    except (http.client.HTTPException, OSError) as error:
        raise Failed(f"{server} does not answer: {error}") from error
    if not isinstance(body, dict):
        raise Failed(f"{server} answered with no enrolment")
    return body


def _identity(directory: Path) -> Identity:
    try:
        return Identity.load(directory / "identity.json")
    except FileNotFoundError:
        raise Failed(f"{directory} holds no identity: run `bellwether-agent enrol` first") from None
    except (OSError, ValueError) as error:
        raise Failed(f"{directory}/identity.json cannot be used: {error}") from error


def _run(options: argparse.Namespace) -> int:
    identity = _identity(options.dir)
    limits = Limits(trial_soak=options.trial_soak, trial_deadline=options.trial_deadline)
    cadence = Cadence(health=options.health_interval)
    runner = Runner(options.dir, identity, Settings(limits=limits), cadence)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    runner.run()
    return 0


def _status(options: argparse.Namespace) -> int:
    identity = _identity(options.dir)
    journal = Journal(options.dir / "journal.db")
    record = journal.load()
    journal.close()
    update = record.update
    body = {
        "device": identity.device,
        "state": str(update.state) if update else "IDLE",
        "attempt": update.order.attempt if update else None,
        "reason": update.reason if update else None,
        "blockedBy": list(update.blocked_by) if update else [],
        "term": record.term,
        "generation": record.generation,
        "bootCount": record.boot_count,
        "components": {
            c: {"release": r.release, "digest": r.digest, "committed": r.committed}
            for c, r in sorted(record.running.items())
        },
    }
    print(json.dumps(body, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
