"""The demo's patience: what one of its own processes is kept from is not the story's fault."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from controller.cli.stage import Children


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Children]:
    children = Children(logs=tmp_path)
    children.running["serve"] = subprocess.Popen(["sleep", "600"])
    yield children
    os.kill(children.running["serve"].pid, signal.SIGCONT)
    children.stop()


def stopped(children: Children) -> None:
    pid = children.running["serve"].pid
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def test_patience_counts_from_when_the_last_of_ours_stood_still(sleeper: Children) -> None:
    assert sleeper.excused() == 0.0
    stopped(sleeper)
    before = time.monotonic()
    first = sleeper.excused()
    assert first >= before
    assert sleeper.excused() > first  # it stands still yet
    os.kill(sleeper.running["serve"].pid, signal.SIGCONT)
    while psutil.Process(sleeper.running["serve"].pid).status() == psutil.STATUS_STOPPED:
        time.sleep(0.01)
    last = sleeper.stopped_at
    assert sleeper.excused() == last
