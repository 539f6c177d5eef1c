"""HealthPolicy text → `telemetry.policy` types, with the field of every fault.

Pure. The policy's types live with the evidence that reads them; here is only how they are written.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic.alias_generators import to_camel

from controller.manifests import scalars
from controller.manifests.kinds import HealthPolicy
from telemetry.outcomes import goal
from telemetry.policy import (
    Direction,
    Engine,
    Factor,
    Gate,
    GateType,
    Margin,
    NoData,
    Policy,
    Preset,
    ScoreSpec,
    Weights,
)

Path = tuple[str | int, ...]
T = TypeVar("T")


class Refused(Exception):
    """What is wrong, and where below `spec`."""

    def __init__(self, faults: list[tuple[Path, str]]) -> None:
        super().__init__(str(faults))
        self.faults = faults


def build(head: Mapping[str, Any], spec: Mapping[str, Any]) -> HealthPolicy:
    """The model; raises Refused with every fault found, or pydantic's ValidationError."""
    known = ("score", "gates", "engine", "goals", "compare", "noData")
    _only(spec, known, ())
    name = str(head["name"])
    goals = _list(spec, "goals", ())
    gates = tuple(_gate(item, ("gates", i)) for i, item in enumerate(_list(spec, "gates", ())))
    policy = _make(
        (),
        lambda: Policy(
            name=name,
            score=_score(_map(spec, "score", ())),
            gates=gates,
            engine=_engine(_map(spec, "engine", ())),
            no_data=_word(NoData, spec.get("noData", "inconclusive"), ("noData",)),
        ),
    )
    return HealthPolicy.model_validate(
        {
            **head,
            "judged": policy,
            "goals": tuple(_goal(item, ("goals", i)) for i, item in enumerate(goals)),
            "compare": _map(spec, "compare", ()),
        }
    )


def _gate(data: Any, path: Path) -> Gate:
    if not isinstance(data, Mapping):
        raise Refused([(path, "a gate is a map: {metric: …, type: …}")])
    known = ("metric", "type", "per", "direction", "margin", "budget", "tripwire", "dryRun")
    _only(data, known, path)
    for needed in ("metric", "type"):
        if needed not in data:
            raise Refused([((*path, needed), "missing")])
    margin, tripwire = _map(data, "margin", path), _map(data, "tripwire", path)
    _only(margin, ("ratio", "absolute"), (*path, "margin"))
    _only(tripwire, ("devices",), (*path, "tripwire"))
    budget = {
        key: _scalar(scalars.share if key == "share" else scalars.number, value, (*path, "budget"))
        for key, value in _map(data, "budget", path).items()
    }
    return _make(
        path,
        lambda: Gate(
            metric=str(data["metric"]),
            type=_word(GateType, data["type"], (*path, "type")),
            per=str(data["per"]) if "per" in data else None,
            direction=_word(Direction, data.get("direction", "increase"), (*path, "direction")),
            margin=Margin(
                ratio=_optional(scalars.number, margin.get("ratio"), (*path, "margin", "ratio")),
                absolute=_optional(
                    scalars.number, margin.get("absolute"), (*path, "margin", "absolute")
                ),
            ),
            budget=budget,
            tripwire_devices=_optional(
                scalars.whole, tripwire.get("devices"), (*path, "tripwire", "devices")
            ),
            dry_run=_scalar(scalars.truth, data.get("dryRun", "false"), (*path, "dryRun")),
        ),
    )


def _goal(data: Any, path: Path) -> Mapping[str, Any]:
    """Kept as it is written; read by `telemetry.outcomes` when it is judged."""
    if not isinstance(data, Mapping):
        raise Refused([(path, "a goal is a map: {metric: …, type: mean, direction: increase}")])
    _make(path, lambda: goal(data))
    return data


def _score(data: Mapping[str, Any]) -> ScoreSpec:
    path: Path = ("score",)
    _only(data, ("preset", "window", "minExposure", "factors", "target"), path)
    factors = tuple(
        _factor(item, (*path, "factors", i)) for i, item in enumerate(_list(data, "factors", path))
    )
    preset: Preset = _word(Preset, data.get("preset", "linear"), (*path, "preset"))
    target = str(data["target"]) if "target" in data else None
    _fits_preset(preset, factors, target, path)
    return _make(
        path,
        lambda: ScoreSpec(
            preset=preset,
            target=target,
            window=_scalar(scalars.duration, data.get("window", "30d"), (*path, "window")),
            min_exposure=_scalar(
                scalars.duration, data.get("minExposure", "20h"), (*path, "minExposure")
            ).total_seconds()
            / 3600,
            factors=factors,
        ),
    )


def _fits_preset(
    preset: Preset, factors: tuple[Factor, ...], target: str | None, path: Path
) -> None:
    if preset is Preset.PIF:
        for i, factor in enumerate(factors):
            if factor.multiplier is None:
                message = "preset pif needs a multiplier: how much one unit multiplies the risk"
                raise Refused([((*path, "factors", i, "multiplier"), message)])
    regressed = preset is Preset.REGRESSION
    if regressed != (target is not None):
        message = (
            "preset regression needs a target: the counter that the factors shall predict"
            if regressed
            else "a target is for preset regression alone"
        )
        raise Refused([((*path, "target"), message)])
    for i, factor in enumerate(factors if regressed else ()):
        if factor.metric == target:
            message = f"{target} is the target: a factor cannot predict itself"
            raise Refused([((*path, "factors", i, "metric"), message)])
        if factor.multiplier is not None:
            message = "preset regression fits the multipliers: leave it out, or use preset pif"
            raise Refused([((*path, "factors", i, "multiplier"), message)])


def _factor(data: Any, path: Path) -> Factor:
    if not isinstance(data, Mapping) or "metric" not in data:
        raise Refused([(path, "a factor is a map with metric, per, good, bad, weight")])
    known = ("metric", "per", "good", "bad", "weight", "multiplier", "cap")
    _only(data, known, path)
    numbers = {
        key: _scalar(scalars.number, data[key], (*path, key)) for key in known[2:] if key in data
    }
    per = str(data.get("per", "device_hour"))
    return _make(path, lambda: Factor(metric=str(data["metric"]), per=per, **numbers))


def _engine(data: Mapping[str, Any]) -> Engine:
    path: Path = ("engine",)
    names = {to_camel(f.name): f for f in fields(Engine)}
    _only(data, tuple(names), path)
    values: dict[str, Any] = {}
    for key, value in data.items():
        field = names[key]
        if key == "weights":
            parts = _map(data, "weights", path)
            _only(parts, tuple(f.name for f in fields(Weights)), (*path, "weights"))
            numbers = {
                k: _scalar(scalars.number, v, (*path, "weights", k)) for k, v in parts.items()
            }
            values["weights"] = _weights(numbers, (*path, "weights"))
        elif isinstance(value, list):
            values[field.name] = tuple(
                _scalar(scalars.margin, v, (*path, key, i)) for i, v in enumerate(value)
            )
        elif isinstance(field.default, int) and not isinstance(field.default, bool):
            values[field.name] = _scalar(scalars.whole, value, (*path, key))
        else:
            values[field.name] = _scalar(scalars.margin, value, (*path, key))
    return _make(path, lambda: Engine(**values))


def _weights(numbers: Mapping[str, float], path: Path) -> Weights:
    return _make(path, lambda: Weights(**numbers))


# -- small readers --------------------------------------------------------------------------------


def _only(data: Mapping[str, Any], known: tuple[str, ...], path: Path) -> None:
    faults: list[tuple[Path, str]] = []
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            faults.append(((*path, key), f"unknown field{hint}"))
    if faults:
        raise Refused(faults)


def _map(data: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, Mapping):
        raise Refused([((*path, key), "a map is expected")])
    return value


def _list(data: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise Refused([((*path, key), "a list is expected")])
    return value


def _scalar(parse: Callable[[Any], Any], value: Any, path: Path) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise Refused([(path, str(error))]) from None


def _optional(parse: Callable[[Any], Any], value: Any, path: Path) -> Any:
    return None if value is None else _scalar(parse, value, path)


def _word(kind: Any, value: Any, path: Path) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise Refused([(path, f"{str(value)[:60]!r}: one of {', '.join(kind)}")]) from None


def _make(path: Path, build: Callable[[], T]) -> T:
    try:
        return build()
    except ValueError as error:
        raise Refused([(path, str(error))]) from None
