"""The fleet repository on real Git: fetched, verified, read, and added to without force."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, select, update

from controller.fleetrepo import FleetRepo, RecordRefused, RepoUnavailable
from controller.gitwatch import GitWatch
from controller.keys import recorder_key
from controller.manifests.reader import read
from controller.recorder import Recorder, hold_text, lift_text
from controller.store.database import open_control
from controller.store.tables import holds, meta
from telemetry.store.database import reading, writing


def git(where: Path, *words: str, **extra: str) -> str:
    environment = {
        **os.environ,
        "GIT_AUTHOR_NAME": "ann", "GIT_AUTHOR_EMAIL": "ann@example.com",
        "GIT_COMMITTER_NAME": "ann", "GIT_COMMITTER_EMAIL": "ann@example.com",
        **extra,
    }  # fmt: skip
    done = subprocess.run(
        ["git", *words], cwd=where, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


class Hosted:
    """A bare repository and a clone of it that a person works in."""

    def __init__(self, root: Path) -> None:
        self.bare, self.work = root / "fleet.git", root / "work"
        git(root, "init", "-q", "--bare", "--initial-branch=main", str(self.bare))
        git(root, "clone", "-q", str(self.bare), str(self.work))
        git(self.work, "checkout", "-q", "-B", "main")
        self.commit("fleets/a.yaml", "a: 1\n")

    def commit(self, path: str, text: str, *flags: str, push: bool = True) -> str:
        file = self.work / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        git(self.work, "add", "-A")
        git(self.work, *flags, "commit", "-q", "-m", f"change {path}")
        if push:
            git(self.work, "push", "-q", "origin", "main")
        return git(self.work, "rev-parse", "HEAD")


@pytest.fixture
def hosted(tmp_path: Path) -> Hosted:
    return Hosted(tmp_path)


@pytest.fixture
def repo(hosted: Hosted, tmp_path: Path) -> FleetRepo:
    return FleetRepo(str(hosted.bare), "main", "fleets", tmp_path / "clone")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_control(f"sqlite:///{tmp_path / 'control.db'}")
    yield made
    made.dispose()


def add_hold(engine: Engine, name: str, reason: str = "because") -> dict[str, object]:
    row = {
        "id": name, "rollout": "cars-app", "fleet": "cars", "release": "app-2",
        "digest": "sha256:" + "a" * 64, "artifacts": [], "to": "previous", "scope": {"all": True},
        "reason": reason, "actor": "eve", "created_at": 1.0e9,
    }  # fmt: skip
    with writing(engine) as conn:
        conn.execute(insert(holds).values(**row))
    return row


def test_manifests_are_read_at_a_commit(hosted: Hosted, repo: FleetRepo) -> None:
    first = repo.fetch().commit
    second = hosted.commit("fleets/deep/b.yml", "b: 2\n")
    hosted.commit("elsewhere/c.yaml", "c: 3\n")
    assert repo.read(first) == {"fleets/a.yaml": b"a: 1\n"}
    assert repo.descends(repo.fetch().commit, second)
    assert repo.read(second) == {"fleets/a.yaml": b"a: 1\n", "fleets/deep/b.yml": b"b: 2\n"}
    assert repo.info(second).author == "ann <ann@example.com>"


def test_links_submodules_and_foreign_names_are_no_manifests(
    hosted: Hosted, repo: FleetRepo
) -> None:
    (hosted.work / "fleets" / "link.yaml").symlink_to("/etc/passwd")
    Path(os.fsdecode(os.fsencode(hosted.work / "fleets") + b"/\xff.yaml")).write_text("x: 1\n")
    git(
        hosted.work,
        "update-index",
        "--add",
        "--cacheinfo",
        "160000," + "1" * 40 + ",fleets/sub.yaml",
    )
    hosted.commit("fleets/huge.yaml", "x" * (2 << 20))
    found = repo.read(repo.fetch().commit)
    assert set(found) == {"fleets/a.yaml", "fleets/huge.yaml"}
    assert "larger than 1 MiB" in str(read(found).problems[-1])
    assert repo.record({"holds/h1.yaml": "x: 1\n"}, "a hold", "h1")  # they do not stop a hold


def test_a_remote_that_is_away_changes_nothing(hosted: Hosted, repo: FleetRepo) -> None:
    commit = repo.fetch().commit
    hosted.bare.rename(hosted.bare.with_suffix(".away"))
    with pytest.raises(RepoUnavailable, match="git fetch"):
        repo.fetch()
    assert repo.read(commit)


def test_a_corrupt_object_is_said(hosted: Hosted, repo: FleetRepo) -> None:
    commit = repo.fetch().commit
    with pytest.raises(RepoUnavailable):
        repo.read("f" * 40)
    assert repo.read(commit)


def test_holds_are_added_while_people_push(hosted: Hosted, repo: FleetRepo, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(hosted.bare), str(tmp_path / "other"))
    theirs: list[str] = []

    def push_many() -> None:
        for i in range(8):
            (tmp_path / "other" / f"file{i}").write_text("x")
            git(tmp_path / "other", "add", "-A")
            git(tmp_path / "other", "commit", "-q", "-m", f"theirs {i}")
            while True:
                try:
                    git(tmp_path / "other", "pull", "-q", "--rebase", "origin", "main")
                    git(tmp_path / "other", "push", "-q", "origin", "HEAD:main")
                    break
                except subprocess.CalledProcessError:
                    continue
            theirs.append(f"theirs {i}")

    pusher = threading.Thread(target=push_many)
    pusher.start()
    for i in range(5):
        repo.record({f"holds/h{i}.yaml": f"n: {i}\n"}, f"ours {i}", f"h{i}")
    pusher.join()
    subjects = git(hosted.bare, "log", "--format=%s", "main").splitlines()
    assert {*theirs, *(f"ours {i}" for i in range(5))} <= set(subjects)
    files = set(repo.read(repo.fetch().commit))
    assert {f"fleets/holds/h{i}.yaml" for i in range(5)} <= files


def test_recording_twice_makes_one_commit(repo: FleetRepo) -> None:
    first = repo.record({"holds/h.yaml": "n: 1\n"}, "ours", "h")
    assert repo.record({"holds/h.yaml": "n: 1\n"}, "ours", "h") == first


def test_a_protected_branch_gets_a_branch_beside_it(hosted: Hosted, repo: FleetRepo) -> None:
    hook = hosted.bare / "hooks" / "pre-receive"
    hook.write_text(
        '#!/bin/sh\nwhile read o n ref; do [ "$ref" != refs/heads/main ] || exit 1; done\n'
    )
    hook.chmod(0o755)
    with pytest.raises(RecordRefused, match="merge bellwether/holds-h1") as refused:
        repo.record({"holds/h1.yaml": "n: 1\n"}, "ours", "h1")
    assert refused.value.side_branch == "bellwether/holds-h1"
    assert "bellwether/holds-h1" in git(hosted.bare, "branch", "--list", "bellwether/*")


@pytest.mark.parametrize(
    "reason",
    [
        "plain", "quotes \" and '", "colon: and # hash", "two\nlines\n---\nkind: Fleet",
        "unicode ü 漢 \u2028 \x85 \x7f", "${x} %n \\ \t", "Actor: forged\nHold: forged",
    ],
)  # fmt: skip
def test_a_hold_reads_back_as_it_was_said(
    engine: Engine, repo: FleetRepo, hosted: Hosted, reason: str
) -> None:
    add_hold(engine, "01hold", reason)
    recorder = Recorder(engine, repo)
    assert recorder.run_once(2.0e9)
    manifests = read(repo.read(repo.fetch().commit)).manifests
    hold = manifests.holds["01hold"]
    assert (hold.reason, hold.actor, hold.rollout, hold.to) == (
        reason.replace("\x7f", "�"),  # no manifest takes it; an older version took it as a reason
        "eve",
        "cars-app",
        "previous",
    )
    message = git(hosted.bare, "log", "-1", "--format=%B", "main")
    assert [line for line in message.splitlines() if line.startswith("Actor:")] == ["Actor: eve"]
    assert not recorder.run_once(2.0e9)


def test_a_lift_is_recorded_beside_its_hold(engine: Engine, repo: FleetRepo) -> None:
    add_hold(engine, "01hold")
    with writing(engine) as conn:
        conn.execute(
            update(holds).values(lift="02lift", lifted_at=1.1e9, lifted_by="ann", lift_reason="ok")
        )
    assert Recorder(engine, repo).run_once(2.0e9)
    manifests = read(repo.read(repo.fetch().commit)).manifests
    assert manifests.lifts["02lift"].hold == "01hold"
    with reading(engine) as conn:
        row = conn.execute(select(holds)).one()
    assert row.commit == row.lift_commit
    assert "01hold" in hold_text(row._mapping)
    assert "02lift" in lift_text(row._mapping)


# -- what is accepted -----------------------------------------------------------------------------


def watch(engine: Engine, repo: FleetRepo, hosted: Hosted) -> GitWatch:
    return GitWatch(engine, repo, Recorder(engine, repo), url=str(hosted.bare), branch="main")


def state(engine: Engine) -> dict[str, object]:
    with reading(engine) as conn:
        return dict(conn.execute(select(meta.c.value).where(meta.c.key == "git")).scalar_one())


def test_rewritten_history_freezes_the_fleet(
    engine: Engine, repo: FleetRepo, hosted: Hosted
) -> None:
    hosted.commit("fleets/b.yaml", "b: 1\n")
    watcher = watch(engine, repo, hosted)
    watcher.poll(1.0)
    accepted = state(engine)["accepted"]
    git(hosted.work, "reset", "-q", "--hard", "HEAD~1")
    hosted.commit("fleets/c.yaml", "c: 1\n", push=False)
    git(hosted.work, "push", "-q", "--force", "origin", "main")
    watcher.poll(2.0)
    found = state(engine)
    assert found["accepted"] == accepted
    assert "history was rewritten" in str(found["refused"])
    # A lost clone and a restart forget nothing of it.
    shutil.rmtree(repo._dir)
    again = watch(engine, repo, hosted)
    again.poll(3.0)
    assert state(engine)["accepted"] == accepted


def test_a_restart_knows_its_head_without_git(
    engine: Engine, repo: FleetRepo, hosted: Hosted
) -> None:
    watch(engine, repo, hosted).poll(1.0)
    hosted.bare.rename(hosted.bare.with_suffix(".away"))
    again = watch(engine, repo, hosted)
    current = again.current()
    assert current is not None
    again.poll(2.0)
    assert again.current() is not None
    assert "git fetch" in str(state(engine)["refused"])


def _key(root: Path, name: str) -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True
    )
    return root / name


def test_only_commits_of_allowed_signers_are_accepted(
    engine: Engine, hosted: Hosted, tmp_path: Path
) -> None:
    good, foreign = _key(tmp_path, "good"), _key(tmp_path, "foreign")
    allowed = tmp_path / "allowed"
    allowed.write_text("ann@example.com " + good.with_suffix(".pub").read_text())
    repo = FleetRepo(
        str(hosted.bare), "main", "fleets", tmp_path / "clone",
        allowed_signers=allowed, signing_key=recorder_key(tmp_path / "keys" / "recorder"),
    )  # fmt: skip
    signed = ("-c", "gpg.format=ssh", "-c", f"user.signingkey={good}", "-c", "commit.gpgsign=true")
    first = hosted.commit("fleets/b.yaml", "b: 1\n", *signed)
    watcher = watch(engine, repo, hosted)
    watcher.poll(1.0)
    assert state(engine)["accepted"] == first
    add_hold(engine, "01hold")
    watcher.poll(2.0)  # records it, signed by us
    watcher.poll(3.0)
    held = state(engine)["accepted"]
    assert held != first
    git(hosted.work, "pull", "-q", "origin", "main")
    other = (*signed[:3], f"user.signingkey={foreign}", *signed[4:])
    hosted.commit("fleets/c.yaml", "c: 1\n", *other)
    watcher.poll(4.0)
    assert state(engine)["accepted"] == held
    assert "is not signed by an allowed signer" in str(state(engine)["refused"])
    hosted.commit("fleets/d.yaml", "d: 1\n")
    watcher.poll(5.0)
    assert "no SSH signature" in str(state(engine)["refused"])


# -- over http ------------------------------------------------------------------------------------


class Backend(http.server.CGIHTTPRequestHandler):
    """`git http-backend` as a CGI program, as a web server runs it."""

    def is_cgi(self) -> bool:
        self.cgi_info = ("/cgi-bin", "git-http-backend" + self.path)
        return True

    def translate_path(self, path: str) -> str:
        return str(self.server.script) if "git-http-backend" in path else path  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


def test_a_repository_over_http_is_read_and_recorded_to(
    hosted: Hosted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(hosted.bare, "config", "http.receivepack", "true")
    core = Path(git(tmp_path, "--exec-path")) / "git-http-backend"
    script = tmp_path / "git-http-backend"
    script.write_text(
        f"#!/bin/sh\nexport GIT_PROJECT_ROOT={tmp_path} GIT_HTTP_EXPORT_ALL=1\n"
        f"export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'\n"
        f"exec {core}\n"
    )
    script.chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    server.script = script  # type: ignore[attr-defined]
    Backend.have_fork = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/fleet.git"
        repo = FleetRepo(url, "main", "fleets", tmp_path / "over-http")
        assert repo.read(repo.fetch().commit) == {"fleets/a.yaml": b"a: 1\n"}
        commit = repo.record({"holds/h.yaml": "n: 1\n"}, "ours", "h")
        assert git(hosted.bare, "rev-parse", "main") == commit
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
