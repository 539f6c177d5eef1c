"""How a command fails: one sentence that says what to do, and an exit code."""

from __future__ import annotations


class Failed(Exception):
    """Ends the command with this message on stderr."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(Failed):
    """Nobody answered: perhaps later."""


def explained(error: Exception) -> str | None:
    """The sentence for faults of the surroundings; None for what is a fault of ours."""
    from sqlalchemy.exc import OperationalError

    from controller.broker_child import BrokerFailed

    if isinstance(error, BrokerFailed):
        return str(error)
    if isinstance(error, OperationalError):
        first = str(error.orig).splitlines()[0]
        return f"the database does not answer: {first}; check --database and --state-dir"
    return None
