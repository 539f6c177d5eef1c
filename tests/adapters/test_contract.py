"""The API keeps what its OpenAPI document promises, whatever is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import Case
from schemathesis.specs.openapi.checks import positive_data_acceptance

from controller.http import services
from controller.roles import Role

if TYPE_CHECKING:
    from conftest import House


# A cursor or a condition can fit its schema and still be none of ours: 400 and 422 are documented.
OFTEN = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def operations(house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every operation of a service with a device, a rollout and no limit of rate."""
    monkeypatch.setattr(services, "EVENTS_LAST", 0.01)
    house.add_rollout()
    house.enrol()
    client = house.with_settings(auth="required", rate_limit=0.0)
    schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", client.app)
    for found in schema.get_all_operations():
        yield found.ok()


def test_no_server_error_and_no_undocumented_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, wrong, tried = house.token(Role.ADMIN), [], 0
    for operation in operations(house, monkeypatch):
        tried += 1

        @given(case=operation.as_strategy())
        @OFTEN
        def ask(case: Case) -> None:
            case.call_and_validate(
                headers={**headers, **(case.headers or {})},
                excluded_checks=[positive_data_acceptance],
            )

        try:
            ask()
        except (AssertionError, BaseExceptionGroup) as error:
            wrong.append(f"{operation.label}: {error}")
    assert tried > 25
    assert not wrong, "\n\n".join(wrong)


def test_every_operation_documents_its_refusals(house: House) -> None:
    document = house.client.get("/api/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation.get("summary"), (method, path)
            assert {"400", "429", "500", "503"} <= set(operation["responses"]), (method, path)
            if "{" in path:
                assert "404" in operation["responses"], (method, path)


def _shown(document: Any, schema: Any, seen: tuple[str, ...] = ()) -> Iterator[Any]:
    """(example, schema) of everything in this schema."""
    if (ref := schema.get("$ref", "")) and ref not in seen:
        yield from _shown(
            document, document["components"]["schemas"][ref.split("/")[-1]], (*seen, ref)
        )
    for example in schema.get("examples", ()):
        yield example, schema
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    for part in [*inner, *([schema["items"]] if isinstance(schema.get("items"), dict) else [])]:
        yield from _shown(document, part, seen)


def test_every_body_and_every_json_answer_has_an_example_that_fits_it(house: House) -> None:
    document = house.client.get("/api/v1/openapi.json").json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            bodies = [operation.get("requestBody", {}).get("content", {})]
            bodies += [a.get("content", {}) for c, a in operation["responses"].items() if c < "300"]
            for content in bodies:
                schema = content.get("application/json", {}).get("schema", {})
                if not schema or schema == {"type": "object"}:
                    continue  # a signed order, a signed file: `schema MESSAGE` tells them
                examples = list(_shown(document, schema))
                assert examples, (method, path)
                for example, of in examples:
                    whole = {**of, "components": document["components"]}
                    Draft202012Validator(whole).validate(example)


def test_a_method_that_a_path_does_not_take_is_405_and_names_those_that_it_does(
    house: House,
) -> None:
    document = house.client.get("/api/v1/openapi.json").json()
    for path, item in document["paths"].items():
        takes = {method.upper() for method in item}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - takes:
            url = path.replace("{digest}", "sha256:" + "0" * 64)
            said = house.client.request(method, re.sub(r"{\w+}", "a", url))
            if said.status_code == 404 and "}:" in path:
                continue  # read as the name of something: `GET /rollouts/a:hold`
            assert said.status_code == 405, (method, path, said.text)
            assert set(said.headers["allow"].split(", ")) == takes, (method, path)


def test_the_document_says_whether_a_token_is_needed(house: House) -> None:
    for auth, needed in (("loopback", False), ("required", True)):
        document = house.with_settings(auth=auth).get("/api/v1/openapi.json").json()
        listed = document["paths"]["/api/v1/rollouts"]["get"]["security"]
        assert ({} not in listed) is needed
        assert {"token": []} in listed
