"""Proof that a share of devices lies below a margin: of all, and of every hardware by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telemetry.evidence import outcome
from telemetry.policy import UPDATE_OK, Engine

_SPEAKS = 2  # × the devices that refute a margin without a failure: a hardware judged by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Safe evidence of the outcomes of all waves so far."""

    name: str
    margin: float
    bad: int
    n: int
    safe: float  # F of the hardware that is furthest from its proof
    lacks: str
    unproven: tuple[str, ...]  # hardware with too few devices to prove anything


def proof(
    engine: Engine,
    name: str,
    groups: Mapping[str, tuple[int, int]],
    margin: float,
    words: str = "",
) -> Proof:
    """Of (bad, devices) by hardware; `words` say what the bad ones are, where not `name`."""
    words = words or name
    bad, n = (sum(group[i] for group in groups.values()) for i in (0, 1))
    safe = outcome.safe(engine, bad, n, margin)
    enough = outcome.needed(engine, margin)
    worst, unproven = ("", bad, n), []
    for hardware, (s, started) in sorted(groups.items()) if len(groups) > 1 else ():
        own = outcome.safe(engine, s, started, margin)
        if own < 1 / engine.beta and started < _SPEAKS * enough:
            unproven.append(hardware)
        elif own < safe:
            safe, worst = own, (f" of hardware {hardware}" if hardware else "", s, started)
    (where, s, started), need = worst, outcome.needed(engine, margin, min(worst[1], worst[2]))
    lacks = (
        f"{UPDATE_OK}: {started - s} of {need - s} devices{where} needed without failure to refute "
        f"{margin * 100:.3g} % {words}" + (f" ({s} {words})" if s else "")
    )
    return Proof(
        name=name,
        margin=margin,
        bad=bad,
        n=n,
        safe=safe,
        lacks=lacks,
        unproven=tuple(unproven),
    )
