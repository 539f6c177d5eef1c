"""What the API answers, as the OpenAPI document tells it. Shapes only: not checked at run time.

Times are RFC 3339 in UTC with milliseconds. More fields may come; none goes away within `/api/v1`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

DIGEST = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
SENTENCE = (
    "ROLLED BACK — disengagement 2.74 per 1,000 km [1.9, 3.8] exceeds 1.5 × control (0.41); "
    "1,840 cars, 41,000 km; by policy `driving`, commit 9c1f2ab"
)


class Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="allow")


class Fault(Answer):
    pointer: str = Field(
        description="JSON pointer into the body, or query/NAME, path, method, header/NAME",
        examples=["/reason"],
    )
    detail: str


class Problem(Answer):
    """RFC 9457: what happened, to what, and what to do."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Precondition Failed"])
    status: int = Field(examples=[412])
    detail: str = Field(examples=["cars: revision 3 is stale, it is 4 now: SOAKING — 3 of 10"])
    hint: str = Field(examples=["GET it again, look, then repeat with its new ETag"])
    errors: list[Fault]


class Git(Answer):
    accepted: str | None
    author: str
    accepted_at: str | None
    head: str | None
    checked_at: str | None
    heard_at: str | None
    refused: str
    problems: list[dict[str, Any]]
    notices: dict[str, str]


class StopAnswer(Answer):
    id: str
    scope: str
    value: str
    reason: str
    actor: str
    at: str


class FleetAnswer(Answer):
    name: str = Field(examples=["model-3-eu"])
    devices: dict[str, int] = Field(examples=[{"active": 11820, "pending": 4}])
    rollouts: dict[str, dict[str, Any]]
    proven: dict[str, dict[str, Any]]


class FleetWhole(FleetAnswer):
    git: Git
    stops: list[StopAnswer]


class Fleets(Answer):
    items: list[FleetAnswer]
    next: str | None
    git: Git
    stops: list[StopAnswer]


class Membership(Answer):
    rollout: str
    name: str
    step: int
    arm: str = Field(examples=["exposed"])
    state: str = Field(examples=["updated"])
    reason: str


class DeviceAnswer(Answer):
    id: str = Field(examples=["car-0001"])
    fleet: str = Field(examples=["model-3-eu"])
    labels: dict[str, str]
    status: str = Field(examples=["active"])
    enrolled_at: str | None
    cohort: str | None
    score: dict[str, Any]
    score_when_drawn: float | None
    membership: Membership | None
    desired: dict[str, Any] | None
    state: str | None = Field(examples=["COMMITTED"])
    reason: str | None
    blocked_by: list[str]
    components: dict[str, Any]
    history: list[dict[str, Any]]
    last_contact: str | None
    online: bool


class Devices(Answer):
    items: list[DeviceAnswer]
    next: str | None


class Suspect(Answer):
    factor: str = Field(examples=["component"])
    name: str = Field(examples=["autopilot"])
    value: str = Field(examples=["fsd-10.3.0, since 2026-11-24T22:00:00.000Z"])
    affected: int
    affected_of: int
    others: int
    others_of: int
    lift: float | None = Field(description="share among the affected ÷ share among all")
    odds_ratio: float = Field(description="with ½ added to each cell (Haldane, Anscombe)")
    p: float = Field(description="Fisher's exact test, one-sided, × the number of factors tried")
    sentence: str


class Suspects(Answer):
    since: str
    where: list[str]
    affected: int
    others: int
    tried: int
    suspects: list[Suspect]
    sentence: str


class Changes(Answer):
    """A page of devices, or, for `where`, the suspects."""

    items: list[DeviceAnswer] | None = None
    next: str | None = None
    suspects: list[Suspect] | None = None


class ReleaseAnswer(Answer):
    name: str
    digest: str = Field(examples=[DIGEST])
    commit: str
    seen_at: str
    document: dict[str, Any]


class Releases(Answer):
    items: list[ReleaseAnswer]
    next: str | None


class HoldAnswer(Answer):
    id: str
    release: str
    digest: str
    to: str
    scope: dict[str, Any]
    reason: str
    actor: str
    incident: str | None
    created_at: str
    commit: str | None = Field(description="where Git has it; null: still to be recorded")
    lifted_at: str | None
    lifted_by: str | None
    lift_reason: str | None
    lift_commit: str | None


class RolloutAnswer(Answer):
    id: str = Field(examples=["01KAV4E6W3Z9QX2M5T7R8Y0BCD"])
    name: str = Field(examples=["model-3-eu-autopilot"])
    fleet: str
    release: str
    digest: str
    artifacts: dict[str, str]
    commit: str
    author: str
    state: str = Field(examples=["Soaking"])
    sentence: str = Field(examples=[SENTENCE])
    revision: int
    step: int
    steps: list[dict[str, Any]]
    opened_at: str
    step_at: str
    soak_seconds: float
    finished_at: str | None
    updated_at: str
    members: dict[str, Any]
    holds: list[HoldAnswer]


class Rollouts(Answer):
    items: list[RolloutAnswer]
    next: str | None


class DecisionAnswer(Answer):
    id: str
    rollout: str
    at: str
    kind: str = Field(examples=["verdict"])
    verdict: str = Field(examples=["roll_back"])
    sentence: str = Field(examples=[SENTENCE])
    numbers: dict[str, Any]
    watermark: int
    commit: str
    term: int


class DecisionWhole(DecisionAnswer):
    inputs: dict[str, Any]
    policy: dict[str, Any]


class Decisions(Answer):
    items: list[DecisionAnswer]
    next: str | None


class Evidence(Answer):
    items: list[DecisionWhole]
    next: str | None
    v: int
    rollout: RolloutAnswer


class AuditRow(Answer):
    seq: int = Field(examples=[4182])
    at: str = Field(examples=["2026-11-24T02:14:05.120Z"])
    actor: str = Field(examples=["ann"])
    action: str = Field(examples=["rollback"])
    subject: str = Field(examples=["model-3-eu-autopilot"])
    detail: dict[str, Any] = Field(examples=[{"reason": "disengagements up", "incident": "INC-7"}])
    previous: str
    hash: str


class Audit(Answer):
    items: list[AuditRow]
    next: str | None


class OutcomeAnswer(Answer):
    metric: str
    type: str = Field(examples=["mean"])
    direction: str
    verdict: str = Field(examples=["better"])
    measurable: bool
    against: str = Field(examples=["the holdout"])
    treated: int
    control: int
    estimate: float | None
    band: list[float] | None = Field(description="Always valid, 95 %")
    sentence: str


class Changed(Answer):
    """What one release changed, goal by goal, by the draw."""

    rollout: str
    name: str
    fleet: str
    release: str
    state: str
    initiative: str | None
    product: str | None
    team: str | None
    opened_at: str | None
    outcomes: list[OutcomeAnswer]


class Measure(Answer):
    name: str = Field(examples=["lead_time"])
    value: float | None
    unit: str
    n: int
    of: int
    definition: str


class Delivery(Answer):
    """The measures of DORA of one product and team."""

    product: str
    team: str
    days: float
    measures: list[Measure]


class Outcomes(Answer):
    items: list[Changed]
    delivery: list[Delivery]
    days: float
    at: str = Field(description="When it was measured")
    next: str | None


class Recorded(Answer):
    """Safe from here: the command stands in the database, with its audit row."""

    id: str
    revision: int
    state: str = Field(examples=["recorded"])
    sentence: str


class Preview(Answer):
    """What a verb would reach, without doing it."""

    kind: str = Field(examples=["rollback"])
    sentence: str = Field(
        examples=[
            "rollback fsd-10.3.0: 5412 devices change now; 184 are offline and go back at their "
            "next contact; 37 wait for their own safety (parked); 22 cannot go back (it ran "
            "nothing before: waits for the fix-forward)"
        ]
    )


class Straggler(Answer):
    device: str
    word: str = Field(description="changes | offline | waiting | cannot", examples=["waiting"])
    why: str = Field(examples=["parked"])
    last_contact: str | None


class Recovery(Answer):
    """Devices that a rollback has not reached yet, and why."""

    rollout: str
    name: str
    release: str
    state: str
    count: int
    groups: dict[str, int] = Field(examples=[{"offline": 12, "waiting": 3}])
    telemetry: str
    items: list[Straggler]
    next: str | None


class ApprovalAnswer(Answer):
    id: str
    kind: str = Field(examples=["promote"])
    fleet: str
    rollout: str
    digest: str = Field(description="of `seen`: a vote names it", examples=[DIGEST])
    seen: dict[str, Any]
    proposer: str
    reason: str
    needs: int = Field(description="people besides the proposer")
    approved_by: list[str]
    state: str = Field(examples=["waiting"])
    at: str
    expires_at: str
    decided_at: str | None
    result: str


class Approvals(Answer):
    items: list[ApprovalAnswer]
    next: str | None


class Voted(Answer):
    id: str
    state: str = Field(examples=["granted"])
    sentence: str


class Registered(Answer):
    items: list[dict[str, Any]] = Field(
        examples=[
            [
                {
                    "device": "car-0001",
                    "token": "bwe_F2R6DnZbFX3a6b35cogBSoi07pskYaWc6bcIPeXPuBA",
                    "expiresAt": "2026-11-25T02:14:05.120Z",
                }
            ]
        ]
    )
    warnings: list[str] = Field(
        examples=[["car-0001: its labels do not match the selector of fleet model-3-eu"]]
    )


class Enrolled(Answer):
    device: str = Field(examples=["car-0001"])
    fleet: str = Field(examples=["model-3-eu"])
    broker: dict[str, str | None] = Field(
        examples=[{"url": "mqtts://mqtt.example.com:8883", "username": "car-0001", "password": "…"}]
    )
    keys: list[dict[str, str]] = Field(
        description="The director's: what the device pins", examples=[[{"keyid": "…"}]]
    )
    server: str = Field(examples=["https://bellwether.example.com"])


class DeviceChanged(Answer):
    device: str = Field(examples=["car-0001"])
    fleet: str = Field(examples=["model-3-eu"])
    status: str = Field(examples=["quarantined"])
    labels: dict[str, str] = Field(examples=[{"hardware": "hw3"}])


class Published(Answer):
    digest: str = Field(examples=[DIGEST])
    size: int
    document: dict[str, Any]


class PlanAnswer(Answer):
    """What a commit would do; `rollouts` with their steps, gates and who is left out."""

    digest: str = Field(description="One digest, one plan", examples=[DIGEST])
    summary: str = Field(examples=["Plan: 1 opens, 2 edited."])
    changes: bool
    errors: list[str] = Field(examples=[[]])
    notices: list[str] = Field(examples=[[]])
    rollouts: list[dict[str, Any]]
    acts: list[dict[str, Any]]
    text: str = Field(description="for a terminal")
    markdown: str = Field(description="for the pull request; its first line is the sticky id")


class State(Answer):
    state: str = Field(examples=["ready"])
