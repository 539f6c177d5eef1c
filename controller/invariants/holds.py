"""I1 no order for a held digest leaves · I3 a rollback reaches every device · I7 orders in turn.

What each device is told, what left on the wire, and what settled devices run, against the holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from controller.facts import Finding, Look, Row, Sent
from device_agent.protocol import Desired, Kind


def held_orders(look: Look) -> Iterator[Finding]:
    """I1 and I3 on the tables: what each device is told, against the holds of its fleet."""
    for row in look.tables.desired:
        device = look.devices.get(row["device"])
        if device is None or device["status"] != "active":
            continue
        for hold in look.in_force:
            if look.covers(hold, device):
                yield from _held_order(look, row, hold)


def _held_order(look: Look, row: Row, hold: Row) -> Iterator[Finding]:
    named = {c: told["digest"] for c, told in row["components"].items()}
    rejected = [c for c, told in named.items() if told in hold["artifacts"]]
    if not rejected:
        return
    component, name = rejected[0], row["device"]
    running = named[component] in look.runs(name)
    if running and hold["to"] == "stay":
        return
    if not look.elsewhere(name, hold, component):
        return
    if running and look.stays(name, hold):
        return
    if row["kind"] == Kind.INSTALL and row["at"] > hold["created_at"] + look.grace:
        yield Finding(
            invariant="I1",
            what=f"{name} was told {hold['release']} after hold {hold['id']} rejected it",
            do="Stop the fleet (`bellwether stop --scope all`), keep both databases, and report it",
        )
    elif look.active_at > hold["created_at"] + max(look.grace, 0.001):
        yield Finding(
            invariant="I3",
            what=f"hold {hold['id']} rejects {hold['release']}, and {name} is still told to run it",
            do="Restart the controller: it composes every order anew; if it stays, report it",
        )


def held_wire(look: Look) -> Iterator[Finding]:
    """I1 and I7, exactly: what left on the wire after a hold was committed."""
    last: dict[str, tuple[tuple[int, int], bytes]] = {}
    for index, sent in enumerate(look.seen.sent):
        order, wrong = look.open(sent.body)
        if order is None or wrong:
            yield Finding(
                invariant="I7",
                what=f"an order for {sent.device} left that is not ours: {wrong}",
                do="Look who holds the broker's service account",
            )
            continue
        yield from _in_turn(look, sent, order, last)
        if order.kind is not Kind.INSTALL:
            continue
        for hold in look.tables.holds:
            mark = look.seen.hold_marks.get(hold["id"])
            later = index >= mark if mark is not None else sent.at > hold["created_at"]
            lifted = hold["lifted_at"] is not None and sent.at >= hold["lifted_at"]
            lifted = lifted or index >= look.seen.lift_marks.get(hold["id"], len(look.seen.sent))
            told = {one.digest for one in order.components.values()}
            held = told & set(hold["artifacts"])
            if not later or lifted or not held or _stays(look, sent, hold, held, order):
                continue
            device = look.devices.get(sent.device)
            if device is not None and look.covers(hold, device):
                yield Finding(
                    invariant="I1",
                    what=f"an order for {hold['release']} left for {sent.device} after hold "
                    f"{hold['id']} was committed",
                    do="Stop the fleet, keep the databases, and report it",
                )


def _in_turn(
    look: Look, sent: Sent, order: Desired, last: dict[str, tuple[tuple[int, int], bytes]]
) -> Iterator[Finding]:
    place = (order.term, order.generation)
    before = last.get(sent.device)
    if before is not None and before[0] == place and before[1] != sent.body:
        yield Finding(
            invariant="I7",
            what=f"two orders for {sent.device} claim term and generation {place}",
            do="Two controllers wrote at once: stop one of them",
        )
    if before is None or place >= before[0]:
        last[sent.device] = (place, sent.body)


def _stays(look: Look, sent: Sent, hold: Row, held: set[str], order: Desired) -> bool:
    """Does the hold leave this device what it runs? Then its old order may come again."""
    components = [c for c, told in order.components.items() if told.digest in held]
    moves = hold["to"] != "stay" and any(look.elsewhere(sent.device, hold, c) for c in components)
    if moves:
        return False
    truth = look.truths.get(sent.device)
    if truth is None:
        return held <= look.runs(sent.device)
    began = {start.digest for start in truth.starts if start.at <= sent.at}
    if not began:  # it ran what it left the factory with, which no start has put there
        began = set(truth.had) - {start.digest for start in truth.starts}
    return held <= began or held <= set(truth.active.values())


def held_devices(look: Look) -> Iterator[Finding]:
    """I3 and I9 on the devices themselves, once they are settled."""
    for truth in look.seen.devices:
        device = look.devices.get(truth.device)
        if not truth.settled or not truth.honest or device is None or device["status"] != "active":
            continue
        for hold in look.in_force:
            if not look.covers(hold, device) or hold["to"] == "stay":
                continue
            if look.stays(truth.device, hold):
                continue
            for component, running in truth.active.items():
                bad = running in hold["artifacts"]
                if bad and look.elsewhere(truth.device, hold, component):
                    yield Finding(
                        invariant="I3",
                        what=f"{truth.device} still runs {hold['release']}, which hold "
                        f"{hold['id']} rejects",
                        do="Look at its order (`bellwether device show`) and at its link",
                    )
