"""What the machine is asked to do for an update, and what it answers. Data.

Every effect may be repeated after a restart, and must then be harmless. A fact names the attempt
that it is about: one of an earlier attempt changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_agent.protocol import Reason, State

# -- effects: what the machine must do, each of them repeatable -----------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    component: str
    release: str
    digest: str
    size: int
    urls: tuple[str, ...]
    installer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Have every item's artifact verified on the disk: from a slot, the cache, or its URLs."""

    attempt: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """Write every item into its inactive slot and read it back; what is there already stays."""

    attempt: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """Switch every item's component to the slot that holds its digest."""

    attempt: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSelfTests:
    attempt: str
    components: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchBack:
    """Switch every component to the slot that holds this digest; None: to nothing at all."""

    attempt: str
    to: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop working for this attempt; what it says from now on is ignored anyway."""

    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLink:
    """Find out whether the server or any network answers, without the broker."""

    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """Drop cached artifacts except these digests."""

    keep: tuple[str, ...]


Effect = Fetch | Install | Activate | RunSelfTests | SwitchBack | Cancel | ProbeLink | Cleanup


# -- facts: what the machine answers --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Fetch, Install, Activate or SwitchBack of this attempt succeeded."""

    attempt: str
    work: State  # DOWNLOADING, INSTALLING, ACTIVATING or ROLLING_BACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    attempt: str
    work: State
    reason: Reason
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestsDone:
    attempt: str
    ok: bool
    log: str = ""
    reason: Reason = Reason.SELF_TEST_FAILED  # or BOOT_FAILED, from a machine that can tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Echoed:
    """The controller has echoed this attempt's nonce: the link works both ways."""

    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProbed:
    attempt: str
    alive: bool  # the server, or at least a network, answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Time went by: seconds since the last call, never negative, never a jump."""

    seconds: float


Fact = Done | Failed | SelfTestsDone | Echoed | LinkProbed | Passed
