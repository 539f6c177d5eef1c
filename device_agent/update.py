"""The update on one device as a state machine: (record, order | fact) → (record, effects). Pure.

`Record` is everything that the device remembers durably. `Agent` saves the record that a step
answers *before* it lets the effects happen, so a power cut at any moment finds either the old
record or the new one, and `restart` says what is done again. Every effect may be repeated.

Rules, in order:

1. One action at a time; the latest accepted order wins. What has not reached ACTIVATING is dropped
   for it; ACTIVATING, COMMITTING and ROLLING_BACK are finished first, TRIAL yields to a rollback.
2. Only components whose digest differs from what runs are touched: all of them together or none.
3. A forward order starts INSTALLING only under a valid lease and true preconditions. A rollback
   waits for the safety predicates alone. Unknown facts are false; waiting is DEFERRED, no failure.
   So does a switch that a power cut left half done: the machine that comes back may be moving.
4. After the switch a trial begins: self-tests, the controller's echo of a nonce, a soak. All three:
   COMMITTED. Failed tests, too many boots: back to what ran before, and the digest is known bad.
   What a kill of the agent alone cut short, on a machine that went on, is done again, uncounted.
5. No echo by the deadline: while the network or the server answers, the trial is extended; only a
   device without any network goes back, `link_lost`, and calls no release bad for it.
6. Going back fails three times: STUCK. Telemetry goes on; nothing loops. Transitions are capped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from device_agent import trust
from device_agent.protocol import (
    MAX_HISTORY,
    MAX_TEXT,
    ComponentReport,
    Desired,
    HistoryEntry,
    Kind,
    Reason,
    State,
)
from device_agent.record import Limits, Record, Update
from device_agent.work import (
    Activate,
    Cancel,
    Cleanup,
    Done,
    Echoed,
    Effect,
    Fact,
    Failed,
    Fetch,
    Install,
    Item,
    LinkProbed,
    Passed,
    ProbeLink,
    RunSelfTests,
    SelfTestsDone,
    SwitchBack,
)

MAX_KNOWN_BAD = 64
SAFETY = frozenset({"landed", "disarmed", "parked"})  # these gate the way back as well
TERMINAL = frozenset(
    {
        State.IDLE,
        State.COMMITTED,
        State.ROLLED_BACK,
        State.FAILED,
        State.CANCELLED,
        State.REJECTED,
        State.SUPERSEDED,
        State.STUCK,
    }
)
CANCELLABLE = frozenset(
    {
        State.OFFERED,
        State.DEFERRED,
        State.DOWNLOADING,
        State.STAGED,
        State.ARMED,
        State.INSTALLING,
        State.INSTALLED,
    }
)


Step = tuple[Record, tuple[Effect, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a step may look at besides the record."""

    now: float  # Unix seconds by the device's clock: for leases and history only
    facts: Mapping[str, bool | None] = field(default_factory=dict)  # fresh preconditions
    limits: Limits = field(default_factory=Limits)


# -- the three entrances --------------------------------------------------------------------------


def obey(record: Record, order: Desired, order_hash: str, world: World) -> Step:
    """Take on an order that `trust.judge` accepted."""
    record = replace(
        record,
        term=order.term,
        generation=order.generation,
        order_hash=order_hash,
        pending=None,
        known_bad=record.known_bad if order.term == record.term else {},
    )
    update = record.update
    if update is None or update.state in TERMINAL:
        return _begin(record, order, world)
    if update.state in CANCELLABLE:
        cancelled = Cancel(attempt=update.order.attempt)
        if order.kind is Kind.NONE:
            return _set(record, State.CANCELLED, reason=None), (cancelled,)
        record, effects = _begin(record, order, world)
        return record, (cancelled, *effects)
    if update.state is State.TRIAL:
        return _during_trial(record, update, order, world)
    return replace(record, pending=order), ()


def learn(record: Record, fact: Fact, world: World) -> Step:
    """Take in a fact; one that belongs to another attempt, or comes too late, changes nothing."""
    update = record.update
    if update is None:
        return record, ()
    if isinstance(fact, Passed):
        return _passed(record, update, fact.seconds, world)
    if fact.attempt != update.order.attempt:
        return record, ()
    if _loops(update, world):
        return _fail(record, update, Reason.TOO_MANY_TRANSITIONS, "", world)
    if isinstance(fact, Done):
        return _done(record, update, fact, world)
    if isinstance(fact, Failed):
        return _failed(record, update, fact, world)
    return _on_trial(record, update, fact, world)


def restart(
    record: Record, world: World, machine: str = "", active: Mapping[str, str] | None = None
) -> Step:
    """The agent starts: after a power cut, after a crash, or for the first time.

    `machine` names the machine's boot, where it can be known. An agent that was killed on a machine
    that went on is no failed attempt at anything: what it was about is done again, uncounted.
    `active`: component → the digest that its slots run now, where it can be known.
    """
    went_on = bool(machine) and machine == record.machine
    record = replace(record, boot_count=record.boot_count + 1, machine=machine)
    if went_on and record.update is not None:
        record = replace(record, update=_uncounted(record.update))
    update = record.update
    if update is None or update.state in TERMINAL:
        return _next(record, world)
    if _loops(update, world):
        return _fail(record, update, Reason.TOO_MANY_TRANSITIONS, "", world)
    match update.state:
        case State.OFFERED | State.DEFERRED:
            return _offered(record, update, world)
        case State.DOWNLOADING | State.STAGED | State.ARMED:
            return _download(record, update)
        case State.INSTALLING | State.INSTALLED:
            return _install(record, update, world)
        case State.ACTIVATING:
            return _switch_again(record, update, active, world)
        case State.TRIAL:
            return _reboot_in_trial(record, update, world)
        case State.COMMITTING:
            return _commit(record, update, world)
        case _:
            return _switch_back(record, update, world)


def _uncounted(update: Update) -> Update:
    """What a kill of the agent alone cut short is not counted: the cap of all transitions bounds an
    agent that dies again and again. The way back has no such cap, so its attempts stay counted."""
    match update.state:
        case State.INSTALLING:
            return replace(update, installs=max(0, update.installs - 1))
        case State.ACTIVATING:
            return replace(update, activations=max(0, update.activations - 1))
        case State.TRIAL:
            return replace(update, boots=max(0, update.boots - 1))
        case _:
            return update


def _loops(update: Update, world: World) -> bool:
    """Too many transitions? The way back is bounded by its own count, and must come to its end."""
    over = update.transitions > world.limits.transitions
    return over and update.state is not State.ROLLING_BACK


def items(update: Update) -> tuple[Item, ...]:
    """What this update writes, in a stable order."""
    return tuple(
        Item(
            component=component,
            release=told.release,
            digest=told.digest,
            size=told.size,
            urls=told.urls,
            installer=told.installer,
        )
        for component in update.targets
        for told in (update.order.components[component],)
    )


# -- forward --------------------------------------------------------------------------------------


def _begin(record: Record, order: Desired, world: World) -> Step:
    if order.kind is Kind.NONE:
        return replace(record, update=Update(order=order, state=State.IDLE)), ()
    targets = _differing(record, order)
    update = Update(
        order=order,
        state=State.OFFERED,
        targets=targets,
        back={component: record.running.get(component) for component in targets},
    )
    # A newer generation that names a digest on purpose lifts what an older one ended.
    named = {told.digest for told in order.components.values()}
    known_bad = {d: g for d, g in record.known_bad.items() if d not in named}
    if order.kind is Kind.ROLLBACK:
        known_bad |= {b.digest: order.generation for b in update.back.values() if b is not None}
    return _offered(replace(record, update=update, known_bad=known_bad), update, world)


def _offered(record: Record, update: Update, world: World) -> Step:
    if not update.targets:
        return _finish(record, update, world)
    blocked = _blockers(update, "download", world)
    if blocked:
        return _defer(record, blocked, State.OFFERED), ()
    return _download(record, update)


def _download(record: Record, update: Update) -> Step:
    record = _set(record, State.DOWNLOADING)
    return record, (Fetch(attempt=update.order.attempt, items=items(update)),)


def _install(record: Record, update: Update, world: World) -> Step:
    blocked = _blockers(update, "install", world)
    if blocked:
        return _defer(record, blocked, State.STAGED), ()
    if update.installs >= world.limits.installs:
        return _fail(record, update, Reason.INSTALL_FAILED, "installing was cut short twice", world)
    record = _set(record, State.INSTALLING, installs=update.installs + 1)
    return record, (Install(attempt=update.order.attempt, items=items(update)),)


def _activate(record: Record, update: Update, world: World) -> Step:
    blocked = _blockers(update, "activate", world)
    if blocked:
        return _defer(record, blocked, State.INSTALLED), ()
    return _switch(record, update, world)


def _switch_again(
    record: Record, update: Update, active: Mapping[str, str] | None, world: World
) -> Step:
    """The start found a switch that was begun: it may be done, half done, or not done at all, and
    what stood still then may be moving now."""
    wanted = {c: update.order.components[c].digest for c in update.targets}
    before = {c: b.digest if b is not None else None for c, b in update.back.items()}
    runs = {c: active.get(c) for c in update.targets} if active is not None else None
    if runs == wanted:
        return _activated(record, update, world)
    if runs == before:
        return _activate(record, update, world)
    return _switch_on(record, update, world)


def _switch_on(record: Record, update: Update, world: World) -> Step:
    """Half a switch is finished before any other order, as soon as that is safe."""
    blocked = _unsafe(update.order, world)
    if blocked:
        return _change(record, blocked_by=blocked), ()
    return _switch(record, update, world)


def _switch(record: Record, update: Update, world: World) -> Step:
    if update.activations >= world.limits.backs:
        return _go_back(record, update, Reason.ACTIVATION_FAILED, "switching was cut short", world)
    record = _set(record, State.ACTIVATING, activations=update.activations + 1)
    return record, (Activate(attempt=update.order.attempt, items=items(update)),)


def _done(record: Record, update: Update, fact: Done, world: World) -> Step:
    if fact.work is not update.state:
        return record, ()
    if fact.work is State.DOWNLOADING:
        record = _set(record, State.STAGED)
        return _install(record, _current(record), world)
    if fact.work is State.INSTALLING:
        record = _set(record, State.INSTALLED)
        return _activate(record, _current(record), world)
    if fact.work is State.ACTIVATING:
        return _activated(record, update, world)
    return _rolled_back(record, update, world)


def _activated(record: Record, update: Update, world: World) -> Step:
    ordered = update.order.kind is Kind.ROLLBACK
    running = dict(record.running)
    for item in items(update):
        running[item.component] = ComponentReport(
            release=item.release, digest=item.digest, committed=ordered
        )
    record = replace(record, running=running)
    record = _remember(record, update.targets, "rolled_back" if ordered else "activated", world.now)
    if ordered:  # it ran here before, or the fleet has proven it: there is no trial to lose
        return _finish(record, update, world)
    record = _set(record, State.TRIAL, boots=1, elapsed=0.0, tests_ok=False, echoed=False)
    return _yield_trial(
        record, (RunSelfTests(attempt=update.order.attempt, components=update.targets),), world
    )


def _try_commit(record: Record, world: World) -> Step:
    update = _current(record)
    ready = update.tests_ok and update.echoed and update.elapsed >= world.limits.trial_soak
    return _commit(record, update, world) if ready else (record, ())


def _commit(record: Record, update: Update, world: World) -> Step:
    return _finish(_set(record, State.COMMITTING), update, world)


def _finish(record: Record, update: Update, world: World) -> Step:
    """Everything that the order names is what runs, for good."""
    named = update.order.components
    running = {
        component: replace(report, committed=True)
        if component in named and report.digest == named[component].digest
        else report
        for component, report in record.running.items()
    }
    ordered = update.order.kind is Kind.ROLLBACK
    record = _set(
        replace(
            record,
            running=running,
            security_epoch=max(record.security_epoch, update.order.security_epoch),
        ),
        State.ROLLED_BACK if ordered else State.COMMITTED,
        reason=str(Reason.ORDERED) if ordered else None,
    )
    before = tuple(b.digest for b in update.back.values() if b is not None)
    keep = tuple(sorted({r.digest for r in running.values()} | set(before)))
    record, effects = _next(record, world)
    return record, (Cleanup(keep=keep), *effects)


# -- trial ----------------------------------------------------------------------------------------


def _passed(record: Record, update: Update, seconds: float, world: World) -> Step:
    match update.state:
        case State.DEFERRED:
            return _reconsider(record, update, world)
        case State.ACTIVATING if update.blocked_by:
            return _switch_on(record, update, world)
        case State.ROLLING_BACK if update.blocked_by:
            return _switch_back(record, update, world)
        case State.TRIAL:
            record = _change(record, elapsed=update.elapsed + seconds)
            return _trial_goes_on(record, _current(record), update.elapsed, world)
        case _:
            return record, ()


def _on_trial(
    record: Record, update: Update, fact: SelfTestsDone | Echoed | LinkProbed, world: World
) -> Step:
    if update.state is not State.TRIAL:
        return record, ()
    if isinstance(fact, SelfTestsDone):
        if not fact.ok:
            return _go_back(record, update, fact.reason, fact.log, world)
        return _try_commit(_change(record, tests_ok=True, log=_tail(fact.log)), world)
    if isinstance(fact, Echoed):
        return _try_commit(_change(record, echoed=True), world)
    if fact.alive:  # our service is down, not the device: nothing reboots, the trial goes on
        return _change(record, elapsed=0.0), ()
    return _go_back(record, update, Reason.LINK_LOST, "", world)


def _trial_goes_on(record: Record, update: Update, before: float, world: World) -> Step:
    deadline = world.limits.trial_deadline
    if update.elapsed < deadline or (update.tests_ok and update.echoed):
        return _try_commit(record, world)
    if not update.tests_ok:
        return _go_back(record, update, Reason.TRIAL_EXPIRED, "the self-tests never ended", world)
    asked = before >= deadline and int(before / 30) == int(update.elapsed / 30)
    return record, () if asked else (ProbeLink(attempt=update.order.attempt),)


def _reconsider(record: Record, update: Update, world: World) -> Step:
    match update.then:
        case State.STAGED:
            return _install(record, update, world)
        case State.INSTALLED:
            return _activate(record, update, world)
        case _:
            return _offered(record, update, world)


def _reboot_in_trial(record: Record, update: Update, world: World) -> Step:
    if update.boots >= world.limits.boots:
        return _go_back(
            record, update, Reason.BOOT_FAILED, f"{update.boots} starts in trial", world
        )
    record = _set(record, State.TRIAL, boots=update.boots + 1, elapsed=0.0, tests_ok=False)
    return record, (RunSelfTests(attempt=update.order.attempt, components=update.targets),)


def _during_trial(record: Record, update: Update, order: Desired, world: World) -> Step:
    if order.kind is Kind.NONE:
        return record, ()
    differing = _differing(record, order)
    if not differing and order.kind is Kind.INSTALL:
        # The same set under a newer word (a renewed lease): the trial goes on under its name.
        again = order.attempt != update.order.attempt
        record = _change(record, order=order, echoed=update.echoed and not again)
        if not again:
            return record, ()
        record = _change(record, tests_ok=False)
        return record, (RunSelfTests(attempt=order.attempt, components=update.targets),)
    if order.kind is Kind.ROLLBACK:
        return _begin(record, order, world)
    # Writing the other slot now would overwrite what this trial may have to fall back to.
    return replace(record, pending=order), ()


def _yield_trial(record: Record, effects: tuple[Effect, ...], world: World) -> Step:
    """A trial has begun: an order that came during the switch may end it at once."""
    order = record.pending
    if order is None:
        return record, effects
    return _during_trial(replace(record, pending=None), _current(record), order, world)


# -- back -----------------------------------------------------------------------------------------


def _failed(record: Record, update: Update, fact: Failed, world: World) -> Step:
    if fact.work is not update.state:
        return record, ()
    if fact.work is State.ACTIVATING:
        return _go_back(record, update, fact.reason, fact.log, world)
    if fact.work is State.ROLLING_BACK:
        return _switch_back(_change(record, log=_tail(fact.log)), _current(record), world)
    return _fail(record, update, fact.reason, fact.log, world)


def _fail(record: Record, update: Update, reason: Reason, log: str, world: World) -> Step:
    if update.state in (State.ACTIVATING, State.TRIAL, State.COMMITTING):
        return _go_back(record, update, reason, log, world)
    if update.state is State.ROLLING_BACK:
        return _set(record, State.STUCK, reason=update.reason, log=_tail(log)), ()
    record = _set(record, State.FAILED, reason=str(reason), log=_tail(log))
    return _next(record, world)


def _go_back(record: Record, update: Update, reason: Reason, log: str, world: World) -> Step:
    # A device without a network calls no release bad; neither does a failed way back.
    # What an order of an earlier term ended does not bind the one that waits.
    calls_bad = reason is not Reason.LINK_LOST and update.order.term == record.term
    if calls_bad and update.order.kind is Kind.INSTALL:
        bad = {item.digest: update.order.generation for item in items(update)}
        known_bad = list((record.known_bad | bad).items())[-MAX_KNOWN_BAD:]
        record = replace(record, known_bad=dict(known_bad))
    record = _set(record, State.ROLLING_BACK, reason=str(reason), log=_tail(log))
    return _switch_back(record, _current(record), world)


def _switch_back(record: Record, update: Update, world: World) -> Step:
    blocked = _unsafe(update.order, world)
    if blocked:
        return _change(record, blocked_by=blocked), ()
    if update.backs >= world.limits.backs:
        return _next(_set(record, State.STUCK, reason=update.reason, log=update.log), world)
    record = _change(record, backs=update.backs + 1, blocked_by=())
    to = {c: None if b is None else b.digest for c, b in sorted(update.back.items())}
    return record, (SwitchBack(attempt=update.order.attempt, to=to),)


def _rolled_back(record: Record, update: Update, world: World) -> Step:
    left = [c for c in update.targets if record.running.get(c) != update.back.get(c)]
    running = dict(record.running)
    for component, before in update.back.items():
        if before is None:
            running.pop(component, None)
        else:
            running[component] = before
    record = _remember(replace(record, running=running), left, "rolled_back", world.now)
    return _next(_set(record, State.ROLLED_BACK, reason=update.reason, log=update.log), world)


# -- small things ---------------------------------------------------------------------------------


def _next(record: Record, world: World) -> Step:
    """Nothing is under way: take up the order that had to wait."""
    if record.pending is None:
        return record, ()
    order = record.pending
    refused = trust.known_bad(order, record.known_bad)
    if refused is not None:
        update = Update(order=order, state=State.REJECTED, reason=str(refused))
        return replace(record, update=update, pending=None), ()
    return _begin(replace(record, pending=None), order, world)


def _blockers(update: Update, phase: str, world: World) -> tuple[str, ...]:
    """Why this phase may not start now. `download:x` binds one phase, a bare `x` the later two."""
    order = update.order
    if order.kind is Kind.ROLLBACK:
        return _unsafe(order, world) if phase == "activate" else ()
    blocked = [
        _bare(p)
        for p in order.preconditions
        if (p.startswith(f"{phase}:") or (":" not in p and phase != "download"))
        and world.facts.get(_bare(p)) is not True
    ]
    if phase != "activate" and not trust.lease_holds(order, world.now):
        blocked.insert(0, str(Reason.LEASE_EXPIRED))
    return tuple(dict.fromkeys(blocked))[:16]


def _unsafe(order: Desired, world: World) -> tuple[str, ...]:
    """The safety predicates of this order that are not known to be true."""
    names = (_bare(p) for p in order.preconditions)
    return tuple(n for n in names if n in SAFETY and world.facts.get(n) is not True)


def _bare(precondition: str) -> str:
    return precondition.rpartition(":")[2]


def _defer(record: Record, blocked: tuple[str, ...], then: State) -> Record:
    update = _current(record)
    if update.state is State.DEFERRED and update.blocked_by == blocked and update.then is then:
        return record
    if update.state is State.DEFERRED:  # a vehicle that parks and drives all day is no loop
        return _change(record, blocked_by=blocked, then=then)
    return _set(record, State.DEFERRED, blocked_by=blocked, then=then)


def _differing(record: Record, order: Desired) -> tuple[str, ...]:
    running = record.running
    return tuple(
        component
        for component, told in sorted(order.components.items())
        if component not in running or running[component].digest != told.digest
    )


def _remember(
    record: Record, components: tuple[str, ...] | list[str], event: str, now: float
) -> Record:
    entries = tuple(
        HistoryEntry(
            component=component,
            release=record.running[component].release,
            digest=record.running[component].digest,
            at=now,
            event=event,
        )
        for component in components
        if component in record.running
    )
    return replace(record, history=(record.history + entries)[-MAX_HISTORY:])


def _current(record: Record) -> Update:
    if record.update is None:
        raise ValueError("no update is under way")
    return record.update


def _set(record: Record, state: State, **changes: object) -> Record:
    """Enter a state: counted, with nothing that blocks it unless it says so."""
    update = _current(record)
    told = {"blocked_by": (), "then": None, "reason": None, **changes}
    return _change(record, state=state, transitions=update.transitions + 1, **told)


def _change(record: Record, **changes: object) -> Record:
    return replace(record, update=replace(_current(record), **changes))  # type: ignore[arg-type]


def _tail(log: str) -> str:
    return log[-MAX_TEXT:]
