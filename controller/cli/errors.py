"""How a command fails: one sentence that says what to do, and an exit code."""

from __future__ import annotations


class Failed(Exception):
    """Ends the command with this message on stderr."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
