"""A stranger's path: the README's "A fleet by hand", line by line, until the first device runs.

The commands are the README's own; only the paths, the port and the waits are ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.story, pytest.mark.timeout(300), pytest.mark.xdist_group("story")]
README = Path(__file__).parents[2] / "README.md"


def stages() -> list[str]:
    """The paragraphs of the README's code block."""
    _, _, after = README.read_text().partition("## A fleet by hand")
    block = after.partition("```sh\n")[2].partition("```")[0]
    return [part.strip() for part in block.split("\n\n")]


class Shell:
    """One bash that keeps its directory and its background jobs from stage to stage."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._count = 0
        self._process = subprocess.Popen(
            ["bash"], stdin=subprocess.PIPE, cwd=folder, start_new_session=True, text=True,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("BELLWETHER_")},
                "BELLWETHER_LISTEN": f"127.0.0.1:{port}",
                "BELLWETHER_SERVER": f"http://127.0.0.1:{port}",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
                "GIT_AUTHOR_NAME": "Stranger", "GIT_AUTHOR_EMAIL": "stranger@example.org",
                "GIT_COMMITTER_NAME": "Stranger", "GIT_COMMITTER_EMAIL": "stranger@example.org",
            },
        )  # fmt: skip

    def run(self, commands: str) -> str:
        """What the commands said; fails with it when the last one failed."""
        self._count += 1
        said, done = (self.folder / f"{self._count}.{name}" for name in ("said", "done"))
        text = commands.replace("/tmp/", f"{self.folder}/").replace(":8420", f":{self.port}")  # noqa: S108
        assert self._process.stdin is not None
        self._process.stdin.write(f"{{ {text}\n}} > {said} 2>&1; echo $? > {done}.part\n")
        self._process.stdin.write(f"mv {done}.part {done}\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + 120
        while not done.exists():
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        assert done.read_text().strip() == "0", said.read_text()
        return said.read_text()

    def json(self, command: str) -> Any:
        answer = subprocess.run(
            [sys.executable, "-m", "controller.cli", *command.split(), "-o", "json"],
            env={**os.environ, "BELLWETHER_SERVER": f"http://127.0.0.1:{self.port}"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(answer.stdout)

    def close(self) -> None:
        """End all that was started: politely, then for good."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _alive(self._process.pid):
                self._process.poll()
                time.sleep(0.1)
        self._process.wait(5)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Shell(tmp_path, port)
    yield here
    here.close()


def test_the_readme_leads_to_a_first_updated_device(shell: Shell) -> None:
    serve, first, cars, commit = stages()
    assert "ready" in shell.run(serve)
    shell.run(first)
    published = (shell.folder / "fleet/releases/app-1.0.0.yaml").read_text()
    assert "kind: Release" in published
    assert "0000000000000000" not in published
    shell.run(cars)
    lines = commit.splitlines()
    assert lines[0].startswith("cd ")
    pushed = shell.run(lines[0])
    assert "valid" in pushed
    deadline = time.monotonic() + 100
    while True:
        devices = shell.json("device list")["items"]
        running = [d for d in devices if "app" in (d.get("components") or {})]
        if len(running) == 3:
            break
        assert time.monotonic() < deadline, devices
        time.sleep(1)
    assert "app-1.0.0" in shell.run(lines[1].replace("sleep 15;", ""))
    planned = shell.run(lines[2])
    assert "EDITED" in planned
    assert "strategy.steps[0].soak" in planned
    shell.run(lines[3])
    deadline = time.monotonic() + 60
    while not subprocess.run(
        ["git", "-C", str(shell.folder / "fleet.git"), "ls-tree", "-r", "--name-only", "main",
         "holds/"], capture_output=True, text=True, check=True,
    ).stdout:  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "trying it" in shell.run(lines[4].replace("sleep 5;", ""))
    shell.run(lines[5])
