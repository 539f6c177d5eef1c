"""How a state looks: a word, a tone and a shape, so that colour never stands alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Tone(StrEnum):
    GOOD = "good"
    MOVING = "moving"
    WAIT = "wait"
    BAD = "bad"
    IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    word: str
    tone: Tone
    icon: str  # a symbol of `icons.html`


_ICON = {
    Tone.GOOD: "tick",
    Tone.MOVING: "arrow",
    Tone.WAIT: "pause",
    Tone.BAD: "alert",
    Tone.IDLE: "ring",
}
_ROLLOUT: Mapping[str, tuple[str, Tone]] = {
    "Pending": ("Pending", Tone.IDLE),
    "Progressing": ("Progressing", Tone.MOVING),
    "Soaking": ("Soaking", Tone.MOVING),
    "Paused": ("Paused", Tone.WAIT),
    "Held": ("Held", Tone.BAD),
    "RollingBack": ("Rolling back", Tone.BAD),
    "RolledBack": ("Rolled back", Tone.BAD),
    "Completed": ("Completed", Tone.GOOD),
    "Superseded": ("Superseded", Tone.IDLE),
    "NoMembers": ("No members", Tone.WAIT),
    "Inconclusive": ("Inconclusive", Tone.WAIT),
}
_VERDICT: Mapping[str, tuple[str, Tone]] = {
    "widen": ("Widened", Tone.GOOD),
    "complete": ("Completed", Tone.GOOD),
    "wait": ("Waited", Tone.IDLE),
    "roll_back": ("Rolled back", Tone.BAD),
    "inconclusive": ("Inconclusive", Tone.WAIT),
    "open": ("Opened", Tone.MOVING),
    "opened": ("Opened", Tone.MOVING),
    "drawn": ("Drawn", Tone.IDLE),
    "approve": ("Approved", Tone.GOOD),
}
_MEMBER: Mapping[str, tuple[str, Tone]] = {
    "drawn": ("Not told yet", Tone.IDLE),
    "told": ("In progress", Tone.MOVING),
    "updated": ("Updated", Tone.GOOD),
    "failed": ("Failed", Tone.BAD),
    "silent": ("Silent", Tone.BAD),
    "back": ("Back on its release before", Tone.WAIT),
    "left": ("Left", Tone.IDLE),
}
_DEVICE: Mapping[str, tuple[str, Tone]] = {
    "pending": ("Not enrolled yet", Tone.IDLE),
    "retired": ("Retired", Tone.IDLE),
    "quarantined": ("Quarantined", Tone.BAD),
}
_UPDATE_BAD = frozenset({"FAILED", "ROLLED_BACK", "ROLLING_BACK", "STUCK", "REJECTED"})
_UPDATE_STILL = frozenset({"IDLE", "COMMITTED", "CANCELLED", "SUPERSEDED"})


def sign(word: str, tone: Tone, icon: str = "") -> Sign:
    return Sign(word=word, tone=tone, icon=icon or _ICON[tone])


def of_rollout(state: str) -> Sign:
    return sign(*_ROLLOUT.get(state, (state, Tone.IDLE)))


def of_verdict(verdict: str) -> Sign:
    """A decision's verdict: the gate's word, or the state that a rollout went to."""
    return sign(*(_VERDICT.get(verdict) or _ROLLOUT.get(verdict, (verdict, Tone.IDLE))))


def of_member(state: str) -> Sign:
    return sign(*_MEMBER.get(state, (state, Tone.IDLE)))


def of_device(status: str, online: bool, state: str | None) -> Sign:
    """The most urgent thing about a device: registry, update, contact."""
    if status != "active":
        return sign(*_DEVICE.get(status, (status, Tone.IDLE)))
    if state is None:
        return sign("Never heard", Tone.WAIT)
    if state in _UPDATE_BAD:
        return sign(_words(state), Tone.BAD)
    if not online:
        return sign("Offline", Tone.WAIT)
    return sign("Online", Tone.GOOD) if state in _UPDATE_STILL else sign(_words(state), Tone.MOVING)


def _words(state: str) -> str:
    return state.replace("_", " ").capitalize()
