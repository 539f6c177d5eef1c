"""Turns targets into signed orders.

An order is signed for its device, and its term and generation are above all that the device has
seen. What the orders of alike devices share is worded once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from controller.orders import Issuer
from controller.rollout.desired import Catalog, Target
from controller.rollout.model import Device, Order, Told
from controller.rollout.recovery import MOST
from device_agent.codec import to_wire
from device_agent.protocol import ComponentOrder, Desired, Kind, canonical, timestamp
from telemetry.report import DeviceRow


class Press:
    """Prints the orders of one moment."""

    def __init__(self, issuer: Issuer, catalog: Catalog, now: float) -> None:
        self._issuer, self._catalog, self._now = issuer, catalog, now
        issued = datetime.fromtimestamp(now, UTC)
        self._issued, self._not_after = timestamp(issued), timestamp(issued + issuer.lease)
        self._worded: dict[Hashable, _Wording] = {}

    def order(
        self, device: Device, target: Target, last: Order | None, row: DeviceRow | None
    ) -> tuple[Order, dict[str, Any]]:
        """(the order, its row for the desired table): newer than all that the device knows.

        The row's body is the order's canonical bytes, until it is sealed (`seal`)."""
        known = row if row is not None and max(row.term, row.generation) <= MOST else None
        term = max(self._issuer.term + device.term, known.term if known else 0)
        generation = 1 + max(last.generation if last else 0, known.generation if known else 0)
        wording = self._wording(target)
        own = {"device": device.id, "term": term, "generation": generation}
        order = Order(
            device=device.id,
            term=term,
            generation=generation,
            attempt=target.attempt,
            kind=str(target.kind),
            components=target.components,
            at=self._now,
        )
        values = {
            **own,
            "attempt": target.attempt,
            "kind": order.kind,
            "components": wording.told,
            "rollout": wording.rollout,
            "body": wording.form.filled(own),
            "at": self._now,
            "published": False,
        }
        return order, values

    def seal(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sign these rows' orders and put them into their envelopes."""
        bodies = self._issuer.key.seal_all([row["body"] for row in rows])
        for row, body in zip(rows, bodies, strict=True):
            row["body"] = body

    def _wording(self, target: Target) -> _Wording:
        told = tuple(sorted(target.components.items()))
        alike = (target.kind, target.attempt, target.security_epoch, target.preconditions, told)
        known = self._worded.get(alike)
        if known is None:
            known = self._worded[alike] = self._word(target)
        return known

    def _word(self, target: Target) -> _Wording:
        forward, base_url = target.kind is Kind.INSTALL, self._issuer.base_url
        desired = Desired(
            device="",
            term=0,
            generation=0,
            attempt=target.attempt,
            kind=target.kind,
            components={
                component: _component(component, told, self._catalog, base_url)
                for component, told in sorted(target.components.items())
                if target.kind is not Kind.NONE and _known(component, told, self._catalog)
            },
            preconditions=target.preconditions if forward else (),
            security_epoch=target.security_epoch,
            issued_at=self._issued,
            not_after=self._not_after if forward else None,
        )
        return _Wording(
            form=Form(to_wire(desired), ("device", "term", "generation")),
            told={c: asdict(told) for c, told in target.components.items()},
            rollout=next((t.rollout for t in target.components.values() if t.rollout), None),
        )


class Form:
    """The canonical bytes of an object, with blanks for what differs from one to the next."""

    def __init__(self, wire: Mapping[str, Any], blanks: Collection[str]) -> None:
        self._blanks = tuple(sorted(blanks))  # canonical bytes have their keys in this order
        same = {key: canonical(value).replace(b"%", b"%%") for key, value in wire.items()}
        same |= dict.fromkeys(self._blanks, b"%b")
        pairs = (canonical(key) + b":" + same[key] for key in sorted(same))
        self._text = b"{%b}" % b",".join(pairs)

    def filled(self, values: Mapping[str, Any]) -> bytes:
        """The canonical bytes of the object with these values in its blanks."""
        return self._text % tuple([_canonical(values[name]) for name in self._blanks])


def _canonical(value: Any) -> bytes:
    # The general encoder takes as long for one whole number as for a small document.
    return b"%d" % value if type(value) is int else canonical(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wording:
    """What the orders of alike devices share."""

    form: Form
    told: Mapping[str, Any]
    rollout: str | None


def _known(component: str, told: Told, catalog: Catalog) -> bool:
    # A component that runs what no release document names cannot be ordered, only left alone.
    return catalog.owner(component, told.digest, told.release) is not None


def _component(component: str, told: Told, catalog: Catalog, base_url: str) -> ComponentOrder:
    release = catalog.owner(component, told.digest, told.release)
    assert release is not None  # noqa: S101 - _known filtered
    artifact = release.components[component]
    own = f"{base_url}/artifacts/{artifact.digest}"
    return ComponentOrder(
        release=release.name,
        digest=artifact.digest,
        size=artifact.size,
        urls=(artifact.url,) if artifact.url else (own,),
        installer=str(release.installer),
    )
