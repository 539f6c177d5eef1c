"""Reads manifests: text → kinds, or `path:line:col: field: what is wrong, what to write instead`.

Pure, and it never raises: whatever the text, the answer is the documents that could be read and
the problems of the others. An unknown field names its nearest known neighbour. What a broken
document is needed by is decided in `admission`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from controller.manifests import policies
from controller.manifests.kinds import Fleet, HealthPolicy, Hold, Lift, Release, Rollout
from controller.manifests.text import Document, Fault, documents, dotted

API_VERSION = "bellwether.dev/v1"
KINDS: Mapping[str, type[BaseModel]] = {
    "Fleet": Fleet,
    "Release": Release,
    "Rollout": Rollout,
    "HealthPolicy": HealthPolicy,
    "Hold": Hold,
    "Lift": Lift,
}
_METADATA = ("name", "labels", "annotations")
_TOP = ("apiVersion", "kind", "metadata", "spec")
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    path: str
    line: int
    col: int
    field: str
    message: str
    severity: Literal["error", "notice"] = "error"
    blocks: frozenset[str] = frozenset()  # names of rollouts that it blocks

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}:{self.col}: "
        return where + (f"{self.field}: " if self.field else "") + self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifests:
    """Every document that could be read, by name; `origin[kind, name]` is where it stands."""

    fleets: Mapping[str, Fleet] = field(default_factory=dict)
    releases: Mapping[str, Release] = field(default_factory=dict)
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)
    policies: Mapping[str, HealthPolicy] = field(default_factory=dict)
    holds: Mapping[str, Hold] = field(default_factory=dict)
    lifts: Mapping[str, Lift] = field(default_factory=dict)
    origin: Mapping[tuple[str, str], str] = field(default_factory=dict)
    places: Mapping[tuple[str, str], Document] = field(default_factory=dict, repr=False)

    def where(self, kind: str, name: str, path: Path = ()) -> tuple[str, int, int]:
        """(file, line, column) of a field of a document."""
        file = self.origin.get((kind, name), "?:1").rpartition(":")[0]
        document = self.places.get((kind, name))
        line, col = document.place(path) if document else (1, 1)
        return file, line, col


Entry = tuple[Document, str | None, str | None, BaseModel | None, list["Problem"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file as it was read: what its text alone says, whatever stands beside it."""

    content: str | bytes
    entries: tuple[Entry | Fault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    manifests: Manifests
    problems: tuple[Problem, ...]
    broken: frozenset[tuple[str, str]] = frozenset()  # (kind, name) of what could not be read
    files: Mapping[str, File] = field(default_factory=dict, repr=False)  # path → as it was read


_TABLES = {
    "Fleet": "fleets",
    "Release": "releases",
    "Rollout": "rollouts",
    "HealthPolicy": "policies",
    "Hold": "holds",
    "Lift": "lifts",
}


def read(files: Mapping[str, str | bytes], before: Reading | None = None) -> Reading:
    """All documents of all files; a file's faults never touch another file.

    `before`: an earlier reading; a file whose text did not change is not parsed again.
    """
    known = before.files if before is not None else {}
    parsed: dict[str, File] = {}
    tables: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    origin: dict[tuple[str, str], str] = {}
    places: dict[tuple[str, str], Document] = {}
    problems: list[Problem] = []
    broken: set[tuple[str, str]] = set()
    for path in sorted(files):
        file = known.get(path)
        if file is None or file.content != files[path]:
            file = _file(path, files[path])
        parsed[path] = file
        for entry in file.entries:
            if isinstance(entry, Fault):
                problems.append(_of_fault(path, entry))
                continue
            found, kind, name, model, faults = entry
            problems += faults
            if kind is None or name is None:
                continue
            if (kind, name) in origin:
                line, col = found.place(("metadata", "name"))
                message = f"{kind} {name} stands in {origin[kind, name]} already: rename one"
                problems.append(_problem(path, line, col, "metadata.name", message))
                continue
            places[kind, name] = found
            origin[kind, name] = f"{path}:{found.place(())[0]}"
            if model is None:
                broken.add((kind, name))
            else:
                tables[kind][name] = model
    manifests = Manifests(
        **{_TABLES[kind]: table for kind, table in tables.items()}, origin=origin, places=places
    )
    blocked = [_blocks(problem, manifests, broken) for problem in problems]
    return Reading(
        manifests=manifests, problems=tuple(blocked), broken=frozenset(broken), files=parsed
    )


@lru_cache(maxsize=256)
def _file(path: str, content: str | bytes) -> File:
    """Kept: what one watcher, plan or revert has read, the next one has not to parse again."""
    entries = (
        found if isinstance(found, Fault) else (found, *_document(path, found))
        for found in documents(content)
    )
    return File(content=content, entries=tuple(entries))


def _document(
    path: str, document: Document
) -> tuple[str | None, str | None, BaseModel | None, list[Problem]]:
    data = document.data
    if data == "" or data is None:
        return None, None, None, []  # an empty document between two `---`
    if not isinstance(data, dict):
        message = "a document is a map with apiVersion, kind, metadata and spec"
        return None, None, None, [_at(path, document, (), message)]
    kind = str(data.get("kind"))
    if kind not in KINDS:
        hint = _nearest(kind, KINDS)
        message = f"{kind[:60]!r} is no kind{hint}; one of {', '.join(KINDS)}"
        return None, None, None, [_at(path, document, ("kind",), message)]
    problems = list(_frame(path, document, data))
    metadata, spec = data.get("metadata"), data.get("spec")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if kind in ("Hold", "Lift") and not name:
        name = PurePosixPath(path).stem
    if not isinstance(name, str):
        if isinstance(metadata, dict):
            message = "missing: every document has a name"
            problems.append(_at(path, document, ("metadata", "name"), message))
        return kind, None, None, problems
    if problems or not isinstance(metadata, dict) or not isinstance(spec, dict):
        return kind, name, None, problems
    try:
        model = _model(kind, name, metadata, spec)
    except ValidationError as error:
        problems += [_of_error(path, document, kind, detail) for detail in error.errors()]
        return kind, name, None, problems
    except policies.Refused as refused:
        problems += [_at(path, document, ("spec", *p), m) for p, m in refused.faults]
        return kind, name, None, problems
    return kind, name, model, problems


def _frame(path: str, document: Document, data: dict[str, Any]) -> Iterator[Problem]:
    for key in data:
        if key not in _TOP:
            message = f"unknown field{_nearest(key, _TOP)}"
            yield _at(path, document, (key, "<key>"), message, shown=(key,))
    if data.get("apiVersion") != API_VERSION:
        yield _at(path, document, ("apiVersion",), f"write apiVersion: {API_VERSION}")
    for part in ("metadata", "spec"):
        if not isinstance(data.get(part), dict):
            yield _at(path, document, (part,), "missing, or not a map")
    metadata = data.get("metadata")
    if isinstance(metadata, dict):
        for key in metadata:
            if key not in _METADATA:
                message = f"unknown field{_nearest(key, _METADATA)}"
                yield _at(
                    path, document, ("metadata", key, "<key>"), message, shown=("metadata", key)
                )


def _model(kind: str, name: str, metadata: dict[str, Any], spec: dict[str, Any]) -> BaseModel:
    for reserved in ("name", "labels", "annotations"):
        if reserved in spec:
            raise policies.Refused([((reserved,), "unknown field: it belongs to metadata")])
    head = {**metadata, "name": name}
    if kind == "HealthPolicy":
        return policies.build(head, spec)
    if kind in ("Hold", "Lift"):
        spec = _hold(spec) if kind == "Hold" else spec
        head = {**head, "id": name}
    return KINDS[kind].model_validate({**head, **spec})


def _hold(spec: dict[str, Any]) -> dict[str, Any]:
    rejects = spec.get("rejects")
    if not isinstance(rejects, dict) or set(rejects) != {"release", "digest"}:
        raise policies.Refused([(("rejects",), "write rejects: {release: NAME, digest: sha256:…}")])
    rest = {key: value for key, value in spec.items() if key != "rejects"}
    return {
        **rest,
        "rejectsRelease": rejects["release"],
        "rejectsDigest": rejects["digest"],
    }


# -- problems -------------------------------------------------------------------------------------


def _of_error(path: str, document: Document, kind: str, detail: Any) -> Problem:
    """A pydantic error in our words, at its place in the text."""
    location = tuple(part for part in detail["loc"] if part != "function-wrap")
    in_metadata = bool(location) and location[0] in _METADATA
    place: Path = (("metadata" if in_metadata else "spec"), *location)
    code, message = detail["type"], str(detail["msg"])
    if code == "extra_forbidden":
        known = _known_fields(KINDS[kind], location[:-1])
        message = f"unknown field{_nearest(str(location[-1]), known)}"
        return _at(path, document, (*place, "<key>"), message, shown=place)
    if code == "missing":
        message = "missing"
    elif code in ("value_error", "assertion_error"):
        message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    elif code == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        message = f"{str(detail['input'])[:80]!r} does not fit {pattern}"
    elif code in ("enum", "literal_error"):
        message = f"{str(detail['input'])[:80]!r}: one of {detail['ctx']['expected']}"
    elif code.endswith(("_type", "_parsing")):
        message = f"{str(detail['input'])[:80]!r}: {message}"
    return _at(path, document, place, message)


def _known_fields(model: type[BaseModel], path: Path) -> list[str]:
    """Written names of the fields at a place inside a model."""
    current: Any = model
    for part in path:
        if isinstance(part, int) or current is None:
            continue
        fields = {f.alias or n: f for n, f in current.model_fields.items()}
        found = fields.get(str(part))
        current = _inner(found.annotation) if found else None
    if current is None:
        return []
    return [f.alias or n for n, f in current.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner(argument)
        if found is not None:
            return found
    return None


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _at(
    path: str, document: Document, place: Path, message: str, shown: Path | None = None
) -> Problem:
    line, col = document.place(place)
    return _problem(path, line, col, dotted(place if shown is None else shown), message)


def _problem(path: str, line: int, col: int, where: str, message: str) -> Problem:
    return Problem(path=path, line=line, col=col, field=where, message=message)


def _of_fault(path: str, fault: Fault) -> Problem:
    return _problem(path, fault.line, fault.col, fault.field, fault.message)


def _blocks(problem: Problem, manifests: Manifests, broken: set[tuple[str, str]]) -> Problem:
    """Which rollouts a fault of this file touches: those that stand in it or need what does."""
    in_file = {
        key for key, where in manifests.origin.items() if where.startswith(problem.path + ":")
    }
    names = {name for kind, name in in_file & broken if kind == "Rollout"}
    for rollout in manifests.rollouts.values():
        fleet = manifests.fleets.get(rollout.fleet)
        needs = {("Fleet", rollout.fleet), ("Release", rollout.release), ("Rollout", rollout.name)}
        if fleet is not None:
            needs.add(("HealthPolicy", fleet.health_policy))
        if needs & broken & in_file:
            names.add(rollout.name)
    return replace(problem, blocks=frozenset(names))
