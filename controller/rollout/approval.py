"""Which acts need more than one person, and whether they have them.

Pure. A fleet's rule says how many *people* an act takes, whoever asks for it among them:

    approvals: {start: 2, recall: 2, widen: 2, lift: 2}      # 1, the default: nobody else

A stop is one person's and is in no rule. What is approved is bound to the digest of what was seen;
nobody approves their own. A rule that asks for more holds at once; one that asks for less takes the
old rule's people first, else whoever may write the file could take the second person away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from controller.manifests.kinds import Approvals, Fleet
from controller.rollout.model import Rollout, RolloutState
from controller.rollout.world import Head, World

Rule = Mapping[str, int]
KINDS = ("start", "recall", "widen", "lift")
_DRIFT = 0.10  # of the fleet's devices: so many may come or go while a start waits


def rule_of(fleet: Fleet) -> dict[str, int]:
    return plain(fleet.approvals)


def plain(approvals: Approvals) -> dict[str, int]:
    return {kind: int(getattr(approvals, kind)) for kind in KINDS}


def in_force(old: Rule | None, wanted: Rule) -> dict[str, int]:
    """The rule that holds when `wanted` is committed: never less than the old one asks for."""
    return {kind: max(wanted.get(kind, 1), (old or {}).get(kind, 1)) for kind in KINDS}


def people_to_change(old: Rule) -> int:
    """How many people it takes to ask for less: as many as the strictest of the old rule."""
    return max([1, *old.values()])


def needed(
    world: World, head: Head, fleet: Fleet, plan: Mapping[str, Any], name: str, *, urgent: bool
) -> dict[str, Any] | None:
    """What a start waits for; None when it waits for nobody."""
    kind = "recall" if urgent else "start"
    people = world.rules.get(fleet.name, {}).get(kind, 1)
    if people <= 1:
        return None
    seen = {**plan, "name": name}
    return {"kind": kind, "needs": people - 1, "digest": digest(seen), "proposer": head.author}


def digest(seen: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what is approved.

    Of a start this is its plan: what goes to whom (release, fleet, cohorts), in which steps and
    windows, behind which gates. How many devices that is now is told beside it (`devices`).
    """
    seen = {key: value for key, value in seen.items() if key != "devices"}
    text = json.dumps(seen, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + sha256(text.encode()).hexdigest()


def outdated(last: Rollout, head: Head) -> bool:
    """Does a start still wait for its people while another commit is in force?"""
    waits = last.state is RolloutState.PENDING and "awaits" in last.flags
    return waits and last.commit != head.commit


def outgrown(then: int | None, now: int) -> bool:
    """Does a start reach so many more devices, or fewer, that nobody has agreed to it?"""
    return then is not None and abs(now - then) > max(1, _DRIFT * then)


def words(awaits: Mapping[str, Any]) -> str:
    n = int(awaits["needs"])
    who = "one more person" if n == 1 else f"{n} more people"
    return f"{who} to approve its plan {str(awaits['digest'])[7:19]} (`bellwether approve`)"


def granted(world: World, rollout: Rollout, now: float) -> Rollout | None:
    """The rollout as its approval lets it go on; None while it waits."""
    if rollout.id not in world.granted:
        return None
    flags = {key: value for key, value in rollout.flags.items() if key != "awaits"}
    by = world.granted[rollout.id]
    waiting = rollout.state is RolloutState.PENDING
    return replace(
        rollout,
        state=RolloutState.PROGRESSING if waiting else rollout.state,
        sentence=f"APPROVED — {rollout.release} for {rollout.fleet}: {by}",
        revision=rollout.revision + 1,
        updated_at=now,
        flags={**flags, "approved_by": by},
    )
