"""The promises I1–I14, checked on data: the rows of both databases, and what was seen outside.

Pure: `check(tables, observed, now)` answers findings, each with its invariant, what is wrong, and
what to do. `bellwether doctor` hands in the tables of a live system; the simulation and the process
tests also what they saw of wire and devices (`Observed`), which makes I1, I4, I7, I9 and I10 exact.

A live system is read while it works: what is younger than `grace` seconds may be half done and is
no finding. Nothing here needs a device to be online: an offline fleet breaks no promise.

I1 no order for a held digest · I2 no step beyond its size · I3 a rollback reaches every device ·
I4 acknowledged is never lost · I5 counted once, decisions stay · I6 decisions replay · I7 one
writer, by term · I8 a restored backup raises the term · I9 old or new, always · I10 no activation
against the device's guard · I11 orders derive from accepted commits · I12 a stop stops · I13 one
audit record per change, chained · I14 deafness never widens and never rolls back.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from controller.audit import FIRST, digest
from controller.facts import Finding, Look, Observed, Row, Sent, Tables
from controller.rollout import replay
from controller.rollout.cohort import AFTER_BEST, TOP_BAND
from device_agent.protocol import Desired, Kind

MOST_REPLAYED = 5_000  # newest decisions that are judged again
HEARD_GAP = 5.0  # seconds without a probe that still count as heard


def check(
    tables: Tables, observed: Observed | None = None, *, now: float, grace: float = 0.0
) -> list[Finding]:
    """Every broken promise that these rows show; an empty list for a sound system."""
    look = Look(tables, observed or Observed(), now, grace)
    found: list[Finding] = []
    for rule in _RULES:
        found += rule(look)
    return list(dict.fromkeys(found))


# -- I1, I3: holds --------------------------------------------------------------------------------


def _held_orders(look: Look) -> Iterator[Finding]:
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


def _held_wire(look: Look) -> Iterator[Finding]:
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
    return held <= began or held <= set(truth.active.values())


def _held_devices(look: Look) -> Iterator[Finding]:
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


# -- I2: steps ------------------------------------------------------------------------------------


def _steps(look: Look) -> Iterator[Finding]:
    exposed: dict[tuple[str, int], set[str]] = defaultdict(set)
    told: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in look.tables.members:
        if row["arm"] == "exposed":
            key = (row["rollout"], row["step"])
            exposed[key].add(row["device"])
            if row["told_at"] is not None:
                told[key].append(row["told_at"])
    draws: dict[str, list[Row]] = defaultdict(list)
    for row in look.tables.decisions:
        if row["kind"] == "draw":
            draws[row["rollout"]].append(row)
    for rollout in look.tables.rollouts:
        drawn: set[str] = set()
        best_first = False
        mine = sorted(draws[rollout["id"]], key=lambda row: row["id"])
        for draw in mine:
            step = int(str(draw["inputs"]["seed"]).rpartition("/")[2])
            members = exposed[rollout["id"], step]
            yield from _step(look, rollout, draw, members, drawn, after_best=best_first)
            drawn |= set(draw["inputs"]["exposed"])
            best_first = draw["inputs"].get("valid_from") is not None
            yield from _pace(rollout, step, told[rollout["id"], step])
        known = {int(str(row["inputs"]["seed"]).rpartition("/")[2]) for row in mine}
        extra = {step for (name, step) in exposed if name == rollout["id"]} - known
        if len(known) < len(mine) or extra:
            yield _step_finding(rollout, f"a step was drawn twice, or without a decision: {extra}")


def _step(
    look: Look,
    rollout: Row,
    draw: Row,
    members: set[str],
    before: set[str],
    *,
    after_best: bool,
) -> Iterator[Finding]:
    inputs = draw["inputs"]
    recorded = set(inputs["exposed"])
    if members - recorded:
        extra = ", ".join(sorted(members - recorded)[:5])
        yield _step_finding(rollout, f"{extra} are members of a step that did not draw them")
    if recorded & before:
        yield _step_finding(rollout, "a step drew devices that an earlier one had drawn")
    size = inputs.get("size")
    # The wave after a best_first one holds some of every band, whatever its percent.
    more = AFTER_BEST * (TOP_BAND + 2) if after_best else 0
    if size is not None and len(recorded) > _admits(rollout, inputs, size) + more:
        share = f"{float(inputs['percent']):.0%}"
        yield _step_finding(rollout, f"a step of {share} of {size} devices drew {len(recorded)}")
    if size is not None and size > len(look.tables.devices):
        yield _step_finding(rollout, f"a cohort of {size} in {len(look.tables.devices)} devices")


def _admits(rollout: Row, inputs: Row, size: int) -> int:
    """How many devices a draw from `size` may expose; a fix's first wave takes half."""
    first = str(inputs["seed"]).endswith("/0")
    if rollout["pinned"].get("fixes") and first:
        return (size + 1) // 2
    return math.ceil(float(inputs["percent"]) * size - 1e-9)


def _pace(rollout: Row, step: int, told: list[float]) -> Iterator[Finding]:
    steps = rollout["pinned"]["rollout"]["strategy"]["steps"]
    first = 1 if rollout["pinned"].get("fixes") else 0
    limit = steps[max(0, step - first)].get("max_per_minute")
    if limit is None:
        return
    told = sorted(told)
    if any(told[i + limit] < told[i] + 60 for i in range(len(told) - limit)):
        yield _step_finding(rollout, f"more than {limit} devices were told within a minute")


def _step_finding(rollout: Row, what: str) -> Finding:
    return Finding(
        invariant="I2",
        what=f"{rollout['name']} ({rollout['release']}): {what}",
        do="`bellwether pause` it, and compare the draw's decision with the members",
    )


# -- I4, I5: telemetry ----------------------------------------------------------------------------


def _counting(look: Look) -> Iterator[Finding]:
    twice = [key for key, n in Counter(look.tables.health).items() if n > 1]
    for device, boot, seq in twice[:20]:
        yield Finding(
            invariant="I5",
            what=f"message {seq} of boot {boot[:12]} of {device} was counted twice",
            do="Keep the telemetry database: its evidence is wrong; pause the rollouts it feeds",
        )
    for device, boot, seq in look.tables.health:
        counted = look.tables.boots.get((device, boot))
        if counted is not None and not counted.has(seq):
            yield Finding(
                invariant="I5",
                what=f"message {seq} of {device} is kept, and would be counted again",
                do="Rows of telemetry_boots were changed: restore the telemetry database",
            )
            break
    for device, counter, raw, rolled in look.tables.sums:
        if abs(raw - rolled) > 1e-6 * max(1.0, abs(raw)):
            yield Finding(
                invariant="I5",
                what=f"{counter} of {device}: {raw:g} in messages, {rolled:g} in rollups",
                do="Restore the telemetry database, or remove the device's rollups",
            )
    for truth in look.seen.devices:
        for boot, seq in truth.acknowledged if truth.honest else ():
            counted = look.tables.boots.get((truth.device, boot))
            if counted is None or not counted.has(seq):
                yield Finding(
                    invariant="I4",
                    what=f"message {seq} of boot {boot[:12]} of {truth.device} was acknowledged "
                    "and is not in the store",
                    do="The telemetry database lost commits: check its disk and its backups",
                )
                break


# -- I6, I14: decisions ---------------------------------------------------------------------------


def _decisions(look: Look) -> Iterator[Finding]:
    rows = sorted(look.tables.decisions, key=lambda row: row["id"])
    try:
        for one in replay.replay(list(rows[-MOST_REPLAYED:])):
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
                    do="Inputs, numbers or engine were changed since: `bellwether replay` it",
                )
    except replay.Unreadable as error:
        yield Finding(
            invariant="I6",
            what=f"a decision cannot be judged again: {error}",
            do="Its row was changed: compare it with a backup",
        )
    yield from _widened(look, rows)
    yield from _deaf(look, rows)


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
    for row in look.tables.members:
        if row["state"] == "silent" and any(
            begin + slack < row["updated_at"] < end for begin, end in spans
        ):
            yield Finding(
                invariant="I14",
                what=f"{row['device']} was counted silent while nothing could be heard",
                do="Look at the hearing clock: ingest or broker were away",
            )


# -- I7, I8, I11: terms and orders ----------------------------------------------------------------


def _terms(look: Look) -> Iterator[Finding]:
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


def _orders(look: Look) -> Iterator[Finding]:
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


def _releases(look: Look) -> Iterator[Finding]:
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


# -- I9, I10: devices -----------------------------------------------------------------------------


def _machines(look: Look) -> Iterator[Finding]:
    for truth in look.seen.devices:
        for component, running in truth.active.items():
            if running not in truth.had:
                yield Finding(
                    invariant="I9",
                    what=f"{truth.device} runs {running[:19]} of {component}, never whole there",
                    do="Take it out of service",
                )
        if truth.settled and dict(truth.active) != dict(truth.running):
            yield Finding(
                invariant="I9",
                what=f"{truth.device} believes {dict(truth.running)}, and runs {truth.active}",
                do="Its journal and its slots disagree: restart its agent",
            )
        for start in truth.starts:
            if start.guards:
                yield Finding(
                    invariant="I10",
                    what=f"{truth.device} activated while {', '.join(start.guards)} was not true",
                    do="Take the agent's version out of service",
                )
            if start.late:
                yield Finding(
                    invariant="I1",
                    what=f"{truth.device} installed under a lease that had passed",
                    do="Take the agent's version out of service",
                )


# -- I12: stops -----------------------------------------------------------------------------------


def _stops(look: Look) -> Iterator[Finding]:
    rollouts = {row["id"]: row for row in look.tables.rollouts}
    for stop in look.tables.stops:
        until = stop["lifted_at"] if stop["lifted_at"] is not None else math.inf
        for member in look.tables.members:
            told = member["told_at"]
            if told is None or not stop["at"] + look.grace < told < until:
                continue
            device, rollout = look.devices.get(member["device"]), rollouts.get(member["rollout"])
            if device is None or rollout is None or member["arm"] != "exposed":
                continue
            if _stopped(stop, device, rollout):
                yield Finding(
                    invariant="I12",
                    what=f"{member['device']} was told {rollout['release']} during the stop of "
                    f"{stop['scope']} {stop['value']}".rstrip(),
                    do="Keep the databases and report it",
                )


def _stopped(stop: Row, device: Row, rollout: Row) -> bool:
    labels = device["labels"] or {}
    match stop["scope"]:
        case "all":
            return True
        case "hardware":
            return bool(labels.get("hardware", "") == stop["value"])
        case "digest":
            return stop["value"] in rollout["artifacts"].values()
        case _:
            return bool(labels.get("product", device["fleet"]) == stop["value"])


# -- I13: the audit -------------------------------------------------------------------------------


def _audit(look: Look) -> Iterator[Finding]:
    previous, seq = FIRST, 0
    for row in sorted(look.tables.audit, key=lambda row: int(row["seq"])):
        if row["seq"] != seq + 1:
            yield _chain(f"rows {seq + 1} to {row['seq'] - 1} are missing")
        if row["previous"] != previous:
            yield _chain(f"row {row['seq']} does not follow the row before it")
        if digest(row) != row["hash"]:
            yield _chain(f"row {row['seq']} was changed")
        previous, seq = row["hash"], row["seq"]


def _records(look: Look) -> Iterator[Finding]:
    named: Counter[str] = Counter()
    sentences: dict[str, str] = {}
    for row in look.tables.audit:
        detail = row["detail"] or {}
        named.update(str(detail[key]) for key in ("decision", "command") if detail.get(key))
        if detail.get("decision"):
            sentences[str(detail["decision"])] = str(detail.get("sentence", ""))
    for row in look.tables.decisions:
        if named[row["id"]] != 1:
            yield _chain(f"decision {row['id']} has {named[row['id']]} records, not one")
        elif sentences[row["id"]] != row["sentence"]:
            yield Finding(
                invariant="I5",
                what=f"decision {row['id']} was rewritten: the audit holds another sentence",
                do="Restore the decisions table; the audit is the older word",
            )
    for row in look.tables.commands:
        if not named[row["id"]]:
            yield _chain(f"command {row['id']} of {row['actor']} has no record")


def _chain(what: str) -> Finding:
    return Finding(
        invariant="I13",
        what=f"the audit: {what}",
        do="Restore the control database; compare the head that was kept outside",
    )


_RULES = (
    _held_orders,
    _held_wire,
    _held_devices,
    _steps,
    _counting,
    _decisions,
    _terms,
    _orders,
    _releases,
    _machines,
    _stops,
    _audit,
    _records,
)
