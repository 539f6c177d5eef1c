"""Decides what became of each member, from the device's own last word and from its silence.

Pure. Rules, in order:

1. A device that was moved, retired, replaced or quarantined since it was drawn has left: it is in
   no denominator from that instant on.
2. A member that was not told is decided by nothing.
3. A failure reported under this attempt counts as failed. A device that rolled itself back for want
   of a link failed only if the server could hear all the while; else it is told once more, and what
   counts is its answer to that.
4. The whole target, committed: updated. An earlier silence is forgiven by that.
5. Activated and then unheard for longer than the patience, on the hearing clock: silent.
   Merely offline before the activation is neither failed nor silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from controller.rollout.model import Arm, Device, Member, MemberState, Order, Rollout
from device_agent.protocol import Reason, State
from telemetry.report import DeviceRow

_FAILED = frozenset({State.FAILED, State.ROLLED_BACK, State.STUCK, State.REJECTED})
_EXPOSED = frozenset(
    {State.TRIAL, State.COMMITTING, State.COMMITTED, State.ROLLING_BACK, State.ROLLED_BACK}
)
_DECIDED_FOREVER = frozenset({MemberState.LEFT, MemberState.BACK})
# An order refused for these says nothing about the release.
_NOT_THE_RELEASE = frozenset(
    {Reason.LOWER_GENERATION, Reason.EXPIRED, Reason.LEASE_EXPIRED, Reason.CONFLICTING_GENERATION}
)


AFTER_COMMIT = "after its commit"  # a silent device that had confirmed the update before
LINK_WAS_DOWN = "rolled itself back while our own link was down: it is told once more"


def follow(
    member: Member,
    rollout: Rollout,
    device: Device | None,
    row: DeviceRow | None,
    *,
    hearing: float,
    patience: float,
    deaf: Sequence[tuple[float, float]],
    now: float,
    order: Order | None = None,
) -> Member:
    """The member after the device's last word; the same object when nothing changed.

    `order`: the last one that was issued to the device.
    """
    if member.state in _DECIDED_FOREVER:
        return member
    if _left(member, device, rollout):
        return replace(member, state=MemberState.LEFT, reason="left", left_at=now, updated_at=now)
    if row is None or (member.state is MemberState.DRAWN and member.arm is not Arm.CONTROL):
        return member
    if member.arm is Arm.CONTROL:
        state = MemberState.SILENT if unheard(row, hearing, now) > patience else MemberState.DRAWN
        return _become(member, state, "", now)
    member = _exposure(member, rollout, row, now)
    mine = row.attempt == member.attempt
    if mine and row.state in _FAILED and row.reason != Reason.ORDERED:
        if row.reason == Reason.LINK_LOST:
            return _link_lost(member, row, order, deaf, now)
        return _failed(member, row, now)
    quiet = unheard(row, hearing, now) > patience
    if runs_target(row, rollout, committed=True) and not quiet:
        return _become(member, MemberState.UPDATED, "", now)
    if _activated(member, row) and quiet:
        return _silent(member, patience, now)
    if member.state is MemberState.SILENT:
        return _become(member, MemberState.TOLD, "", now)
    waits = ", ".join(row.blocked_by) if row.state is State.DEFERRED else ""
    return member if member.reason == waits else replace(member, reason=waits, updated_at=now)


def _silent(member: Member, patience: float, now: float) -> Member:
    if member.state is MemberState.SILENT:
        return member
    reason = f"no contact for {patience:.3g} s"
    if member.state is MemberState.UPDATED:
        reason += f", {AFTER_COMMIT}"
    return _become(member, MemberState.SILENT, reason, now)


def unheard(row: DeviceRow, hearing: float, now: float) -> float:
    """Seconds without contact in which the server could hear; announced sleep is not silence."""
    if row.sleeping_until is not None and row.sleeping_until > now:
        return 0.0
    return max(0.0, hearing - row.heard_clock)


def runs_target(row: DeviceRow, rollout: Rollout, *, committed: bool) -> bool:
    """Does the device run every artifact of this release (and has it committed them)?"""
    for component, digest in rollout.artifacts.items():
        report = row.components.get(component)
        if report is None or report.digest != digest or (committed and not report.committed):
            return False
    return True


def _left(member: Member, device: Device | None, rollout: Rollout) -> bool:
    if device is None or not device.governed or device.fleet != rollout.fleet:
        return True
    return device.moved_at is not None and device.moved_at > member.drawn_at


def _exposure(member: Member, rollout: Rollout, row: DeviceRow, now: float) -> Member:
    if member.exposed_at is not None:
        return member
    mine = row.attempt == member.attempt and row.state in _EXPOSED
    if not (mine or runs_target(row, rollout, committed=False)):
        return member
    return replace(member, exposed_at=min(row.reported_at or now, now), updated_at=now)


def _activated(member: Member, row: DeviceRow) -> bool:
    mine = row.attempt == member.attempt
    return member.exposed_at is not None or (mine and row.state is State.ACTIVATING)


def _failed(member: Member, row: DeviceRow, now: float) -> Member:
    reason = row.reason or str(row.state)
    if reason in _NOT_THE_RELEASE:
        return member if member.reason == reason else replace(member, reason=reason, updated_at=now)
    return _become(member, MemberState.FAILED, reason, now)


def _link_lost(
    member: Member,
    row: DeviceRow,
    order: Order | None,
    deaf: Sequence[tuple[float, float]],
    now: float,
) -> Member:
    """Judged when it is heard: outages from before it was told, or after, say nothing of it."""
    if member.state is MemberState.FAILED or member.reason == LINK_WAS_DOWN:
        return member
    told = member.told_at or now
    if order is not None and (order.at < told or row.generation < order.generation):
        return member  # told once more: it has not answered yet
    since = max(told, member.exposed_at or told)
    if any(end > since for _, end in deaf):
        return _become(member, MemberState.TOLD, LINK_WAS_DOWN, now)
    return _failed(member, row, now)


def wants_telling(member: Member) -> bool:
    """Is it to be told, for the first time or once more?"""
    if member.arm is Arm.CONTROL:
        return False
    again = member.state is MemberState.TOLD and member.reason == LINK_WAS_DOWN
    return again or (member.state is MemberState.DRAWN and member.arm is Arm.EXPOSED)


def _become(member: Member, state: MemberState, reason: str, now: float) -> Member:
    if member.state is state and member.reason == reason:
        return member
    return replace(member, state=state, reason=reason, updated_at=now)
