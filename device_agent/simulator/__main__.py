"""`python -m device_agent.simulator PLAN.json`, until SIGTERM or until its parent is gone."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device_agent.simulator.fleet import Fleet
from device_agent.simulator.plan import Plan

PARENT = "BELLWETHER_PARENT"  # in our environment: the process that watches us


def _say(word: Mapping[str, Any]) -> None:
    """One JSON line for each thing that the parent waits for."""
    with contextlib.suppress(OSError):  # on a full disk nobody reads of it
        sys.stdout.write(json.dumps(word) + "\n")
        sys.stdout.flush()


async def _main(plan: Plan, parent: int) -> None:
    fleet = Fleet(plan, _say)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, fleet.stop)
    orphaned = loop.create_task(_until_orphaned(parent))
    orphaned.add_done_callback(lambda _: fleet.stop())
    await fleet.run()
    orphaned.cancel()


async def _until_orphaned(parent: int) -> None:
    """Whoever started us was killed: it, started again, starts another one of us."""
    while os.getppid() == parent:
        await asyncio.sleep(0.25)


def main() -> int:
    # Told by who starts us: asked for here, it may be gone, and whoever adopted us never goes.
    parent, file = int(os.environ.pop(PARENT, os.getppid())), Path(sys.argv[1])
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with file.open() as plan:
        fcntl.flock(plan, fcntl.LOCK_EX)  # a process that is still ending has these devices
        asyncio.run(_main(Plan.from_json(plan.read()), parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
