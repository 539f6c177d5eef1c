"""I7 one writer, by term · I8 a backup raises it · I11 orders derive from accepted commits."""

from __future__ import annotations

from collections.abc import Iterator

from controller.facts import Finding, Look, Row


def terms(look: Look) -> Iterator[Finding]:
    term = look.tables.term
    by_id = {row["id"]: int(row["term"]) for row in look.tables.decisions}
    newest = 0
    for row in sorted(look.tables.audit, key=lambda row: int(row["seq"])):
        own = by_id.get((row["detail"] or {}).get("decision", ""), 0)
        if own and own < newest:
            yield Finding(
                invariant="I7",
                what=f"decision {row['detail']['decision']} of term {own} was written after one of "
                f"term {newest}",
                do="An older controller wrote past its fence: end it, and look at its decisions",
            )
        newest = max(newest, own)
    if newest > term:
        yield Finding(
            invariant="I8",
            what=f"the term is {term}, and decisions of term {newest} exist",
            do="This is an old backup, or the term was lowered: restart the controller, it raises "
            "the term above all that devices have seen",
        )
    for report in look.tables.reports:
        device = look.devices.get(report.device)
        if device is None or not look.honest(report.device) or device["status"] != "active":
            continue
        if report.term > term + int(device["term"] or 0):
            yield Finding(
                invariant="I8",
                what=f"{report.device} has obeyed term {report.term}, ours is {term}",
                do="This is an old backup, or the term was lowered: restart the controller",
            )


def orders(look: Look) -> Iterator[Finding]:
    artifacts = {
        (row["name"], artifact["component"], artifact["digest"])
        for row in look.tables.releases
        for artifact in row["document"]["artifacts"]
    }
    rollouts = {row["id"] for row in look.tables.rollouts}
    term = look.tables.term
    for row in look.tables.desired:
        name = row["device"]
        order, wrong = look.orders[name]
        if order is None or wrong:
            yield _order_finding("I7", name, f"is not signed as it should be: {wrong}")
            continue
        said = (order.device, order.term, order.generation, str(order.kind), order.attempt)
        kept = (name, row["term"], row["generation"], row["kind"], row["attempt"])
        if said != kept:
            yield _order_finding("I7", name, f"says {said}, its row {kept}")
        for component, told in order.components.items():
            row_told = row["components"].get(component, {}).get("digest")
            if row_told != told.digest:
                yield _order_finding("I7", name, f"names another {component} than its row")
            if (told.release, component, told.digest) not in artifacts:
                yield _order_finding(
                    "I11", name, f"names {told.release}, which no accepted commit has shown so"
                )
        if row["rollout"] is not None and row["rollout"] not in rollouts:
            yield _order_finding("I11", name, f"belongs to no rollout: {row['rollout']}")
        yield from _order_term(look, row, term)
    yield from _unfenced(look)


def _order_term(look: Look, row: Row, term: int) -> Iterator[Finding]:
    device, report = look.devices.get(row["device"]), look.reports.get(row["device"])
    if device is None or not look.honest(row["device"]):
        return
    most = max(term + int(device["term"] or 0), report.term if report else 0)
    if row["term"] > most:
        yield Finding(
            invariant="I8",
            what=f"the order of {row['device']} is of term {row['term']}, ours is {term}",
            do="The term was lowered: restart the controller, it raises the term",
        )


def _unfenced(look: Look) -> Iterator[Finding]:
    """I7: an order that an older controller made after a newer one had taken over."""
    for row in look.tables.desired:
        device = look.devices.get(row["device"])
        if device is None or not look.honest(row["device"]):
            continue
        own = row["term"] - int(device["term"] or 0)
        for term, at in look.seen.take_overs:
            if term > own and row["at"] > at:
                yield Finding(
                    invariant="I7",
                    what=f"the order of {row['device']} was made by term {own} after term {term} "
                    "had taken over",
                    do="An older controller wrote past its fence: end it",
                )
                break


def _order_finding(invariant: str, device: str, what: str) -> Finding:
    return Finding(
        invariant=invariant,
        what=f"the order of {device} {what}",
        do="Somebody wrote into the desired table: restore it, or remove the row and restart",
    )


def releases(look: Look) -> Iterator[Finding]:
    known = {row["name"]: row for row in look.tables.releases}
    for rollout in look.tables.rollouts:
        release = known.get(rollout["release"])
        if release is None or release["digest"] != rollout["digest"]:
            yield Finding(
                invariant="I11",
                what=f"rollout {rollout['id']} brings {rollout['release']} with a digest that no "
                "accepted commit has shown",
                do="`bellwether pause` it; compare the releases and rollouts tables with a backup",
            )
