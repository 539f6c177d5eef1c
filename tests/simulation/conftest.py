"""One pair of databases for all histories of a test process: compiled statements are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.world.databases import Databases, memory_directory


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    with memory_directory() as root:
        made = Databases(root)
        yield made
        made.close()
