"""Writes a plan for people: Markdown for the pull request, plain text for a terminal, and JSON.

Pure. One order in all three: what happens in a sentence, then the numbers, then who is left out.
The first line of the Markdown is the sticky comment's id: a later plan replaces it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from controller.rollout.plan import Effect, Plan, Planned, effects
from controller.rollout.planned_steps import PlannedStep
from controller.rollout.power import SURE
from telemetry.policy import UPDATE_OK

STICKY = "<!-- bellwether-plan -->"
_SIGN = {
    Effect.OPENS: "+",
    Effect.EDITED: "~",
    Effect.REFUSED: "!",
    Effect.BLOCKED: "x",
    Effect.REMOVED: "-",
    Effect.UNCHANGED: " ",
}
_MARK = {
    Effect.OPENS: "🟢",
    Effect.EDITED: "✏️",
    Effect.REFUSED: "✋",
    Effect.BLOCKED: "❌",
    Effect.REMOVED: "➖",
    Effect.UNCHANGED: "·",
}
_NO_FLEET = (
    "Only the documents were compared: no server was asked, so devices, downloads and what the "
    "gates can prove are not known (--server URL or --state-dir DIR)."
)


def digest(plan: Plan) -> str:
    """SHA-256 of what was seen, without the clock: an approval is bound to it."""
    body = asdict(plan)
    for key in ("at", "base", "head"):
        body.pop(key)
    for rollout in body["rollouts"]:
        rollout.pop("ends")
        for step in rollout["steps"]:
            for key in ("begins", "ends", "unheard"):
                step.pop(key)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + sha256(text.encode()).hexdigest()


def document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: camelCase, times in RFC 3339, sizes in bytes, durations in seconds."""
    body: dict[str, Any] = _camel(asdict(plan))
    body["at"] = moment(plan.at)
    for rollout, planned in zip(body["rollouts"], plan.rollouts, strict=True):
        rollout["ends"] = moment(planned.ends)
        for step, each in zip(rollout["steps"], planned.steps, strict=True):
            step["begins"], step["ends"] = moment(each.begins), moment(each.ends)
    return {
        **body,
        "changes": plan.changes,
        "digest": digest(plan),
        "summary": summary(plan),
        "markdown": markdown(plan),
        "text": plain(plan),
    }


def summary(plan: Plan) -> str:
    """`Plan: 1 opens, 2 edited, 1 blocked.`"""
    counts = effects(plan.rollouts)
    parts = [f"{counts[e]} {e}" for e in Effect if counts.get(e) and e is not Effect.UNCHANGED]
    parts += [f"{len(plan.acts)} holds or lifts"] if plan.acts else []
    return f"Plan: {', '.join(parts)}." if parts else "Plan: nothing changes on any device."


# -- Markdown -------------------------------------------------------------------------------------


def markdown(plan: Plan) -> str:
    """For a pull request; the sticky comment id is its first line."""
    lines = [STICKY, f"### Bellwether: {summary(plan).removeprefix('Plan: ')}", ""]
    if plan.errors:
        lines += ["**Errors** (what references them is blocked):", "", "```"]
        lines += [*(_code(e) for e in plan.errors[:50]), "```", ""]
    for rollout in plan.rollouts:
        if rollout.effect is not Effect.UNCHANGED:
            lines += [*_markdown_rollout(rollout, plan.measured), ""]
    for act in plan.acts:
        lines += [f"⛔ **{act.kind} `{act.id}`** — {_escape(act.sentence)}", ""]
    same = [r.rollout for r in plan.rollouts if r.effect is Effect.UNCHANGED]
    if same:
        lines += [f"Unchanged: {', '.join(f'`{name}`' for name in same)}", ""]
    if plan.notices:
        lines += ["<details><summary>Notices</summary>", ""]
        lines += [*(f"- {_escape(n)}" for n in plan.notices[:50]), "", "</details>", ""]
    if not plan.measured:
        lines += [f"> {_NO_FLEET}", ""]
    lines.append(
        f"<sub>{_escape(plan.base)} → {_escape(plan.head)} · fleet as of {moment(plan.at)} · "
        f"plan `{digest(plan)[:19]}`</sub>"
    )
    return "\n".join(lines) + "\n"


def _markdown_rollout(rollout: Planned, measured: bool) -> Iterator[str]:
    yield f"{_MARK[rollout.effect]} **`{rollout.rollout}`** — {_escape(rollout.sentence)}"
    if rollout.effect not in (Effect.OPENS, Effect.EDITED):
        return
    if rollout.before and rollout.before != rollout.after:
        yield f"\n`{rollout.before}` → `{rollout.after}`"
    if rollout.differs:
        yield ""
        yield from (f"- {_escape(str(each))}" for each in rollout.differs)
    if _told_by_step(rollout, measured):
        yield from _markdown_steps(rollout, measured)
    for line in _facts(rollout):
        yield f"- {_escape(line)}"
    for i, step in enumerate(_told_by_step(rollout, measured), 1):
        lines = _says(step)
        if lines:
            flag = "" if step.conclusive else " ⚠️"
            yield f"- **step {i}**{flag} {_escape(step.name)}"
            yield from (f"  - {_escape(line)}" for line in lines)


def _markdown_steps(rollout: Planned, measured: bool) -> Iterator[str]:
    if not measured:
        yield ""
        for i, step in enumerate(rollout.steps, 1):
            yield f"{i}. {_escape(step.name)}, soak {span(step.soak)}"
        yield ""
        return
    if rollout.effect is Effect.EDITED:
        yield f"\n{_escape(_rehearsal(rollout))}"
    yield ""
    yield "| step | who | devices | control | soak | ends, at the earliest | download |"
    yield "|--:|---|--:|--:|--:|---|--:|"
    for i, step in enumerate(rollout.steps, 1):
        person = " then `promote`" if step.waits_for else ""
        yield (
            f"| {i} | {_escape(step.name)} | {_devices(step)}{_unheard(step)} | "
            f"{step.control:,} | {span(step.soak)}{person} | {moment(step.ends) or 'never'} | "
            f"{size(step.download)} |"
        )
    yield ""
    yield f"- {_total(rollout)}"


# -- plain text -----------------------------------------------------------------------------------


def plain(plan: Plan) -> str:
    """For a terminal or a log."""
    lines: list[str] = [f"{error}" for error in plan.errors]
    if plan.errors:
        lines.append("")
    for rollout in plan.rollouts:
        lines += _plain_rollout(rollout, plan.measured)
    for act in plan.acts:
        lines += [f"  {'+' if act.kind == 'Hold' else '-'} {act.kind} {act.id}: {act.sentence}"]
    for notice in plan.notices:
        lines.append(f"    notice: {notice}")
    if not plan.measured:
        lines += ["", _NO_FLEET]
    lines += ["", summary(plan), f"{plan.base} → {plan.head} · {digest(plan)}"]
    return "\n".join(lines)


def _plain_rollout(rollout: Planned, measured: bool) -> Iterator[str]:
    yield f"  {_SIGN[rollout.effect]} {rollout.rollout}: {rollout.sentence}"
    if rollout.effect not in (Effect.OPENS, Effect.EDITED):
        return
    if rollout.before and rollout.before != rollout.after:
        yield f"      {rollout.before} → {rollout.after}"
    yield from (f"      {each}" for each in rollout.differs)
    if rollout.steps and rollout.effect is Effect.EDITED:
        yield f"      {_rehearsal(rollout)}"
    for i, step in enumerate(_told_by_step(rollout, measured), 1):
        person = f", then waits for {step.waits_for}" if step.waits_for else ""
        if not measured:
            yield f"      step {i}  {step.name}: soak {span(step.soak)}{person}"
            continue
        yield (
            f"      step {i}  {step.name}: {_devices(step)} devices{_unheard(step)}, "
            f"{step.control:,} as control, soak {span(step.soak)}{person}; "
            f"{size(step.download)}; ends {moment(step.ends) or 'never'} at the earliest"
        )
        for line in _says(step):
            yield f"                {line}"
    if measured and _told_by_step(rollout, measured):
        yield f"      {_total(rollout)}"
    for line in _facts(rollout):
        yield f"      {line}"
    yield ""


# -- words both share -----------------------------------------------------------------------------


def _told_by_step(rollout: Planned, measured: bool) -> tuple[PlannedStep, ...]:
    """The steps, unless all go back at once: a table of noughts says nothing more."""
    nobody = measured and not any(step.devices for step in rollout.steps)
    return () if nobody and rollout.returning else rollout.steps


def _total(rollout: Planned) -> str:
    reached = sum(step.devices for step in rollout.steps)
    end = moment(rollout.ends)
    when = f"the last step ends {end} at the earliest"
    if not end:
        stuck = next((i for i, s in enumerate(rollout.steps, 1) if not moment(s.ends)), 1)
        why = (
            "stops there: its cohort is empty"
            if not rollout.steps[stuck - 1].devices
            else ("never begins: no window opens within five weeks")
        )
        when = f"step {stuck} {why}"
    waits = sum(bool(step.waits_for) for step in rollout.steps)
    when += f", {waits} × waiting for a person not counted" if waits else ""
    return f"{reached:,} of {rollout.fleet_size:,} devices, {size(rollout.download)} in all; {when}"


def _facts(rollout: Planned) -> Iterator[str]:
    if rollout.returning:
        yield (
            f"{rollout.returning:,} devices have run {rollout.after} in health: they go back to "
            f"it at once, without steps; at most {size(rollout.returning_download)} to download, "
            "nothing where the other slot still holds it"
        )
    yield from rollout.notes
    for left in rollout.left_out:
        names = ", ".join(left.examples)
        more = ", …" if left.devices > len(left.examples) else ""
        yield f"{left.devices:,} × {left.why} ({names}{more})"


def _says(step: PlannedStep) -> tuple[str, ...]:
    """Warnings first, they explain the rest; then power, which the plan is read for. What a step
    alone cannot prove of failures, the steps before it help to: `gates` counts them all."""
    seen = (
        gate.sentence
        for gate in step.power
        if gate.metric != UPDATE_OK or any(chance.by_max >= SURE for chance in gate.chances)
    )
    return (*step.warnings, *seen, *step.gates)


def _rehearsal(rollout: Planned) -> str:
    return f"The next release, were it as large as {rollout.after} and committed now, would go so:"


def _devices(step: PlannedStep) -> str:
    changed = step.was is not None and step.was != step.devices
    return f"{step.was:,} → {step.devices:,}" if changed else f"{step.devices:,}"


def _unheard(step: PlannedStep) -> str:
    return f" ({step.unheard:,} offline now)" if step.unheard else ""


def moment(at: float | None) -> str:
    """RFC 3339 in minutes; empty for never."""
    if at is None or not math.isfinite(at):
        return ""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%MZ")


def span(seconds: float) -> str:
    for unit, word in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit and (seconds % unit == 0 or seconds >= 2 * unit):
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds:.3g} s" if seconds else "none"


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"


def _escape(text: str) -> str:
    """Markdown shows it as written: no tags, no links, no table cells of somebody's making."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in ("\\", "|", "[", "]", "*", "_", "@"):
        safe = safe.replace(sign, f"\\{sign}" if sign != "@" else "@\u200b")
    return " ".join(safe.split())


def _code(text: str) -> str:
    return " ".join(text.replace("```", "ʼʼʼ").split())


def _camel(value: Any) -> Any:
    if isinstance(value, dict):
        return {_camel_word(key): _camel(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_camel(item) for item in value]
    return value


def _camel_word(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word.capitalize() for word in rest)
