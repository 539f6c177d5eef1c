"""A device whose disk is full obeys a rollback and tells of it; it counts what it lost."""

from __future__ import annotations

import io
import sqlite3
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from device_agent.agent import Connected, DesiredArrived, Disconnected, HealthSampled
from device_agent.installers.slots import InstallRefused, Slots
from device_agent.journal import Journal
from device_agent.outbox import Outbox
from device_agent.protocol import Channel, Kind, Reason, State
from device_agent.reserve import LAST, SIZE, Reserve, room
from tests.disks import fill, small_or_skip

from .one_device import Device, Server, order

ROOM = 24  # MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_or_skip(tmp_path / "disk", ROOM) as place:
        yield place


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "server")


def drive(device: Device, samples: int) -> None:
    for _ in range(samples):
        device.now += 60
        device.do(
            HealthSampled(
                components=device.agent.running(), t0=device.now - 60, dt=60.0,
                counters={"hard_brake": 1}, exposure={"device_hour": 1 / 60},
            )
        )  # fmt: skip


def test_a_full_disk_loses_samples_and_no_order(disk: Path, server: Server) -> None:
    old, new = server.bundle("1"), server.bundle("2")
    device = Device(disk / "car", server)
    device.power_on()
    for generation, bundle in ((1, old), (2, new)):
        device.do(DesiredArrived(payload=order(generation, {"app": bundle})))
        device.pass_time(3)
    assert device.runs() == {"app": "2"}
    filler = fill(disk)
    device.do(Disconnected())
    drive(device, 500)
    assert len(device.outbox) < 500
    assert (disk / "car/reserve").exists()  # no sample has touched it
    device.do(Connected())
    device.do(DesiredArrived(payload=order(3, {"app": old}, Kind.ROLLBACK)))
    assert device.runs() == {"app": "1"}
    assert device.reports[-1].state is State.ROLLED_BACK
    assert not (disk / "car/reserve").exists()
    device.do(Disconnected())
    (disk / "theirs").write_bytes(bytes(room(disk) - LAST - 256 * 1024))  # somebody was faster
    drive(device, 3_000)
    assert LAST - 64 * 1024 < room(disk) < LAST  # samples took what was freed, but the last of it

    device.power_off()  # and it starts again where it was
    device.boot()
    device.power_on()
    assert device.agent.record.generation == 3
    device.do(DesiredArrived(payload=order(4, {"app": old}, Kind.ROLLBACK)))
    assert device.reports[-1].generation == 4

    filler.unlink()
    device.reserve.lay()
    assert (disk / "car/reserve").stat().st_size == SIZE
    heard = len(device.samples)
    drive(device, 1)
    assert len(device.samples) == heard + 1


def test_what_was_lost_is_told_with_the_next_sample(disk: Path) -> None:
    reserve = Reserve(disk / "reserve")
    outbox = Outbox(disk / "outbox.db", reserve)
    payload = bytes(700)
    for seq in range(3_000):
        if seq == 10:
            filler = fill(disk)
        outbox.put("b", seq, Channel.HEALTH, payload)
    written = len(outbox)
    assert 10 <= written < 3_000
    assert (disk / "reserve").exists()  # no sample has touched it
    outbox.put("b", 9_000, Channel.REPORTED, payload)
    assert not (disk / "reserve").exists()
    assert len(outbox) == written + 1
    outbox.acknowledge("b", [(0, 4)])
    assert len(outbox) == written + 1 - 5
    filler.unlink()
    assert outbox.take_lost() == 3_000 - written
    assert outbox.take_lost() == 0


def test_losses_told_by_a_sample_that_is_lost_are_told_by_the_next(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "car", server)
    device.power_on()
    monkeypatch.setattr(Reserve, "scarce", True)
    drive(device, 5)
    monkeypatch.setattr(Reserve, "scarce", False)
    drive(device, 2)
    assert [sample.dropped for sample in device.samples] == [5, 0]


def test_what_is_shed_goes_with_its_count_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path / "outbox.db", Reserve(tmp_path / "reserve"), max_messages=200)
    for seq in range(200):
        outbox.put("b", seq, Channel.HEALTH, b"x")
    with sqlite3.connect(tmp_path / "outbox.db") as other:
        other.execute("ALTER TABLE lost RENAME TO away")  # stands for the last page of the disk
    monkeypatch.setattr(Reserve, "is_full", lambda *_: True)
    outbox.put("b", 200, Channel.HEALTH, b"x")
    assert len(outbox) == len(outbox.oldest(300)) == 201
    with sqlite3.connect(tmp_path / "outbox.db") as other:
        other.execute("ALTER TABLE away RENAME TO lost")
    outbox.put("b", 201, Channel.HEALTH, b"x")
    assert len(outbox) == len(outbox.oldest(300)) == 200
    assert outbox.take_lost() == 2


def test_a_disk_without_room_for_it_keeps_nothing_and_loses_nothing(tmp_path: Path) -> None:
    with small_or_skip(tmp_path / "tiny", 5) as tiny:
        reserve = Reserve(tiny / "reserve")
        outbox = Outbox(tiny / "outbox.db", reserve)
        assert not (tiny / "reserve").exists()
        outbox.put("b", 1, Channel.HEALTH, b"x")
        assert len(outbox) == 1


def test_a_bundle_that_does_not_fit_leaves_its_slot_empty(disk: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "big.tar.gz"
    with tarfile.open(bundle, "w:gz") as archive:
        info = tarfile.TarInfo("big")
        info.size = (ROOM + 1) << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    slots = Slots(disk / "components")
    with pytest.raises(InstallRefused) as refused:
        slots.install("app", "2", "sha256:" + "0" * 64, bundle)
    assert refused.value.reason is Reason.DISK_FULL
    assert room(disk) > (ROOM - 1) << 20


def test_years_of_samples_and_updates_take_a_few_mebibytes(tmp_path: Path) -> None:
    journal, outbox = Journal(tmp_path / "journal.db"), Outbox(tmp_path / "outbox.db")
    record = journal.load()
    for seq in range(3_000):
        outbox.put("b", seq, Channel.HEALTH, bytes(500))
        outbox.acknowledge("b", [(seq, seq)])
        journal.save(replace(record, boot_count=seq))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 << 20
    journal.close()
    outbox.close()
