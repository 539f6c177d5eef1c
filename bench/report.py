"""What a benchmark answers: rows, and where and when they were measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `ratio` is value ÷ limit; `more` holds the columns that one benchmark adds."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    better: str = "lower"  # lower | higher: which way is better
    peer: str = ""  # what the limit is: a promise, or a program measured in the same run
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self.value / self.limit if self.limit else None

    @property
    def met(self) -> bool | None:
        """Is the limit kept? None where there is none."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.better == "lower" else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        more = data.pop("more")
        return {**data, "ratio": self.ratio, "met": self.met, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line hands to a benchmark; each reads what it knows."""

    seed: int = 1
    runs: int | None = None
    scenario: str | None = None
    method: str | None = None
    real: Path | None = None
    database: str | None = None
    seconds: float | None = None
    devices: int | None = None
    jobs: int = 2


def document(name: str, options: Options, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "v": 1,
        "bench": name,
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "rows": [row.to_json() for row in rows],
    }


def keep(result: Mapping[str, Any]) -> Path:
    """Write a result beside the earlier ones: `<name>-<date>-<commit>.json`."""
    RESULTS.mkdir(exist_ok=True)
    day = str(result["at"])[:10]
    path = RESULTS / f"{result['bench']}-{day}-{str(result['commit'])[:7]}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"
