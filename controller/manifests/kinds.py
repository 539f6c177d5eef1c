"""The six kinds of manifest as frozen models: what a release manager may write, and its defaults.

Pure types. Attribute names are snake_case, written names camelCase; scalars arrive as text and are
parsed by `scalars`. A model's JSON dump can be read back into the same model: rollouts keep pinned
copies. What depends on several documents is `admission`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic.alias_generators import to_camel

from controller.manifests import scalars
from controller.people import are_several
from device_agent.protocol import DIGEST, ID
from telemetry.policy import Policy, ScoreSpec

Duration = Annotated[
    timedelta,
    BeforeValidator(scalars.duration),
    PlainSerializer(lambda value: value.total_seconds(), return_type=float),
]
Share = Annotated[float, BeforeValidator(scalars.share)]
Number = Annotated[float, BeforeValidator(scalars.number)]
Whole = Annotated[int, BeforeValidator(scalars.whole)]
People = Annotated[int, BeforeValidator(scalars.whole), Field(ge=1, le=5)]
Truth = Annotated[bool, BeforeValidator(scalars.truth)]
Margin = Annotated[float, BeforeValidator(scalars.margin), Field(gt=0)]
Size = Annotated[int, BeforeValidator(scalars.size)]
Name = Annotated[str, Field(pattern=rf"^{ID.pattern}$")]
Digest = Annotated[str, Field(pattern=rf"^{DIGEST.pattern}$")]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Label = Annotated[str, Field(max_length=256)]


class Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True
    )


class Named(Model):
    """What every kind has from its metadata."""

    name: Name
    labels: Mapping[str, Label] = Field(default_factory=dict)
    annotations: Mapping[str, Label] = Field(default_factory=dict)


# -- selectors ------------------------------------------------------------------------------------


class Operator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Expression(Model):
    key: Label
    operator: Operator
    values: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _values(self) -> Expression:
        listed = self.operator in (Operator.IN, Operator.NOT_IN)
        if listed and not self.values:
            raise ValueError(f"{self.operator} needs values: [..]")
        if not listed and self.values:
            raise ValueError(f"{self.operator} takes no values")
        return self

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None


class Selector(Model):
    """Kubernetes label selector: all of it must match; an empty one matches everything."""

    match_labels: Mapping[str, Label] = Field(default_factory=dict)
    match_expressions: tuple[Expression, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            expression.matches(labels) for expression in self.match_expressions
        )


# -- Fleet ----------------------------------------------------------------------------------------


class ScoreBounds(Model):
    min: Number | None = None
    max: Number | None = None


class Mode(StrEnum):
    STRATIFIED = "stratified"
    HYBRID = "hybrid"
    BEST_FIRST = "best_first"


class Select(Selector):
    """Who may be in a cohort: labels, score, and how a limited number is drawn."""

    score: ScoreBounds | None = None
    mode: Mode = Mode.STRATIFIED

    @property
    def labels(self) -> Selector:
        return self


class Cohort(Model):
    name: Name
    select: Select | None = None
    limit: Annotated[Whole, Field(ge=1)] | None = None
    spread: tuple[Label, ...] = ()
    caps: Mapping[Label, Annotated[Share, Field(gt=0, le=1)]] = Field(default_factory=dict)
    rest: Truth = False

    @model_validator(mode="after")
    def _says_who(self) -> Cohort:
        if self.rest and (self.select is not None or self.limit is not None):
            raise ValueError("rest: true takes everybody that is left: no select, no limit")
        if not self.rest and self.select is None:
            raise ValueError("say who: select: {...}, or rest: true for the last cohort")
        return self


class OnUnknown(StrEnum):
    KEEP = "keep"
    ADOPT = "adopt"
    CONVERGE = "converge"


class Approvals(Model):
    """How many people an act takes, who asks for it among them. A stop takes one, always."""

    start: People = 1  # a release that a commit names
    recall: People = 1  # one with `urgency`: beside the two names in the file
    widen: People = 1  # `promote`
    lift: People = 1  # the end of a hold or of a stop


class Fleet(Named):
    selector: Selector
    health_policy: Name
    baseline: Mapping[Name, Name] = Field(default_factory=dict)
    on_unknown: OnUnknown = OnUnknown.KEEP
    approvals: Approvals = Approvals()
    cohorts: Annotated[tuple[Cohort, ...], Field(min_length=1)]


# -- Release --------------------------------------------------------------------------------------


class Artifact(Model):
    component: Name
    digest: Digest
    size: Annotated[Size, Field(ge=1)]
    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://\S+$")] | None = None
    compatible: Mapping[str, tuple[Label, ...]] = Field(default_factory=dict)


class Requirement(Model):
    component: Name
    version: Text


class RollbackRule(Model):
    """May a device go back from this release? `to` limits to which versions."""

    allowed: Truth = True
    to: tuple[Text, ...] = ()
    reason: str = ""
    data_loss: Truth = False

    @model_validator(mode="before")
    @classmethod
    def _yes_or_no(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("allowed") in ("yes", "no"):
            return {**data, "allowed": data["allowed"] == "yes"}
        return data

    @property
    def possible(self) -> bool:
        return self.allowed


class Installer(StrEnum):
    SLOTS = "slots"
    RAUC = "rauc"
    SWUPDATE = "swupdate"


class Install(Model):
    requires: tuple[Annotated[str, Field(pattern=r"^[a-z_]+((>=|<)[0-9]+)?$")], ...] = ()
    reboot: Truth = False
    timeout: Duration = timedelta(minutes=30)
    max_bytes_on: Mapping[str, Size] = Field(default_factory=dict)


class Sbom(Model):
    digest: Digest
    url: str


class ReleaseSignature(Model):
    """One person's word for a release: see `controller.release_signing`."""

    keyid: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sig: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class Release(Named):
    version: Text
    artifacts: Annotated[tuple[Artifact, ...], Field(min_length=1, max_length=32)]
    requires: tuple[Requirement, ...] = ()
    upgrades_from: tuple[Text, ...] = ()
    rollback: RollbackRule = RollbackRule()
    metrics: Mapping[str, Whole] = Field(default_factory=dict)
    security_epoch: Whole = 0
    installer: Annotated[str, Field(pattern=r"^(slots|rauc|swupdate|module:[a-z0-9._-]+)$")] = (
        "slots"
    )
    install: Install = Install()
    fixes: Name | None = None
    sbom: Sbom | None = None
    notes: str = ""
    signatures: Annotated[tuple[ReleaseSignature, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _one_artifact_a_component(self) -> Release:
        names = [artifact.component for artifact in self.artifacts]
        if len(set(names)) != len(names):
            raise ValueError("artifacts: one artifact for each component")
        return self

    @cached_property
    def components(self) -> Mapping[str, Artifact]:
        return {artifact.component: artifact for artifact in self.artifacts}

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Is every artifact compatible with a device of these labels?"""
        return all(
            labels.get(label) in allowed
            for artifact in self.artifacts
            for label, allowed in artifact.compatible.items()
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of {installer, sorted (component, artifact digest)}: what the release *is*."""
        identity = {
            "installer": self.installer,
            "artifacts": sorted([a.component, a.digest] for a in self.artifacts),
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return "sha256:" + sha256(text.encode()).hexdigest()


# -- Rollout --------------------------------------------------------------------------------------


class Pause(Model):
    """`{}` waits for `promote`."""

    duration: Duration | None = None


class KeepBack(Model):
    """So much of the cohort waits until the others were watched for so long."""

    percent: Annotated[Share, Field(gt=0)]
    for_: Annotated[Duration, Field(alias="for")]


class Step(Model):
    cohort: Name
    percent: Annotated[Share, Field(gt=0)] = 1.0
    max_concurrent: Annotated[Whole, Field(ge=1)] | None = None
    max_per_minute: Annotated[Whole, Field(ge=1)] | None = None
    soak: Duration = timedelta(0)
    max_soak: Duration | None = None
    margins: Mapping[str, Margin] = Field(default_factory=dict)  # ratio, failed, lost, <metric>
    pause: Pause | None = None
    keep_back: KeepBack | None = None

    @model_validator(mode="after")
    def _soaks(self) -> Step:
        if self.max_soak is not None and self.max_soak < self.soak:
            raise ValueError("maxSoak is shorter than soak")
        if self.keep_back is not None and self.keep_back.percent >= self.percent:
            raise ValueError("keepBack keeps everybody back: percent must be above it")
        return self


class AbortFailed(Model):
    count: Annotated[Whole, Field(ge=1)]
    share: Share = 0.0


class OfflineAction(StrEnum):
    DEFER = "defer"
    WAIT = "wait"
    FAIL = "fail"


class Offline(Model):
    action: OfflineAction = OfflineAction.DEFER
    count_after: Duration = timedelta(days=14)


class OnFailure(StrEnum):
    ROLLBACK = "rollback"
    HOLD = "hold"


class OnNewRelease(StrEnum):
    SUPERSEDE = "supersede"
    QUEUE = "queue"
    REJECT = "reject"


class Proceed(Model):
    min_healthy: Whole
    after_soak: Duration = timedelta(hours=72)
    max_devices: Whole = 50


class OnInconclusive(Model):
    """`pause`, `extend`, `grow`, `rollback`, or `proceed: {…}` for fleets too small to prove."""

    action: Literal["pause", "extend", "grow", "rollback", "proceed"] = "pause"
    proceed: Proceed | None = None

    @model_validator(mode="before")
    @classmethod
    def _word_or_map(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"action": data}
        if isinstance(data, Mapping) and set(data) == {"proceed"}:
            return {"action": "proceed", "proceed": data["proceed"]}
        return data

    @model_validator(mode="after")
    def _proceeds_with_limits(self) -> OnInconclusive:
        if (self.action == "proceed") != (self.proceed is not None):
            raise ValueError("write proceed: {minHealthy: 10, afterSoak: 72h, maxDevices: 50}")
        return self

    def allows(self, *, healthy: int, soaked: float, devices: int) -> bool:
        rule = self.proceed
        return rule is not None and (
            healthy >= rule.min_healthy
            and soaked >= rule.after_soak.total_seconds()
            and devices <= rule.max_devices
        )


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class Strategy(Model):
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=100)]
    partial: Truth = False
    max_failed: Annotated[Share, Field(gt=0, lt=1)] | None = None  # None: the fleet's own past
    abort_failed: AbortFailed | None = None
    silent_after: Annotated[Duration | None, BeforeValidator(_auto)] = None
    offline: Offline = Offline()
    min_reporting: Share = 0.8
    progress_deadline: Duration = timedelta(days=21)
    on_failure: OnFailure = OnFailure.ROLLBACK
    on_inconclusive: OnInconclusive = OnInconclusive()
    on_new_release: OnNewRelease = OnNewRelease.SUPERSEDE


def _moment(text: str) -> float:
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() + 86_400
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"expires: {text[:40]!r} is no time: write 2026-11-30 or 2026-11-30T18:00:00Z"
        ) from None


class Urgency(Model):
    level: Literal["recall", "normal"]
    reason: Text
    expires: Text
    approved_by: tuple[Text, ...] = ()

    @property
    def recall(self) -> bool:
        return self.level == "recall"

    @property
    def until(self) -> float:
        """When it ends, Unix seconds; a day ends with the day, UTC."""
        return _moment(self.expires)

    @model_validator(mode="after")
    def _two_people(self) -> Urgency:
        if self.recall and not are_several(self.approved_by):
            raise ValueError("approvedBy: a recall takes two different people")
        _moment(self.expires)
        return self


class Holdout(Model):
    percent: Share
    for_: Annotated[Duration, Field(alias="for")]
    unit: Literal["device"] = "device"


class RollbackPlan(Model):
    to: str = "previous"
    pace: Literal["immediate", "steps"] = "immediate"
    abort_failed: Whole = 2


class WindowKind(StrEnum):
    ALLOW = "Allow"
    DENY = "Deny"


class Window(Model):
    kind: WindowKind
    schedule: Text
    duration: Duration
    timezone: str = "UTC"


class Rollout(Named):
    fleet: Name
    release: Name
    strategy: Strategy
    urgency: Urgency | None = None
    holdout: Holdout | None = None
    rollback: RollbackPlan = RollbackPlan()
    windows: tuple[Window, ...] = ()
    suspend: Truth = False


# -- HealthPolicy, Hold, Lift ---------------------------------------------------------------------


class HealthPolicy(Named):
    """The policy as the evidence reads it (`judged`), with what is only shown beside it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    judged: Annotated[
        Policy,
        BeforeValidator(lambda v: v if isinstance(v, Policy) else Policy.from_json(v)),
        PlainSerializer(lambda policy: policy.to_json(), return_type=dict),
    ]
    goals: tuple[Mapping[str, Any], ...] = ()
    compare: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def score(self) -> ScoreSpec:
        return self.judged.score


class Hold(Named):
    id: Name
    rollout: Name
    rejects_release: Name
    rejects_digest: Digest
    to: str = "previous"
    scope: Mapping[str, Any] = Field(default_factory=lambda: {"all": True})
    reason: Text
    actor: Text
    incident: str | None = None
    created_at: str | None = None


class Lift(Named):
    id: Name
    hold: Name
    reason: Text
    actor: Text
    created_at: str | None = None
