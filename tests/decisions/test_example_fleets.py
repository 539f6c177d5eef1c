"""The example fleets are documentation and test data: they validate, and fit the schemas."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from controller.fleetrepo import is_manifest
from controller.manifests.admission import admit
from controller.manifests.reader import read
from controller.manifests.schema import names, schema
from controller.starter import files

FLEETS = Path(__file__).parents[2] / "fleets"
FILES_THERE = sorted(FLEETS.rglob("*.yaml"))


def test_the_example_fleets_are_valid_together_and_alone() -> None:
    for folder in (FLEETS, FLEETS / "cars", FLEETS / "drones"):
        reading = read({str(file): file.read_bytes() for file in folder.rglob("*.yaml")})
        problems = [*reading.problems, *admit(reading)]
        assert [str(p) for p in problems if p.severity == "error"] == []
        assert reading.manifests.rollouts


def test_the_story_is_told_by_them() -> None:
    reading = read({str(file): file.read_bytes() for file in FILES_THERE})
    releases = reading.manifests.releases
    assert releases["fsd-10.3.1"].fixes == "fsd-10.3.0"
    (need,) = releases["autopilot-4.2.0"].requires
    assert (need.component, need.version) == ("battery", ">=1.9")


@pytest.mark.parametrize("file", FILES_THERE, ids=lambda file: str(file.relative_to(FLEETS)))
def test_each_document_fits_its_published_schema(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        jsonschema.validate(document, schema(document["kind"]))


def test_the_starter_of_init_is_valid() -> None:
    written = files()
    reading = read({path: text for path, text in written.items() if is_manifest(path)})
    assert set(reading.manifests.rollouts) == {"my-fleet-app"}
    for path, text in written.items():
        if path.endswith((".yaml", ".yml")):
            assert yaml.safe_load(text), path
    assert [str(p) for p in (*reading.problems, *admit(reading))] == []


@pytest.mark.parametrize("name", names())
def test_every_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(name))
