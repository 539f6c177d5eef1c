"""The promises I1–I14, checked on data: the rows of both databases, and what was seen outside.

Pure: `check(tables, observed, now)` answers findings, each with its invariant, what is wrong, and
what to do; `notes` what is worth knowing and breaks no promise. `bellwether doctor` hands in the
tables of a live system; the simulation and the process tests also what they saw of wire and devices
(`Observed`), which makes I1, I4, I7, I9 and I10 exact.

A live system is read while it works: what is younger than `grace` seconds may be half done and is
no finding. Nothing here needs a device to be online: an offline fleet breaks no promise.

I1 no order for a held digest · I2 no step beyond its size · I3 a rollback reaches every device ·
I4 acknowledged is never lost · I5 counted once, decisions stay · I6 decisions replay · I7 one
writer, by term · I8 a restored backup raises the term · I9 old or new, always · I10 no activation
against the device's guard · I11 orders derive from accepted commits · I12 a stop stops · I13 one
audit record per change, chained · I14 deafness never widens and never rolls back.
"""

from __future__ import annotations

from controller.facts import Finding, Look, Observed, Tables
from controller.invariants import (
    audit,
    decisions,
    holds,
    machines,
    orders,
    steps,
    stops,
    telemetry,
)


def check(
    tables: Tables, observed: Observed | None = None, *, now: float, grace: float = 0.0
) -> list[Finding]:
    """Every broken promise that these rows show; an empty list for a sound system."""
    look = Look(tables, observed or Observed(), now, grace)
    found: list[Finding] = []
    for rule in _RULES:
        found += rule(look)
    return list(dict.fromkeys(found))


def notes(tables: Tables) -> list[str]:
    """What is no fault: decisions that another engine than the present one recorded."""
    return list(decisions.of_other_engines(tables.decisions))


_RULES = (
    holds.held_orders,
    holds.held_wire,
    holds.held_devices,
    steps.steps,
    telemetry.counting,
    decisions.decisions,
    orders.terms,
    orders.orders,
    orders.releases,
    machines.machines,
    stops.stops,
    audit.chain,
    audit.records,
)
