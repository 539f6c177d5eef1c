"""The devices of one process: started, ticked, connected at a pace, ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from device_agent.agent import Identity
from device_agent.simulator.device import Device
from device_agent.simulator.plan import MOST, Plan, Script

_TICK = 1.0


class Fleet:
    """The devices of one process: started, ticked, connected at a pace, ended."""

    def __init__(self, plan: Plan, say: Callable[[Mapping[str, Any]], None]) -> None:
        if len(plan.devices) > MOST:
            raise ValueError(f"{len(plan.devices)} devices: at most {MOST} in one process")
        self._plan = plan
        self._say = say
        self._stop = asyncio.Event()
        self.devices: list[Device] = []

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="disk") as workers:
            await self._start(loop, workers)
            scripts = [loop.create_task(self._play(script)) for script in self._plan.faults]
            told = loop.create_task(self._tell_history())
            try:
                await self._beat()
            finally:
                for task in (*scripts, told):
                    task.cancel()
                await asyncio.gather(*(device.stop() for device in self.devices))

    async def _start(self, loop: asyncio.AbstractEventLoop, workers: ThreadPoolExecutor) -> None:
        for name in self._plan.devices:
            identity = Identity.load(Path(self._plan.root) / name / "identity.json")
            self.devices.append(Device(identity, self._plan, loop, workers))
        await asyncio.gather(*(loop.run_in_executor(workers, d.prepare) for d in self.devices))
        for device in self.devices:
            device.start()
        self._say({"event": "started", "devices": len(self.devices)})

    async def _beat(self) -> None:
        """Each device once a second, spread over the second; connects no faster than their pace."""
        room, slices = 0.0, 10
        turn = 0
        next_at = time.monotonic()
        while not self._stop.is_set():
            room = min(room + self._plan.connects_per_second * _TICK / slices, 50.0)
            for device in self.devices[turn::slices]:
                if device.tick() and room >= 1.0:
                    room -= 1.0
                    device.connect()
            turn = (turn + 1) % slices
            next_at = max(next_at + _TICK / slices, time.monotonic() - _TICK)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), max(0.001, next_at - time.monotonic()))

    async def _tell_history(self) -> None:
        """Say once when all of the recorded history is in the server's store."""
        while any(device.recorded() for device in self.devices):
            await asyncio.sleep(0.5)
        self._say({"event": "history", "devices": len(self.devices)})

    async def _play(self, script: Script) -> None:
        await asyncio.sleep(script.at)
        for device in self.devices:
            if not script.meets(device.name):
                continue
            if script.do == "offline":
                device.go_offline(script.lasting)
            elif script.do == "clock":
                device.shift_clock(script.by)
            else:
                await device.crash()
