"""Bundles that want out of their slot, and slots that are not what they say."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from device_agent.installers.slots import BundleLimits, InstallRefused, Slots
from device_agent.protocol import Reason

DIGEST = "sha256:" + "a" * 64
NEXT = "sha256:" + "b" * 64


def bundle(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("../out", b"x"),
        ("a/../../out", b"x"),
        ("/abs", b"x"),
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard", tarfile.LNKTYPE, "../../identity.json"),
        special("pipe", tarfile.FIFOTYPE),
        special("null", tarfile.CHRTYPE),
        ("/".join(["d"] * 40), b"x"),
        ("n" * 300, b"x"),
    ],
)
def test_a_bundle_that_leaves_its_slot_is_refused(
    tmp_path: Path, member: tarfile.TarInfo | tuple[str, bytes]
) -> None:
    slots = Slots(tmp_path / "components")
    path = bundle(tmp_path / "x.tar.gz", ("fine", b"x"), member)
    with pytest.raises(InstallRefused) as refused:
        slots.install("app", "r", DIGEST, path)
    assert refused.value.reason is Reason.UNSAFE_BUNDLE
    assert slots.holding("app", DIGEST) is None
    assert not list((tmp_path / "components/app").iterdir())  # nor does it fill the disk
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "components", BundleLimits(max_bytes=1000))
    path = bundle(tmp_path / "x.tar.gz", ("zeros", bytes(1_000_000)))
    with pytest.raises(InstallRefused, match="unpacked"):
        slots.install("app", "r", DIGEST, path)


def test_a_truncated_bundle_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path / "x.tar.gz", ("data", bytes(range(256)) * 400))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(InstallRefused):
        Slots(tmp_path / "components").install("app", "r", DIGEST, path)


def test_a_file_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = bundle(tmp_path / "x.tar.gz", ("a", b"1"), ("a", b"2"))
    with pytest.raises(InstallRefused, match="twice"):
        Slots(tmp_path / "components").install("app", "r", DIGEST, path)


def test_the_running_slot_is_never_written(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "components")
    slots.install("app", "1", DIGEST, bundle(tmp_path / "1", ("v", b"1")))
    slots.switch({"app": DIGEST})
    written = slots.install("app", "2", NEXT, bundle(tmp_path / "2", ("v", b"2")))
    active = slots.active("app")
    assert active is not None
    assert (active.name, written.name, (active.path / "v").read_bytes()) == ("a", "b", b"1")


def test_a_slot_changed_behind_our_back_is_not_switched_to(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "components")
    slot = slots.install("app", "1", DIGEST, bundle(tmp_path / "1", ("v", b"1")))
    (slot.path / "v").write_bytes(b"evil")
    with pytest.raises(InstallRefused):
        slots.switch({"app": DIGEST})
    assert slots.active("app") is None


def test_one_component_that_cannot_switch_switches_none(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "components")
    slots.install("app", "1", DIGEST, bundle(tmp_path / "1", ("v", b"1")))
    with pytest.raises(InstallRefused):
        slots.switch({"app": DIGEST, "zeta": NEXT})
    assert slots.active("app") is None
