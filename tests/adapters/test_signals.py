"""SIGTERM ends a process in order, whichever line of it the handler interrupts.

Python runs a handler between two lines of the main thread. If that thread holds a lock which the
handler wants, both wait for ever; so the signal is told here at each line in turn.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controller.keys import DirectorKey
from device_agent.agent import Identity
from device_agent.runner import Cadence, Runner

KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PATIENCE = 30.0
LINES = 60  # of the loop, and of what it calls: more than one turn with an event, and one without


@pytest.mark.parametrize("part", range(4))
def test_an_agent_ends_wherever_the_signal_meets_it(tmp_path: Path, part: int) -> None:
    for line in range(1 + part, LINES, 4):
        runner = _runner(tmp_path / str(line))
        thread = threading.Thread(target=_told_at, args=(runner, line), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"told to end at line {line} of its loop, it never did"


def _told_at(runner: Runner, line: int) -> None:
    """`run`, which `stop` interrupts at the n-th line that its loop comes by."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if event == "line" and (passed or frame.f_code.co_name == "_loop"):
            passed += 1
            if passed == line:
                runner.stop()
        return trace

    sys.settrace(trace)
    try:
        runner.run()
    finally:
        sys.settrace(None)


def _runner(directory: Path) -> Runner:
    directory.mkdir()
    identity = Identity(
        device="car-1",
        keys=(KEY.public_hex,),
        server="http://127.0.0.1:9",
        broker_url="mqtt://127.0.0.1:9",  # nobody listens: the link says so at once
        broker_username="car-1",
        broker_password="secret",
    )
    return Runner(directory, identity, cadence=Cadence(tick=0.001))


SERVICE = """
import signal, sys, threading
from controller.service import _upon_signals

for line in range(1, 80):
    stopping, passed = threading.Event(), 0
    _upon_signals(stopping.set)

    def trace(frame, event, _):
        global passed
        if event == "line" and frame.f_code.co_filename == threading.__file__:
            passed += 1
            if passed == line:
                signal.raise_signal(signal.SIGTERM)
        return trace

    sys.settrace(trace)
    while not stopping.wait(0.001):
        pass
    sys.settrace(None)
print("ended")
"""


def test_a_service_ends_wherever_the_signal_meets_it() -> None:
    words = [sys.executable, "-c", SERVICE]
    said = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (said.stdout, said.stderr) == ("ended\n", "")
