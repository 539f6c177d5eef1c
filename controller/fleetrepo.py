"""The fleet repository: fetches, verifies, reads blobs at a commit, records additive commits.

A bare clone of our own, driven by the git command: no work tree, no hooks, no prompts, only the
protocols that we list, every call with a time limit. Nothing in the repository is ever executed or
written to disk as a file; symbolic links, submodules and names that are not UTF-8 are left out.

`record` builds its commit in the object database on top of the remote tip and pushes it without
force: a push that lost a race is built again on the new tip. Other people's work is never touched.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

TIMEOUT = 60.0  # seconds for one git command
MOST_BYTES = 1 << 20  # of one manifest; larger blobs are left to the reader to refuse
MOST_FILES = 20_000
ATTEMPTS = 12  # of pushing on a moving tip
PROTOCOLS = "file:https:http:ssh"
_AUTHOR = ("Bellwether", "bellwether@localhost")


class RepoUnavailable(RuntimeError):
    """The remote, or an object of it, cannot be had now; the message says which and why."""


class RecordRefused(RuntimeError):
    """The branch takes no commit of ours; it was pushed to `side_branch` for people to merge."""

    def __init__(self, message: str, side_branch: str | None) -> None:
        super().__init__(message)
        self.side_branch = side_branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInfo:
    commit: str
    author: str  # Name <address>
    committer: str
    at: float  # Unix seconds of the commit
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureProblem:
    commit: str
    why: str

    def __str__(self) -> str:
        return f"commit {self.commit[:10]} is not signed by an allowed signer ({self.why})"


class FleetRepo:
    def __init__(
        self,
        url: str,
        branch: str,
        path: str,
        workdir: Path,
        *,
        allowed_signers: Path | None = None,
        signing_key: Path | None = None,
    ) -> None:
        self._url = str(Path(url).resolve()) if Path(url).exists() else url
        self._branch, self._path = branch, path.strip("/").removeprefix(".").strip("/")
        self._dir = workdir
        self._allowed_signers, self._signing_key = allowed_signers, signing_key

    # -- reading ----------------------------------------------------------------------------------

    def fetch(self) -> Fetched:
        """Bring the branch here; raises RepoUnavailable, and what was here stays."""
        self._prepare()
        ref = f"refs/heads/{self._branch}"
        self._git(
            "fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--force",
            self._url, f"{ref}:refs/remotes/fleet/{self._branch}",
        )  # fmt: skip
        return Fetched(commit=self._tip())

    def read(self, commit: str) -> dict[str, bytes]:
        """path → content of every manifest under our path at a commit."""
        wanted: dict[str, str] = {}
        listing = self._git("ls-tree", "-r", "-z", "--full-tree", commit, *self._pathspec())
        for entry in listing.split(b"\0"):
            head, _, raw = entry.partition(b"\t")
            fields = head.split()
            if len(fields) != 3 or fields[0] not in (b"100644", b"100755"):
                continue  # symbolic links and submodules are not manifests
            try:
                name = raw.decode()
            except UnicodeDecodeError:
                continue
            if is_manifest(name):
                wanted[name] = fields[2].decode()
        if len(wanted) > MOST_FILES:
            raise RepoUnavailable(f"{len(wanted)} manifests; at most {MOST_FILES}")
        return self._blobs(wanted)

    def resolve(self, revision: str) -> str:
        """The commit that a revision names; raises RepoUnavailable."""
        if revision.startswith("-"):
            raise RepoUnavailable(f"{revision}: no revision")
        return (
            self._git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
        )

    def descends(self, new: str, old: str) -> bool:
        """Is `old` an ancestor of `new`? An unknown old commit is none."""
        done = self._run("merge-base", "--is-ancestor", old, new)
        return done.returncode == 0

    def verify(self, old: str | None, new: str) -> list[SignatureProblem]:
        """Commits since `old` without a good signature; empty when none is asked for."""
        if self._allowed_signers is None:
            return []
        # Of a first head only the tip is asked for: history from before us is taken with it.
        span = [f"{old}..{new}"] if old else ["-1", new]
        problems = []
        for commit in self._git("rev-list", *span).decode().split():
            if why := self._bad_signature(commit):
                problems.append(SignatureProblem(commit=commit, why=why))
        return problems

    def _bad_signature(self, commit: str) -> str:
        """Why this commit carries no SSH signature of an allowed signer; empty: it does."""
        head = self._git("cat-file", "commit", commit).split(b"\n\n", 1)[0]
        if b"\ngpgsig -----BEGIN SSH SIGNATURE-----" not in head:
            return "no SSH signature"  # another kind is never asked the service user's keyring
        done = self._run(
            "-c", "gpg.format=ssh",
            "-c", f"gpg.ssh.allowedSignersFile={self._signers()}",
            "verify-commit", commit,
        )  # fmt: skip
        if done.returncode == 0:
            return ""
        return _last_line(done.stderr.decode(errors="replace"))

    def _signers(self) -> Path:
        """The allowed signers, and ourselves: the holds that we record are ours."""
        listed = self._allowed_signers.read_text() if self._allowed_signers else ""
        if self._signing_key is not None:
            own = self._signing_key.with_name(self._signing_key.name + ".pub").read_text()
            listed += f"\n{_AUTHOR[1]} {own.strip()}\n"
        file = self._dir / "allowed_signers"
        file.write_text(listed)
        return file

    def info(self, commit: str) -> CommitInfo:
        text = self._git("show", "-s", "--format=%an <%ae>%x00%cn <%ce>%x00%ct%x00%B", commit)
        author, committer, at, message = text.decode(errors="replace").split("\0", 3)
        return CommitInfo(
            commit=commit,
            author=author[:256],
            committer=committer[:256],
            at=float(at),
            message=message.strip(),
        )

    # -- recording --------------------------------------------------------------------------------

    def record(self, files: Mapping[str, str], message: str, name: str) -> str:
        """Add files (paths below ours) in one commit on the remote tip; answers the commit.

        Files that are there already are left as they are. Raises RepoUnavailable when the remote is
        away, RecordRefused when it takes no commit of ours on this branch.
        """
        refused = ""
        for attempt in range(ATTEMPTS):
            tip = self.fetch().commit
            commit = self._commit(tip, files, message)
            if commit == tip:
                return tip
            done = self._push(commit, f"refs/heads/{self._branch}")
            if done.returncode == 0:
                return commit
            refused = done.stderr.decode(errors="replace")
            if not _lost_a_race(refused):
                break
            time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 6)))  # noqa: S311
        return self._side_branch(commit, name, refused)

    def _side_branch(self, commit: str, name: str, refused: str) -> str:
        if "Could not read" in refused or "unable to access" in refused:
            raise RepoUnavailable(_last_line(refused))
        side = f"bellwether/holds-{name}"
        done = self._push(commit, f"refs/heads/{side}")
        why = f"{self._branch} takes no commit of ours ({_last_line(refused)})"
        if done.returncode != 0:
            raise RecordRefused(why, None)
        raise RecordRefused(f"{why}; merge {side}", side)

    def _push(self, commit: str, ref: str) -> subprocess.CompletedProcess[bytes]:
        return self._run("push", "--quiet", "--no-verify", self._url, f"{commit}:{ref}")

    def _commit(self, tip: str, files: Mapping[str, str], message: str) -> str:
        """A commit on `tip` that adds what is not there, made without a work tree."""
        index = self._dir / f"index.{os.getpid()}"
        environment = {"GIT_INDEX_FILE": str(index)}
        try:
            self._git("read-tree", tip, env=environment)
            there = set(self._git("ls-files", "-z", env=environment).split(b"\0"))
            for path, text in files.items():
                full = f"{self._path}/{path}" if self._path else path
                if full.encode() in there:
                    continue
                blob = self._git("hash-object", "-w", "--stdin", stdin=text.encode()).decode()
                entry = f"100644,{blob.strip()},{full}"
                self._git("update-index", "--add", "--cacheinfo", entry, env=environment)
            tree = self._git("write-tree", env=environment).decode().strip()
        finally:
            index.unlink(missing_ok=True)
        if tree == self._git("rev-parse", f"{tip}^{{tree}}").decode().strip():
            return tip
        sign = ["-S"] if self._signing_key else []
        made = self._git(
            *self._signing(), "commit-tree", *sign, "-p", tip, "-F", "-", tree,
            stdin=message.encode("utf-8", "replace"),
        )  # fmt: skip
        return made.decode().strip()

    def _signing(self) -> list[str]:
        if self._signing_key is None:
            return []
        return ["-c", "gpg.format=ssh", "-c", f"user.signingkey={self._signing_key.resolve()}"]

    # -- git --------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not (self._dir / "HEAD").exists():
            self._dir.mkdir(parents=True, exist_ok=True)
            self._git("init", "--quiet", "--bare", ".")

    def _tip(self) -> str:
        ref = f"refs/remotes/fleet/{self._branch}"
        return self._git("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()

    def _pathspec(self) -> list[str]:
        return ["--", self._path] if self._path else []

    def _blobs(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """All blobs by one `cat-file --batch`."""
        ask = "".join(f"{blob}\n" for blob in wanted.values()).encode()
        answer = self._git("cat-file", "--batch", stdin=ask)
        contents, at = {}, 0
        for name, blob in wanted.items():
            end = answer.index(b"\n", at)
            fields = answer[at:end].split()
            if len(fields) != 3 or fields[1] != b"blob":
                raise RepoUnavailable(f"{name}: object {blob} is missing or corrupt")
            size = int(fields[2])
            # One byte beyond the limit is kept: the reader then says "too large" with the path.
            contents[name] = answer[end + 1 : end + 1 + min(size, MOST_BYTES + 1)]
            at = end + 1 + size + 1
        return contents

    def _git(
        self, *arguments: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> bytes:
        done = self._run(*arguments, stdin=stdin, env=env)
        if done.returncode != 0:
            said = _last_line(done.stderr.decode(errors="replace"))
            raise RepoUnavailable(f"git {_verb(arguments)}: {said}")
        return done.stdout

    def _run(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                ["git", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", *arguments],
                cwd=self._dir,
                input=stdin if stdin is not None else b"",
                env={**_environment(), **(env or {})},
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RepoUnavailable(f"git {_verb(arguments)}: no answer in {TIMEOUT:.0f} s") from None
        except OSError as error:
            raise RepoUnavailable(f"git cannot be run: {error}") from None


def is_manifest(name: str) -> bool:
    """YAML outside hidden files and folders: `.github/` and `.gitlab-ci.yml` speak to others."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return name.endswith((".yaml", ".yml")) and not hidden


def _environment() -> dict[str, str]:
    name, address = _AUTHOR
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return {
        **kept,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": PROTOCOLS,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10",
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": address,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": address,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        "LC_ALL": "C",
    }


def _lost_a_race(said: str) -> bool:
    return any(
        sign in said
        for sign in ("fetch first", "non-fast-forward", "cannot lock ref", "failed to update ref")
    )


def _verb(arguments: Sequence[str]) -> str:
    return next((a for a in arguments if not a.startswith("-") and "=" not in a), "?")


def _last_line(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    wanted = [line for line in lines if line.startswith(("fatal", "error", "remote", " !"))]
    return (wanted or lines or ["no word"])[0].strip()[:300]


def moment(at: float) -> str:
    """RFC 3339 of Unix seconds, as manifests write it."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
