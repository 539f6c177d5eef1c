"""Writes documents as text that a person would commit: block style, quoted where it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Indents lists, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def document_text(document: Mapping[str, Any]) -> str:
    """One YAML document, ready to commit."""
    text: str = yaml.dump(
        dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )
    return text


def with_signatures(text: str, name: str, signatures: Sequence[Mapping[str, str]]) -> str:
    """The text of a file with these signatures in the Release of this name, everything else, its
    comments too, as it was; raises ValueError where `spec` is not written in block style."""
    spec = _spec_of(text, name)
    if spec.flow_style or not spec.value:
        raise ValueError(f"release {name}: write `spec:` over several lines, not as {{…}}")
    lines = text.splitlines()
    at = _last_line(spec) + 1
    for key, value in spec.value:
        if key.value == "signatures":
            at = key.start_mark.line
            del lines[at : _last_line(value) + 1]
    indent = " " * spec.value[0][0].start_mark.column
    said = [f'{indent}  - {{keyid: "{s["keyid"]}", sig: "{s["sig"]}"}}' for s in signatures]
    lines[at:at] = [f"{indent}signatures:", *said]
    return "\n".join(lines) + "\n"


def _spec_of(text: str, name: str) -> Any:
    """The node of that Release's `spec`."""
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        found = _keys(document)
        named = _keys(found.get("metadata")).get("name")
        kind = found.get("kind")
        right = kind is not None and kind.value == "Release"
        if right and named is not None and named.value == name and "spec" in found:
            return found["spec"]
    raise ValueError(f"release {name}: no such document in this file")


def _keys(node: Any) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value}


def _last_line(node: Any) -> int:
    """The line, counted from 0, on which a node's text ends; what follows is not its own."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        end = node.end_mark
        return int(
            end.line - 1 if end.column == 0 and end.line > node.start_mark.line else end.line
        )
    last = node.value[-1]
    return _last_line(last[1] if isinstance(node, yaml.MappingNode) else last)
