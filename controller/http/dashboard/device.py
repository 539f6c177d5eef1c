"""One device: what it runs, what it should run, and why not yet. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.http.dashboard.figures import moment, seconds
from controller.http.dashboard.rollout import step_name
from controller.http.dashboard.signs import Sign, Tone, of_member, sign

Plain = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of "why not updated?": it is met, it is what the device waits for, or it may be."""

    sign: Sign
    question: str
    answer: str

    @property
    def blocks(self) -> bool:
        return self.sign.tone is Tone.BAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    name: str
    desired: str
    reported: str
    digest: str
    sign: Sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the timeline; `at` is RFC 3339, `by` whose clock it is."""

    at: str
    what: str
    detail: str
    by: str
    sign: Sign


def components(device: Plain) -> tuple[Component, ...]:
    wanted = (device["desired"] or {}).get("components", {})
    runs = device["components"]
    return tuple(
        _component(name, wanted.get(name), runs.get(name)) for name in sorted({*wanted, *runs})
    )


def _component(name: str, wanted: Plain | None, runs: Plain | None) -> Component:
    if runs is None:
        how = sign("Not reported", Tone.WAIT)
    elif wanted is None:
        how = sign("Not ordered by us", Tone.IDLE)
    elif wanted["digest"] != runs["digest"]:
        how = sign("On its way", Tone.MOVING)
    else:
        how = (
            sign("As ordered", Tone.GOOD)
            if runs.get("committed")
            else sign("On trial", Tone.MOVING)
        )
    return Component(
        name=name,
        desired="—" if wanted is None else str(wanted["release"]),
        reported="—" if runs is None else str(runs["release"]),
        digest="" if runs is None else str(runs["digest"]),
        sign=how,
    )


def why_not(
    device: Plain, newest: Plain | None, fixes: str | None, holds: Sequence[Plain],
    stops: Sequence[Plain],
) -> tuple[Check, ...]:  # fmt: skip
    """Every reason that may keep the newest rollout of its fleet from a device, in order.

    Rules: who runs the release already needs no reason; who is in its rollout is told by what the
    loop wrote on its membership; who is not drawn waits for the step of its cohort.
    """
    if newest is None:
        return (_ask("Is there a rollout for its fleet?", Tone.IDLE, "None yet."),)
    if _runs(device, newest):
        return (_ask("Does it run the release?", Tone.GOOD, f"Yes: {newest['release']}."),)
    return (
        _registered(device),
        _moving(newest),
        _rejected(newest, holds),
        _stopped(stops),
        _drawn(device, newest, fixes),
        _reached(device),
        _ready(device),
    )


def _runs(device: Plain, newest: Plain) -> bool:
    artifacts: Mapping[str, str] = newest["artifacts"]
    return bool(artifacts) and all(
        device["components"].get(name, {}).get("digest") == digest
        and device["components"][name].get("committed")
        for name, digest in artifacts.items()
    )


def _ask(question: str, tone: Tone, answer: str) -> Check:
    word = {Tone.GOOD: "Met", Tone.BAD: "Blocks", Tone.WAIT: "Waits", Tone.MOVING: "Under way"}
    return Check(sign=sign(word.get(tone, "—"), tone), question=question, answer=answer)


def _registered(device: Plain) -> Check:
    status = device["status"]
    if status == "active":
        return _ask("Is it an active device?", Tone.GOOD, f"Yes, of fleet {device['fleet']}.")
    return _ask("Is it an active device?", Tone.BAD, f"It is {status}: no rollout reaches it.")


def _moving(newest: Plain) -> Check:
    question = f"Does {newest['name']} move?"
    match newest["state"]:
        case "Progressing" | "Soaking":
            return _ask(question, Tone.GOOD, f"{newest['state']}, step {newest['step'] + 1}.")
        case "Completed":
            return _ask(question, Tone.GOOD, "Completed: who was not reached gets it at contact.")
        case "Pending" | "Paused" | "Inconclusive" | "NoMembers":
            return _ask(question, Tone.WAIT, newest["sentence"])
    return _ask(question, Tone.BAD, newest["sentence"])


def _rejected(newest: Plain, holds: Sequence[Plain]) -> Check:
    question = f"Is {newest['release']} allowed?"
    for hold in holds:
        if hold["liftedAt"] is None and hold["digest"] == newest["digest"]:
            return _ask(question, Tone.BAD, f"Held by {hold['actor']}: {hold['reason']}")
    return _ask(question, Tone.GOOD, "No hold is in force on it.")


def _stopped(stops: Sequence[Plain]) -> Check:
    if not stops:
        return _ask("Is nothing stopped?", Tone.GOOD, "No stop is in force.")
    stop = stops[0]
    scope = f"{stop['scope']} {stop['value']}".strip()
    return _ask(
        "Is nothing stopped?", Tone.BAD, f"Stop of {scope} by {stop['actor']}: {stop['reason']}"
    )


def _drawn(device: Plain, newest: Plain, fixes: str | None) -> Check:
    question, member = "Is its turn come?", device["membership"]
    if member is not None and member["rollout"] == newest["id"]:
        if member["arm"] == "control":
            return _ask(
                question, Tone.WAIT,
                f"It is in the control group of step {member['step'] + 1}: the release is judged "
                "against it, and it gets it when a later step draws it.",
            )  # fmt: skip
        state = of_member(member["state"])
        reason = f": {member['reason']}" if member["reason"] else ""
        tone = {Tone.BAD: Tone.BAD, Tone.GOOD: Tone.GOOD}.get(state.tone, Tone.MOVING)
        if member["reason"] and tone is Tone.MOVING:
            tone = Tone.WAIT
        return _ask(question, tone, f"Step {member['step'] + 1}, {state.word.lower()}{reason}.")
    cohort = device["cohort"]
    named = [n for n, step in enumerate(newest["steps"]) if step.get("cohort") == cohort]
    if not cohort or not named:
        return _ask(question, Tone.WAIT, "No step of the rollout names its cohort yet.")
    first = named[0] + (1 if fixes else 0)
    name = step_name(newest["steps"][named[0]])
    if first > newest["step"]:
        return _ask(
            question, Tone.WAIT,
            f"Cohort {cohort}: its first step is number {first + 1} ({name}), the rollout is at "
            f"{newest['step'] + 1}.",
        )  # fmt: skip
    return _ask(question, Tone.WAIT, f"Cohort {cohort}: not among the share drawn so far ({name}).")


def _reached(device: Plain) -> Check:
    question = "Can we reach it?"
    if device["online"]:
        return _ask(question, Tone.GOOD, f"Online, last heard {moment(device['lastContact'])}.")
    if device["lastContact"] is None:
        return _ask(question, Tone.BAD, "It was never heard: is it enrolled and running?")
    return _ask(
        question, Tone.BAD, f"Offline since {moment(device['lastContact'])}: it gets it at contact."
    )


def _ready(device: Plain) -> Check:
    question = "Does the device agree?"
    if device["blockedBy"]:
        return _ask(question, Tone.WAIT, f"It waits for {', '.join(device['blockedBy'])}.")
    if device["reason"]:
        return _ask(
            question, Tone.WAIT, f"Its last word was {device['state']}: {device['reason']}."
        )
    return _ask(question, Tone.GOOD, "It names nothing that it waits for.")


def timeline(
    device: Plain, memberships: Iterable[Plain], audited: Iterable[Plain], limit: int = 60
) -> tuple[Entry, ...]:
    """What became of it, newest first: its own history, our draws and orders, people's acts."""
    found = [
        Entry(
            at=seconds(float(entry["at"])) or "",
            what=f"{entry['component']}: {entry['release']}",
            detail="went back by itself" if entry["event"] == "rolled_back" else "activated",
            by="device",
            sign=sign("Went back", Tone.BAD) if entry["event"] == "rolled_back"
            else sign("Activated", Tone.GOOD),
        )
        for entry in device["history"]
    ]  # fmt: skip
    for member in memberships:
        found.extend(_membership(member))
    for row in audited:
        detail = row["detail"] if isinstance(row["detail"], Mapping) else {}
        found.append(
            Entry(
                at=row["at"],
                what=row["action"],
                detail=str(detail.get("reason") or ""),
                by=row["actor"],
                sign=sign(
                    "By itself" if row["actor"] == f"device:{device['id']}" else "By a person",
                    Tone.IDLE,
                ),
            )
        )
    if device["enrolledAt"]:
        found.append(
            Entry(at=device["enrolledAt"], what="enrolled", detail=f"fleet {device['fleet']}",
                  by="server", sign=sign("Enrolled", Tone.IDLE))
        )  # fmt: skip
    found.reverse()  # of one moment, what follows from the other stands above it
    return tuple(sorted(found, key=lambda entry: entry.at, reverse=True)[:limit])


def _membership(member: Plain) -> list[Entry]:
    step, name = member["step"] + 1, f"{member['name']} → {member['release']}"
    score = "" if member["score"] is None else f", score {member['score']:.1f}"
    if member["arm"] == "control":
        how = sign("Control", Tone.IDLE)
        return [Entry(at=member["drawnAt"], what=name, detail=f"control of step {step}{score}",
                      by="server", sign=how)]  # fmt: skip
    found = [
        Entry(at=member["drawnAt"], what=name, detail=f"drawn for step {step}{score}",
              by="server", sign=sign("Drawn", Tone.IDLE))
    ]  # fmt: skip
    if member["toldAt"]:
        found.append(
            Entry(at=member["toldAt"], what=name, detail="told", by="server",
                  sign=sign("Told", Tone.MOVING))
        )  # fmt: skip
    if member["state"] not in ("drawn", "told"):
        found.append(
            Entry(at=member["updatedAt"], what=name, detail=member["reason"], by="server",
                  sign=of_member(member["state"]))
        )  # fmt: skip
    return found
