"""The bodies that people and devices send: strict types, bounded, unknown fields refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from controller.commands import CONTROLS, REASON

Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
# Reasons stand in Git, in the audit and on pages: text of one person, without control characters
# (`controller.commands` holds the command line to the same).
Reason = Annotated[str, StringConstraints(max_length=REASON, pattern=rf"^[^{CONTROLS}]*$")]
# Names also without what turns the direction of writing around: two of them must not look alike.
Word = Annotated[
    str,
    StringConstraints(
        max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*$"
    ),
]
Labels = Annotated[dict[str, str], Field(max_length=64)]


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=to_camel, populate_by_name=True
    )


def fields() -> set[str]:
    """The names of all fields of all bodies, as they are sent."""
    return {
        field.alias or name
        for body in Body.__subclasses__()
        for name, field in body.model_fields.items()
    }


class Verb(Body):
    """What every verb on a rollout takes."""

    reason: Reason = Field(default="", examples=["disengagements up since 02:00"])
    incident: Word | None = Field(default=None, examples=["INC-7"])
    to: Word | None = None
    hold: Id | None = None
    scope: dict[str, Any] | None = Field(
        default=None,
        description="rollback, hold: one of all, step, cohort, selector, devices; left out: all",
        examples=[{"cohort": "canary"}],
    )
    break_glass: bool = Field(
        default=False, description="Without the second person that the fleet's rule asks for"
    )
    if_revision: Annotated[int, Field(ge=0)] | None = None


class Vote(Body):
    """What an approval is answered with: `digest` is that of what was seen."""

    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")] = Field(
        examples=["sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    )
    reason: Reason = Field(default="", examples=["looked at the plan of PR 118"])
    break_glass: bool = False


class Stop(Body):
    scope: Literal["all", "product", "hardware", "digest"] = Field(
        default="all", examples=["hardware"]
    )
    value: Word = Field(
        default="",
        description="Which: a product (label of devices or of their fleet, or the fleet), a "
        "hardware, a digest (of a release or of an artifact)",
        examples=["hw4"],
    )
    reason: Reason = Field(examples=["smoke in two cars"])
    incident: Word | None = Field(default=None, examples=["INC-7"])
    lift: bool = False
    break_glass: bool = False


class Device(Body):
    id: str = Field(max_length=128, examples=["car-0001"])
    fleet: str = Field(max_length=128, examples=["model-3-eu"])
    labels: Labels = Field(default_factory=dict, examples=[{"hardware": "hw3", "region": "eu"}])


class Move(Body):
    fleet: str = Field(max_length=128, examples=["model-y-us"])
    labels: Labels | None = Field(default=None, examples=[{"hardware": "hw3", "region": "us"}])
    reason: Reason = Field(default="", examples=["sold to the us"])


class Why(Body):
    reason: Reason = Field(default="", examples=["board replaced"])


class Claim(Body):
    token: Annotated[str, StringConstraints(min_length=1, max_length=128)] = Field(
        description="One-time, from `POST /devices`",
        examples=["bwe_F2R6DnZbFX3a6b35cogBSoi07pskYaWc6bcIPeXPuBA"],
    )
