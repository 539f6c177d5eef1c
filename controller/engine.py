"""Which engine judges: the release that it came with, and a digest of the source that judges.

A recorded decision says by which engine it was made, so that one that replays otherwise under a
later engine is told apart from one whose row was changed.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib import resources
from importlib.metadata import PackageNotFoundError, version

_UNKNOWN = "0"


@cache
def present() -> str:
    """As `0.3.0+1a2b3c4d5e`."""
    digest = sha256()
    for name, source in _sources():
        digest.update(f"{name}\0{len(source)}\0".encode() + source)
    return f"{_release()}+{digest.hexdigest()[:10]}"


def recorded(policy: object) -> str:
    """By which engine a decision was made; empty: by one that did not say so yet."""
    return str(policy.get("engine") or "") if isinstance(policy, dict) else ""


def _release() -> str:
    try:
        return version("bellwether")
    except PackageNotFoundError:  # run from a tree that nobody installed
        return _UNKNOWN


def _sources() -> list[tuple[str, bytes]]:
    """All that turns a case into a judgement."""
    evidence = resources.files("telemetry.evidence")
    files = [one for one in evidence.iterdir() if one.name.endswith(".py")]
    files.append(resources.files("telemetry").joinpath("policy.py"))
    files.append(resources.files("controller.rollout").joinpath("gate.py"))
    return sorted((one.name, one.read_bytes()) for one in files)
