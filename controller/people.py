"""Whether two names are one person's. Pure.

People are named by Git (`Ann <ann@example.com>`), by their tokens and identity provider (`Ann`,
`ann@example.com`), and by the shell that a command ran in (`ann (cli)`).
"""

from __future__ import annotations

from collections.abc import Iterable


def same_person(one: str, other: str) -> bool:
    """`Ann <ann@example.com>`, `ann@example.com`, `Ann` and `ann (cli)` are one person.

    A bare `ann` is whoever has that mailbox, at any host: in doubt two names are one person's. Two
    whole addresses are one person's only if they are equal.
    """
    return _meet(_names(one), _names(other))


def are_several(names: Iterable[str]) -> bool:
    """Are there two different people among them? Two names are one's where a third has both."""
    one, *others = [found for name in names if (found := _names(name))] or [set()]
    while kin := [other for other in others if _meet(one, other)]:
        one = one.union(*kin)
        others = [other for other in others if other not in kin]
    return bool(others)


def _names(text: str) -> set[str]:
    text = text.strip().removesuffix("(cli)")
    name, _, rest = text.partition("<")
    found = {part.strip().casefold() for part in (text, name, rest.rstrip("> "))}
    return found - {""}


def _meet(a: set[str], b: set[str]) -> bool:
    return not (a.isdisjoint(b) and a.isdisjoint(_mailboxes(b)) and b.isdisjoint(_mailboxes(a)))


def _mailboxes(names: set[str]) -> set[str]:
    return {name.partition("@")[0] for name in names if "@" in name and "<" not in name}
