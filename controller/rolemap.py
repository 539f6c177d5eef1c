"""Which claims of an identity provider give which roles: a TOML file of the operator's.

    name = "email"                # the claim that names people; without it `sub`
    [[grant]]
    claim = "groups"              # dotted path; its value, or one of its values, must be `value`
    value = "fleet-oncall"
    role = "on-call"
    fleets = ["model-3-eu"]       # left out: all

Deny by default: who matches no grant has no role. `email` names a person only when the provider
says that it is verified; people are told apart by issuer and subject, never by a name they chose.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.roles import Grant, Principal, Role

_KNOWN = frozenset({"claim", "value", "role", "fleets"})


class BadRoleMap(ValueError):
    """The file cannot be used; the message names the place and says what to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    claim: str
    value: str
    grant: Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMap:
    rules: tuple[Rule, ...] = ()
    name: str = "email"

    def principal(self, claims: Mapping[str, Any], *, via: str) -> Principal:
        """Who these (verified) claims are; without a matching rule: somebody without any right."""
        grants = tuple(rule.grant for rule in self.rules if _matches(rule, claims))
        return Principal(name=_name(self.name, claims), grants=grants, via=via)


def load(file: Path) -> RoleMap:
    """Raises BadRoleMap."""
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise BadRoleMap(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRoleMap(f"{file}: {error}") from None
    if unknown := set(table) - {"name", "grant"}:
        raise BadRoleMap(f"{file}: unknown {', '.join(sorted(unknown))}; known: name, [[grant]]")
    plain = table.get("grant", [])
    if not isinstance(plain, list) or not isinstance(table.get("name", ""), str):
        raise BadRoleMap(f'{file}: write name = "CLAIM" and [[grant]] tables')
    rules = tuple(_rule(file, i, one) for i, one in enumerate(plain, 1))
    return RoleMap(rules=rules, name=table.get("name", "email"))


def _rule(file: Path, number: int, plain: Any) -> Rule:
    where = f"{file}: grant {number}"
    if not isinstance(plain, Mapping) or (unknown := set(plain) - _KNOWN):
        raise BadRoleMap(f"{where}: unknown {unknown}; known: {', '.join(sorted(_KNOWN))}")
    claim, value, role = (plain.get(key) for key in ("claim", "value", "role"))
    if not (isinstance(claim, str) and claim and isinstance(value, str) and value):
        raise BadRoleMap(f'{where}: write claim = "groups" and value = "NAME"')
    if role not in list(Role):
        raise BadRoleMap(f"{where}: role {role!r}: one of {', '.join(Role)}")
    fleets = plain.get("fleets", [])
    if not isinstance(fleets, list) or not all(isinstance(f, str) and f for f in fleets):
        raise BadRoleMap(f"{where}: fleets is a list of names")
    if "fleets" in plain and not fleets:
        raise BadRoleMap(f"{where}: fleets is empty: leave it out for all fleets")
    grant = Grant(role=Role(role), fleets=frozenset(fleets))
    return Rule(claim=claim, value=value, grant=grant)


def _matches(rule: Rule, claims: Mapping[str, Any]) -> bool:
    found: Any = claims.get(rule.claim)
    if found is None:  # a dotted path, as in realm_access.roles
        found = claims
        for part in rule.claim.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    values = found if isinstance(found, list) else [found]
    return any(isinstance(value, str) and value == rule.value for value in values)


def _name(claim: str, claims: Mapping[str, Any]) -> str:
    subject = str(claims.get("sub", ""))
    chosen = claims.get(claim)
    if claim == "email" and claims.get("email_verified") is not True:
        chosen = None
    named = isinstance(chosen, str) and 0 < len(chosen) <= 128 and chosen.isprintable()
    return str(chosen) if named else f"sub:{subject}"[:128]
