"""The first files of a new fleet repository: what `bellwether init` writes, as they stand here."""

from __future__ import annotations

from importlib.resources import files as resources

_PLACES = {
    "README.md": "README.md",
    "fleet.yaml": "fleet.yaml",
    "policy.yaml": "policy.yaml",
    "release.yaml": "releases/app-1.0.0.yaml",
    "rollout.yaml": "rollout.yaml",
    "github-workflow.yaml": ".github/workflows/fleet.yaml",
    "gitlab-ci.yaml": ".gitlab-ci.yml",
    "pre-commit-config.yaml": ".pre-commit-config.yaml",
}


def files() -> dict[str, str]:
    """path in the repository → text."""
    here = resources(__package__)
    return {place: (here / name).read_text("utf-8") for name, place in _PLACES.items()}
