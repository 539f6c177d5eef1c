"""Which methods a path takes: all of its routes count, not only the first whose path fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.routing import Match
from starlette.types import Scope


def allowed(scope: Scope) -> frozenset[str]:
    """The methods of the routes at the path that was asked; empty: nothing is there."""
    found = list(_at(scope))
    # `/rollouts/x:hold` fits `/rollouts/{rollout}` too, whose names have no colon.
    verbs = [route for route in found if "}:" in route.path]
    return frozenset(method for route in verbs or found for method in route.methods or ())


def _at(scope: Scope) -> Iterator[Any]:
    for route in scope["app"].state.routes:
        if route.matches(scope)[0] is not Match.NONE and getattr(route, "methods", None):
            yield route
