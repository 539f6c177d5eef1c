"""Rules of the house that import contracts cannot say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from controller.settings import Settings
from telemetry.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
DECIDES = sorted(
    file
    for pattern in (
        "controller/manifests/*.py",
        "controller/rollout/*.py",
        "device_agent/codec.py",
        "device_agent/protocol.py",
        "device_agent/record.py",
        "device_agent/trust.py",
        "device_agent/update.py",
        "device_agent/work.py",
        "telemetry/evidence/*.py",
        "telemetry/policy.py",
        "telemetry/score.py",
    )
    for file in ROOT.glob(pattern)
)
CLOCKS = {"now", "utcnow", "today"}


@pytest.mark.parametrize("file", DECIDES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_decides_asks_no_clock(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in CLOCKS:
            owner = ast.unparse(node.value)
            assert owner.split(".")[-1] not in {"datetime", "date"}, f"{file}:{node.lineno}"


def test_every_setting_and_metric_is_documented() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    names = [*Settings.model_fields, *(metric.name for metric in METRICS)]
    assert [name for name in names if f"`{name}`" not in text] == []
