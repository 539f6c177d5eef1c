"""The steps of a rollout that a commit would open: sizes, times, downloads, what gates can prove.

Pure. `drawing` draws every step, one after the other on a copy of the world, as the loop would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.manifests.kinds import Release
from controller.rollout import drawing, gate, schedule
from controller.rollout.model import Arm, Device, Member, Rollout
from controller.rollout.power import GatePower, History, PlannedWave, power
from controller.rollout.standing import patience, reachable
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import Decision, Put, World

PLANNED = "plan"  # id of the rollout that is not opened
NOBODY_NEW = "no device is left for this step: the steps before it reach all that it asks for"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    name: str
    size: int  # of its cohort
    devices: int  # that this step exposes
    control: int
    unheard: int  # of them out of reach now: they come when they are heard
    download: int  # bytes
    begins: float  # Unix seconds, at the earliest
    ends: float
    soak: float  # seconds
    waits_for: str = ""  # a person's word, after it
    gates: tuple[str, ...] = ()  # what a clean step must show
    power: tuple[GatePower, ...] = ()  # which rise is seen, how surely, by when
    warnings: tuple[str, ...] = ()
    conclusive: bool = True  # are there enough devices for a verdict at all?
    was: int | None = None  # devices, by the rules before an edit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    wave: Wave
    exposed: tuple[Member, ...]
    control: tuple[Member, ...]
    returning: tuple[Member, ...]
    size: int
    warnings: tuple[str, ...]
    empty: bool  # its cohort: the rollout would stop there


def drawn_by_step(world: World, rollout: Rollout, pinned: Pinned, now: float) -> Iterator[_Drawn]:
    """Every step as `drawing` would draw it now, each on top of the ones before."""
    members: dict[str, Member] = {}
    for wave in pinned.waves:
        here = replace(rollout, step=wave.index)
        copy = replace(
            world,
            rollouts={**world.rollouts, PLANNED: here},
            members={**world.members, PLANNED: members},
            pinned={**world.pinned, PLANNED: pinned},
        )
        actions = list(drawing.draw_step(copy, here, pinned, wave, now))
        new = [m for action in actions if isinstance(action, Put) for m in action.members]
        members = {**members, **{m.device: m for m in new}}
        exposed = tuple(m for m in new if m.arm is Arm.EXPOSED)
        decision = next((a for a in actions if isinstance(a, Decision)), None)
        inputs: Mapping[str, Any] = decision.inputs if decision else {}
        nobody = decision is not None and decision.verdict == "NoMembers"
        yield _Drawn(
            wave=wave,
            exposed=exposed,
            control=tuple(m for m in new if m.arm is Arm.CONTROL),
            returning=tuple(m for m in new if m.arm is Arm.RETURNING),
            size=len(exposed),
            warnings=tuple(_warnings(inputs, decision.sentence if decision and nobody else ""))
            if exposed or nobody
            else (NOBODY_NEW,),
            empty=nobody,
        )


def _warnings(inputs: Mapping[str, Any], nobody: str) -> Iterator[str]:
    if nobody:
        yield nobody
    yield from inputs.get("warnings", ())
    if inputs.get("held_out"):
        yield f"{inputs['held_out']} held out until the benefit is measured"
    if inputs.get("valid_from") is not None:
        yield f"best first: what it shows is valid for scores ≥ {inputs['valid_from']:g}"


def planned(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    drawn: Sequence[_Drawn],
    now: float,
    past: History | None,
) -> Iterator[PlannedStep]:
    begins, exposed = now, 0
    powers = _power(pinned, drawn, past)
    world = replace(world, pinned={**world.pinned, PLANNED: pinned})
    limit = patience(world, replace(rollout, id=PLANNED))
    for each in drawn:
        wave = each.wave
        devices = [world.devices[m.device] for m in each.exposed]
        exposed += len(devices)
        told_by = schedule.told_by(pinned.rollout.windows, wave.step, devices, begins)
        if each.empty:
            ends = math.inf
        else:
            ends = told_by + (wave.step.soak.total_seconds() if devices else 0.0)
        gates, conclusive = _gates(pinned, wave, exposed, len(devices))
        yield PlannedStep(
            name=wave.name,
            size=each.size,
            devices=len(devices),
            control=len(each.control),
            unheard=sum(not reachable(world, d.id, limit, now) for d in devices),
            download=sum(download(world, pinned.release, d) for d in devices),
            begins=begins,
            ends=ends,
            soak=wave.step.soak.total_seconds(),
            waits_for="`promote`" if wave.step.pause is not None else "",
            gates=gates,
            power=powers.get(wave.index, ()),
            warnings=each.warnings,
            conclusive=conclusive,
        )
        begins = ends


def _gates(pinned: Pinned, wave: Wave, exposed: int, here: int) -> tuple[tuple[str, ...], bool]:
    """What a clean step of this size can prove; (sentences, is it enough for a verdict)."""
    last = wave.index == len(pinned.waves) - 1
    if not here or wave.fixes:
        return (), True
    need = gate.needed(pinned.policy.judged, _limits(wave))
    enough = exposed >= need["devices"]
    verb = "enough" if enough else "too few"
    words = [f"{exposed} devices so far, {need['devices']} needed without failure: {verb}"]
    for metric, wants in need["gates"].items():
        hours = wants["hours"]
        if hours is not None:
            each = hours / max(exposed, 1)
            words.append(
                f"{metric}: {hours:,.0f} {_units(wants['unit'])} without an event are needed, "
                f"{each:,.3g} a device; or {wants['events']} first events at ratio "
                f"{wants['ratio']:g}"
            )
        else:
            words.append(f"{metric}: {wants['events']} first events at ratio {wants['ratio']:g}")
    if not enough and not last:
        rule = pinned.rollout.strategy.on_inconclusive.action
        words.append(f"it would end inconclusive, onInconclusive is {rule}: enlarge the step")
    return tuple(words), enough or last


def _units(unit: str) -> str:
    """`device_hour` → `device hours`."""
    words = unit.replace("_", " ")
    return words if words.endswith(("km", "s")) else f"{words}s"


def _limits(wave: Wave) -> gate.StepLimits:
    longest = wave.step.max_soak
    return gate.StepLimits(
        wave=wave.index,
        name=wave.name,
        min_soak=wave.step.soak.total_seconds(),
        max_soak=longest.total_seconds() if longest is not None else None,
        margins=dict(wave.step.margins),
    )


def _power(
    pinned: Pinned, drawn: Sequence[_Drawn], past: History | None
) -> dict[int, tuple[GatePower, ...]]:
    """What each step with devices in it can see; nothing without a past."""
    if past is None:
        return {}
    waves = [
        PlannedWave(exposed=len(d.exposed), control=len(d.control), limits=_limits(d.wave))
        for d in drawn
        if d.exposed and not d.wave.fixes
    ]
    return {w.wave: w.gates for w in power(pinned.policy.judged, waves, past)}


def unmeasured(wave: Wave, now: float) -> PlannedStep:
    soak = wave.step.soak.total_seconds()
    return PlannedStep(
        name=wave.name, size=0, devices=0, control=0, unheard=0, download=0, begins=now,
        ends=now + soak, soak=soak,
        waits_for="`promote`" if wave.step.pause is not None else "",
    )  # fmt: skip


def download(world: World, release: Release, device: Device) -> int:
    """Bytes of what it does not run yet."""
    row = world.seen.get(device.id)
    running = {c: report.digest for c, report in row.components.items()} if row else {}
    return sum(
        artifact.size
        for component, artifact in release.components.items()
        if running.get(component) != artifact.digest
    )
