"""Ingest processes on one state directory: each has a seat, and the first ones are taken again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from telemetry import seat

HOLD = """
import sys
from pathlib import Path
from telemetry import seat
with seat.take(Path(sys.argv[1])) as own:
    print(own.client_id, flush=True)
    sys.stdin.read()
"""


def test_two_processes_have_two_sessions_and_each_finds_its_own_again(tmp_path: Path) -> None:
    with seat.take(tmp_path) as first:
        words = [sys.executable, "-c", HOLD, str(tmp_path)]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            name = other.stdout.readline().strip()
            with seat.take(tmp_path) as third:
                assert [first.number, third.number] == [1, 3]
                assert first.session_expiry > 86_400 > third.session_expiry
                assert len({first.client_id, name, third.client_id}) == 3
            other.kill()
        with seat.take(tmp_path) as again:  # its lock ended with it
            assert again.client_id == name
    with seat.take(tmp_path) as again:
        assert again == first


def test_two_machines_never_share_a_session(tmp_path: Path) -> None:
    with seat.take(tmp_path / "a") as one, seat.take(tmp_path / "b") as two:
        assert one.number == two.number == 1
        assert one.client_id != two.client_id
