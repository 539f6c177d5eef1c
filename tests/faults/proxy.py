"""A TCP proxy that breaks what goes through it, at a word or at random moments from a seed.

Faults: cut (both sides are reset, in the middle of a packet when bytes are on their way), stall
(nothing passes, nothing is closed), crawl (1,000 bytes a second), half (our side towards the server
is gone, the client's is never told), refuse (nobody listens).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

CRAWL = 1_000  # bytes a second
FAULTS = ("cut", "stall", "crawl", "half", "refuse")


class Proxy:
    """Listens on `port`, forwards to host and port of the server; lives in its own thread."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.port = 0
        self.passed = 0  # bytes
        self.mode = "pass"
        self._lines: set[_Line] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def become(self, mode: str) -> None:
        """pass, or one of FAULTS, for all lines that are open and all that come."""
        done = threading.Event()

        def change() -> None:
            self.mode = mode
            for line in list(self._lines):
                if mode in ("cut", "refuse"):
                    line.reset()
                elif mode == "half":
                    line.lose_server()
                elif mode == "pass" and line.half:
                    line.reset()  # at last it is told
            done.set()

        self._loop.call_soon_threadsafe(change)
        done.wait()

    def close(self) -> None:
        self.become("refuse")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._ready.set()
        self._loop.run_forever()
        self._server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._come, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode in ("refuse", "cut"):
            _reset(writer)
            return
        try:
            server = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        line = _Line(self, (reader, writer), server)
        self._lines.add(line)
        try:
            await line.run()
        finally:
            self._lines.discard(line)


class _Line:
    """One connection, both ways."""

    def __init__(self, proxy: Proxy, client: tuple, server: tuple) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self.half = False

    async def run(self) -> None:
        ways = [
            asyncio.create_task(self._way(self._client[0], self._server[1])),
            asyncio.create_task(self._way(self._server[0], self._client[1])),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        while self.half:
            await asyncio.sleep(0.02)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        self.reset()

    def reset(self) -> None:
        self.half = False
        for _, writer in (self._client, self._server):
            _reset(writer)

    def lose_server(self) -> None:
        self.half = True
        _reset(self._server[1])

    async def _way(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(16_384):
                while self._proxy.mode == "stall":
                    await asyncio.sleep(0.02)
                if self._proxy.mode == "crawl":
                    await self._crawl(data, target)
                    continue
                target.write(data)
                await target.drain()
                self._proxy.passed += len(data)

    async def _crawl(self, data: bytes, target: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), CRAWL // 20):
            target.write(data[start : start + CRAWL // 20])
            await target.drain()
            if self._proxy.mode == "crawl":
                await asyncio.sleep(1 / 20)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST, not FIN: what was on its way is lost in the middle of a packet."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def seed() -> int:
    """A new one each run; printed, and taken from BELLWETHER_FAULT_SEED to play it again."""
    given = os.environ.get("BELLWETHER_FAULT_SEED")
    found = int(given) if given else random.SystemRandom().randrange(1 << 32)
    print(f"BELLWETHER_FAULT_SEED={found}")  # noqa: T201 - pytest shows it with a failure
    return found


def moments(number: int, rounds: int) -> Iterator[tuple[str, float, float]]:
    """(fault, how long it lasts, how long all is well after it), seconds."""
    dice = random.Random(number)
    for _ in range(rounds):
        yield dice.choice(FAULTS), dice.uniform(0.05, 1.2), dice.uniform(0.05, 0.8)
