"""The real core on real slots, journal and outbox, killed at every durable write."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controller.keys import DirectorKey
from device_agent import update, work
from device_agent.agent import (
    DesiredArrived,
    Fact,
    Tick,
)
from device_agent.installers.slots import Slots
from device_agent.journal import Journal
from device_agent.protocol import (
    Desired,
    Kind,
    State,
)
from device_agent.record import Record

from .one_device import Device, Server, order


class PowerCut(Exception):
    pass


class CutJournal(Journal):
    """Loses power at the k-th write: before it, or just after."""

    def __init__(self, path: Path, at: int, *, before: bool) -> None:
        super().__init__(path)
        self._left, self._before = at, before

    def save(self, record: Record) -> None:
        self._left -= 1
        if self._left == 0 and self._before:
            raise PowerCut
        super().save(record)
        if self._left == 0:
            raise PowerCut


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


@pytest.fixture
def device(tmp_path: Path, server: Server) -> Device:
    made = Device(tmp_path / "device", server)
    made.power_on()
    return made


def history(device: Device) -> list[tuple[str, str]]:
    return [(entry.release, entry.event) for entry in device.reports[-1].history]


def test_an_order_is_installed_tried_and_committed(device: Device, server: Server) -> None:
    device.do(DesiredArrived(payload=order(1, {"app": server.bundle("1")})))
    assert device.agent.state is State.TRIAL
    assert not device.reports[-1].components["app"].committed
    device.pass_time(3)
    assert device.agent.state is State.COMMITTED
    assert device.runs() == {"app": "1"}
    assert device.reports[-1].state is State.COMMITTED
    assert device.reports[-1].components["app"].committed


def test_a_rollback_downloads_nothing_and_is_told_in_the_history(
    device: Device, server: Server
) -> None:
    old, new = server.bundle("1"), server.bundle("2")
    device.do(DesiredArrived(payload=order(1, {"app": old})))
    device.pass_time(3)
    device.do(DesiredArrived(payload=order(2, {"app": new})))
    device.pass_time(3)
    server.fetched.clear()
    device.now += 1e6  # no lease is asked for
    device.do(DesiredArrived(payload=order(3, {"app": old}, Kind.ROLLBACK)))
    assert device.agent.state is State.ROLLED_BACK
    assert device.reports[-1].reason == "ordered"
    assert server.fetched == []
    assert device.runs() == {"app": "1"}
    assert history(device) == [("1", "activated"), ("2", "activated"), ("1", "rolled_back")]
    assert device.agent.record.known_bad == {new.digest: 3}


def test_a_failed_self_test_goes_back_and_says_why(device: Device, server: Server) -> None:
    device.do(DesiredArrived(payload=order(1, {"app": server.bundle("1")})))
    device.pass_time(3)
    device.do(DesiredArrived(payload=order(2, {"app": server.bundle("2", passes=False)})))
    assert device.runs() == {"app": "1"}
    last = device.reports[-1]
    assert (last.state, last.reason) == (State.ROLLED_BACK, "self_test_failed")
    assert history(device)[-2:] == [("2", "activated"), ("1", "rolled_back")]


def test_the_first_install_ever_goes_back_to_nothing(device: Device, server: Server) -> None:
    device.do(DesiredArrived(payload=order(1, {"app": server.bundle("1", passes=False)})))
    assert device.runs() == {}
    assert device.reports[-1].state is State.ROLLED_BACK


def test_several_components_switch_together_or_not_at_all(device: Device, server: Server) -> None:
    device.do(DesiredArrived(payload=order(1, {"a": server.bundle("1"), "b": server.bundle("1b")})))
    device.pass_time(3)
    both = {"a": server.bundle("2"), "b": server.bundle("2b", passes=False)}
    device.do(DesiredArrived(payload=order(2, both)))
    assert device.runs() == {"a": "1", "b": "1b"}


def test_an_expired_lease_defers_and_a_newer_generation_goes_on(
    device: Device, server: Server
) -> None:
    device.now += 86_400
    told = {"app": server.bundle("1")}
    device.do(DesiredArrived(payload=order(1, told)))
    assert device.reports[-1].blocked_by == ("lease_expired",)
    assert device.reports[-1].state is State.DEFERRED
    device.now -= 86_400
    device.do(DesiredArrived(payload=order(2, told)))
    assert device.agent.state is State.TRIAL


def test_a_refused_order_is_reported_and_changes_nothing(device: Device, server: Server) -> None:
    device.do(DesiredArrived(payload=order(1, {"app": server.bundle("1")})))
    device.pass_time(3)
    stranger = DirectorKey(Ed25519PrivateKey.generate())
    forged = stranger.sign(
        Desired(
            device="car-1",
            term=9,
            generation=9,
            attempt="evil",
            kind=Kind.NONE,
            components={},
            issued_at="2027-01-15T08:00:00Z",
        )
    )
    device.do(DesiredArrived(payload=forged))
    refusal, last = device.reports[-2:]
    assert (refusal.state, refusal.reason) == (State.REJECTED, "bad_signature")
    assert (last.state, last.generation) == (State.COMMITTED, 1)


def test_a_broker_outage_in_trial_extends_it(device: Device, server: Server) -> None:
    device.echo = False
    device.do(DesiredArrived(payload=order(1, {"app": server.bundle("1")})))
    for _ in range(70):
        device.now += 1
        for effect in device.agent.handle(Tick(facts={}), device.now):
            if isinstance(effect, work.ProbeLink):
                device.do(Fact(work.LinkProbed(attempt=effect.attempt, alive=True)))
    assert device.agent.state is State.TRIAL
    device.do(Fact(work.LinkProbed(attempt="try-1", alive=False)))
    assert device.reports[-1].reason == "link_lost"
    assert device.agent.record.known_bad == {}


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", [Kind.INSTALL, Kind.ROLLBACK])
def test_a_power_cut_at_every_journal_write_leaves_old_or_new(
    tmp_path: Path, kind: Kind, before: bool, passes: bool
) -> None:
    for cut in range(1, 40):
        if _survive(tmp_path / f"cut{cut}", kind, cut, before=before, passes=passes):
            assert cut >= 3
            return
    pytest.fail("the update never ended without a cut")


def _survive(root: Path, kind: Kind, cut: int, *, before: bool, passes: bool) -> bool:
    """Was there no cut, because the update has fewer writes?"""
    root.mkdir()
    server = Server(root / "server")
    device = Device(root / "device", server)
    device.power_on()
    old = {"a": server.bundle("old"), "b": server.bundle("oldb")}
    new = {"a": server.bundle("new"), "b": server.bundle("newb", passes=passes)}
    device.do(DesiredArrived(payload=order(1, old)))
    device.pass_time(3)
    if kind is Kind.ROLLBACK:
        device.do(DesiredArrived(payload=order(2, new)))
        device.pass_time(3)
    payload = order(3, old if kind is Kind.ROLLBACK else new, kind)
    device.power_off()
    whole = ({"a": "old", "b": "oldb"}, {"a": "new", "b": "newb"})
    device.boot(CutJournal(root / "device/journal.db", cut, before=before))
    lost_power = False
    try:
        device.power_on()
        device.do(DesiredArrived(payload=payload))
        device.pass_time(4)
    except PowerCut:
        lost_power = True
    assert device.runs() in whole
    device.power_off()
    device.boot()
    device.reports.clear()
    device.power_on()
    device.do(DesiredArrived(payload=payload))  # the broker holds it still
    device.pass_time(4)
    assert device.runs() in whole
    assert device.agent.state in update.TERMINAL
    wanted = "old" if kind is Kind.ROLLBACK or not passes else "new"
    assert device.runs()["a"] == wanted
    assert device.reports[-1].state is device.agent.state
    assert device.reports[-1].components["a"].release == wanted
    device.power_off()
    return not lost_power


class CutSlots(Slots):
    """Loses power at the k-th switch of a symlink."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self._left = at

    def _point(self, component: str, name: str | None) -> None:
        self._left -= 1
        if self._left == 0:
            raise PowerCut
        super()._point(component, name)


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_power_cut_between_two_switches_is_completed_at_the_next_start(
    tmp_path: Path, server: Server, device: Device, cut: int, passes: bool
) -> None:
    old = {"a": server.bundle("old"), "b": server.bundle("oldb")}
    new = {"a": server.bundle("new"), "b": server.bundle("newb", passes=passes)}
    device.do(DesiredArrived(payload=order(1, old)))
    device.pass_time(3)
    device.disk.slots = CutSlots(device.root / "components", cut)
    lost_power = False
    try:
        device.do(DesiredArrived(payload=order(2, new)))
    except PowerCut:
        lost_power = True
    # A good set is switched twice; a bad one twice more, on its way back.
    assert lost_power == (cut <= (2 if passes else 4))
    device.power_off()
    device.boot()
    device.power_on()
    device.pass_time(4)
    expected = {"a": "new", "b": "newb"} if passes else {"a": "old", "b": "oldb"}
    assert device.runs() == expected
    assert device.reports[-1].state in (State.COMMITTED, State.ROLLED_BACK)
    device.power_off()
