"""Which orders leave no more, once a hold has come that lets devices stay where they are."""

from __future__ import annotations

import pytest

from controller.rollout.model import ActiveHold, Order, Told
from controller.rollout.withholding import HEED, rejected
from device_agent.protocol import ComponentReport, Kind, State
from telemetry.report import DeviceRow

REJECTED, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def order(digest: str = REJECTED, *, at: float = 100.0, kind: Kind = Kind.INSTALL) -> Order:
    told = Told(release="app-1", digest=digest, at=at, rollout=None)
    return Order(
        device="car-1", term=1, generation=2, attempt="a", kind=kind, components={"app": told},
        at=at,
    )  # fmt: skip


def word(generation: int, at: float, *, runs: str = REJECTED) -> DeviceRow:
    report = ComponentReport(release="app-1", digest=runs, committed=True)
    return DeviceRow(
        device="car-1", change=1, last_contact=at, heard_clock=at, online=True, sleeping_until=None,
        boot="b", boot_count=1, reported_at=at, state=State.COMMITTED, term=1,
        generation=generation, components={"app": report},
    )  # fmt: skip


def hold(to: str = "stay") -> ActiveHold:
    return ActiveHold(
        id="h", rollout="cars", fleet="cars", release="app-1", digest="d",
        artifacts=frozenset({REJECTED}), to=to, reason="", actor="eve", created_at=200.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "withheld"),
    [
        (None, True),
        (word(2, 110.0), False),  # it has obeyed this order
        (word(1, 90.0), True),  # what it was told before this order, it may run by now
        (word(1, 100.0 + HEED + 1.0), False),  # and long after it: it never got another one
        (word(1, 150.0, runs=OTHER), True),
    ],
)
def test_who_stays_is_told_what_it_runs_and_no_other(row: DeviceRow | None, withheld: bool) -> None:
    assert rejected(order(), row, [hold()]) is withheld


def test_an_order_that_knows_of_the_hold_leaves() -> None:
    assert not rejected(order(at=201.0), word(1, 90.0), [hold()])


def test_what_leads_back_and_what_is_not_rejected_leaves() -> None:
    assert not rejected(order(kind=Kind.ROLLBACK), None, [hold("previous")])
    assert not rejected(order(OTHER), None, [hold("previous")])
    assert rejected(order(), word(2, 110.0), [hold("previous")])
