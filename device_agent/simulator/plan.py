"""What one process simulates: devices, factory images, scripted faults; travels as JSON."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from device_agent.simulator.machine import share

MOST = 1_000  # devices in one process


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a device left the factory with."""

    component: str
    release: str
    bundle: str  # path of the artifact file


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One scripted fault."""

    at: float
    do: str
    lasting: float = 0.0
    devices: str = "*"
    share: float = 1.0
    by: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Script:
        """Raises ValueError that names the field."""
        known = {"at", "do", "for", "devices", "share", "by"}
        for name in data:
            if name not in known:
                raise ValueError(f"faults: {name}: unknown; known: {', '.join(sorted(known))}")
        if data.get("do") not in ("offline", "restart", "clock"):
            raise ValueError('faults: do: "offline", "restart" or "clock" is expected')
        try:
            return cls(
                at=float(data["at"]),
                do=str(data["do"]),
                lasting=float(data.get("for", 0.0)),
                devices=str(data.get("devices", "*")),
                share=float(data.get("share", 1.0)),
                by=float(data.get("by", 0.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"faults: {error!r}: a number is expected") from None

    def meets(self, device: str) -> bool:
        named = fnmatch.fnmatchcase(device, self.devices)
        return named and share("fault", self.at, device) < self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one process simulates; travels as JSON."""

    root: str  # directory that holds one directory a device
    devices: tuple[str, ...]
    seed: str = "1"
    pace: float = 8.0  # hours of driving a second
    history_days: int = 0
    health_interval: float = 1.0
    trial_soak: float = 1.0
    trial_deadline: float = 600.0
    connects_per_second: float = 100.0
    images: tuple[Image, ...] = ()
    faults: tuple[Script, ...] = ()
    careful: float = 0.4

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        body = json.loads(text)
        body["devices"] = tuple(body["devices"])
        body["images"] = tuple(Image(**image) for image in body["images"])
        body["faults"] = tuple(Script(**fault) for fault in body["faults"])
        return cls(**body)


def scripts(data: object) -> tuple[Script, ...]:
    """A faults file's content; raises ValueError."""
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ValueError("faults: a list of objects is expected")
    return tuple(Script.from_json(entry) for entry in data)


def split(devices: Sequence[str], processes: int) -> Iterable[tuple[str, ...]]:
    """The devices of each process; more processes than asked for where `MOST` demands it."""
    count = max(processes, -(-len(devices) // MOST), 1)
    parts = [tuple(devices[i::count]) for i in range(count)]
    return [part for part in parts if part]
