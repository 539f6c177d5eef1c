"""paho-mqtt without what it drags along and a device may never use.

- `urllib.request`, and with it `http.client` and `email`, to ask for the proxies that it would use
  if PySocks were installed: 3 MiB and a third of the start. Without PySocks it never looks there.
- `ssl`, 2 MiB: of a broker without TLS it needs the names of two exceptions. `secure` brings the
  real one before the first connection that needs it.

A module that holds just that stands in for each of them while paho is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def _standing_in() -> Iterator[None]:
    ours: dict[str, ModuleType] = {"ssl": ModuleType("ssl")}
    for name in ("SSLWantReadError", "SSLWantWriteError"):
        setattr(ours["ssl"], name, type(name, (OSError,), {}))
    if importlib.util.find_spec("socks") is None:
        ours["urllib.request"] = ModuleType("urllib.request")
    needless = {name: module for name, module in ours.items() if name not in sys.modules}
    sys.modules.update(needless)
    try:
        yield
    finally:
        for name in needless:
            del sys.modules[name]


with _standing_in():
    from paho.mqtt import client
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

mqtt: Any = client  # typed by whichever release of its stubs is about: none fits all versions


def secure(session: Any) -> None:
    """Speak TLS in this session, with the certificates that the system trusts."""
    import ssl

    mqtt.ssl = ssl
    session.tls_set()


__all__ = ["PacketTypes", "Properties", "mqtt", "secure"]
