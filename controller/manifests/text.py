"""Manifest text → plain data with a place for every value. What is written is what is meant.

Pure. All scalars stay strings; aliases, anchors, tags, duplicate keys, merge keys and control
characters are errors; so is more than 1 MiB, or more than 32 levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
MOST_DOCUMENTS = 5_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = frozenset({f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")})
# What the loader guesses of plain text; any other tag was written by somebody.
_SCALAR_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
)

_BRACKET = re.compile(r"[\[\]{}]")
# All but tab and line feed. Those above 0x7f are taken: reasons, and so files of holds, had them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Place = tuple[int, int]  # line and column, from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    line: int
    col: int
    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML document: strings, lists and dicts, and where each of them stands."""

    data: Any
    places: dict[tuple[str | int, ...], Place] = field(default_factory=dict)

    def place(self, path: tuple[str | int, ...]) -> Place:
        """The place of a value, or of the nearest thing around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, (1, 1))


class _Refused(Exception):
    def __init__(self, node: Any, message: str, path: tuple[str | int, ...]) -> None:
        super().__init__(message)
        mark = node.start_mark
        self.fault = Fault(
            line=mark.line + 1, col=mark.column + 1, field=dotted(path), message=message
        )


def documents(content: bytes | str) -> Iterator[Document | Fault]:
    """Every document of a file, or the fault that ends the reading."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > MOST_BYTES:
        yield Fault(line=1, col=1, field="", message="larger than 1 MiB: split the file")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        yield Fault(line=line, col=1, field="", message="not UTF-8: save the file as UTF-8")
        return
    if fault := _too_deep(text):
        yield fault
        return
    yield from _composed(text)


def dotted(path: tuple[str | int, ...]) -> str:
    """("spec", "steps", 0, "cohort") → spec.steps[0].cohort"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _composed(text: str) -> Iterator[Document | Fault]:
    loader = _Loader(text)
    try:
        for count in range(MOST_DOCUMENTS + 1):
            if not loader.check_node():
                return
            if count == MOST_DOCUMENTS:
                yield Fault(line=1, col=1, field="", message="too many documents in one file")
                return
            document = Document(data=None)
            node = loader.get_node()
            data = _plain(node, (), document.places, set())
            yield Document(data=data, places=document.places)
    except _Refused as refused:
        yield refused.fault
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = getattr(error, "problem", None) or str(error).split("\n")[0]
        yield Fault(
            line=mark.line + 1 if mark else 1,
            col=mark.column + 1 if mark else 1,
            field="",
            message=f"not YAML: {message}",
        )
    except (RecursionError, ValueError) as error:
        yield Fault(line=1, col=1, field="", message=f"not YAML: {error}"[:200])
    finally:
        loader.dispose()


def _plain(node: Any, path: tuple[str | int, ...], places: dict[Any, Place], seen: set[int]) -> Any:
    if id(node) in seen:
        raise _Refused(node, "aliases (*name) are not allowed: write the value again", path)
    seen.add(id(node))
    if len(path) > MOST_DEPTH:
        raise _Refused(node, f"nested deeper than {MOST_DEPTH} levels", path)
    places[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    if node.tag not in _PLAIN_TAGS:
        raise _Refused(node, f"tags ({node.tag}) are not allowed", path)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), places, seen) for i, item in enumerate(node.value)]
    return _mapping(node, path, places, seen)


def _mapping(
    node: Any, path: tuple[str | int, ...], places: dict[Any, Place], seen: set[int]
) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _Refused(key_node, "a key must be plain text", path)
        key = _writable(key_node, path)
        if key in table:
            raise _Refused(key_node, f"{key!r} is written twice", (*path, key))
        if key == "<<":
            raise _Refused(key_node, "merge keys (<<) are not allowed", path)
        table[key] = _plain(value_node, (*path, key), places, seen)
        places[(*path, key, "<key>")] = (
            key_node.start_mark.line + 1,
            key_node.start_mark.column + 1,
        )
    return table


def _scalar(node: Any, path: tuple[str | int, ...]) -> str:
    # The loader resolves `10.10` to a float tag but keeps the text: the text is what counts.
    if node.tag not in _SCALAR_TAGS:
        raise _Refused(node, f"tags ({node.tag}) are not allowed", path)
    return _writable(node, path)


def _writable(node: Any, path: tuple[str | int, ...]) -> str:
    """The text, when it may stand in a database, on a page and in a terminal.

    YAML itself refuses a control character that is written; `"\\0"` and `"\\e"` are its escapes.
    """
    text = str(node.value)
    if found := CONTROL.search(text):
        raise _Refused(node, f"the control character {found.group()!a} is not allowed", path)
    return text


def _too_deep(text: str) -> Fault | None:
    """Flow nesting is counted before a parser recurses into it; block nesting costs a column."""
    depth = 0
    for number, line in enumerate(text.split("\n"), 1):
        indent = len(line) - len(line.lstrip(" "))
        if indent > 512 or line.count("- ") > 64:
            return Fault(line=number, col=1, field="", message="nested too deep")
        for bracket in _BRACKET.finditer(line):
            depth += 1 if bracket.group() in "[{" else -1
            if depth > 2 * MOST_DEPTH:
                col = bracket.start() + 1
                return Fault(line=number, col=col, field="", message="nested too deep")
    return None
