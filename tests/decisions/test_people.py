"""Two names of one person are one vote; two people are two, also of one surname or one host."""

from __future__ import annotations

import pytest

from controller.people import are_several, same_person


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ann <ann@example.org>", "ann@example.org"),
        ("Ann <ann@example.org>", "ANN"),
        ("ann (cli)", "ann"),
        ("ann", "ann@example.org"),
        ("Ann Lee <ann@example.org>", "ann"),
        ("Ann Lee <ann@example.org>", "ann (cli)"),
        ("<ann@example.org>", "Ann"),
    ],
)
def test_one_person_by_two_names(one: str, other: str) -> None:
    assert same_person(one, other)
    assert same_person(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ann@example.org", "ann@example.com"),
        ("Ann Lee <ann@example.org>", "Bob Lee <bob@example.org>"),
        ("ann", "anna@example.org"),
        ("example.org", "ann@example.org"),
        ("", "ann"),
        ("@example.org", ""),
    ],
)
def test_two_people(one: str, other: str) -> None:
    assert not same_person(one, other)
    assert not same_person(other, one)


def test_somebody_by_two_names_is_nobody_else() -> None:
    assert not are_several(["ann", "Ann Lee <ann@example.org>", "ann@example.org"])
    assert are_several(["ann", "bob@example.org"])
    assert not are_several(["ann", ""])
