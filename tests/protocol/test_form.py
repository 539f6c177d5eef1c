"""A form that is filled in has the canonical bytes of the whole object: they are what is signed."""

from __future__ import annotations

import json

import pytest

from controller.press import Form
from device_agent.codec import to_wire
from device_agent.protocol import ComponentOrder, Desired, Kind, canonical

DIGEST = "sha256:" + "a" * 64


def order(**changes: object) -> Desired:
    part = ComponentOrder(
        release="app-€",
        digest=DIGEST,
        size=7,
        urls=("http://x/100%25%d?device=%b",),
        installer="slots",
    )
    known = {
        "device": "car-1", "term": 3, "generation": 9, "attempt": 'r.0 "100%"',
        "kind": Kind.INSTALL, "components": {"app": part}, "preconditions": ("parked",),
        "issued_at": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    return Desired(**{**known, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "own",
    [
        {"device": "a", "term": 0, "generation": 0},
        {"device": "car-%d.b", "term": 2**53 - 1, "generation": 12},
    ],
)
def test_filled_in_it_is_canonical(own: dict[str, object]) -> None:
    form = Form(to_wire(order()), ("device", "term", "generation"))
    filled = form.filled(own)
    assert filled == canonical(to_wire(order(**own)))
    assert json.loads(filled)["components"]["app"]["urls"] == ["http://x/100%25%d?device=%b"]
