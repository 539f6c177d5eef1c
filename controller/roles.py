"""Who may do what: roles, the rights that each has, and grants of a role on all fleets or some.

Deny by default: a person without a grant sees nothing. The asymmetry is here: a *stop* (hold,
pause, rollback, stop) needs `STOP` and one person; lift, resume and promote need `START`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    VIEWER = "viewer"
    RELEASE_MANAGER = "release-manager"
    ON_CALL = "on-call"
    ADMIN = "admin"
    AUDITOR = "auditor"


class Right(StrEnum):
    VIEW = "view"
    STOP = "stop"
    START = "start"
    BREAK_GLASS = "break-glass"  # start without the second person: skips waiting, never safety
    PUBLISH = "publish"
    DEVICES = "devices"
    AUDIT = "audit"


RIGHTS: Mapping[Role, frozenset[Right]] = {
    Role.VIEWER: frozenset({Right.VIEW}),
    Role.AUDITOR: frozenset({Right.VIEW, Right.AUDIT}),
    Role.ON_CALL: frozenset({Right.VIEW, Right.STOP, Right.BREAK_GLASS}),
    Role.RELEASE_MANAGER: frozenset(
        {Right.VIEW, Right.STOP, Right.START, Right.BREAK_GLASS, Right.PUBLISH}
    ),
    Role.ADMIN: frozenset(Right),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One role, on these fleets; on all when none is named."""

    role: Role
    fleets: frozenset[str] = frozenset()

    def gives(self, right: Right, fleet: str | None = None) -> bool:
        """Does it give the right on this fleet; without one: on any fleet at all?"""
        covers = fleet is None or not self.fleets or fleet in self.fleets
        return covers and right in RIGHTS[self.role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A person or program that has shown who it is."""

    name: str
    grants: tuple[Grant, ...] = ()
    via: str = "token"  # local | token | jwt | session
    csrf: str = ""  # what its forms must send back; set for sessions of pages

    @property
    def roles(self) -> str:
        return ", ".join(sorted({str(grant.role) for grant in self.grants})) or "no role"

    @property
    def fleets(self) -> frozenset[str]:
        """The fleets it sees; empty: all. Without a grant: none that exists."""
        seeing = [grant.fleets for grant in self.grants if grant.gives(Right.VIEW)]
        if not seeing:
            return frozenset({""})
        return frozenset() if frozenset() in seeing else frozenset().union(*seeing)

    def sees(self, fleet: str) -> bool:
        return self.may(Right.VIEW, fleet)

    def may(self, right: Right, fleet: str | None = None) -> bool:
        """Is there a grant of this right on this fleet; without one: on any fleet?"""
        return any(grant.gives(right, fleet) for grant in self.grants)

    def may_everywhere(self, right: Right) -> bool:
        return any(grant.gives(right) and not grant.fleets for grant in self.grants)


def to_json(grants: Iterable[Grant]) -> list[list[object]]:
    """[[role, [fleets]], …]: how sessions and approvals keep grants."""
    return [[str(grant.role), sorted(grant.fleets)] for grant in grants]


def from_json(plain: Iterable[Iterable[object]]) -> tuple[Grant, ...]:
    found = []
    for role, fleets in plain:
        found.append(Grant(role=Role(str(role)), fleets=frozenset(map(str, fleets))))  # type: ignore[call-overload]
    return tuple(found)
