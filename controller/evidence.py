"""Keeps the evidence of every active rollout: feeds telemetry into the ledgers as it arrives.

A ledger is a pure fold over health rows (`telemetry.evidence.ledger`); this file only reads new
batches, once for all ledgers, remembers where each stands, and tells the ledgers who is enrolled.
After a restart it reads the kept rows again: the fold's answer depends on the rows alone, and on
who was enrolled when. A member's row tells that of today; who was a control before, its draws tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from controller.rollout.model import Arm, Draw, Member, MemberState, Rollout
from controller.rollout.waves import Pinned
from telemetry.evidence.ledger import Enrolment, Ledger, Observations
from telemetry.report import HealthRow, TelemetryReader


class Evidence:
    def __init__(self, reader: TelemetryReader) -> None:
        self._reader = reader
        self._ledgers: dict[str, Ledger] = {}
        self._read_to: dict[str, int] = {}
        self._rollouts: dict[str, Rollout] = {}
        self.watermark = 0  # until the first `open` or `read`

    def open(self, rollout: Rollout, pinned: Pinned, members: Iterable[Member]) -> None:
        """Start the ledger of a rollout; rows from before it are the devices' own baselines."""
        self.watermark = max(self.watermark, self._reader.watermark())
        self.resume(rollout, pinned, members, ())
        self._catch_up([rollout.id], None, self.watermark)

    def resume(
        self,
        rollout: Rollout,
        pinned: Pinned,
        members: Iterable[Member],
        draws: Sequence[Draw],
    ) -> None:
        """Start the ledger of a rollout that began before we did: `read` brings it everything.

        `draws`, the oldest first.
        """
        self._ledgers[rollout.id] = Ledger(pinned.policy.judged)
        self._read_to[rollout.id] = 0
        self._rollouts[rollout.id] = rollout
        serving = _serving(draws)
        for member in members:
            before: Member | None = None
            for was in _lives(member, serving.get(member.device, ())):
                self.member(rollout.id, before, was)
                before = was

    def close(self, rollout: str) -> None:
        for table in (self._ledgers, self._read_to, self._rollouts):
            table.pop(rollout, None)

    def member(self, rollout: str, before: Member | None, after: Member) -> None:
        """Enrol, or censor, by what became of a member."""
        ledger = self._ledgers.get(rollout)
        if ledger is None:
            return
        if after.state is MemberState.LEFT:
            ledger.censor(after.device, after.left_at or after.updated_at)
            return
        if before is not None and before.arm is Arm.CONTROL and after.arm is not Arm.CONTROL:
            ledger.censor(after.device, after.drawn_at)
        lent = before is not None and before.arm is after.arm and before.step != after.step
        if lent:  # a control that a later wave took over: the strata of waves stay disjoint
            ledger.censor(after.device, after.drawn_at)
        enrolled = before is not None and before.arm is after.arm and before.exposed_at is not None
        enrolled = enrolled and not lent
        if after.arm is Arm.RETURNING or after.exposed_at is None or enrolled:
            return
        ledger.enrol(self._enrolment(rollout, after))

    def read(self, most: int | None = None, rung: Callable[[], bool] = lambda: False) -> bool:
        """Take in what was committed since the last time; about `most` messages.

        Answers whether all was read; the watermark is as far as every ledger has read. Where
        somebody has `rung` meanwhile, what was read is read again another time.
        """
        newest = self._reader.watermark()
        self._catch_up(list(self._ledgers), most, newest, rung)
        self.watermark = min(self._read_to.values(), default=newest)
        return self.watermark >= newest

    def observations(self) -> Mapping[str, Observations]:
        return {rollout: ledger.snapshot() for rollout, ledger in self._ledgers.items()}

    def _catch_up(
        self,
        rollouts: Sequence[str],
        most: int | None,
        newest: int,
        rung: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read from where the last of these ledgers stands; who is ahead waits for it."""
        page = {} if most is None else {"limit": most}
        position = min((self._read_to[name] for name in rollouts), default=newest)
        while position < newest:
            rows = self._reader.health_since(position, **page)
            if rung():
                break
            position = _last_batch(rows) if rows else newest
            for name in rollouts:
                self._take(name, rows, position)
            if most is not None and len(rows) >= most // 2:
                break  # perhaps there is more

    def _take(self, rollout: str, rows: Sequence[HealthRow], position: int) -> None:
        known = self._read_to[rollout]
        if known < position:
            new = (
                rows if not rows or rows[0].batch > known else [r for r in rows if r.batch > known]
            )
            self._ledgers[rollout].add(new)
            self._read_to[rollout] = position

    def _enrolment(self, rollout: str, member: Member) -> Enrolment:
        exposed = member.arm is Arm.EXPOSED
        return Enrolment(
            device=member.device,
            arm="exposed" if exposed else "control",
            wave=member.step,
            hardware=member.hardware,
            band=member.band,
            since=member.exposed_at or member.drawn_at,
            until=None,
            attempt=member.attempt if exposed else None,
            digests=self._rollouts[rollout].artifacts if exposed else {},
        )


def _serving(draws: Sequence[Draw]) -> Mapping[str, list[tuple[int, float, int | None]]]:
    """device → (step, since, band) of each time that it was drawn as a control."""
    found: dict[str, list[tuple[int, float, int | None]]] = {}
    for draw in draws:
        for device in draw.control:
            found.setdefault(device, []).append((draw.step, draw.at, draw.bands.get(device)))
    return found


def _lives(member: Member, served: Iterable[tuple[int, float, int | None]]) -> Iterator[Member]:
    """What this member was, one after the other, up to what it is."""
    for step, at, band in served:
        if member.arm is Arm.CONTROL and step == member.step:
            break  # that is what it still is
        yield replace(
            member,
            step=step,
            arm=Arm.CONTROL,
            state=MemberState.DRAWN,
            drawn_at=at,
            exposed_at=at,
            left_at=None,
            attempt=None,
            band=member.band if band is None else band,
        )
    if member.state is MemberState.LEFT:  # it counted until it left
        yield replace(member, state=MemberState.TOLD, left_at=None)
    yield member


def _last_batch(rows: Sequence[HealthRow]) -> int:
    return rows[-1].batch  # they come in the order of their batches
