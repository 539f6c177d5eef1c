"""The fleet overview: is it healthy, what is moving, what needs a person? Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.http.dashboard.census import UNHEARD, Counts
from controller.http.dashboard.shares import OTHERS, Share
from controller.http.dashboard.signs import Sign, Tone, of_rollout, sign
from controller.http.dashboard.tally import Tally, tally
from controller.rollout.model import ACTIVE

MOVING = frozenset({*map(str, ACTIVE), "RollingBack"})
ASKS = frozenset({"Inconclusive", "NoMembers", "Paused"})
_SHOWN_RELEASES = 4  # of a bar; the others are counted together
_SHARES = (Tone.GOOD, Tone.MOVING, Tone.WAIT, Tone.IDLE)

Plain = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Something that waits for a person: the state, the sentence, and where to decide."""

    sign: Sign
    title: str
    sentence: str
    href: str
    verb: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCard:
    name: str
    product: str
    team: str
    total: int  # active devices: what every count below is of
    online: int
    heard: int
    others: tuple[tuple[str, int], ...]  # pending, retired, quarantined
    components: tuple[tuple[str, Tally], ...]
    newest: Plain | None  # its newest rollout, as the API tells it
    sign: Sign | None
    proven: tuple[tuple[str, str, str], ...]  # (component, hardware, release)


def fleet_card(
    name: str, counts: Counts, newest: Plain | None, proven: Plain, labels: Mapping[str, str]
) -> FleetCard:
    return FleetCard(
        name=name,
        product=labels.get("product", ""),
        team=labels.get("team", ""),
        total=counts.active,
        online=counts.online,
        heard=counts.heard,
        others=tuple(
            (status, n) for status, n in sorted(counts.status.items()) if n and status != "active"
        ),
        components=tuple(
            (component, shares(runs, counts.active, newest))
            for component, runs in sorted(counts.runs.items())
        ),
        newest=newest,
        sign=None if newest is None else of_rollout(newest["state"]),
        proven=tuple(
            (component, hardware, entry["release"])
            for component, entries in sorted(proven.items())
            for hardware, entry in sorted(entries.items())
        ),
    )


def tones(share: Share, newest: Plain | None) -> tuple[int, ...]:
    """The place of each release's tone in the chart: its colour is that of the fleet's bar."""
    now = dict(zip(share.releases, share.days[-1][1], strict=True))
    first = "" if newest is None else newest["release"]
    order = sorted(
        now, key=lambda release: (release == OTHERS, release != first, -now[release], release)
    )
    shift = _shift(order, first)
    return tuple(order.index(release) + shift for release in share.releases)


def _shift(order: Sequence[str], first: str) -> int:
    """The newest release has the first tone even while nobody runs it."""
    return 0 if not order or order[0] == first else 1


def shares(runs: Mapping[tuple[str, str], int], total: int, newest: Plain | None) -> Tally:
    """Who runs what: the newest rollout's release first, then by size; the unheard last."""
    merged: dict[str, int] = {}
    for (release, _), n in runs.items():
        merged[release] = merged.get(release, 0) + n
    first = "" if newest is None else newest["release"]
    order = sorted(merged, key=lambda release: (release != first, -merged[release], release))
    shown, rest = order[:_SHOWN_RELEASES], order[_SHOWN_RELEASES:]
    shift = _shift(order, first)
    parts = [
        (release, release, _SHARES[min(place + shift, 3)], merged[release])
        for place, release in enumerate(shown)
    ]
    if rest:
        others = sum(merged[release] for release in rest)
        parts.append(("*", f"{len(rest)} other releases", Tone.IDLE, others))
    unheard = total - sum(merged.values())
    if unheard > 0:
        parts.append((UNHEARD, "not heard yet", Tone.BAD, unheard))
    return tally(parts)


def asks(
    rollouts: Iterable[Plain], paging: frozenset[str], git: Plain, approvals: Iterable[Plain] = ()
) -> tuple[Ask, ...]:
    """What needs a person, most urgent first. `paging`: rollouts whose last verdict asks for one.

    Stops in force stand in a banner on every page, so they are not repeated here.
    """
    found: list[tuple[int, Ask]] = []
    for one in rollouts:
        urgency, verb = _urgency(one, paging)
        if urgency:
            ask = Ask(
                sign=of_rollout(one["state"]),
                title=f"{one['name']} → {one['release']}",
                sentence=one["sentence"],
                href=f"/rollouts/{one['id']}",
                verb=verb,
            )
            found.append((urgency, ask))
    found.extend((3, ask) for ask in _git_asks(git))
    found.extend((3, _approval(one)) for one in approvals)
    return tuple(ask for _, ask in sorted(found, key=lambda pair: pair[0]))


def _urgency(one: Plain, paging: frozenset[str]) -> tuple[int, str]:
    if one["state"] == "RollingBack":
        return 1, "watch it"
    if one["id"] in paging:
        return 2, "decide"
    if one["state"] in ASKS:
        return 4, "decide"
    return 0, ""


def _approval(one: Plain) -> Ask:
    """`one`: id, kind, fleet, proposer, reason, needs of what waits for a second person."""
    people = "one more person" if one["needs"] == 1 else f"{one['needs']} more people"
    return Ask(
        sign=sign("Approval", Tone.WAIT),
        title=f"{one['kind']} in {one['fleet'] or 'every fleet'}",
        sentence=f"asked by {one['proposer']}, waits for {people}: {one['reason']}",
        href=f"/approvals/{one['id']}",
        verb="decide",
    )


def _git_asks(git: Plain) -> Sequence[Ask]:
    found = []
    if git["refused"]:
        found.append(_git_ask("Git refused", git["refused"]))
    errors = [p for p in git["problems"] if p.get("severity", "error") == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        found.append(_git_ask("Manifests not accepted", f"{errors[0]['text']}{more}"))
    return found


def _git_ask(title: str, sentence: str) -> Ask:
    return Ask(
        sign=sign("Git", Tone.BAD),
        title=title,
        sentence=sentence,
        href="/#git",
        verb="mend it in Git",
    )
