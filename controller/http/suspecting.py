"""`GET /devices:changes?since=&where=`: "what changed on these devices?" in one question.

Reads the symptom, gathers what can be true of every device, and lets `telemetry.evidence.suspects`
rank. What the symptom itself names is no suspect: it would only repeat the question.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from controller.http.devicebook import DeviceBook
from controller.http.ports import Deps
from controller.http.problems import Problem
from controller.manifests.scalars import duration
from controller.roles import Principal
from controller.store import views
from telemetry.evidence.suspects import Factor, Suspect
from telemetry.evidence.suspects import rank as ranked
from telemetry.report import DeviceRow, Totals
from telemetry.store.database import reading

_CLAUSE = re.compile(
    r"([A-Za-z][A-Za-z0-9._/-]{0,127}?)\s*(!=|>=|<=|=|~|>|<)\s*(.{0,256})", re.DOTALL
)
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_WORDS = frozenset(
    {"id", "fleet", "status", "state", "reason", "blockedBy", "online", "running", "score"}
)
_MOST_VALUES = 200  # of one label: beyond it is a serial number, no kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    key: str
    op: str
    value: str

    @property
    def about(self) -> str:
        """The kind of factor that would only repeat this clause."""
        return self.key.removeprefix("label.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Device:
    row: Row[Any]
    seen: DeviceRow | None
    index: int | None  # in the totals
    score: float | None


def rank(
    deps: Deps,
    book: DeviceBook,
    who: Principal,
    *,
    since: str,
    where: Sequence[str],
    fleet: str,
    limit: int,
) -> dict[str, Any]:
    now = deps.clock()
    start = moment(since or "24h", now)
    clauses = [parse(text) for text in where]
    metrics = any(_metric(clause) for clause in clauses)
    totals = deps.reader.totals(since=start, until=now) if metrics else None
    _known(clauses, totals)
    affected: list[set[Factor]] = []
    others: list[set[Factor]] = []
    about = {clause.about for clause in clauses}
    with reading(deps.engine) as conn:
        rows = views.list_devices(
            conn, after="", limit=1_000_000, fleets=who.fleets, fleet=fleet, status=""
        )
        drawn = views.drawn_since(conn, start)
        scores: Mapping[str, float | None] = {}
        if any(clause.key == "score" for clause in clauses):
            scores = book.scores(conn, {row.fleet for row in rows})
    seen = book.seen()
    places = {name: i for i, name in enumerate(totals.devices)} if totals else {}
    for row in rows:
        one = _Device(
            row=row,
            seen=seen.get(row.id),
            index=places.get(row.id),
            score=scores.get(row.id),
        )
        hit = all(_holds(clause, one, totals) for clause in clauses)
        factors = set(_factors(one, drawn.get(row.id, ()), start, about))
        (affected if hit else others).append(factors)
    affected, others = _kinds(affected, others)
    suspects, tried = ranked(affected, others)
    return {
        "since": views.when(start),
        "where": list(where),
        "affected": len(affected),
        "others": len(others),
        "tried": tried,
        "suspects": [_plain(suspect) for suspect in suspects[:limit]],
        "sentence": _sentence(suspects, len(affected), len(others)),
    }


def parse(text: str) -> Clause:
    """One clause of `where`; raises 422."""
    match = _CLAUSE.fullmatch(text.strip())
    if match is None:
        raise Problem(
            422,
            f"where: {text[:80]!r} is no condition",
            pointer="query/where",
            hint="write KEY OP VALUE, as in state=ROLLED_BACK or hard_braking/device_hour>0.5",
        )
    clause = Clause(key=match[1], op=match[2], value=match[3].strip())
    if (clause.op in _ORDER or _metric(clause)) and _number(clause.value) is None:
        raise Problem(422, f"where: {clause.value[:40]!r} is no number", pointer="query/where")
    if clause.op in _ORDER and not (_metric(clause) or clause.key == "score"):
        raise Problem(
            422, f"where: {clause.key[:63]} is a word: use = != or ~", pointer="query/where"
        )
    return clause


def moment(text: str, now: float) -> float:
    """`24h` ago, or an RFC 3339 time; raises 422."""
    try:
        return now - duration(text).total_seconds()
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
        at = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        at = math.nan
    if not 0 <= at <= 4e11:
        raise Problem(
            422,
            f"since: {text[:40]!r} is no time",
            pointer="query/since",
            hint="write an age (24h) or an RFC 3339 time (2026-11-24T22:00:00Z)",
        )
    return at


def _metric(clause: Clause) -> bool:
    return clause.key not in _WORDS and not clause.key.startswith(("label.", "running."))


def _known(clauses: Sequence[Clause], totals: Totals | None) -> None:
    for clause in clauses:
        if totals is None or not _metric(clause):
            continue
        name, _, unit = clause.key.partition("/")
        here = {*totals.counters, *(totals.levels if not unit else ())}
        if name not in here or (unit and unit not in totals.exposure):
            known = ", ".join(sorted({*_WORDS, *here})[:30])
            raise Problem(
                422,
                f"where: nobody has reported {clause.key[:80]!r} since then",
                pointer="query/where",
                hint=f"known: {known}; label.NAME; running.COMPONENT",
            )


def _holds(clause: Clause, one: _Device, totals: Totals | None) -> bool:
    if totals is not None and _metric(clause):
        number = _measured(clause.key, one, totals)
        return number is not None and _compared(clause, number)
    if clause.key == "score":
        return one.score is not None and _compared(clause, one.score)
    values = _words(clause.key, one)
    match clause.op:
        case "=":
            return clause.value in values
        case "!=":
            return clause.value not in values
        case _:
            return any(clause.value.lower() in value.lower() for value in values)


def _compared(clause: Clause, number: float) -> bool:
    limit = float(clause.value)
    if clause.op in _ORDER:
        return _ORDER[clause.op](number, limit)
    return (number == limit) == (clause.op != "!=")


def _measured(key: str, one: _Device, totals: Totals) -> float | None:
    if one.index is None:
        return None
    name, _, unit = key.partition("/")
    if unit:
        exposure = float(totals.exposure[unit][one.index])
        return float(totals.counters[name][one.index]) / exposure if exposure > 0 else None
    table = totals.counters if name in totals.counters else totals.levels
    number = float(table[name][one.index])
    return number if math.isfinite(number) else None


def _words(key: str, one: _Device) -> list[str]:
    row, seen = one.row, one.seen
    if key.startswith("label."):
        value = row.labels.get(key.removeprefix("label."))
        return [] if value is None else [value]
    if key in ("id", "fleet", "status"):
        return [str(getattr(row, key))]
    if seen is None:
        return ["false"] if key == "online" else []
    if key == "running" or key.startswith("running."):
        wanted = key.removeprefix("running").removeprefix(".")
        parts = [part for name, part in seen.components.items() if wanted in ("", name)]
        return [text for part in parts for text in (part.release, part.digest)]
    if key == "blockedBy":
        return [str(text) for text in seen.blocked_by]
    if key == "online":
        return [str(seen.online).lower()]
    value = seen.state if key == "state" else seen.reason
    return [] if value is None else [str(value)]


def _factors(
    one: _Device, drawn: Sequence[Row[Any]], start: float, about: set[str]
) -> Iterator[Factor]:
    """What is true of this device, and not what was asked for."""
    row, seen = one.row, one.seen
    if "fleet" not in about:
        yield Factor(kind="fleet", name="", value=row.fleet)
    for key, value in row.labels.items():
        if key not in about:
            yield Factor(kind="label", name=key, value=value)
    if row.moved_at is not None and row.moved_at >= start:
        yield Factor(kind="registry", name="moved or replaced", value="")
    if row.enrolled_at is not None and row.enrolled_at >= start:
        yield Factor(kind="registry", name="enrolled", value="")
    for member in drawn:
        step = f"step {member.step + 1}, {member.arm}" if member.step >= 0 else member.arm
        yield Factor(kind="rollout", name=member.rollout_name, value=step)
    if seen is not None:
        yield from _by_its_word(seen, row.labels.get("hardware"), start, about)


def _by_its_word(
    seen: DeviceRow, hardware: str | None, start: float, about: set[str]
) -> Iterator[Factor]:
    for component, part in seen.components.items():
        if "running" in about or f"running.{component}" in about:
            continue
        yield Factor(kind="running", name=component, value=part.release)
        if hardware and "hardware" not in about:
            yield Factor(
                kind="running on hardware", name=component, value=f"{part.release} on {hardware}"
            )
    for entry in seen.history:
        if entry.at >= start:
            yield Factor(
                kind="changed", name=entry.component, value=f"{entry.release} {entry.event}"
            )


def _kinds(*groups: list[set[Factor]]) -> tuple[list[set[Factor]], ...]:
    """Without the labels that name single devices."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for factors in group:
            for factor in factors:
                if factor.kind == "label":
                    values.setdefault(factor.name, set()).add(factor.value)
    serial = {name for name, found in values.items() if len(found) > _MOST_VALUES}
    if not serial:
        return groups
    return tuple(
        [{f for f in factors if f.kind != "label" or f.name not in serial} for factors in group]
        for group in groups
    )


def _plain(suspect: Suspect) -> dict[str, Any]:
    return {
        "factor": suspect.factor.kind,
        "name": suspect.factor.name,
        "value": suspect.factor.value,
        "affected": suspect.affected,
        "affectedOf": suspect.affected_of,
        "others": suspect.others,
        "othersOf": suspect.others_of,
        "lift": suspect.lift,
        "oddsRatio": suspect.odds_ratio,
        "p": suspect.p,
        "sentence": suspect.sentence,
    }


def _sentence(suspects: Sequence[Suspect], affected: int, others: int) -> str:
    if not affected:
        return f"no device of {others} matches"
    if not suspects:
        return (
            f"{affected} devices match; nothing that we know sets them apart from {others} others"
        )
    return f"{affected} devices match, {others} do not. {suspects[0].sentence}"


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
