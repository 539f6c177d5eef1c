"""`POST /plan`: what would this commit do to the fleet as it is? Nothing is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints

from controller.http import answers
from controller.http.access import Principal, Right, must_everywhere, needs
from controller.http.bodies import Body
from controller.http.contract import says
from controller.http.ports import Given
from controller.http.problems import Problem
from controller.planner import Tree, against_fleet
from controller.release_signing import Signers
from controller.rollout import plan_text

router = APIRouter(prefix="/api/v1")
Viewer = Annotated[Principal, Depends(needs(Right.VIEW))]
_Path = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Side(Body):
    """A revision with its manifests: path → text."""

    revision: Annotated[str, StringConstraints(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")] = (
        Field(default="", examples=["origin/main"])
    )
    commit: Annotated[str, StringConstraints(max_length=64, pattern=r"^[0-9a-f]*$")] = Field(
        default="", examples=["9c1f2ab"]
    )
    files: Annotated[dict[_Path, str], Field(max_length=20_000)] = Field(
        default_factory=dict, examples=[{"rollout.yaml": "apiVersion: bellwether.dev/v1\n…"}]
    )


class Wanted(Body):
    base: Side = Side()
    head: Side


@router.post("/plan", **says(answers.PlanAnswer))
def plan(body: Wanted, deps: Given, who: Viewer) -> dict[str, Any]:
    """Devices by step, who is left out and why, downloads, earliest end, what gates can prove."""
    must_everywhere(who, Right.VIEW, "a plan tells of all of them")
    made = against_fleet(
        _tree(body.base, "base"), _tree(body.head, "head"), deps.engine, deps.reader, deps.clock(),
        _signers(deps.settings.release_signers),
    )  # fmt: skip
    return plan_text.document(made)


def _signers(path: Path | None) -> Signers | None:
    if path is None:
        return None
    try:
        return Signers.load(path)
    except ValueError as error:
        raise Problem(503, f"whose signatures count is not known here: {error}") from None


def _tree(side: Side, name: str) -> Tree:
    return Tree(
        revision=side.revision or name, commit=side.commit or name, author="", files=side.files
    )
