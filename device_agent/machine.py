"""Does what the agent decided, on a real disk: cache, slots, self-tests. Blocking, on one thread.

`Disk` answers every effect of `device_agent.work` with its fact; only the transfer itself is a
port, so that the simulator brings its own. An effect that comes again after a restart finds its
work done, or does it again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from device_agent import selftests, work
from device_agent.installers.slots import InstallRefused, Slots
from device_agent.protocol import Reason, State
from device_agent.work import Item, SelfTestsDone


class FetchRefused(Exception):
    """The artifact could not be had; `reason` goes into the device's report."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Transfer(Protocol):
    """Brings one artifact to `target`, verified; raises FetchRefused."""

    def __call__(self, item: Item, target: Path) -> None: ...


SelfTests = Callable[[Mapping[str, Path], str], SelfTestsDone]  # slots of components, attempt


class Disk:
    """`components/` and `cache/` below one directory."""

    def __init__(
        self,
        root: Path,
        transfer: Transfer,
        *,
        self_tests: SelfTests | None = None,
        test_seconds: float = 60.0,
    ) -> None:
        self.slots = Slots(root / "components")
        self._cache = root / "cache"
        self._transfer = transfer
        self._self_tests = self_tests or self._run_self_tests
        self._test_seconds = test_seconds

    def execute(self, effect: work.Effect) -> work.Fact | None:
        """The answer to hand to the agent; None for effects that ask for none."""
        match effect:
            case work.Fetch():
                return self._work(effect.attempt, State.DOWNLOADING, lambda: self._fetch(effect))
            case work.Install():
                return self._work(effect.attempt, State.INSTALLING, lambda: self._install(effect))
            case work.Activate():
                to: dict[str, str | None] = {i.component: i.digest for i in effect.items}
                return self._work(effect.attempt, State.ACTIVATING, lambda: self.slots.switch(to))
            case work.SwitchBack():
                return self._work(effect.attempt, State.ROLLING_BACK, lambda: self._back(effect.to))
            case work.RunSelfTests():
                active = {c: self.slots.active(c) for c in effect.components}
                paths = {c: slot.path for c, slot in active.items() if slot is not None}
                return self._self_tests(paths, effect.attempt)
            case work.Cleanup():
                self.cleanup(effect.keep)
        return None

    def active(self) -> dict[str, Path]:
        """component → the directory that runs."""
        slots = {c: self.slots.active(c) for c in self.slots.components()}
        return {c: slot.path for c, slot in slots.items() if slot is not None}

    def digests(self) -> dict[str, str]:
        """component → the digest that runs."""
        slots = {c: self.slots.active(c) for c in self.slots.components()}
        return {c: slot.digest for c, slot in slots.items() if slot is not None}

    def cleanup(self, keep: tuple[str, ...]) -> None:
        """Drop cached artifacts that are neither running nor what we would fall back to."""
        if not self._cache.is_dir():
            return
        names = {_file_name(digest) for digest in keep}
        for entry in self._cache.iterdir():
            if entry.name not in names:
                entry.unlink(missing_ok=True)

    def cached(self, digest: str) -> Path:
        return self._cache / _file_name(digest)

    # -- one effect -------------------------------------------------------------------------------

    def _work(self, attempt: str, phase: State, do: Callable[[], None]) -> work.Fact:
        try:
            do()
        except (FetchRefused, InstallRefused) as refused:
            return work.Failed(attempt=attempt, work=phase, reason=refused.reason, log=str(refused))
        except OSError as error:
            reason = _OS_REASONS[phase]
            return work.Failed(attempt=attempt, work=phase, reason=reason, log=str(error))
        return work.Done(attempt=attempt, work=phase)

    def _fetch(self, effect: work.Fetch) -> None:
        for item in effect.items:
            slot = self.slots.holding(item.component, item.digest)
            if slot is not None and self.slots.intact(slot):
                continue  # a way back that lies in the other slot downloads nothing
            self._have(item)

    def _have(self, item: Item) -> None:
        target = self.cached(item.digest)
        if target.is_file() and hash_file(target) == item.digest:
            return
        target.unlink(missing_ok=True)
        self._cache.mkdir(parents=True, exist_ok=True)
        self._transfer(item, target)
        if hash_file(target) != item.digest:
            target.unlink(missing_ok=True)
            raise FetchRefused(Reason.DIGEST_MISMATCH, f"{item.component}: not {item.digest}")

    def _install(self, effect: work.Install) -> None:
        for item in effect.items:
            bundle = self.cached(item.digest)
            self.slots.install(item.component, item.release, item.digest, bundle)

    def _back(self, to: Mapping[str, str | None]) -> None:
        for component, digest in to.items():
            slot = None if digest is None else self.slots.holding(component, digest)
            if digest is None or (slot is not None and self.slots.intact(slot)):
                continue
            # The slot was lost: the artifact is still in the cache, until the next is proven.
            self.slots.install(component, digest[7:19], digest, self.cached(digest))
        self.slots.switch(to)

    def _run_self_tests(self, paths: Mapping[str, Path], attempt: str) -> SelfTestsDone:
        log = ""
        for _, path in sorted(paths.items()):
            ok, said = selftests.run(path, seconds=self._test_seconds)
            log += said
            if not ok:
                return SelfTestsDone(attempt=attempt, ok=False, log=log)
        return SelfTestsDone(attempt=attempt, ok=True, log=log)


_OS_REASONS = {
    State.DOWNLOADING: Reason.DOWNLOAD_FAILED,
    State.INSTALLING: Reason.INSTALL_FAILED,
    State.ACTIVATING: Reason.ACTIVATION_FAILED,
    State.ROLLING_BACK: Reason.ACTIVATION_FAILED,
}


def hash_file(path: Path) -> str:
    """sha256:<hex> of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def boot_id() -> str:
    """Names this boot of the machine, as Linux does; empty where nobody can tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:64]
    except (OSError, UnicodeDecodeError):
        return ""


def private_directory(path: Path) -> None:
    """Made if missing; passwords live here, so it is the owner's alone."""
    path.mkdir(parents=True, exist_ok=True)
    os.chmod(path, 0o700)


def _file_name(digest: str) -> str:
    return digest.replace(":", "-")
