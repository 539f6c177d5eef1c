"""One stream a page: when what it shows has changed, its new content, at most once a second.

Everybody who looks at the same page with the same grants shares one reading and one rendering of
it, so that five hundred open pages cost as much as the different ones among them.

Rules:

1. A page is read again only after something was recorded: an audit row, a rollout's row, telemetry.
2. What is the same as what was sent is not sent again; a stream that is slow misses the steps in
   between, never the last one.
3. Something is said every five seconds, so that a page knows that it is live.
4. A stream ends after some minutes: the browser comes again, and is asked again who it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from starlette.concurrency import run_in_threadpool

from controller.http.problems import Problem

EVERY = 1.0  # seconds between two looks
BEAT = 5.0
STREAM_LASTS = 300.0
log = structlog.get_logger()

Key = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class _Topic:
    """One page as one group of people sees it."""

    render: Callable[[], str]
    html: str = ""
    version: int = 0  # 0: not rendered yet
    watchers: int = 0
    mark: Any = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    first: asyncio.Lock = field(default_factory=asyncio.Lock)
    sent: tuple[int, bytes] = (0, b"")  # (version, its event): made once for everybody

    def event(self) -> bytes:
        if self.sent[0] != self.version:
            self.sent = self.version, _event(self.html)
        return self.sent[1]


class Live:
    """The topics that somebody looks at. `mark`: a cheap value that differs after any change."""

    def __init__(self, mark: Callable[[], Any]) -> None:
        self._mark = mark
        self._topics: dict[Key, _Topic] = {}
        self._turn: asyncio.Task[None] | None = None

    async def join(self, key: Key, render: Callable[[], str]) -> AsyncIterator[bytes]:
        """The server-sent events of one page; raises what its first rendering raises.

        Whoever comes while the page is being rendered waits for it instead of doing it again.
        """
        topic = self._topics.setdefault(key, _Topic(render))
        try:
            async with topic.first:
                if not topic.version:
                    topic.html, topic.version = await run_in_threadpool(topic.render), 1
        except BaseException:
            self._leave(key, topic)
            raise
        return self._follow(key, topic)

    async def _follow(self, key: Key, topic: _Topic) -> AsyncIterator[bytes]:
        topic = self._topics.setdefault(key, topic)  # the last one may have left meanwhile
        topic.watchers += 1
        self._start()
        loop = asyncio.get_running_loop()
        ends, sent = loop.time() + STREAM_LASTS, 0
        try:
            yield b"retry: 1000\n\n"
            while loop.time() < ends:
                if topic.version != sent:
                    sent = topic.version
                    yield topic.event()
                    continue
                try:
                    await asyncio.wait_for(topic.changed.wait(), BEAT)
                except TimeoutError:
                    yield b"event: beat\ndata: 1\n\n"
        finally:
            topic.watchers -= 1
            self._leave(key, topic)

    def _leave(self, key: Key, topic: _Topic) -> None:
        if not topic.watchers and self._topics.get(key) is topic:
            del self._topics[key]

    def _start(self) -> None:
        if self._turn is None or self._turn.done():
            self._turn = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._topics:
            began = asyncio.get_running_loop().time()
            try:
                mark = await run_in_threadpool(self._mark)
                for topic in list(self._topics.values()):
                    if topic.mark != mark:
                        await self._again(topic, mark)
            except Exception:  # the outermost turn: logged, and tried again
                log.exception("live")
            await asyncio.sleep(max(0.05, EVERY - (asyncio.get_running_loop().time() - began)))

    async def _again(self, topic: _Topic, mark: Any) -> None:
        try:
            html = await run_in_threadpool(topic.render)
        except Problem as problem:  # what it told of went away: it stays as it was
            log.info("live page", detail=problem.detail)
            html = topic.html
        topic.mark = mark
        if html != topic.html:
            topic.html, topic.version = html, topic.version + 1
            changed, topic.changed = topic.changed, asyncio.Event()
            changed.set()

    async def close(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._turn


def _event(html: str) -> bytes:
    lines = html.replace("\r", "").split("\n")
    return ("".join(f"data: {line}\n" for line in lines) + "\n").encode()
