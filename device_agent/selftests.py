"""Runs a slot's `selftest/*` executables: in name order, in the slot, each with a time limit.

All must exit with 0. Their process group is killed afterwards: no test outlives its
verdict.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported by the first test
    import subprocess

MAX_LOG = 2048


def run(slot: Path, *, seconds: float = 60.0) -> tuple[bool, str]:
    """(all passed, the tail of what they said)."""
    folder = slot / "selftest"
    tests = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    log = ""
    for test in tests:
        passed, said = _one(test, slot, seconds)
        log = (log + said)[-MAX_LOG:]
        if not passed:
            return False, log
    return True, log


def _one(test: Path, slot: Path, seconds: float) -> tuple[bool, str]:
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [str(test.absolute())],
                cwd=slot,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Nothing of the agent's surroundings leaks into foreign code.
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "SLOT": str(slot.absolute())},
            )
        except OSError as error:
            return False, f"{test.name}: cannot be run: {error}\n"
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"no end after {seconds:g} s"
        finally:
            _end(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - MAX_LOG))
        said = output.read().decode(errors="replace")
    return code == 0, f"{said}{test.name}: {'ok' if code == 0 else code}\n"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
