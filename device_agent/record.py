"""What a device remembers durably: the update under way, what runs, and what it was told. Data."""

from __future__ import annotations

from dataclasses import dataclass, field

from device_agent.protocol import ComponentReport, Desired, HistoryEntry, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    trial_soak: float = 5.0  # seconds of trial before a commit
    trial_deadline: float = 600.0  # seconds to self-tests and echo
    boots: int = 3  # starts of the machine in one trial
    installs: int = 2
    backs: int = 3
    transitions: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The order being carried out, or the last one that was."""

    order: Desired
    state: State
    reason: str | None = None
    blocked_by: tuple[str, ...] = ()
    then: State | None = None  # of DEFERRED: the state that it waits to enter
    targets: tuple[str, ...] = ()  # components this order changes
    back: dict[str, ComponentReport | None] = field(default_factory=dict)  # what ran before
    installs: int = 0
    activations: int = 0
    boots: int = 0
    backs: int = 0
    transitions: int = 0
    elapsed: float = 0.0  # seconds of trial, by a clock that cannot jump
    tests_ok: bool = False
    echoed: bool = False
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What survives a power cut."""

    boot_count: int = 0
    machine: str = ""  # the machine's own boot, as the agent found it at its last start
    term: int = 0
    generation: int = 0
    order_hash: str = ""  # sha256 of the newest order's signed bytes
    security_epoch: int = 0
    running: dict[str, ComponentReport] = field(default_factory=dict)
    known_bad: dict[str, int] = field(default_factory=dict)  # digest → generation that ended it
    history: tuple[HistoryEntry, ...] = ()
    update: Update | None = None
    pending: Desired | None = None  # accepted while something could not be interrupted
