"""Signed releases: people's keys, a file that says whose count, and rollouts that wait for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from controller import release_signing
from controller.gitwatch import assess
from controller.keys import DirectorKey
from controller.manifests.kinds import Release
from controller.manifests.reader import read
from controller.release_signing import Signers

CARS = Path(__file__).parents[2] / "fleets" / "cars"
FILE = """\
# what the team says of it
apiVersion: bellwether.dev/v1
kind: Release
metadata: {name: fsd-11.0.0}   # a comment
spec:
  version: "11.0.0"
  artifacts:
    - component: autopilot
      digest: "sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
      size: 10
      url: "https://example.com/a"
  upgradesFrom: [">=10.1"]
  notes: |
    two lines
    of notes

# the end
"""


def bellwether(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controller.cli", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def person(folder: Path, name: str) -> Path:
    DirectorKey.load_or_create(folder / f"{name}.pem")
    return folder / f"{name}.pem"


def trusting(folder: Path, *names: str, threshold: int = 1) -> Path:
    text = f"threshold = {threshold}\n"
    for name in names:
        public = DirectorKey.load_or_create(folder / f"{name}.pem").public_hex
        text += f'[[signer]]\nname = "{name.rstrip("0123456789")}"\npublic = "{public}"\n'
    (folder / "signers.toml").write_text(text)
    return folder / "signers.toml"


def release_of(text: str) -> Release:
    content = read({"r.yaml": text})
    assert not [p for p in content.problems if p.severity == "error"], content.problems
    return content.manifests.releases["fsd-11.0.0"]


def test_two_people_sign_on_the_command_line_and_the_file_stays_theirs(tmp_path: Path) -> None:
    file = tmp_path / "release.yaml"
    file.write_text(FILE)
    made = bellwether("release", "key", str(tmp_path / "ann.pem"))
    assert made.returncode == 0, made.stderr
    assert 'name = "ann"' in made.stdout
    assert (tmp_path / "ann.pem").stat().st_mode & 0o077 == 0
    assert bellwether("release", "key", str(tmp_path / "ann.pem")).returncode == 1
    done = bellwether("release", "sign", str(file), "--key", str(tmp_path / "ann.pem"))
    assert done.returncode == 0, done.stderr
    person(tmp_path, "bob")
    for key in ("bob", "ann"):  # ann once more: one signature of each
        assert not bellwether(
            "release", "sign", str(file), "--key", str(tmp_path / f"{key}.pem")
        ).returncode
    text = file.read_text()
    assert [line for line in text.splitlines() if "keyid" not in line and "signatures" not in line]
    for line in FILE.splitlines():
        assert line in text.splitlines(), line
    release = release_of(text)
    assert len(release.signatures) == 2
    signers = Signers.load(trusting(tmp_path, "ann", "bob", threshold=2))
    assert signers.vouching(release) == ["ann", "bob"]
    assert signers.lacking(release) == ""


def test_what_devices_would_run_is_signed_and_notes_are_not(tmp_path: Path) -> None:
    private = release_signing.private_key(person(tmp_path, "ann"))
    release = release_of(FILE)
    signed = release.model_copy(update={"signatures": (release_signing.sign(release, private),)})
    signers = Signers.load(trusting(tmp_path, "ann"))
    assert signers.vouching(signed) == ["ann"]
    for same in ({"notes": "other"}, {"labels": {"a": "b"}}):
        assert signers.vouching(signed.model_copy(update=same)) == ["ann"], same
    artifact = release.artifacts[0]
    for other in (
        {"name": "fsd-11.0.1"}, {"version": "11.0.1"}, {"security_epoch": 7},
        {"upgrades_from": (">=9",)}, {"installer": "rauc"},
        {"artifacts": (artifact.model_copy(update={"digest": "sha256:" + "e" * 64}),)},
        {"artifacts": (artifact.model_copy(update={"size": 11}),)},
        {"rollback": release.rollback.model_copy(update={"to": (">=1",)})},
    ):  # fmt: skip
        assert signers.vouching(signed.model_copy(update=other)) == [], other
        assert "0 of 1" in signers.lacking(signed.model_copy(update=other))


def test_a_person_with_two_keys_is_one_and_a_stranger_is_nobody(tmp_path: Path) -> None:
    release = release_of(FILE)
    keys = [release_signing.private_key(person(tmp_path, n)) for n in ("ann1", "ann2", "eve")]
    signed = release.model_copy(
        update={"signatures": tuple(release_signing.sign(release, key) for key in keys)}
    )
    person(tmp_path, "bob")
    signers = Signers.load(trusting(tmp_path, "ann1", "ann2", "bob", threshold=2))
    assert signers.vouching(signed) == ["ann"]
    assert "signed by 1 of 2 people (ann)" in signers.lacking(signed)


def test_a_rollout_of_an_unsigned_release_is_blocked_and_no_other(tmp_path: Path) -> None:
    files = {str(p.relative_to(CARS)): p.read_text() for p in sorted(CARS.rglob("*.yaml"))}
    signers = Signers.load(trusting(tmp_path, "ann"))
    head, problems = assess(read(files), "c" * 40, "bob", known={}, registry={}, signers=signers)
    named = {rollout.name for rollout in head.manifests.rollouts.values()}
    assert set(head.blocked) == named
    assert all("bellwether release sign" in why for why in head.blocked.values())
    unsigned = [p for p in problems if p.field == "spec.signatures"]
    assert {p.path for p in unsigned} == {
        str(p.relative_to(CARS)) for p in CARS.rglob("*.yaml") for one in unsigned
        if str(p.relative_to(CARS)) == one.path
    }  # fmt: skip
    for release in {r.release for r in head.manifests.rollouts.values()}:
        path = head.manifests.origin["Release", release].rpartition(":")[0]
        (tmp_path / "one.yaml").write_text(files[path])
        words = ("--key", str(tmp_path / "ann.pem"), "--name", release)
        assert not bellwether("release", "sign", str(tmp_path / "one.yaml"), *words).returncode
        files[path] = (tmp_path / "one.yaml").read_text()
    head, _ = assess(read(files), "d" * 40, "bob", known={}, registry={}, signers=signers)
    assert head.blocked == {}
    assert assess(read(files), "d" * 40, "bob", known={}, registry={})[0].blocked == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "threshold = 1", "threshold = 2\n[[signer]]\nname = 'a'\npublic = '00'",
        "[[signer]]\nname = ''\npublic = '" + "0" * 64 + "'", "signer = 1", "[[signer]]\nname = 1",
        "[[signer]]\nname = 'a'\npublic = '" + "5f" * 31 + "'", "\x00", "colour = 'red'",
    ],
)  # fmt: skip
def test_a_file_of_signers_with_a_mistake_says_what_to_write(tmp_path: Path, text: str) -> None:
    (tmp_path / "signers.toml").write_text(text)
    with pytest.raises(ValueError, match=r"signers\.toml"):
        Signers.load(tmp_path / "signers.toml")


def test_a_spec_in_one_line_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    flow = FILE.partition("spec:")[0] + (
        'spec: {version: "1", artifacts: [{component: a, digest: "sha256:' + "a" * 64 + '", '
        'size: 1, url: "https://x"}]}\n'
    )
    file.write_text(flow)
    person(tmp_path, "ann")
    done = bellwether("release", "sign", str(file), "--key", str(tmp_path / "ann.pem"))
    assert done.returncode == 1
    assert "over several lines" in done.stderr
    assert file.read_text() == flow
