"""JSON Schemas of the manifests, for editors, and of the wire messages, for other implementations.

Pure. A manifest's schema describes the written document; scalars are text or numbers there, since
YAML lets people write either. The strict check is the reader's.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from pydantic.json_schema import GenerateJsonSchema

from controller.manifests.reader import API_VERSION, KINDS
from device_agent import protocol
from telemetry import policy

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MESSAGES: Mapping[str, type] = {
    "desired": protocol.Desired,
    "reported": protocol.Reported,
    "health": protocol.Health,
    "ack": protocol.Ack,
    "presence": protocol.Presence,
}
_METADATA = ("name", "labels", "annotations")
_NOT_WRITTEN = {"Hold": ("id", "rejectsRelease", "rejectsDigest"), "Lift": ("id",)}
_SCALAR = {"type": ["string", "number", "boolean"]}


def names() -> list[str]:
    return [*KINDS, *MESSAGES]


def schema(name: str) -> dict[str, Any]:
    """The schema of a kind or a message; raises KeyError for another name."""
    if name in KINDS:
        return _manifest(name)
    return {"$schema": DIALECT, "title": name, **_message(MESSAGES[name], name)}


def _manifest(kind: str) -> dict[str, Any]:
    spec = _policy() if kind == "HealthPolicy" else _spec(kind)
    definitions = spec.pop("$defs", {})
    return {
        "$schema": DIALECT,
        "title": kind,
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": API_VERSION},
            "kind": {"const": kind},
            "metadata": {
                "type": "object",
                "additionalProperties": False,
                "required": [] if kind in _NOT_WRITTEN else ["name"],
                "properties": {
                    "name": {"type": "string", "pattern": f"^{protocol.ID.pattern}$"},
                    "labels": {"type": "object", "additionalProperties": _SCALAR},
                    "annotations": {"type": "object", "additionalProperties": _SCALAR},
                },
            },
            "spec": spec,
        },
        "$defs": definitions,
    }


class _Written(GenerateJsonSchema):
    """Scalars that we parse ourselves may be written as text or as numbers."""

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        inner = super().function_before_schema(schema)
        if inner.get("type") in ("number", "integer", "string", "boolean"):
            return dict(_SCALAR)
        if "anyOf" in inner:
            return {"anyOf": [*inner["anyOf"], _SCALAR]}
        return inner


def _spec(kind: str) -> dict[str, Any]:
    model: type[BaseModel] = KINDS[kind]
    made = model.model_json_schema(by_alias=True, schema_generator=_Written)
    properties = made["properties"]
    for field in (*_METADATA, *_NOT_WRITTEN.get(kind, ())):
        properties.pop(field, None)
    required = [field for field in made.get("required", []) if field in properties]
    if kind == "Hold":
        properties["rejects"] = {
            "type": "object",
            "required": ["release", "digest"],
            "additionalProperties": False,
            "properties": {"release": {"type": "string"}, "digest": {"type": "string"}},
        }
        required.append("rejects")
    spec = {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
        "$defs": made.get("$defs", {}),
    }
    _loosen(spec)
    return spec


def _loosen(node: Any) -> None:
    """Shorthands that the reader takes: `onInconclusive: pause`, `rollback: {allowed: yes}`."""
    definitions = node.get("$defs", {})
    inconclusive = definitions.get("OnInconclusive")
    if inconclusive is not None:
        definitions["OnInconclusive"] = {"anyOf": [{"type": "string"}, inconclusive]}


def _policy() -> dict[str, Any]:
    gate = _written(
        policy.Gate,
        {"margin": ("ratio", "absolute"), "tripwire": ("devices",)},
        without=("tripwireDevices",),
    )
    engine = [to_camel(f.name) for f in fields(policy.Engine)]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "score": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "preset": {"enum": list(policy.Preset)},
                    "window": _SCALAR,
                    "minExposure": _SCALAR,
                    "target": _SCALAR,
                    "factors": {"type": "array", "items": _written(policy.Factor, {})},
                },
            },
            "gates": {"type": "array", "items": gate},
            "engine": {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: {} for name in engine},
            },
            "goals": {"type": "array", "items": {"type": "object"}},
            "compare": {"type": "object"},
            "noData": {"enum": list(policy.NoData)},
        },
    }


def _written(
    cls: type, maps: Mapping[str, tuple[str, ...]], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        enum = isinstance(hint, type) and issubclass(hint, StrEnum)
        properties[to_camel(field.name)] = {"enum": list(hint)} if enum else dict(_SCALAR)
    for name in without:
        properties.pop(name)
    for name, keys in maps.items():
        properties[name] = {
            "type": "object",
            "additionalProperties": False,
            "properties": dict.fromkeys(keys, _SCALAR),
        }
    if "budget" in properties:
        properties["budget"] = {"type": "object", "additionalProperties": _SCALAR}
    required = ["metric", "type"] if "type" in properties else ["metric"]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


# -- messages -------------------------------------------------------------------------------------


def _message(cls: type, name: str) -> dict[str, Any]:
    inner = _object(cls)
    if name != "desired":
        return inner
    signature = _object(protocol.Signature)
    return {
        "type": "object",
        "required": ["signed", "signatures"],
        "properties": {
            "signed": inner,
            "signatures": {"type": "array", "minItems": 1, "maxItems": 8, "items": signature},
        },
    }


def _object(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    required = [
        protocol.camel(f.name)
        for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING
    ]
    return {
        "type": "object",
        "required": required,
        "properties": {protocol.camel(f.name): _type(hints[f.name]) for f in fields(cls)},
    }


def _type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [_type(a) for a in arguments if a is not type(None)]
        return {"anyOf": [*inner, {"type": "null"}]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1])}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is tuple:
        items = [_type(a) for a in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items)}
    if is_dataclass(hint):
        return _object(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return {"enum": [str(value) for value in hint]}
    kinds = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": kinds[hint]}
