"""I6 every decision replays · I14 deafness never widens and never rolls back.

A decision that an older engine recorded may be judged otherwise by the present one: that breaks no
promise and is a note. The engine that recorded it stands in the decision.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from controller import engine
from controller.facts import Finding, Look, Row
from controller.rollout import replay
from controller.rollout.standing import HEARTBEAT, HEARTBEATS

MOST_REPLAYED = 5_000  # newest decisions that are judged again
HEARD_GAP = 5.0  # seconds without a probe that still count as heard


def decisions(look: Look) -> Iterator[Finding]:
    rows = sorted(look.tables.decisions, key=lambda row: row["id"])
    for row in rows[-MOST_REPLAYED:]:
        if engine.recorded(row["policy"]) == engine.present():
            yield from _replayed(row)
    yield from _widened(look, rows)
    yield from _deaf(look, rows)


def _patience(rollout: Row) -> float:
    """Seconds without contact after which its members count as silent."""
    strategy = ((rollout["pinned"] or {}).get("rollout") or {}).get("strategy") or {}
    return float(strategy.get("silent_after") or HEARTBEATS * HEARTBEAT)


def of_other_engines(rows: Iterable[Row]) -> Iterator[str]:
    """One sentence for each other engine: how many of its decisions the present one shares."""
    different: dict[str, list[str]] = defaultdict(list)
    counted: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: str(row["id"]))[-MOST_REPLAYED:]:
        by = engine.recorded(row["policy"])
        if by == engine.present():
            continue
        judged = _judged(row)
        counted[by] += judged is not None
        if judged is False:
            different[by].append(row["id"])
    for by, n in sorted(counted.items()):
        who = f"engine {by}" if by else "an engine that did not say its version"
        otherwise = different[by]
        shown = f": {', '.join(otherwise[:3])}" if otherwise else ""
        yield (
            f"{n} decisions were recorded by {who}; the present one ({engine.present()}) judges "
            f"{len(otherwise)} of them otherwise{shown}"
        )


def _judged(row: Row) -> bool | None:
    """Does the present engine judge it the same? None: it is no verdict."""
    try:
        again = replay.replay([row])
    except replay.Unreadable:
        return False
    return again[0].same if again else None


def _replayed(row: Row) -> Iterator[Finding]:
    try:
        for one in replay.replay([row]):
            if one.same:
                continue
            if one.recorded == "widen" and one.judgement.verdict != "widen":
                yield Finding(
                    invariant="I14",
                    what=f"decision {one.id} widened without the evidence for it: {one.sentence}",
                    do="`bellwether pause` it: its inputs say that the gate would have waited",
                )
            else:
                yield Finding(
                    invariant="I6",
                    what=f"decision {one.id} does not replay: {one.sentence}",
                    do="Its inputs or numbers were changed since: compare its row with a backup",
                )
    except replay.Unreadable as error:
        yield Finding(
            invariant="I6",
            what=f"decision {row['id']} cannot be judged again: {error}",
            do="Its row was changed: compare it with a backup",
        )


def _widened(look: Look, rows: Sequence[Row]) -> Iterator[Finding]:
    """I14: every step that is behind a rollout has its verdict, or a person who promoted it."""
    passed: dict[str, set[int]] = defaultdict(set)
    promoted: set[str] = set()
    for row in rows:
        if row["kind"] == "command" and row["verdict"] == "promote":
            promoted.add(row["rollout"])
        if row["kind"] != "verdict" or row["verdict"] != "widen":
            continue
        step = (row["inputs"] or {}).get("step", {})
        by_person = str(row["sentence"]).startswith("WIDENED by ")
        if by_person and row["rollout"] not in promoted and "policy" not in row["sentence"]:
            continue
        passed[row["rollout"]].add(int(step.get("wave", -1)))
    for rollout in look.tables.rollouts:
        missing = set(range(rollout["step"])) - passed[rollout["id"]]
        if missing:
            yield Finding(
                invariant="I14",
                what=f"{rollout['name']} ({rollout['release']}) went past step "
                f"{min(missing) + 1} without a verdict that let it",
                do="`bellwether pause` it; somebody wrote into the rollouts table",
            )


def _deaf(look: Look, rows: Sequence[Row]) -> Iterator[Finding]:
    spans = list(look.seen.deaf)
    heard = look.tables.hearing_at
    if heard is not None and heard > 0 and look.now - heard > HEARD_GAP + look.grace:
        spans.append((heard, look.now))
    slack = HEARD_GAP + look.grace
    for row in rows:
        if row["verdict"] not in ("widen", "roll_back") or row["kind"] != "verdict":
            continue
        if str(row["sentence"]).startswith("WIDENED by "):
            continue  # a person may
        if any(begin + slack < row["at"] < end for begin, end in spans):
            yield Finding(
                invariant="I14",
                what=f"decision {row['id']} ({row['verdict']}) was made while nothing was heard",
                do="Look at the hearing clock: ingest or broker were away",
            )
    patience = {row["id"]: _patience(row) for row in look.tables.rollouts}
    last = {report.device: report.last_contact for report in look.tables.reports}
    for row in look.tables.members:
        # Who was drawn while nothing is heard may have been silent before that began.
        heard_at = last.get(row["device"], math.inf) + patience.get(row["rollout"], 0.0)
        if row["state"] == "silent" and any(
            begin + slack < row["updated_at"] < end and heard_at > begin for begin, end in spans
        ):
            yield Finding(
                invariant="I14",
                what=f"{row['device']} was counted silent while nothing could be heard",
                do="Look at the hearing clock: ingest or broker were away",
            )
