"""What the HTTP application is given: every adapter it uses, made by `controller.service`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from fastapi import Depends, Request
from sqlalchemy import Engine

from controller.devices import Registry
from controller.http.devicebook import DeviceBook
from controller.keys import DirectorKey
from controller.settings import Settings
from telemetry.report import TelemetryReader


class Content(Protocol):
    """The content store: `controller.artifacts.ContentStore`."""

    def path(self, digest: str) -> Path: ...

    def add(self, source: Path) -> tuple[str, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    engine: Engine
    reader: TelemetryReader
    registry: Registry
    content: Content
    key: DirectorKey
    settings: Settings
    clock: Callable[[], float]
    poke: Callable[[], None] | None = None  # none: the loop of this state directory


# `async`: a dependency that is not would wait for a free thread, and a stop must not wait for one.
async def _deps(request: Request) -> Deps:
    deps: Deps = request.app.state.deps
    return deps


async def _book(request: Request) -> DeviceBook:
    book: DeviceBook = request.app.state.book
    return book


Given = Annotated[Deps, Depends(_deps)]
Book = Annotated[DeviceBook, Depends(_book)]
