"""A sample of small errors, planted one by one into the code that decides: most must be noticed.

Long: each mutant runs the tests that guard its file in a process of its own. `docs/mutation.md`
has the whole search, and the survivors with their reasons.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUARDS = {
    "telemetry/evidence/outcome.py": (
        "past_and_needs",
        "evidence_curves",
        "evidence_promise",
        "gate",
    ),
    "telemetry/evidence/first_events.py": ("past_and_needs", "evidence_curves", "gate"),
    "telemetry/evidence/levels.py": (
        "evidence_curves",
        "evidence_levels",
        "evidence_safe",
        "gate",
    ),
    "telemetry/evidence/curves.py": ("evidence_curves", "evidence_promise", "gate"),
    "telemetry/evidence/fleetwide.py": ("fleetwide",),
    "telemetry/evidence/proofs.py": ("not_back", "gate"),
    "controller/rollout/gate.py": (
        "not_back",
        "gate_limits",
        "past_and_needs",
        "evidence_levels",
        "uneven_arms",
        "gate_words",
        "gate",
    ),
    "controller/rollout/cohort.py": ("cohort",),
    "controller/rollout/controls.py": ("cohort",),
}
SAMPLE = 8  # mutants of each file
NOTICED = 0.6  # share of them at least; some mutants change nothing that matters

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(number of the node in walking order, what can be done to it).

    Not the size of a cache: whatever it is, the answers are the same.
    """
    sizes = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        for part in ast.walk(decorator)
    }
    for n, node in enumerate(ast.walk(tree)):
        if node in sizes:
            continue
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
            yield n, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            yield n, "compare"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield n, "constant"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield n, "unary"


def mutated(source: str, place: int, what: str) -> tuple[str, str]:
    """(the source with one error, where it is)."""
    tree = ast.parse(source)
    node = next(node for n, node in enumerate(ast.walk(tree)) if n == place)
    before = ast.unparse(node)
    if what == "op":
        node.op = _SWAPS[type(node.op)]()  # type: ignore[attr-defined]
    elif what == "compare":
        node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[attr-defined]
    elif what == "constant":
        node.value += 1  # type: ignore[attr-defined]
    else:
        node.op = ast.UAdd()  # type: ignore[attr-defined] # −x becomes x, `not x` becomes x
    return ast.unparse(tree), f"line {getattr(node, 'lineno', 0)}: {before} → {ast.unparse(node)}"


def house(directory: Path) -> Path:
    """A copy of the packages and tests, in which errors are planted."""
    for name in ("controller", "telemetry", "device_agent", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", directory / "pyproject.toml")
    return directory


def passes(directory: Path, guards: tuple[str, ...]) -> bool:
    files = [f"tests/decisions/test_{name}.py" for name in guards]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=600,
        check=False,
    )
    return found.returncode == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", list(GUARDS))
def test_most_of_a_sample_of_errors_is_noticed(file: str, tmp_path: Path) -> None:
    copy = house(tmp_path)
    source = (ROOT / file).read_text(encoding="utf-8")
    assert passes(copy, GUARDS[file]), "the tests fail without any error"
    every = list(places(ast.parse(source)))
    chosen = random.Random(f"mutation {file}").sample(every, min(SAMPLE, len(every)))
    survivors = []
    for place, what in chosen:
        text, where = mutated(source, place, what)
        (copy / file).write_text(text, encoding="utf-8")
        if passes(copy, GUARDS[file]):
            survivors.append(where)
    print("\n".join(f"{file} {where}" for where in survivors))  # noqa: T201 - shown with -s
    assert len(survivors) <= (1 - NOTICED) * len(chosen), survivors


def test_a_mutant_differs_in_one_place() -> None:
    source = "def f(a):\n    return a + 1 if a > 0 else not a\n"
    for place, what in places(ast.parse(source)):
        text, where = mutated(source, place, what)
        assert text != ast.unparse(ast.parse(source))
        assert "→" in where
